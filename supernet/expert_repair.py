"""Repair of stacked experts: the output projection of each is refitted in turn to what all of them still lack.

A layer of experts puts out Σ sₑ Wₑ xₑ over the experts that its router chose, with weights s. Where neurons of experts
or whole experts are cut, its gap to the output that is wanted is known for every token. One expert after the other is
fitted to its own output and the gap, on the tokens that come to it; the gap is then what is left. So each step is the
least squares of `supernet.least_squares.refit` in the inputs sₑ xₑ, and no step makes the fitted gap larger (coordinate
descent over experts; all of them at once would need moments of all inputs together).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from supernet.experts import FEWEST_TOKENS, ExpertInputs, Experts
from supernet.least_squares import Sums, refit
from supernet.moments import check_finite


@torch.no_grad()
def refit_experts(experts: Experts, batches: Sequence[ExpertInputs], gaps: Sequence[Tensor]) -> Tensor | None:
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
            tokens, x = experts.coming(batch, number)
            target = x @ weight.float().T + gap[tokens]
            held = batch.held_out[tokens]
            training.add(x[~held], target[~held])
            held_out.add(x[held], target[held])
            coming.append((tokens, x))
        if training.tokens + held_out.tokens < FEWEST_TOKENS or not (training.tokens and held_out.tokens):
            continue
        sums = training.xx, training.xt, held_out.xx, held_out.xt
        check_finite(f"{experts.name} of expert {number}", *sums)
        fitted, ridge = refit(weight, training, held_out, centred=False)
        if math.isinf(ridge):
            continue
        for (tokens, x), gap in zip(coming, missing, strict=True):
            gap[tokens] -= x @ (fitted - weight).float().T
        refitted[number], changed = fitted.to(refitted), True
    return refitted if changed else None
