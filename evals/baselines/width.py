"""Uniform width: every layer keeps the same share of neurons and head groups, chosen by one criterion of importance."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from evals.baselines import Baseline, Cut, PruningContext, ordered_cut, uniform_width
from supernet.importance import IMPORTANCES


def cut(context: PruningContext, criterion: str) -> Cut:
    scores = IMPORTANCES[criterion](context.supernet(), context.calibration)
    return ordered_cut(context, scores, uniform_width(context))


def by(criterion: str) -> Callable[[PruningContext], Cut]:
    return partial(cut, criterion=criterion)


BASELINES = (
    Baseline("magnitude", "the group's L2 norm, as in Li et al., arXiv 1608.08710", by("magnitude")),
    Baseline("wanda", "Sun et al., arXiv 2306.11695", by("wanda")),
    Baseline("taylor", "Ma et al. (LLM-Pruner), arXiv 2305.11627", by("taylor")),
)
