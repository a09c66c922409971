"""Repair of stacked experts: the output projection of each is refitted in turn to what all of them still lack.

A layer of experts puts out Σ sₑ Wₑ xₑ over the experts that its router chose, with weights s. Where neurons of experts
or whole experts are cut, its gap to the output that is wanted is known for every token. One expert after the other is
fitted to its own output and the gap, on the tokens that come to it; the gap is then what is left. So each step is the
least squares of `supernet.moments.refit` in the inputs sₑ xₑ, and no step makes the fitted gap larger (coordinate
descent over experts; all of them at once would need moments of all inputs together).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from supernet.activation import SuperNetwork
from supernet.importance import projects_experts
from supernet.moments import Sums, refit

FEWEST_TOKENS = 256
"""Tokens that must come to an expert: of fewer, the error on the quarter that is held out is mostly luck."""


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

    @property
    def outputs(self) -> Tensor:
        """The output projections of the active experts, [experts, hidden, neurons]."""
        return cast(Tensor, self.module.down_proj)


@dataclass(frozen=True)
class Routed:
    """What the experts of a layer were given for one batch: states [tokens, hidden], and for each token the experts
    that were chosen and their weights [tokens, experts of each]; with it which tokens are held out [tokens]."""

    states: Tensor
    chosen: Tensor
    weights: Tensor
    held_out: Tensor


def stacked_experts(supernet: SuperNetwork) -> dict[int, Experts]:
    """The experts of every layer that has some, by the layer's number."""
    found: dict[int, Experts] = {}
    for spec in supernet.structure.tensors:
        if spec.layer is not None and projects_experts(spec):
            module, _, _ = spec.name.rpartition(".")
            found[spec.layer] = Experts(supernet.model.get_submodule(module), spec.name)
    return found


@torch.no_grad()
def refit_experts(experts: Experts, batches: Sequence[Routed], gaps: Sequence[Tensor]) -> Tensor | None:
    """The output projections [experts, hidden, neurons] of the active experts, refitted so that less is missing of
    `gaps` [tokens, hidden], one for each batch; None where that is so of none. An expert to which fewer than
    `FEWEST_TOKENS` come, or whose error on held-out tokens no ridge makes less, stays as it is."""
    missing = [gap.to(torch.float32, copy=True) for gap in gaps]
    refitted = experts.outputs.clone()
    changed = False
    for number in range(len(refitted)):
        weight = experts.outputs[number].double()
        outs, ins = weight.shape
        training, held_out = Sums(ins, outs, weight.device), Sums(ins, outs, weight.device)
        coming: list[tuple[Tensor, Tensor]] = []  # tokens that come to this expert, and what it reads of them
        for batch, gap in zip(batches, missing, strict=True):
            tokens, place = torch.where(batch.chosen == number)
            x = (experts.read(batch.states[tokens], number) * batch.weights[tokens, place, None]).float()
            target = x @ weight.float().T + gap[tokens]
            held = batch.held_out[tokens]
            training.add(x[~held], target[~held])
            held_out.add(x[held], target[held])
            coming.append((tokens, x))
        if training.tokens + held_out.tokens < FEWEST_TOKENS or not (training.tokens and held_out.tokens):
            continue
        fitted, ridge = refit(weight, training, held_out, centred=False)
        if math.isinf(ridge):
            continue
        for (tokens, x), gap in zip(coming, missing, strict=True):
            gap[tokens] -= x @ (fitted - weight).float().T
        refitted[number], changed = fitted.to(refitted), True
    return refitted if changed else None
