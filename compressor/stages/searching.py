"""Measure sub-networks and find the Pareto front: fills `speed.json` and `search/`."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

from compressor.job import Job
from compressor.recipe import former_names
from compressor.schedule import stage
from compressor.sizing import byte_limit, sizes_asked_for, smallest_in_training, smallest_storage
from compressor.stages.front import read_front
from compressor.stages.repairing import repair_inputs, search_variants, searched_weights
from compressor.stages.score_keys import fidelities, measurable, score_keys
from compressor.stages.subnet_scores import SubnetEvaluator
from compressor.stages.warm_start import proposals, sources
from evals.speed.table import SpeedTable
from evals.warm_starts import GREEDY
from export.layouts.table import copies_hold
from search.algorithms import algorithm
from search.objectives import SPEEDS, Constraint, Evaluation, Objective, choose, computed
from search.run import GenerationRecord, SearchResult, greedy_path
from search.run import search as run_search
from search.sampling import uniform_members
from search.store import EvaluationStore
from supernet.architecture import Architecture, Structure
from supernet.common.errors import RequestError
from supernet.common.files import fingerprint, write_json
from supernet.common.metrics import record
from supernet.common.progress import Bar, bar, say
from supernet.device import device_name
from supernet.slicing import extract, fits_plain_class

NOT_MEASURED = {"workers", "executor"}
"""Of the recipe's section: who measures, which moves no number."""
GREEDY_SHARE = 0.25
"""Share of the evaluations that a warm start from greedy perturbation may take."""


def search(job: Job) -> dict[str, Any]:
    """Measure sub-networks and find the Pareto front. Everything measured is kept; returns what front.json holds."""
    recipe, run = job.recipe, job.run
    if not recipe.tasks:
        raise RequestError(f"{run.path}: no tasks yet; say --tasks")
    if run.manifest(run.supernet) is None:
        raise RequestError(f"{run.path}: no fine-tuned super-network yet; run compressor finetune or compress")
    # 1. What was searched already is as it was.
    check_searching(job)
    inputs = fingerprint(search_inputs(job, run.supernet_weights))
    if run.front.is_file() and job.redo != "search":
        front = read_front(run.front)
        if front["inputs"] == inputs:
            return front
    # 2. Prepare: timings of the layers, objectives, where the search starts.
    run.search.mkdir(exist_ok=True)
    job.threads(scoring=True)
    speed = speed_table(job, lambda: job.load_supernet().model)
    objectives, constraints = goals(job, speed.predict)
    if repair_inputs(job):
        search_variants(job, job.load_supernet())  # moments are gathered once, before workers want them
    starts = proposals(job)
    # 3. Search.
    with (
        job.schedule.stage("search"),
        EvaluationStore(run.evaluations) as store,
        closing(SubnetEvaluator(job, store, searched_weights(job))) as evaluator,
        bar("searching", recipe.searching.evaluations or 0) as progress,
    ):
        result = run_searches(job, evaluator, objectives, constraints, starts, SearchProgress(job, progress))
    # 4. Record.
    front = {
        "inputs": inputs,
        "weights": run.supernet_weights,
        "base": {name: score.value for name, score in evaluator.base["full"].items()},
        "base_decode_tps": untouched_decode_tps(job, speed.predict),
        **result.to_dict(),
    }
    write_json(run.front, front)
    run.log(f"searched: {len(result.evaluations)} sub-networks measured")
    return front


def search_inputs(job: Job, weights: str) -> dict[str, Any]:
    """All that the search depends on; another value of any of it makes another search."""
    recipe = job.recipe
    return {
        "weights": weights,
        "scores": [{name: key.place for name, key in score_keys(job, one).items()} for one in fidelities(job)],
        "searching": former_names(job.given.searching.model_dump(exclude=NOT_MEASURED)),
        "warm_start": sources(job),
        "targets": recipe.targets.model_dump(),
        "space": job.space.to_dict(),
        "seed": recipe.seed,
        "device": device_name(job.device),
        "speed_table": repr(job.given_speed_table()) if recipe.speed_table is not None else None,
        **repair_inputs(job),
    }


def run_searches(
    job: Job,
    evaluator: SubnetEvaluator,
    objectives: list[Objective],
    constraints: list[Constraint],
    starts: list[Architecture],
    progress: SearchProgress,
) -> SearchResult:
    """Greedy perturbation first, where the warm start names it, then the recipe's algorithm."""
    settings = job.recipe.searching
    budget = settings.evaluations or 1
    common: dict[str, Any] = {
        "constraints": constraints,
        "population": settings.population,
        "seed": job.recipe.seed,
        "on_evaluation": progress.evaluated,
    }
    known = []
    if GREEDY in settings.warm_start:
        share = int(GREEDY_SHARE * budget)
        known = greedy_path(job.space, objectives, evaluator.measure, evaluations=share, **common)
    return run_search(
        job.space,
        objectives,
        evaluator.measure,
        algorithm=settings.algorithm,
        evaluations=budget,
        include=uniform_architectures(job),
        warm_start=starts,
        known=known,
        screening=partial(evaluator.measure, fidelity="screening") if "screening" in evaluator.keys else None,
        share=settings.screening or 0.0,
        on_generation=progress.generation,
        **common,
    )


class SearchProgress:
    """Shows how the search goes: the best so far on the bar, each generation in the log, predictors that fail."""

    def __init__(self, job: Job, bar: Bar) -> None:
        self._job, self._bar = job, bar
        self._largest = max(sizes_asked_for(job), default=None)
        self._best = (0.0, 0)
        self._set_aside: dict[str, list[str]] = {}

    def evaluated(self, evaluation: Evaluation) -> None:
        """Move the bar by one measured sub-network, and record it."""
        values = {name: value for name, value in evaluation.values.items() if value is not None}
        record(
            "candidate",
            int(self._bar.done) + 1,
            key=evaluation.architecture.key,
            generation=evaluation.generation,
            **values,
        )
        structure = self._job.structure
        parameters = structure.parameters(evaluation.architecture)
        if self._largest is None or parameters <= self._largest:
            self._best = max(self._best, (evaluation.values["quality"], parameters))
        share = self._best[1] / self._job.untouched_parameters
        self._bar.advance(note=f"best quality {self._best[0]:.3f} at {share:.2f} of the parameters")

    def generation(self, made: GenerationRecord) -> None:
        """Log a generation; say which predictors were set aside in it."""
        self._job.run.log(generation_line(made))
        record("generation", made["generation"], evaluations=made["evaluations"], hypervolume=made["hypervolume"])
        for name, predictors in made.get("predictors", {}).items():
            for kind in set(predictors["set_aside"]) - set(self._set_aside.get(name, [])):
                say(f"predictor {kind} of {name} ranked the newest sub-networks no better than chance: set aside")
            self._set_aside[name] = predictors["set_aside"]


def generation_line(record: GenerationRecord) -> str:
    """A generation in one line of the log, with how the predictors in use ranked its newcomers beforehand."""
    parts = [f"generation {record['generation']}: {record['evaluations']} measured"]
    if record["full"] < record["new"]:
        parts.append(f"{record['new'] - record['full']} of {record['new']} ruled out by screening")
    parts.append(f"hypervolume {record['hypervolume']:.4f}")
    for name, predictors in record.get("predictors", {}).items():
        if judged := predictors["newest"].get(predictors["used"] or ""):
            parts.append(
                f"{name} by {predictors['used']}: tau {judged['kendall']:.2f}, rho {judged['spearman']:.2f}, "
                f"error {judged['mae']:.3g}"
            )
    return ", ".join(parts)


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
        _, low = smallest_in_training(job)
        constraints.append(Constraint(exact["parameters"], maximum=max(sizes), minimum=min(low, min(sizes))))
    if byte_limit(job) is not None:
        constraints.append(Constraint(exact["bytes"], maximum=byte_limit(job)))
    if targets.min_speedup is not None:
        base = untouched_decode_tps(job, predict)
        constraints.append(Constraint(exact["decode_tps"], minimum=targets.min_speedup * base))
    if targets.max_drop is not None:
        constraints.append(Constraint(Objective("quality", measured["quality"]), minimum=1 - targets.max_drop))
    return objectives, constraints


def check_searching(job: Job) -> None:
    """Refuse, before anything is measured, what the search could not do."""
    # Speeds are not known yet, and not needed to see whether the rest makes sense.
    objectives, constraints = goals(job, lambda architecture: dict.fromkeys(SPEEDS, 1.0))
    sources(job)
    try:
        algorithm(job.recipe.searching.algorithm)(job.space, objectives, constraints=constraints)
    except ValueError as error:
        raise RequestError(f"searching.algorithm: {error}") from error


def uniform_architectures(job: Job) -> list[Architecture]:
    """A few architectures within the sizes asked for that the plain layout can hold: every search measures some."""
    sizes = sizes_asked_for(job)
    config = job.checkpoint.config
    holds = partial(copies_hold, config=config, layouts=job.recipe.formats)
    uniform = [a for a in uniform_members(job.space, 6, max(sizes, default=None), holds) if fits_plain_class(config, a)]
    if sizes:
        _, low = smallest_in_training(job)
        uniform = [a for a in uniform if job.structure.parameters(a) >= low] or uniform[-1:]
    return uniform


@stage("timing the layers")
def speed_table(job: Job, load_model: Callable[[], Any]) -> SpeedTable:
    """speed.json: layer timings on this device, in what is computed in and on these threads, measured once per run on
    networks cut out of what `load_model` gives.

    Timings do not depend on what the weights are, so the base serves as well as the super-network. A table that the
    recipe names, of another device, takes its place.
    """
    job.threads(scoring=True)
    if job.recipe.speed_table is not None:
        job.speed = job.given_speed_table()
    elif job.speed is None and job.run.speed_table.is_file():
        kept = SpeedTable.load(job.run.speed_table)
        job.speed = kept if kept.made_on(job.device, job.compute_dtype) else None
    if job.speed is None:
        model = load_model()
        with bar("timing the layers", SpeedTable.steps(job.structure, job.device)) as progress:
            job.speed = SpeedTable.measure(
                lambda architecture: extract(model, job.structure, architecture),
                job.structure,
                on_step=progress.advance,
            )
    if job.run.recipe_file.is_file():
        job.speed.save(job.run.speed_table)
    return job.speed


def untouched_decode_tps(job: Job, predict: Callable[[Architecture], dict[str, float]]) -> float:
    """Decode tokens per second of the untouched base, in tokens of the base, so that a ratio to it is one of text.

    Where the vocabulary is cut, the untouched base is taken to be slower by as much as it reads more weights for each
    token, and each of its tokens stands for more text. The report measures both.
    """
    tps = predict(job.structure.base)["decode_tps"]
    if job.vocabulary is None:
        return tps
    record = job.vocabulary.record
    read, read_by_untouched = (weights_read(structure) for structure in (job.structure, job.untouched.structure))
    return tps * read / read_by_untouched * record.base_bytes_per_token / record.bytes_per_token


def weights_read(structure: Structure) -> int:
    """Weights that a base reads for each token: all but an embedding that is not the head too."""
    looked_up = [tensor for tensor in structure.tensors if tensor.role == "embedding" and not structure.tied]
    shapes = (structure.shape(tensor, structure.base) or (0,) for tensor in looked_up)
    return structure.parameters(structure.base) - sum(map(math.prod, shapes))


def check_speedup(job: Job) -> None:
    """Refuse a speed-up that not even the smallest sub-network of the space reaches on this device."""
    wanted = job.recipe.targets.min_speedup
    if wanted is None:
        return
    table = speed_table(job, job.load_base)
    smallest, base = table.predict(job.space.smallest())["decode_tps"], untouched_decode_tps(job, table.predict)
    if smallest < wanted * base:
        raise RequestError(
            f"--min-speedup: {wanted:g} cannot be reached; the smallest sub-network of this space is "
            f"{smallest / base:.2f} times as fast as the base"
        )
