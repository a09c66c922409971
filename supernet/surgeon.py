"""An order of units that knows of the repair: what costs least to say with the others is removed next.

With A = H + λI, the second moments of what an output projection W reads, and what stays refitted by least squares
(`supernet.repair`), removing the inputs S of one unit raises the mean square error of the output by

    tr(W_S ((A⁻¹)_SS)⁻¹ W_Sᵀ),

and leaves the weight W - W_S ((A⁻¹)_SS)⁻¹ (A⁻¹)_S: and the inverse A⁻¹ - (A⁻¹)_:S ((A⁻¹)_SS)⁻¹ (A⁻¹)_S: (optimal brain
surgery for groups: Kurtić et al., ZipLM, arXiv 2302.04089, eq. 2 and 4; Ling et al., SlimGPT, arXiv 2412.18110, removes
several at a time as is done here). Of two neurons that say the same, Wanda keeps both or neither; this keeps one.
"""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from supernet.least_squares import factorised
from supernet.moments import Moments, Projection

STEPS = 128
"""Units are removed in so many steps at most, several at once where there are more."""
RIDGE = 1e-2
"""The ridge, as a share of the mean diagonal, where moments could not judge one."""


def removal_errors(projection: Projection, moments: Moments, units: int) -> Tensor:
    """The error at which each of a projection's units goes, when one after another is removed and the others are
    refitted, summed up to it: [units], float64, least for the one that goes first. A unit is as many inputs, one behind
    the other, as there are inputs by `units`."""
    second = moments.to(projection.device).of(projection.bias() is not None)
    ridge = moments.ridge if isfinite(moments.ridge) else RIDGE
    inverse = torch.cholesky_inverse(factorised(second, ridge))
    return removed_in_turn(projection.weight(), inverse, units)


def removed_in_turn(weight: Tensor, inverse: Tensor, units: int, steps: int = STEPS) -> Tensor:
    """The same of a weight [outputs, inputs] and the inverse of the moments [inputs, inputs]."""
    weight, inverse = weight.clone(), inverse.clone()
    width, device = len(inverse) // units, inverse.device
    at_once = max(1, units // steps)
    within = torch.arange(width, device=device)
    left = torch.arange(units, device=device)
    errors = torch.empty(units, dtype=torch.float64, device=device)
    gone = torch.zeros((), dtype=torch.float64, device=device)
    while len(left):
        # 1. What each unit that is left costs. Blocks on the diagonal: [units, width, width].
        blocks = inverse.view(units, width, units, width)[left, :, left]
        own = weight.view(-1, units, width)[:, left].permute(1, 2, 0)  # [units, width, outputs]
        costs = (own * solved(blocks, own)).sum((1, 2))
        # 2. The cheapest go, the cheaper of them first. (A GPU is not waited for anywhere here.)
        order = costs.argsort(stable=True)
        chosen = left[order[:at_once]]
        errors[chosen] = gone + costs[order[:at_once]].cumsum(0)
        removed = (chosen[:, None] * width + within).flatten()
        # 3. The others take over their outputs. Rows and columns of what is gone become zero, and are not read again.
        taken = solved(inverse[removed][:, removed], torch.cat([inverse[removed], weight[:, removed].T], 1))
        shift, outputs = taken[:, : len(inverse)], taken[:, len(inverse) :]
        gone = gone + (weight[:, removed] * outputs.T).sum()
        weight -= weight[:, removed] @ shift
        inverse -= inverse[:, removed] @ shift
        left = left[order[at_once:]].sort().values
    return errors.cpu()


def solved(matrices: Tensor, right: Tensor) -> Tensor:
    """X of M X = R, for positive definite M [..., n, n] and R [..., n, k].

    Not by `torch.linalg.solve`: with several threads, torch 2.13 with MKL raises for a stack of matrices of 192 rows on
    some processors, and on a GPU a stack of a thousand single numbers is slow.
    """
    if matrices.shape[-1] == 1:
        return right / matrices
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrices))
