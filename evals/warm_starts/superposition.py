"""Superposition: learn a mixture of all sizes at once, under pressure to become smaller.

TangleNAS (arXiv 2312.10440, section 3) superposes the weights of all choices, sum_k alpha_k W[:k]. Where choices are
prefixes of the units that feed an output projection, that is one mask on those units: unit j is scaled by the sum of
the alphas of the choices that keep it. So a step costs one pass through the whole network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from evals.warm_starts import Proposals, WarmStart
from search.layer_options import Variants, assemble, half_of, options, with_layer
from supernet.activation import SuperNetwork
from supernet.architecture import HALVES, Architecture, Half, LayerSizes, Unit
from supernet.common.errors import RequestError
from supernet.common.progress import bar
from supernet.hooks import Hooks, frozen
from supernet.ordering import output_projections
from supernet.training.data import Batch
from supernet.training.losses import divergence
from supernet.training.traces import trace

STEPS = 200
"""Steps in which the mixture is trained."""
PASSES = 2.0
"""Passes over all of the text that a step costs: over one batch of two, the whole network's, the mixture's and back."""
UNIT: dict[Half, Unit] = {"attention": "kv", "mlp": "ffn"}
"""What a half-block is made of."""


def superposition(
    supernet: SuperNetwork, variants: Variants, batches: Sequence[Batch], steps: int = STEPS
) -> Proposals:
    """The most probable architecture of each of 20 sizes, by a mixture over the sizes of every half-block.

    The alphas are trained (Adam; the weights are not) to keep the predictions, KL(whole || mixture), at an expected
    size that falls evenly over the steps from the base's to the smallest. Choices are then made not one by one, by the
    largest alpha (DARTS-PT, arXiv 2108.04392, shows how that fails), but together, for each size.
    """
    mixture = Mixture(supernet, variants, "superposition")
    alphas = [start.requires_grad_() for start in mixture.whole()]
    smallest = mixture.smallest(alphas)
    optimizer = torch.optim.Adam(alphas, lr=0.05)
    full = supernet.structure.parameters(supernet.base)
    proposed: dict[Architecture, int] = {}
    with bar("mixing sizes", steps) as progress:
        for step in range(steps):
            batch = batches[step % len(batches)]
            target = full + (smallest - full) * (step + 1) / steps
            shares = [alpha.softmax(0) for alpha in alphas]
            with torch.no_grad():
                whole = trace(supernet.model, batch)
            optimizer.zero_grad()
            with frozen(supernet.model), mixture.active(shares):
                kept = divergence(trace(supernet.model, batch), whole)
                # A tenth too large costs as much as a nat: enough to follow the target.
                (kept + 100 * ((mixture.expected(shares) - target) / full) ** 2).backward()
            optimizer.step()
            progress.advance()
            if (step + 1) % max(1, steps // 20) == 0:
                parameters, architecture = mixture.most_probable(alphas, target)
                proposed[architecture] = parameters
    return Proposals(sorted(((p, a) for a, p in proposed.items()), key=lambda point: point[0]))


class Mixture:
    """A mixture over the sizes of every half-block, and over keeping or removing a layer where that is a choice.

    `choices`: layer, half-block (None: the whole layer), and the sizes, the base's first. What its methods are given
    has a tensor for each choice: `shares` of its sizes, or the `logits` of such shares. Raises ValueError where nothing
    is to be chosen, and `RequestError`, in the name of a `method`, for a family whose units it cannot scale.
    """

    def __init__(self, supernet: SuperNetwork, variants: Variants, method: str) -> None:
        self.supernet = supernet
        base, structure = supernet.base, supernet.structure
        self.choices: list[tuple[int, Half | None, list[LayerSizes]]] = []
        for layer, full in enumerate(base.layers):
            of_layer = [sizes for at, sizes in variants if at == layer and sizes.num_experts in (0, full.num_experts)]
            for half in (*HALVES, None):
                cut = [s for s in of_layer if (None if s.removed else half_of(s, full)) == half]
                if cut:
                    self.choices.append((layer, half, [full, *cut]))
        if not self.choices:
            raise ValueError("no layer has sizes to choose from")
        self._projections = output_projections(supernet)
        mixed = {(layer, UNIT[half]) for layer, choice, _ in self.choices for half in _halves(choice)}
        if not mixed <= self._projections.keys():
            raise RequestError(
                f"--warm-start {method}: no linear layer of this family reads the neurons of stacked experts, or "
                "the output of a layer of linear attention; use blockwise or greedy"
            )
        self._parameters = [
            torch.tensor([structure.parameters(with_layer(base, layer, s)) for s in sizes], dtype=torch.float64)
            for layer, _, sizes in self.choices
        ]
        self._full = structure.parameters(base)

    def whole(self) -> list[Tensor]:
        """Logits near the whole network: its sizes are seven times as probable as all others together."""
        logits = [torch.zeros(len(sizes)) for _, _, sizes in self.choices]
        for of_choice in logits:
            of_choice[0] = 2.0 + float(np.log(len(of_choice)))
        return logits

    def smallest(self, logits: Sequence[Tensor]) -> int:
        """Parameters of the smallest architecture that can be made of the choices."""
        structure = self.supernet.structure
        return min(parameters for parameters, _ in assemble(structure, options(structure, self.degradations(logits))))

    def most_probable(self, logits: Sequence[Tensor], parameters: float) -> tuple[int, Architecture]:
        """The most probable architecture of about so many parameters, after how many it has. All choices are made
        together."""
        structure = self.supernet.structure
        path = assemble(structure, options(structure, self.degradations(logits)))
        return min(path, key=lambda point: abs(point[0] - parameters))

    def degradations(self, logits: Sequence[Tensor]) -> dict[tuple[int, LayerSizes], float]:
        """How much less probable each cut is than the whole half-block or layer: the difference of their logits.

        The pressure to become smaller is in them too, and lowers the degradation of cuts that save much. So the
        same amount for every parameter saved is added to all, the least that leaves no degradation negative: among
        architectures of one size, it changes nothing.
        """
        odds = [(of_choice[0] - of_choice).detach().double() for of_choice in logits]
        saved = [self._full - parameters for parameters in self._parameters]
        pressure = max(0.0, *(float((-o[1:] / s[1:]).max()) for o, s in zip(odds, saved, strict=True)))
        degradations: dict[tuple[int, LayerSizes], float] = {}
        for (layer, _, sizes), o, s in zip(self.choices, odds, saved, strict=True):
            values = (o + 1.001 * pressure * s).tolist()
            degradations |= {(layer, cut): value for cut, value in zip(sizes[1:], values[1:], strict=True)}
        return degradations

    def expected(self, shares: Sequence[Tensor]) -> Tensor:
        """Expected parameters of the mixture: the base's less what every choice is expected to save, weighted by the
        probability that its layer is kept."""
        kept = {
            layer: of_choice[0]
            for (layer, half, _), of_choice in zip(self.choices, shares, strict=True)
            if half is None
        }
        total = torch.tensor(float(self._full), dtype=torch.float64)
        for (layer, half, _), of_choice, parameters in zip(self.choices, shares, self._parameters, strict=True):
            saved = (of_choice * (self._full - parameters)).sum()
            total = total - (saved if half is None else saved * kept.get(layer, 1.0))
        return total

    @contextmanager
    def active(self, shares: Sequence[Tensor]) -> Iterator[None]:
        """Within, the network's half-blocks are mixtures of these shares."""
        # 1. The choices that decide on the units of each half-block.
        base = self.supernet.base
        choices_of: dict[tuple[int, Half], list[tuple[list[LayerSizes], Tensor]]] = {}
        for (layer, choice, sizes), of_choice in zip(self.choices, shares, strict=True):
            for half in _halves(choice):
                choices_of.setdefault((layer, half), []).append((sizes, of_choice))
        # 2. Scale the units before each output projection.
        hooks = []
        for (layer, half), mixed in choices_of.items():
            module: nn.Module = self._projections[layer, UNIT[half]].module
            full = _units(base.layers[layer], half)

            def scale(
                _: nn.Module,
                inputs: tuple[Tensor, ...],
                mixed: list[tuple[list[LayerSizes], Tensor]] = mixed,
                half: Half = half,
                full: int = full,
            ) -> tuple[Tensor, ...]:
                """The inputs, unit j scaled by the probability that it is kept."""
                mask = torch.ones(full, device=inputs[0].device)
                for sizes, of_choice in mixed:
                    kept = torch.tensor([_units(s, half) for s in sizes])[:, None] > torch.arange(full)
                    mask = mask * (of_choice[:, None] * kept).sum(0).to(mask)
                return (inputs[0] * mask.repeat_interleave(inputs[0].shape[-1] // full).to(inputs[0]), *inputs[1:])

            hooks.append(module.register_forward_pre_hook(scale))
        with Hooks(hooks):
            yield


def _halves(choice: Half | None) -> tuple[Half, ...]:
    """The half-blocks that a choice sizes; None stands for the whole layer."""
    return HALVES if choice is None else (choice,)


def _units(sizes: LayerSizes, half: Half) -> int:
    return sizes.num_key_value_heads if half == "attention" else sizes.intermediate_size


WARM_STARTS = (WarmStart("superposition", superposition, lambda layers: PASSES * STEPS),)
