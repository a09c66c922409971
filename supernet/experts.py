"""Stacked experts: their output projections, what these read, and what the router sends to each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from supernet.activation import SuperNetwork
from supernet.architecture import TensorSpec

FEWEST_TOKENS = 256
"""Tokens that must come to an expert for it to be refitted: of fewer, the error on the quarter that is held out is
mostly luck."""


@dataclass(frozen=True)
class ExpertInputs:
    """What the experts of a layer were given for one batch: states [tokens, hidden], and for each token the experts
    that were chosen and their weights [tokens, experts of each]; with it which tokens are held out [tokens]."""

    states: Tensor
    chosen: Tensor
    weights: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class Experts:
    """The stacked experts of a layer: their module, and the name of their output projections in the network."""

    module: nn.Module
    name: str

    def read(self, states: Tensor, number: int) -> Tensor:
        """What the output projection of an active expert reads, [tokens, neurons], of what the experts read."""
        gate_and_up = nn.functional.linear(states, cast(Tensor, self.module.gate_up_proj)[number])
        gate, up = gate_and_up.chunk(2, dim=-1)
        return cast(nn.Module, self.module.act_fn)(gate) * up

    def coming(self, batch: ExpertInputs, number: int) -> tuple[Tensor, Tensor]:
        """The tokens that come to an active expert, and what its output projection reads of them times the router's
        weight, [tokens, neurons] in float32. The expert's share of the layer's output is a linear function of these."""
        tokens, place = torch.where(batch.chosen == number)
        x = self.read(batch.states[tokens], number) * batch.weights[tokens, place, None]
        return tokens, x.float()

    @property
    def outputs(self) -> Tensor:
        """The output projections of the active experts, [experts, hidden, neurons]."""
        return cast(Tensor, self.module.down_proj)


def stacked_experts(supernet: SuperNetwork) -> dict[int, Experts]:
    """The experts of every layer that has some, by the layer's number."""
    found: dict[int, Experts] = {}
    for spec in supernet.structure.tensors:
        if spec.layer is not None and projects_experts(spec):
            module, _, _ = spec.name.rpartition(".")
            found[spec.layer] = Experts(supernet.model.get_submodule(module), spec.name)
    return found


def projects_experts(spec: TensorSpec) -> bool:
    """Whether a parameter holds the output projections of a layer's experts, [experts, residual channels, neurons]."""
    return spec.role == "experts" and spec.axes[-1].blocks[0][0] == "ffn"
