"""Measure sub-networks and find the Pareto front: fills `speed.json` and `search/`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

from compressor.job import Job
from compressor.sizing import byte_limit, sizes_asked_for, smallest_in_training, smallest_storage
from compressor.stages.score_keys import fidelities, measurable, score_keys
from compressor.stages.subnet_scores import SubnetEvaluator
from compressor.stages.warm_start import GREEDY, proposals, sources
from export.layouts.table import copies_hold
from search.algorithms import algorithm
from search.objectives import SPEEDS, Constraint, Evaluation, Objective, choose, computed
from search.run import GenerationRecord, greedy_path
from search.run import search as run_search
from search.sampling import uniform_members
from search.store import EvaluationStore
from supernet.architecture import Architecture
from supernet.common.errors import RequestError
from supernet.common.files import fingerprint, read_json, write_json
from supernet.common.progress import bar, say
from supernet.slicing import extract, fits_plain_class

if TYPE_CHECKING:
    from evals.speed.table import SpeedTable

NOT_MEASURED = {"workers", "executor"}
"""Of the recipe's section: who measures, which moves no number."""
GREEDY_SHARE = 0.25
"""Share of the evaluations that a warm start from greedy perturbation may take."""


def search(job: Job) -> dict[str, Any]:
    """Measure sub-networks and find the Pareto front. Everything measured is kept; returns what front.json holds."""
    recipe, run = job.recipe, job.run
    if not recipe.tasks:
        raise RequestError(f"{run.path}: no tasks yet; say --tasks")
    manifest = run.manifest(run.supernet)
    if manifest is None:
        raise RequestError(f"{run.path}: no fine-tuned super-network yet; run compressor finetune or compress")
    check_searching(job)
    inputs = {
        "weights": manifest["weights"],
        "scores": [{name: key.place for name, key in score_keys(job, one).items()} for one in fidelities(job)],
        "searching": recipe.searching.model_dump(exclude=NOT_MEASURED),
        "warm_start": sources(job),
        "targets": recipe.targets.model_dump(),
        "space": job.space.to_dict(),
        "seed": recipe.seed,
        "device": str(job.device),
        "speed_table": repr(job.given_speed_table()) if recipe.speed_table is not None else None,
    }
    if run.front.is_file() and job.redo != "search":
        found = read_json(run.front)
        if found["inputs"] == fingerprint(inputs):
            return found
    run.search.mkdir(exist_ok=True)
    job.threads(scoring=True)
    speed = speed_table(job, lambda: job.load_supernet().model)
    objectives, constraints = goals(job, speed.predict)
    sizes = sizes_asked_for(job)
    starts = proposals(job)
    with (
        EvaluationStore(run.evaluations) as store,
        closing(SubnetEvaluator(job, store, manifest["weights"])) as evaluator,
        bar("searching", recipe.searching.evaluations or 0) as progress,
    ):
        base, best = job.structure.parameters(job.structure.base), (0.0, 0)

        def note(evaluation: Evaluation) -> None:
            nonlocal best
            parameters = job.structure.parameters(evaluation.architecture)
            if not sizes or parameters <= max(sizes):
                best = max(best, (evaluation.values["quality"], parameters))
            progress.advance(note=f"best quality {best[0]:.3f} at {best[1] / base:.2f} of the parameters")

        budget = recipe.searching.evaluations or 1
        common: dict[str, Any] = {
            "constraints": constraints,
            "population": recipe.searching.population,
            "seed": recipe.seed,
            "on_evaluation": note,
        }
        aside: dict[str, list[str]] = {}

        def tell(record: GenerationRecord) -> None:
            run.log(generation_line(record))
            for name, found in record.get("predictors", {}).items():
                for kind in set(found["set_aside"]) - set(aside.get(name, [])):
                    say(f"predictor {kind} of {name} ranked the newest sub-networks no better than chance: set aside")
                aside[name] = found["set_aside"]

        known = []
        if GREEDY in recipe.searching.warm_start:
            share = int(GREEDY_SHARE * budget)
            known = greedy_path(job.space, objectives, evaluator.measure, evaluations=share, **common)
        result = run_search(
            job.space,
            objectives,
            evaluator.measure,
            algorithm=recipe.searching.algorithm,
            evaluations=budget,
            include=uniform_ones(job),
            warm_start=starts,
            known=known,
            screening=partial(evaluator.measure, fidelity="screening") if "screening" in evaluator.keys else None,
            share=recipe.searching.first_look or 0.0,
            on_generation=tell,
            **common,
        )
    found = {
        "inputs": fingerprint(inputs),
        "weights": manifest["weights"],
        "base": {name: score.value for name, score in evaluator.base["full"].items()},
        "base_decode_tps": speed.predict(job.structure.base)["decode_tps"],
        **result.to_dict(),
    }
    write_json(run.front, found)
    run.log(f"searched: {len(result.evaluations)} sub-networks measured")
    return found


def generation_line(record: GenerationRecord) -> str:
    """A generation in one line of the log, with how the predictors in use ranked its newcomers beforehand."""
    parts = [f"generation {record['generation']}: {record['evaluations']} measured"]
    if record["full"] < record["new"]:
        parts.append(f"{record['new'] - record['full']} of {record['new']} ruled out by a first look")
    parts.append(f"hypervolume {record['hypervolume']:.4f}")
    for name, found in record.get("predictors", {}).items():
        if judged := found["newest"].get(found["used"] or ""):
            parts.append(
                f"{name} by {found['used']}: tau {judged['kendall']:.2f}, rho {judged['spearman']:.2f}, "
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
        base = predict(job.structure.base)["decode_tps"]
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


def uniform_ones(job: Job) -> list[Architecture]:
    """A few architectures within the sizes asked for that the plain layout can hold: every search measures some."""
    sizes = sizes_asked_for(job)
    config = job.checkpoint.config
    holds = partial(copies_hold, config=config, layouts=job.recipe.formats)
    found = [a for a in uniform_members(job.space, 6, max(sizes, default=None), holds) if fits_plain_class(config, a)]
    if sizes:
        _, low = smallest_in_training(job)
        found = [a for a in found if job.structure.parameters(a) >= low] or found[-1:]
    return found


def speed_table(job: Job, load_model: Callable[[], Any]) -> SpeedTable:
    """speed.json: layer timings on this device, in what is computed in and on these threads, measured once per run on
    networks cut out of what `load_model` gives.

    Timings do not depend on what the weights are, so the base serves as well as the super-network. A table that the
    recipe names, of another device, takes its place.
    """
    from evals.speed.table import SpeedTable

    job.threads(scoring=True)
    if job.recipe.speed_table is not None:
        job.speed = job.given_speed_table()
    elif job.speed is None and job.run.speed_table.is_file():
        kept = SpeedTable.load(job.run.speed_table)
        job.speed = kept if kept.made_on(job.device, job.compute_dtype) else None
    if job.speed is None:
        model = load_model()
        with bar("timing the layers", SpeedTable.steps(job.structure)) as progress:
            job.speed = SpeedTable.measure(
                lambda architecture: extract(model, job.structure, architecture),
                job.structure,
                rounds=3,
                on_step=progress.advance,
            )
    if job.run.recipe_file.is_file():
        job.speed.save(job.run.speed_table)
    return job.speed


def check_speedup(job: Job) -> None:
    """Refuse a speed-up that not even the smallest sub-network of the space reaches on this device."""
    wanted = job.recipe.targets.min_speedup
    if wanted is None:
        return
    table = speed_table(job, job.load_base)
    smallest, base = (table.predict(a)["decode_tps"] for a in (job.space.smallest(), job.structure.base))
    if smallest < wanted * base:
        raise RequestError(
            f"--min-speedup: {wanted:g} cannot be reached; the smallest sub-network of this space is "
            f"{smallest / base:.2f} times as fast as the base"
        )
