"""The front as it is by today's definition of quality, whatever version scored the search.

The tasks' scores do not depend on it, so nothing is measured again; the front is another all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from compressor.job import Job
from compressor.stages.front import FrontRecord, QualityRecord, read_front
from compressor.stages.goals import goals
from compressor.stages.repairing import searched_weights
from compressor.stages.score_keys import score_keys
from compressor.stages.search_parts import for_search
from compressor.stages.subnet_scores import known_scores
from evals.quality import DEFINITION, QualityScale
from search.objectives import SPEEDS, Constraint, Evaluation, EvaluationRecord, Objective
from search.pareto import costs, hypervolume_in, violations
from search.pareto import front as pareto_front
from search.run import GenerationRecord
from search.scores import Score, ScoreKey
from search.store import EvaluationStore
from supernet.architecture import Architecture
from supernet.common.errors import RequestError, reading


def current_front(job: Job) -> FrontRecord:
    """What front.json holds, its qualities by today's definition. Raises `RequestError` where they cannot be."""
    front = read_front(job.run.front)
    quality = front.get("quality", {})
    # By text there is no cap: those of the definition before are the same.
    if quality.get("definition") == DEFINITION or (quality.get("definition") == 2 and not quality["counted"]):
        return front
    # Every evaluation holds its speed, so only the base's is asked for here.
    speed = dict.fromkeys(SPEEDS, front["base_decode_tps"])
    with reading(f"{job.run.front}: an earlier version searched for other objectives; run compressor search"):
        return requalified(job, front, *goals(for_search(job), lambda architecture: speed))


def quality_of(scale: QualityScale) -> QualityRecord:
    """What front.json holds of the scale of its qualities."""
    return {
        "definition": DEFINITION,
        "counted": scale.counted,
        "left_out": scale.left_out,
        "remark": scale.remark,
    }


def requalified(
    job: Job, front: FrontRecord, objectives: Sequence[Objective], constraints: Sequence[Constraint]
) -> FrontRecord:
    """What front.json would hold if its search had had today's quality, from the scores that were recorded.

    What was screened only has the scores that the screening predicted. Raises `RequestError` where no task counts by
    today's definition, or the recorded scores are of other tasks than the recipe's.
    """
    keys = {name: key for name, key in score_keys(job, "full").items() if name in job.tasks.tasks}
    rows: list[EvaluationRecord] = []
    with EvaluationStore(job.run.evaluations) as store:
        base = known_scores(store, job.untouched.structure.base, job.untouched_fingerprint, keys)
        if missing := [name for name in keys if name not in base]:
            raise RequestError(f"{job.run.front}: {missing[0]} was not scored in this search; run compressor search")
        scale = QualityScale(base)
        if scale.by_text:
            raise RequestError(f"{job.run.front}: {scale.remark} Search again: compressor search --redo search")
        weights = searched_weights(job)
        for row in front["evaluations"]:
            known = known_scores(store, Architecture.from_dict(row["architecture"]), weights, keys)
            scores = {name: _score(key, row["values"].get(name), known.get(name)) for name, key in keys.items()}
            now = {"quality": scale.quality(scores, capped=True), "quality_stderr": scale.stderr(scores)}
            rows.append({**row, "values": {**row["values"], **now}})
    evaluations = [Evaluation.from_dict(row) for row in rows]
    best = pareto_front(evaluations, objectives, constraints)
    volumes = _hypervolumes(evaluations, objectives, constraints, len(front["generations"]))
    generations: list[GenerationRecord] = [
        {**row, "hypervolume": volume} for row, volume in zip(front["generations"], volumes, strict=True)
    ]
    return {
        **front,
        "quality": quality_of(scale),
        "evaluations": rows,
        "front": [e.architecture.key for e in best],
        "generations": generations,
        "control": None,  # they were of the qualities of then
        "likeness": None,
    }


def _score(key: ScoreKey, value: float | None, known: Score | None) -> Score:
    """A recorded value as a score; with the error of the full measurement, where there was one."""
    stderr, n = (known.stderr, known.n) if known is not None else (None, 0)
    return key.score(math.nan if value is None else value, stderr, n).or_worst()


def _hypervolumes(
    evaluations: Sequence[Evaluation], objectives: Sequence[Objective], constraints: Sequence[Constraint], number: int
) -> list[float]:
    """After each generation, in units of the box between the best and the worst of the first."""
    values, generation = costs(evaluations, objectives), np.array([e.generation for e in evaluations])
    usable = np.isfinite(values).all(axis=1)
    first = values[usable & (generation == 0)]
    if not len(first):
        return [0.0] * number
    best, worst = first.min(0), first.max(0)
    usable &= ~(violations(evaluations, constraints) > 0).any(axis=1) & np.array([e.full for e in evaluations])
    return [hypervolume_in(values[usable & (generation <= g)], best, worst) for g in range(number)]
