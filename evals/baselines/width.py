"""Uniform width: every layer keeps the same share of neurons and head groups, those of the highest importance.

- `magnitude`: the L2 norm of a group's weights, as in Li et al., Pruning Filters for Efficient ConvNets,
  arXiv 1608.08710.
- `wanda`: |W| times the norm of the input, summed over a unit's outgoing weights. Sun et al., arXiv 2306.11695, eq. 1.
- `taylor`: first-order loss change of a coupled group. Ma et al., LLM-Pruner, arXiv 2305.11627.
"""

from __future__ import annotations

from functools import partial

from evals.baselines import Baseline, Cut, PruningContext, ordered_cut, uniform_width
from supernet.importance import IMPORTANCES


def cut(criterion: str, context: PruningContext) -> Cut:
    """The base at a uniform width, cut by one of `supernet.importance.IMPORTANCES`."""
    scores = IMPORTANCES[criterion](context.supernet(), context.calibration)
    return ordered_cut(context, scores, uniform_width(context))


BASELINES = (
    Baseline("magnitude", "the group's L2 norm, as in Li et al., arXiv 1608.08710", partial(cut, "magnitude"), True),
    Baseline("wanda", "Sun et al., arXiv 2306.11695", partial(cut, "wanda"), True),
    Baseline("taylor", "Ma et al. (LLM-Pruner), arXiv 2305.11627", partial(cut, "taylor"), True),
)
