"""Superposition: a mixture of all sizes learned at once, while the network is pressed to become smaller."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from evals.warm_starts import WarmStart
from search.knapsack import Path, Variants, assemble, half_of, options, with_layer
from supernet.activation import SuperNetwork
from supernet.architecture import HALVES, Architecture, Half, LayerSizes, Unit
from supernet.common.errors import RequestError
from supernet.common.progress import bar
from supernet.hooks import Hooks, frozen
from supernet.ordering import output_projections
from supernet.training.data import Batch
from supernet.training.losses import divergence
from supernet.training.traces import trace

UNIT: dict[Half, Unit] = {"attention": "kv", "mlp": "ffn"}
"""What a half-block is made of."""


def superposition(supernet: SuperNetwork, variants: Variants, batches: Sequence[Batch], steps: int = 200) -> Path:
    """Learn a mixture of all sizes of every half-block at once, while the network is pressed to become smaller.

    TangleNAS (arXiv 2312.10440, section 3) superposes the weights of all choices, sum_k alpha_k W[:k]. Where choices
    are prefixes of the units that feed an output projection, that is one mask on those units: unit j is scaled by the
    sum of the alphas of the choices that keep it. So a step costs one pass through the whole network. The alphas learn
    (Adam; the weights do not) to keep the predictions, KL(whole || mixture), at an expected size that falls evenly
    over the steps from the base's to the smallest. Choices are then made not one by one, by the largest alpha
    (DARTS-PT, arXiv 2108.04392, shows how that fails), but together, as the most probable architecture of each size.
    """
    mixture = _Mixture(supernet, variants)
    optimizer = torch.optim.Adam(mixture.alphas, lr=0.05)
    full = supernet.structure.parameters(supernet.base)
    found: dict[Architecture, int] = {}
    with bar("mixing sizes", steps) as progress:
        for step in range(steps):
            batch = batches[step % len(batches)]
            target = full + (mixture.smallest - full) * (step + 1) / steps
            with torch.no_grad():
                whole = trace(supernet.model, batch)
            optimizer.zero_grad()
            with mixture.active():
                kept = divergence(trace(supernet.model, batch), whole)
                # A tenth too large weighs as much as a nat: enough to follow the target, and degradations decide the
                # rest.
                (kept + 100 * ((mixture.expected() - target) / full) ** 2).backward()
            optimizer.step()
            progress.advance()
            if (step + 1) % max(1, steps // 20) == 0:
                path = assemble(supernet.structure, options(supernet.structure, mixture.degradations()))
                parameters, architecture = min(path, key=lambda point: abs(point[0] - target))
                found[architecture] = parameters
    return sorted(((p, a) for a, p in found.items()), key=lambda point: point[0])


class _Mixture:
    """Alphas over the sizes of every half-block, and over keeping or removing a layer where that is a choice."""

    def __init__(self, supernet: SuperNetwork, variants: Variants) -> None:
        self.supernet = supernet
        base, structure = supernet.base, supernet.structure
        self.choices: list[tuple[int, Half | None, list[LayerSizes]]] = []
        for layer, full in enumerate(base.layers):
            mine = [sizes for at, sizes in variants if at == layer and sizes.num_experts in (0, full.num_experts)]
            for half in (*HALVES, None):
                cut = [s for s in mine if (None if s.removed else half_of(s, full)) == half]
                if cut:
                    self.choices.append((layer, half, [full, *cut]))
        if not self.choices:
            raise ValueError("no layer has sizes of its own to choose from")
        self._projections = output_projections(supernet)
        mixed = {(layer, UNIT[one]) for layer, half, _ in self.choices for one in (HALVES if half is None else (half,))}
        if not mixed <= self._projections.keys():
            raise RequestError(
                "--warm-start superposition: no linear layer of this family reads the neurons of stacked experts, or "
                "what a layer of linear attention gives; use blockwise or greedy"
            )
        self.alphas = [torch.zeros(len(sizes), requires_grad=True) for _, _, sizes in self.choices]
        with torch.no_grad():
            for alpha in self.alphas:
                alpha[0] = 2.0 + float(np.log(len(alpha)))  # starts near the whole network
        self._parameters = [
            torch.tensor([structure.parameters(with_layer(base, layer, s)) for s in sizes], dtype=torch.float64)
            for layer, _, sizes in self.choices
        ]
        self._full = structure.parameters(base)
        self.smallest = min(
            parameters for parameters, _ in assemble(structure, options(structure, self.degradations()))
        )

    def degradations(self) -> dict[tuple[int, LayerSizes], float]:
        """How much less probable each cut is than the whole half-block or layer: the difference of log alphas.

        The pressure to become smaller is in the alphas too, and makes cuts that save much look harmless. The same
        amount for every parameter saved is added to all, the least that leaves no degradation negative: among
        architectures of one size, it changes nothing.
        """
        odds = [(alpha[0] - alpha).detach().double() for alpha in self.alphas]
        saved = [self._full - parameters for parameters in self._parameters]
        pressure = max(0.0, *(float((-o[1:] / s[1:]).max()) for o, s in zip(odds, saved, strict=True)))
        found: dict[tuple[int, LayerSizes], float] = {}
        for (layer, _, sizes), o, s in zip(self.choices, odds, saved, strict=True):
            degradation = (o + 1.001 * pressure * s).tolist()
            found |= {(layer, cut): value for cut, value in zip(sizes[1:], degradation[1:], strict=True)}
        return found

    def expected(self) -> Tensor:
        """Parameters of the mixture: what is expected of every choice is saved, within a layer that is kept."""
        kept = {
            layer: alpha.softmax(0)[0]
            for (layer, half, _), alpha in zip(self.choices, self.alphas, strict=True)
            if half is None
        }
        total = torch.tensor(float(self._full), dtype=torch.float64)
        for (layer, half, _), alpha, parameters in zip(self.choices, self.alphas, self._parameters, strict=True):
            saved = (alpha.softmax(0) * (self._full - parameters)).sum()
            total = total - (saved if half is None else saved * kept.get(layer, 1.0))
        return total

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within, the network's half-blocks are mixtures; gradients reach the alphas only."""
        base = self.supernet.base
        masks: dict[tuple[int, Half], list[tuple[list[LayerSizes], Tensor]]] = {}
        for (layer, half, sizes), alpha in zip(self.choices, self.alphas, strict=True):
            for one in HALVES if half is None else (half,):
                masks.setdefault((layer, one), []).append((sizes, alpha))
        hooks = []
        for (layer, half), mixed in masks.items():
            module: nn.Module = self._projections[layer, UNIT[half]].module
            full = _units(base.layers[layer], half)

            def scale(
                _: nn.Module,
                inputs: tuple[Tensor, ...],
                mixed: list[tuple[list[LayerSizes], Tensor]] = mixed,
                half: Half = half,
                full: int = full,
            ) -> tuple[Tensor, ...]:
                mask = torch.ones(full, device=inputs[0].device)
                for sizes, alpha in mixed:
                    kept = torch.tensor([_units(s, half) for s in sizes])[:, None] > torch.arange(full)
                    mask = mask * (alpha.softmax(0)[:, None] * kept).sum(0).to(mask)
                return (inputs[0] * mask.repeat_interleave(inputs[0].shape[-1] // full).to(inputs[0]), *inputs[1:])

            hooks.append(module.register_forward_pre_hook(scale))
        with Hooks(hooks), frozen(self.supernet.model):
            yield


def _units(sizes: LayerSizes, half: Half) -> int:
    return sizes.num_key_value_heads if half == "attention" else sizes.intermediate_size


WARM_STARTS = (WarmStart("superposition", superposition),)
