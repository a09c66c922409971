"""The search beside chance: a random search of as many evaluations, predicted in every run, measured on request."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

from compressor.job import Job
from compressor.stages.front import FrontRecord
from compressor.stages.goals import goals, judged
from compressor.stages.layer_timings import speed_table
from compressor.stages.picking import measured
from compressor.stages.repairing import searched_weights
from compressor.stages.search_parts import for_search, searches_in_turn
from compressor.stages.subnet_scores import SubnetEvaluator
from search.control import measured_control, random_genomes, within_bounds
from search.control_records import Control, Likeness
from search.objectives import Evaluation
from search.store import EvaluationStore
from supernet.architecture import Architecture
from supernet.common.errors import RequestError, reading
from supernet.common.files import read_json, write_json
from supernet.common.formatting import shell_word
from supernet.common.progress import bar, say

SEED = 1
"""Added to the run's, so that the control draws other networks than the search did."""


def measure_control(job: Job) -> Control:
    """Measure as many random networks as the search measured within its bounds, and keep how it compares in
    `search/control.json`. What was measured is in the store like all else, so this goes on where it was stopped; the
    front does not know of it. Raises `RequestError` where there is nothing to compare."""
    evaluations = measured(job)
    speed = speed_table(job, lambda: job.load_supernet().model)
    objectives, constraints = goals(for_search(job), speed.predict)
    of, seed = judged(objectives), job.recipe.seed
    count = len(within_bounds(job.space, evaluations, of, constraints))
    drawn = random_genomes(job.space, constraints, count, seed + SEED)
    if not len(drawn):
        raise RequestError(
            f"--control: {'no random' if count else 'no'} sub-network within the sizes asked for was measured; search "
            f"there first (compressor search {shell_word(job.run.path)} --max-params …)"
        )
    architectures, values = job.space.decode_all(drawn), dict[Architecture, Mapping[str, float]]()
    job.threads(scoring=True)
    with (
        EvaluationStore(job.run.evaluations) as store,
        closing(SubnetEvaluator(job, store, searched_weights(job))) as evaluator,
        bar("a random search beside it", len(drawn)) as progress,
    ):
        for architecture, found in evaluator.measure(architectures):
            values[architecture] = found
            progress.advance()
    random = [Evaluation(architecture, values[architecture]) for architecture in architectures]
    control = measured_control(job.space, evaluations, random, of, constraints, seed=seed)
    if control is None:
        raise RequestError(f"--control: {of.name} of the random sub-networks is no finite number; nothing to compare")
    write_json(job.run.control, {"of": search_asked_for(job), **control.model_dump()})
    say(control.text)
    return control


def search_asked_for(job: Job) -> str:
    """What identifies the search that the recipe asks for now, as front.json's `inputs` do."""
    return searches_in_turn(job)[-1][1]


def control_of(job: Job, front: FrontRecord) -> Control | None:
    """How the search that the recipe asks for compares: as measured, else as predicted when it ended. None for searches
    of earlier versions, and where another search came after it."""
    asked = search_asked_for(job)
    if job.run.control.is_file():
        with reading(f"{job.run.control}: not what this version writes; remove it"):
            kept = read_json(job.run.control)
            if kept.pop("of") == asked:
                return Control.model_validate(kept)
    return Control.model_validate(front["control"]) if front.get("control") and front["inputs"] == asked else None


def likeness_of(job: Job, front: FrontRecord) -> Likeness | None:
    """Whether that search could learn anything; None as in `control_of`."""
    found = front.get("likeness")
    return Likeness.model_validate(found) if found and front["inputs"] == search_asked_for(job) else None
