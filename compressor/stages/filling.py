"""What fills the sizes asked for: sub-networks that were found good, grown to what the targets leave room for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from compressor.job import Job
from compressor.sizing import picks_bits, sizes_asked_for
from export.layouts.table import copies_hold
from search.filling import filled
from search.objectives import Constraint, Evaluation
from search.pareto import not_told_from_best
from supernet.architecture import Architecture
from supernet.slicing import fits_plain_class

SHARE = 0.1
"""Of a search's evaluations, at most so many measure what fills the sizes asked for."""


def reserved(job: Job, constraints: Sequence[Constraint], evaluations: int) -> int:
    """How many of a search's evaluations are kept for what fills. None where no size is to be filled: where the
    smallest network within a drop of quality is wanted, or bits are chosen with the size."""
    sizes = any(c.objective.name in ("parameters", "bytes") and c.maximum is not None for c in constraints)
    if not sizes or job.recipe.targets.max_drop is not None or job.space.bits or picks_bits(job):
        return 0
    return round(SHARE * evaluations)


def fillings(
    job: Job,
    evaluations: Sequence[Evaluation],
    constraints: Sequence[Constraint],
    most: int,
    losses: Callable[[list[Architecture]], list[float]],
) -> list[Architecture]:
    """Up to `most` architectures that were not measured yet: for every size asked for, those that grew from what the
    tasks do not tell from the best within it and whose `losses` are below those of all that it could pick so far, the
    lowest first. None where what is best fills its size: then the search goes on as before."""
    chosen: dict[Architecture, None] = {}
    sizes: list[int | None] = [*sizes_asked_for(job)] or [None]
    for number, size in enumerate(sizes):
        good, grown = grown_to(job, evaluations, constraints, size)
        grown = [architecture for architecture in grown if architecture not in chosen]
        if not grown:
            continue
        numbers = losses([*good, *grown])
        least = min(numbers[: len(good)], default=math.inf)
        better = [i for i in np.argsort(numbers, kind="stable") if i >= len(good) and numbers[i] < least]
        share = -(-(most - len(chosen)) // (len(sizes) - number))  # rounded up: the first sizes may have one more
        chosen |= dict.fromkeys([grown[i - len(good)] for i in better][:share])
    return list(chosen)


def grown_to(
    job: Job, evaluations: Sequence[Evaluation], constraints: Sequence[Constraint], size: int | None
) -> tuple[list[Architecture], list[Architecture]]:
    """What the tasks do not tell from the best within a size and can be picked, and what that grows to, as far as the
    targets and the layout that is asked for leave room; of the second, what was not measured yet."""
    config, formats = job.checkpoint.config, job.recipe.formats
    uniform = set(formats) == {"uniform"}
    # What is below the least number of parameters may grow to it.
    upper = [c if c.objective.name != "parameters" else replace(c, minimum=None) for c in constraints if not_least(c)]

    def allowed(architecture: Architecture) -> bool:
        small = size is None or job.structure.parameters(architecture) <= size
        holds = not uniform or (fits_plain_class(config, architecture) and copies_hold(architecture, config, formats))
        return small and holds and all(constraint.allows(architecture) for constraint in upper)

    good = [e.architecture for e in not_told_from_best([e for e in evaluations if e.full and allowed(e.architecture)])]
    known = {e.architecture for e in evaluations}
    grown = dict.fromkeys(filled(job.space, architecture, allowed) for architecture in good)

    def pickable(architectures: Iterable[Architecture]) -> list[Architecture]:
        return [a for a in architectures if all(constraint.allows(a) for constraint in constraints)]

    return pickable(good), pickable(a for a in grown if a not in known)


def not_least(constraint: Constraint) -> bool:
    """Whether a constraint says more than the least number of parameters."""
    return constraint.objective.name != "parameters" or constraint.maximum is not None
