"""Rounding that makes up for itself, on calibration text and without training: GPTQ (Frantar et al., arXiv 2210.17323).

Inputs of a linear layer are rounded one after the other. What the rounding of one takes from the layer's output is
given back by those that are not rounded yet, as well as least squares can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from export.quantization.round_to_nearest import Rounded, scale_dtype, values_of
from export.quantization.schemes import LinearLayers, SchemePlan, form_of
from supernet.common.errors import RequestError
from supernet.hooks import Hooks
from supernet.layer_walk import LayerWalk
from supernet.least_squares import WIDE, Sums
from supernet.uneven import family_of_standalone

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DAMPING = 0.01
"""Added to the diagonal of the second moments, as a share of its mean; the paper's."""
SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Scales to choose from, as shares of the one at which no weight is clipped."""
ROWS = 8
"""Sequences of calibration text that are computed at a time."""


def gptq(weight: Tensor, second: Tensor, bits: int, group_size: int, stored: torch.dtype = torch.bfloat16) -> Rounded:
    """Codes and scales of a linear layer's weight [out, in] in fewer than 8 bits, `group_size` inputs to a scale.

    `second` are the second moments E[x xᵀ] [in, in] of its inputs; an input that is always zero is rounded to nearest.
    `stored` is the dtype of scales.
    """
    # 1. How the inputs behind each one make up for it.
    makes_up, means = compensation(second), second.diagonal().float()
    # 2. Group by group: a scale for what is there by now, then input by input.
    left = weight.detach().float().clone()
    codes, scales = torch.empty_like(left, dtype=torch.int8), []
    lowest = -(2 ** (bits - 1))
    for start in range(0, left.shape[1], group_size):
        here = slice(start, start + group_size)
        group, own = left[:, here], makes_up[here, here]
        scale = best_scale(group, means[here], lowest, stored)
        scales.append(scale)
        step = scale.float()
        divisor, errors = torch.where(step == 0, 1.0, step), torch.empty_like(group)
        for i in range(group.shape[1]):
            code = (group[:, i] / divisor).round_().clamp_(lowest, -lowest - 1)
            codes[:, start + i] = code.to(torch.int8)
            errors[:, i] = (group[:, i] - code * step) / own[i, i]
            group[:, i + 1 :].addr_(errors[:, i], own[i, i + 1 :], alpha=-1)
        # 3. What the groups behind give back for this one.
        behind = slice(start + group_size, None)
        left[:, behind] -= errors @ makes_up[here, behind]
    return codes, torch.stack(scales, 1)


def compensation(second: Tensor) -> Tensor:
    """U [in, in], upper triangular, of the inverse Uᵀ U of second moments [in, in]: where the rounding of input i moves
    its weight by e, those behind it make up for it best by moving by e U[i, j] / U[i, i] (the paper's eq. 2 and 3)."""
    # Half the memory, and precise enough with this damping, where inputs are many.
    damped = second.to(torch.float64 if len(second) <= WIDE else torch.float32, copy=True)
    diagonal = damped.diagonal()
    diagonal.add_(DAMPING * diagonal.mean() + (diagonal == 0))
    factor = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=True).float()


def best_scale(group: Tensor, means: Tensor, lowest: int, dtype: torch.dtype) -> Tensor:
    """The scale [out], as it is stored, at which a group [out, inputs] rounded to nearest errs least; errors are
    weighed by the inputs' mean squares."""
    low, high = group.aminmax(dim=1)
    # Codes reach one step further below zero than above: the scale's sign puts the largest weight on that side.
    largest = torch.where(-low > high, low, high) / lowest
    best, least = torch.zeros_like(largest, dtype=dtype), torch.full_like(largest, torch.inf)
    for share in SHRUNK:
        scale = (largest * share).to(dtype)
        step = scale.float()[:, None]
        codes = (group / torch.where(step == 0, 1.0, step)).round_().clamp_(lowest, -lowest - 1)
        error = (codes * step - group).square_() @ means
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


class _Inputs:
    """Sums over what linear layers read. Those that read one and the same tensor, as q, k and v do, share theirs."""

    def __init__(self) -> None:
        self.sums: dict[str, Sums] = {}
        self.first: dict[str, str] = {}
        """By layer, the first that reads the same: whose sums they are."""
        self._last: tuple[Tensor, str] | None = None

    def by(self, name: str) -> Callable[..., None]:
        """The hook that adds what a layer reads."""

        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self._last is None or self._last[0] is not inputs[0]:
                self._last = inputs[0], name
                x = inputs[0].flatten(0, -2)
                self.sums.setdefault(name, Sums(x.shape[1], device=x.device)).add(x)
            self.first[name] = self._last[1]

        return add


@torch.no_grad()
def round_in_sequence(
    network: PreTrainedModel,
    plan: SchemePlan,
    linear: LinearLayers,
    ids: Tensor,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Rounded]:
    """Round the linear layers inside blocks that a plan gives fewer than 8 bits, the first block first, each by what
    it reads once the blocks before it are rounded; returns codes and scales by module name.

    `ids` are calibration text, [sequences, length]. The network holds the rounded values then. `progress` is told
    blocks done and blocks in all. Needs memory for the network, two sets of hidden states, and in float64 the second
    moments of one block's inputs and five times the largest of them.

    Raises `RequestError` where inputs are not finite.
    """
    layers = family_of_standalone(network.config).layers
    walk = LayerWalk(network, layers, ids.to(network.device).split(ROWS))
    formats = {name: plan.format_of(name, shape) for name, shape in linear.widths.items()}
    stored, found = scale_dtype(form_of(plan.scheme)), dict[str, Rounded]()
    blocks = len(cast(nn.ModuleList, network.get_submodule(layers)))
    for index in range(blocks):
        here = [n for n, (bits, _) in formats.items() if n.startswith(f"{layers}.{index}.") and bits < 8]
        modules, read = {name: network.get_submodule(name) for name in here}, _Inputs()
        # The moments of all of a block's layers come from one pass, before any of them is rounded: to pass again after
        # each gains nothing that can be measured (docs/results.md, "Quantization").
        with Hooks([module.register_forward_pre_hook(read.by(name)) for name, module in modules.items()]):
            if modules:
                walk.outputs(index)
        # Layers of the same inputs and format are rounded as one. One that no token reaches is rounded to nearest.
        together: dict[tuple[str, tuple[int, int]], list[str]] = {}
        for name, first in read.first.items():
            together.setdefault((first, formats[name]), []).append(name)
        for (first, format_), names in together.items():
            second = read.sums[first].moments(centred=False)[0]
            if not second.isfinite().all():
                raise RequestError(f"{first}: what it reads of the calibration text is not finite; nothing is rounded")
            weights = [cast(Tensor, modules[name].weight) for name in names]
            rows = [len(weight) for weight in weights]
            codes, scales = gptq(torch.cat(weights), second, *format_, stored)
            for name, weight, *rounded in zip(names, weights, codes.split(rows), scales.split(rows), strict=True):
                found[name] = rounded[0].cpu(), rounded[1].cpu()
                weight.copy_(values_of(found[name]))
        if index + 1 < blocks:
            walk.step(index)
        progress(index + 1, blocks)
    return found
