"""The search beside chance: a random search of as many evaluations, predicted in every run, measured on request."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np

from compressor.job import Job
from compressor.stages.picking import measured
from compressor.stages.repairing import searched_weights
from compressor.stages.searching import current_front, goals, judged, speed_table
from compressor.stages.subnet_scores import SubnetEvaluator
from search.control import Control, measured_control, random_genomes, within_bounds
from search.objectives import Evaluation
from search.store import EvaluationStore
from supernet.common.errors import reading
from supernet.common.files import read_json, write_json
from supernet.common.progress import bar, say

SEED = 1
"""Added to the run's, so that the control draws other networks than the search did."""


def measure_control(job: Job) -> Control | None:
    """Measure as many random networks as the search measured within its bounds, and keep how it compares in
    `search/control.json`. What was measured is in the store like all else, so this goes on where it was stopped; the
    front does not know of it."""
    evaluations = measured(job)
    speed = speed_table(job, lambda: job.load_supernet().model)
    objectives, constraints = goals(job, speed.predict)
    count = len(within_bounds(evaluations, constraints))
    drawn = random_genomes(job.space, constraints, count, job.recipe.seed + SEED)[:count]
    random: list[Evaluation] = []
    job.threads(scoring=True)
    with (
        EvaluationStore(job.run.evaluations) as store,
        closing(SubnetEvaluator(job, store, searched_weights(job))) as evaluator,
        bar("a random search beside it", len(drawn)) as progress,
    ):
        for architecture, values in evaluator.measure(job.space.decode_all(np.array(drawn))):
            known = {c.objective.name: c.objective.compute(architecture) for c in constraints if c.objective.compute}
            random.append(Evaluation(architecture, {**known, **values}))
            progress.advance()
    control = measured_control(evaluations, random, judged(objectives), constraints, seed=job.recipe.seed)
    if control is not None:
        write_json(job.run.control, {"of": current_front(job)["inputs"], **control.model_dump()})
        say(control.text)
    return control


def control_of(job: Job, front: dict[str, Any]) -> Control | None:
    """What was measured of this front's control, else what was predicted; None for searches of earlier versions."""
    if job.run.control.is_file():
        with reading(f"{job.run.control}: not what this version writes; remove it"):
            kept = read_json(job.run.control)
            if kept.pop("of") == front["inputs"]:
                return Control.model_validate(kept)
    predicted = front.get("control")
    return None if predicted is None else Control.model_validate(predicted)
