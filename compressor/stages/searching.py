"""Measure sub-networks and find the Pareto front: fills `speed.json` and `search/`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from compressor.architecture import Architecture
from compressor.elastic.slicing import extract, fits_plain_class
from compressor.errors import RequestError
from compressor.job import Job
from compressor.progress import bar, say
from compressor.run import fingerprint, read_json, write_json

if TYPE_CHECKING:
    from evals.speed import SpeedTable


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
    documents = {name: job.tasks.fingerprint(name, "search", limit) for name in job.tasks.tasks}
    inputs = {
        "weights": weights,
        "documents": documents,
        "searching": recipe.searching.model_dump(),
        "targets": recipe.targets.model_dump(),
        "space": job.space.to_dict(),
        "seed": recipe.seed,
        "device": str(job.device),
    }
    if run.front.is_file():
        found = read_json(run.front)
        if found["inputs"] == fingerprint(inputs):
            return found
    run.search.mkdir(exist_ok=True)
    job.threads(scoring=True)
    supernet = job.load_supernet()
    speed = speed_table(job, supernet.model)
    scorer = job.scorer(supernet.model)
    with EvaluationStore(run.evaluations) as store:
        base_scores = base_on_search_split(job, store, documents)
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
            for architecture in asked:
                scores = {t: store.get(architecture, weights, row_key(job, t), documents[t]) for t in documents}
                if any(score is None for score in scores.values()):
                    began = time.monotonic()
                    with torch.no_grad():
                        supernet.activate(architecture)
                        fresh = scorer.score("search", limit, architecture=architecture)
                    seconds = time.monotonic() - began
                    for name, score in fresh.items():
                        store.put(
                            architecture,
                            weights,
                            row_key(job, name),
                            documents[name],
                            score=score.value,
                            stderr=score.stderr,
                            n=score.n,
                            seconds=seconds / len(fresh),
                        )
                    scores = {t: store.get(architecture, weights, row_key(job, t), documents[t]) for t in documents}
                values = {name: score.score for name, score in scores.items() if score is not None}
                yield architecture, values | {"quality": relative_quality(job, values, base_scores)}

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

            try:
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
            except ValueError as error:
                raise RequestError(f"search: {error}") from error
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


def base_on_search_split(job: Job, store: Any, documents: dict[str, str]) -> dict[str, float]:
    """The base's own scores on the search documents, from the store where they were measured before."""
    base = job.structure.base
    rows = {t: store.get(base, job.base_fingerprint, row_key(job, t), documents[t]) for t in documents}
    if any(row is None for row in rows.values()):
        say("scoring the base")
        began = time.monotonic()
        scores = job.scorer(job.load_base()).score("search", job.recipe.searching.limit)
        for name, score in scores.items():
            store.put(
                base,
                job.base_fingerprint,
                row_key(job, name),
                documents[name],
                score=score.value,
                stderr=score.stderr,
                n=score.n,
                seconds=time.monotonic() - began,
            )
        rows = {t: store.get(base, job.base_fingerprint, row_key(job, t), documents[t]) for t in documents}
    values = {name: row.score for name, row in rows.items()}
    for name, value in values.items():
        if value == 0:
            raise RequestError(f"task {name}: the base scores 0, so nothing can be measured against it; choose another")
    return values


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
