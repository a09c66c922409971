"""What a search is for: its objectives, and the targets as constraints."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from compressor.job import Job
from compressor.sizing import byte_limit, sizes_asked_for, smallest_storage, smallest_to_search
from compressor.stages.layer_timings import untouched_decode_tps
from compressor.stages.score_keys import measurable
from search.objectives import SPEEDS, Constraint, Objective, choose, computed
from supernet.architecture import Architecture
from supernet.common.errors import RequestError


def goals(job: Job, predict: Callable[[Architecture], dict[str, float]]) -> tuple[list[Objective], list[Constraint]]:
    """What is searched for, and the targets as hard constraints that steer the search.

    `predict` gives an architecture's speed (`SpeedTable.predict`). Raises `RequestError` for an objective that nobody
    can measure.
    """

    def speed_of(name: str) -> Callable[[Architecture], float]:
        return lambda architecture: predict(architecture)[name]

    exact = computed(job.structure, scheme=smallest_storage(job), speed={name: speed_of(name) for name in SPEEDS})
    measured = measurable(job)
    try:
        objectives = choose(job.recipe.searching.objectives, exact, measured)
    except ValueError as error:
        raise RequestError(f"searching.objectives: {error}") from error
    targets = job.recipe.targets
    constraints = []
    sizes = sizes_asked_for(job)
    if sizes:
        constraints.append(Constraint(exact["parameters"], maximum=max(sizes), minimum=smallest_to_search(job)))
    if byte_limit(job) is not None:
        constraints.append(Constraint(exact["bytes"], maximum=byte_limit(job)))
    if targets.min_speedup is not None:
        base = untouched_decode_tps(job, predict)
        constraints.append(Constraint(exact["decode_tps"], minimum=targets.min_speedup * base))
    if targets.max_drop is not None:
        constraints.append(Constraint(Objective("quality", measured["quality"]), minimum=1 - targets.max_drop))
    return objectives, constraints


def judged(objectives: Sequence[Objective]) -> Objective:
    """The objective that a search is judged by: the first that is measured."""
    return next(objective for objective in objectives if objective.kind == "measured")
