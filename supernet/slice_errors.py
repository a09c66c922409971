"""How far a half-block's output moves when it is cut, in closed form: no pass of the cut network is needed.

The output projection W of a half-block reads inputs x with second moments H = E[x xᵀ]. A smaller half-block has the
weight W' for the inputs that it keeps, its own part or a repaired one (`supernet.repair`), so its output moves by
(W - W') x, whose mean square is tr((W - W') H (W - W')ᵀ): the objective of SparseGPT (arXiv 2301.00774) and ZipLM
(arXiv 2302.04089). One pass of the whole network serves every size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from supernet.activation import SuperNetwork
from supernet.architecture import Half, LayerSizes
from supernet.hooks import Hooks
from supernet.layer_walk import LayerWalk
from supernet.least_squares import Sums
from supernet.moments import Projection, projections


@torch.no_grad()
def slice_errors(
    supernet: SuperNetwork, cuts: Mapping[tuple[int, Half], Sequence[LayerSizes]], batches: Sequence[Tensor]
) -> dict[tuple[int, Half, LayerSizes], float]:
    """Mean square by which the output of each half-block moves, summed over channels, by (layer, half-block) and the
    sizes that it is cut to; half-blocks that do not end in one linear module are left out.

    `batches` are token ids, [rows, length] each. The full network must be active; one layer's moments are in memory.
    """
    by_half = {key: p for key, p in projections(supernet).items() if key in cuts}
    walk = LayerWalk.of(supernet, batches)
    errors: dict[tuple[int, Half, LayerSizes], float] = {}
    for index in range(max((layer for layer, _ in by_half), default=-1) + 1):
        here = {half: p for (layer, half), p in by_half.items() if layer == index}
        sums: dict[Half, Sums] = {}

        def collect(half: Half, sums: dict[Half, Sums] = sums) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x = inputs[0].flatten(0, -2)
                sums.setdefault(half, Sums(x.shape[1], device=x.device)).add(x)

            return hook

        with Hooks([p.module.register_forward_pre_hook(collect(half)) for half, p in here.items()]):
            walk.step(index)
        for half, projection in here.items():
            moved = _Moved(supernet, projection, sums[half])
            errors |= {(index, half, sizes): moved.by(sizes) for sizes in cuts[index, half]}
    return errors


class _Moved:
    """The mean squares by which one projection's output moves."""

    def __init__(self, supernet: SuperNetwork, projection: Projection, sums: Sums) -> None:
        self._projection, self._full = projection, supernet.base.layers[projection.layer]
        self._variants = supernet.variants
        weight = projection.weight()
        self._weight = weight.float()
        self._second = sums.moments(centred=False)[0].float()
        # Where variants have a bias of their own, that takes the mean.
        own_bias = self._variants is not None and projection.bias_name in self._variants.names
        self._of_variants = sums.moments(centred=True)[0].float() if own_bias else self._second
        mean = sums.x / max(1, sums.tokens)
        # Sums of rows and columns of (WᵀW) ∘ H over what is dropped are the errors of plain slices.
        self._products = (self._weight.T @ self._weight) * self._second
        bias = projection.bias()
        self._removed = float(self._products.sum())
        if bias is not None:
            self._removed += float((2 * (weight @ mean) + bias) @ bias)

    def by(self, sizes: LayerSizes) -> float:
        """Of a half-block of these sizes."""
        if self._projection.half in sizes.skip:
            return self._removed
        kept = self._projection.kept(sizes, self._full).to(self._weight.device)
        variant = None
        if self._variants is not None and self._projection.weight_name in self._variants.names:
            variant = self._variants.tensor(self._projection.weight_name, sizes)
        if variant is None:
            dropped = torch.ones(self._weight.shape[1], dtype=torch.bool, device=kept.device)
            dropped[kept] = False
            return float(self._products[dropped][:, dropped].sum())
        gap = self._weight.clone()
        gap[:, kept] -= (variant.T if self._projection.transposed else variant).to(gap)
        return float(((gap @ self._of_variants) * gap).sum())
