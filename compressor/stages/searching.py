"""Measure sub-networks and find the Pareto front: fills `speed.json` and `search/`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from compressor.architecture import Architecture
from compressor.elastic.slicing import extract, fits_plain_class
from compressor.errors import RequestError
from compressor.job import Job
from compressor.progress import bar, say
from compressor.run import fingerprint, read_json, write_json

if TYPE_CHECKING:
    from evals.scoring import TaskScore
    from evals.speed import SpeedTable
    from search.store import EvaluationStore, Measurement


def search(job: Job) -> dict[str, Any]:
    """Measure sub-networks and find the Pareto front. Everything measured is kept; returns what front.json holds."""
    from search.objectives import Constraint, Direction, choose, computed
    from search.run import search as run_search
    from search.store import EvaluationStore

    recipe, run = job.recipe, job.run
    if not recipe.tasks:
        raise RequestError(f"{run.path}: no tasks yet; say --tasks")
    manifest = run.manifest(run.supernet)
    if manifest is None:
        raise RequestError(f"{run.path}: no fine-tuned super-network yet; run compressor finetune or compress")
    weights = manifest["weights"]
    limit = recipe.searching.limit
    inputs = {
        "weights": weights,
        "documents": {name: job.tasks.fingerprint(name, "search", limit) for name in job.tasks.tasks},
        "searching": recipe.searching.model_dump(),
        "targets": recipe.targets.model_dump(),
        "space": job.space.to_dict(),
        "seed": recipe.seed,
        "device": str(job.device),
    }
    if run.front.is_file() and job.redo != "search":
        found = read_json(run.front)
        if found["inputs"] == fingerprint(inputs):
            return found
    run.search.mkdir(exist_ok=True)
    job.threads(scoring=True)
    supernet = job.load_supernet()
    speed = speed_table(job, supernet.model)
    scorer = job.scorer(supernet.model)
    with EvaluationStore(run.evaluations) as store:
        base_scores = base_on_search_split(job, store)
        exact = computed(
            job.structure,
            scheme=job.smallest_scheme(),
            speed={
                "decode_tps": lambda a: speed.predict(a)["decode_tps"],
                "prefill_tps": lambda a: speed.predict(a)["prefill_tps"],
            },
        )
        measured_names: dict[str, Direction] = {"quality": "max"}
        for name, task in job.tasks.tasks.items():
            measured_names[name] = "max" if task.higher_is_better else "min"
        try:
            objectives = choose(recipe.searching.objectives, exact, measured_names)
        except ValueError as error:
            raise RequestError(f"searching.objectives: {error}") from error
        base_speed = speed.predict(job.structure.base)["decode_tps"]
        _, low = job.smallest_in_training()
        sizes = [size for _, size in job.sizes() if size is not None]
        constraints = []
        if sizes:
            constraints.append(Constraint(exact["parameters"], maximum=max(sizes), minimum=min(low, min(sizes))))
        if job.max_bytes() is not None:
            constraints.append(Constraint(exact["bytes"], maximum=job.max_bytes()))
        if recipe.targets.min_speedup is not None:
            constraints.append(Constraint(exact["decode_tps"], minimum=recipe.targets.min_speedup * base_speed))

        def measure(asked: list[Architecture]) -> Iterator[tuple[Architecture, dict[str, float]]]:
            # Neighbours in this order share most leading layers, which are then computed once.
            for architecture in sorted(asked, key=lambda a: (a.hidden_size, a.layers)):
                rows = stored_scores(job, store, architecture, weights, "search", partial(score_active, architecture))
                values = {name: row.score for name, row in rows.items()}
                yield architecture, values | {"quality": relative_quality(job, values, base_scores)}

        def score_active(architecture: Architecture) -> dict[str, TaskScore]:
            with torch.no_grad():
                supernet.activate(architecture)
                return scorer.score("search", limit, architecture=architecture)

        uniform = job.space.uniform_members(6, max(sizes) if sizes else None)
        uniform = [a for a in uniform if fits_plain_class(job.checkpoint.config, a)]
        if sizes:
            uniform = [a for a in uniform if job.structure.parameters(a) >= low] or uniform[-1:]
        with bar("searching", recipe.searching.evaluations or 0) as progress:
            best: dict[str, float] = {}

            def note(evaluation: Any) -> None:
                fits = not sizes or evaluation.values["parameters"] <= max(sizes)
                if fits and evaluation.values["quality"] > best.get("quality", 0.0):
                    best.update(evaluation.values)
                share = best.get("parameters", 0) / job.structure.parameters(job.structure.base)
                progress.advance(note=f"best quality {best.get('quality', 0):.3f} at {share:.2f} of the parameters")

            result = run_search(
                job.space,
                objectives,
                measure,
                algorithm=recipe.searching.algorithm,
                evaluations=recipe.searching.evaluations or 1,
                population=recipe.searching.population,
                seed=recipe.seed,
                constraints=constraints,
                include=uniform,
                on_evaluation=note,
            )
    found = {
        "inputs": fingerprint(inputs),
        "weights": weights,
        "base": base_scores,
        "base_decode_tps": base_speed,
        **result.to_dict(),
    }
    write_json(run.front, found)
    run.log(f"searched: {len(result.evaluations)} sub-networks measured")
    return found


def row_key(job: Job, task: str) -> str:
    """The store's name of a task's score: the metric belongs to it."""
    return f"{task}:{job.tasks.tasks[task].key}"


def relative_quality(job: Job, values: dict[str, float], base: dict[str, float]) -> float:
    """Mean over tasks of score / base's score, inverted where lower is better: the base is 1.0."""
    ratios = [
        values[name] / base[name] if task.higher_is_better else base[name] / values[name]
        for name, task in job.tasks.tasks.items()
    ]
    return sum(ratios) / len(ratios)


def stored_scores(
    job: Job,
    store: EvaluationStore,
    architecture: Architecture,
    weights: str,
    split: Literal["search", "report"],
    score: Callable[[], dict[str, TaskScore]],
) -> dict[str, Measurement]:
    """Every task's score of an architecture with these weights: from the store, or else from `score` and recorded.

    A score that is not a number (a network whose numbers overflowed) is recorded as the worst there is.
    """
    limit = job.recipe.searching.limit if split == "search" else None
    tasks = job.tasks.tasks
    keys = {name: (row_key(job, name), job.tasks.fingerprint(name, split, limit)) for name in tasks}

    def known() -> dict[str, Measurement]:
        rows = {name: store.get(architecture, weights, *key) for name, key in keys.items()}
        return {name: row for name, row in rows.items() if row is not None}

    if len(known()) < len(tasks):
        began = time.monotonic()
        fresh = score()
        seconds = (time.monotonic() - began) / len(fresh)
        for name, found in fresh.items():
            value = found.value
            if math.isnan(value):
                value = 0.0 if found.higher_is_better else math.inf
            store.put(architecture, weights, *keys[name], score=value, stderr=found.stderr, n=found.n, seconds=seconds)
    return known()


def base_on_search_split(job: Job, store: EvaluationStore) -> dict[str, float]:
    """The base's own scores on the search documents. Raises `RequestError` where nothing can be measured against it."""

    def score() -> dict[str, TaskScore]:
        say("scoring the base")
        return job.scorer(job.load_base()).score("search", job.recipe.searching.limit)

    rows = stored_scores(job, store, job.structure.base, job.base_fingerprint, "search", score)
    for name, row in rows.items():
        if not 0 < row.score < math.inf:
            raise RequestError(
                f"task {name}: the base scores {row.score:g}, so nothing can be measured against it; choose another"
            )
    return {name: row.score for name, row in rows.items()}


def speed_table(job: Job, model: Any) -> SpeedTable:
    """speed.json: layer timings on this device, measured once per run on networks cut out of `model`.

    Timings do not depend on what the weights are, so the base serves as well as the super-network.
    """
    from evals.speed import SpeedTable

    if job.speed is None and job.run.speed_table.is_file():
        job.speed = SpeedTable.load(job.run.speed_table)
    if job.speed is None:
        job.threads(scoring=True)
        with bar("timing the layers", SpeedTable.steps(job.structure)) as progress:
            job.speed = SpeedTable.measure(
                lambda architecture: extract(model, job.structure, architecture),
                job.structure,
                rounds=3,
                on_step=progress.advance,
            )
    if not job.run.speed_table.is_file() and job.run.recipe_file.is_file():
        job.speed.save(job.run.speed_table)
    return job.speed


def check_speedup(job: Job) -> None:
    """Refuse a speed-up that not even the smallest sub-network of the space reaches on this device."""
    wanted = job.recipe.targets.min_speedup
    if wanted is None:
        return
    table = speed_table(job, job.load_base())
    smallest, base = (table.predict(a)["decode_tps"] for a in (job.space.smallest(), job.structure.base))
    if smallest < wanted * base:
        raise RequestError(
            f"--min-speedup: {wanted:g} cannot be reached; the smallest sub-network of this space is "
            f"{smallest / base:.2f} times as fast as the base"
        )
