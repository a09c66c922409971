"""What fills the sizes asked for: sub-networks that were found good, grown to what the targets leave room for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compressor.job import Job
from compressor.sizing import picks_bits, sizes_asked_for
from compressor.stages.subnet_scores import FIRST_BLOCKS, held_out_losses
from search.filling import filled
from search.objectives import Constraint, Evaluation
from search.pareto import not_told_from_best
from supernet.architecture import Architecture

SHARE = 0.1
"""Of a search's evaluations, so many measure what fills the sizes asked for."""


def reserved(job: Job, constraints: Sequence[Constraint], evaluations: int) -> int:
    """How many of a search's evaluations are kept for what fills. None where no size is to be filled: where the
    smallest network within a drop of quality is wanted, or bits are chosen with the size."""
    sizes = any(c.objective.name in ("parameters", "bytes") and c.maximum is not None for c in constraints)
    if not sizes or job.recipe.targets.max_drop is not None or job.space.bits or picks_bits(job):
        return 0
    return round(SHARE * evaluations)


def fillings(
    job: Job, evaluations: Sequence[Evaluation], constraints: Sequence[Constraint], most: int
) -> list[Architecture]:
    """Up to `most` architectures that were not measured yet: for every size asked for, those grown from what the tasks
    do not tell from the best within it, of the lowest held-out losses. None where everything good fills its size."""
    chosen: dict[Architecture, None] = {}
    sizes: Sequence[int | None] = sizes_asked_for(job) or [None]
    for number, size in enumerate(sizes):

        def allowed(architecture: Architecture, size: int | None = size) -> bool:
            if size is not None and job.structure.parameters(architecture) > size:
                return False
            values = ((c, c.objective.compute) for c in constraints)
            return all(f is None or not c.violation(np.array([f(architecture)])).any() for c, f in values)

        good = not_told_from_best([e for e in evaluations if e.full and allowed(e.architecture)])
        known = {e.architecture for e in evaluations} | set(chosen)
        grown = list(dict.fromkeys(filled(job.space, e.architecture, allowed) for e in good))
        grown = [architecture for architecture in grown if architecture not in known]
        losses = held_out_losses(job, grown, FIRST_BLOCKS) if grown else []
        ranked = [grown[i] for i in np.argsort(losses, kind="stable")]
        chosen |= dict.fromkeys(ranked[: (most - len(chosen)) // (len(sizes) - number)])
    return list(chosen)
