"""Measure sub-networks and find the Pareto front: fills `speed.json` and `search/`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from itertools import takewhile
from typing import Any

from compressor.checks import check_targets
from compressor.job import Job
from compressor.schedule import stage
from compressor.sizing import (
    byte_limit,
    largest_in_training,
    sizes_asked_for,
    sizes_searched_for,
    smallest_in_training,
    smallest_storage,
    smallest_to_search,
)
from compressor.stages.front import BesideChance, FrontRecord, SearchPart, read_front
from compressor.stages.repairing import repair_inputs, rounding_inputs, search_variants, searched_weights
from compressor.stages.requalify import quality_of, requalified
from compressor.stages.score_keys import measurable
from compressor.stages.search_parts import earlier_result, for_search, parts_of, searches_in_turn
from compressor.stages.subnet_scores import SubnetEvaluator, check_workers
from compressor.stages.warm_start import proposals, sources
from evals.quality import DEFINITION
from evals.speed.table import SpeedTable
from evals.warm_starts import GREEDY
from export.layouts.table import copies_hold
from search.algorithms import algorithm
from search.control import likeness, predicted_control
from search.objectives import SPEEDS, Constraint, Evaluation, Objective, choose, computed
from search.run import GenerationRecord, SearchResult, greedy_path
from search.run import search as run_search
from search.sampling import uniform_members
from search.store import EvaluationStore
from supernet.architecture import Architecture, Structure
from supernet.common.errors import RequestError, reading
from supernet.common.files import write_json
from supernet.common.metrics import record
from supernet.common.progress import Bar, bar, say
from supernet.slicing import extract, fits_plain_class

GREEDY_SHARE = 0.25
"""Share of the evaluations that a warm start from greedy perturbation may take."""
LARGER_SHARE = 1 / 7
"""Share of the evaluations that goes to sizes between the largest asked for and the base, so that any of them can be
picked later."""


def search(job: Job) -> FrontRecord:
    """Measure sub-networks and find the Pareto front. Everything measured is kept; returns what front.json holds.

    A recipe may name earlier searches for other targets (`searching.earlier`): each search goes on from what the ones
    before it measured, and the front is that of all.
    """
    recipe, run = job.recipe, job.run
    if not recipe.tasks:
        raise RequestError(f"{run.path}: no tasks yet; say --tasks")
    if run.manifest(run.supernet) is None:
        raise RequestError(f"{run.path}: no fine-tuned super-network yet; run compressor finetune or compress")
    # 1. What was searched already is as it was.
    check_searching(job)
    searches = searches_in_turn(job)
    wanted = [inputs for _, inputs in searches]
    front = read_front(run.front) if run.front.is_file() and job.redo != "search" else None
    done = [part["inputs"] for part in parts_of(front)]
    if front is not None and wanted == done[: len(wanted)]:
        return current_front(job)
    # 2. Prepare: timings of the layers, objectives, where the search starts.
    run.search.mkdir(exist_ok=True)
    job.threads(scoring=True)
    speed = speed_table(job, lambda: job.load_supernet().model)
    if repair_inputs(job):
        search_variants(job, job.load_supernet())  # moments are gathered once, before workers want them
    # 3. One search after another, each from what those before it measured.
    within = bounds_of_front(job)
    in_common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(wanted, done, strict=False)))
    if in_common:
        front = current_front(job)
    parts = parts_of(front)[:in_common]
    result = earlier_result(job, front, parts) if front is not None and parts else None
    with (
        EvaluationStore(run.evaluations) as store,
        closing(SubnetEvaluator(job, store, searched_weights(job))) as evaluator,
    ):
        for part, inputs in searches[in_common:]:
            starts = proposals(part)
            with (
                job.schedule.stage("search"),
                bar("searching", part.recipe.searching.evaluations or 0) as progress,
            ):
                shown = SearchProgress(part, progress, evaluator)
                result = run_searches(part, evaluator, speed.predict, starts, shown, within, result)
            say(shown.outcome)
            # 4. Record.
            parts.append(part_record(part, inputs, result))
            front = {
                "inputs": inputs,
                "weights": run.supernet_weights,
                "scored_weights": searched_weights(job),
                **rounding_inputs(job),
                "base": {name: score.value for name, score in evaluator.base.items()},
                "quality": quality_of(evaluator.scale),
                "base_decode_tps": untouched_decode_tps(job, speed.predict),
                "parts": parts,
                **result.to_dict(),
                **beside_chance(part, result, speed.predict),
            }
            write_json(run.front, front)
            run.log(f"searched: {len(result.evaluations)} sub-networks measured")
    assert front is not None
    return front


def bounds_of_front(job: Job) -> list[Constraint]:
    """The sizes that the front lies within: outside of what was trained is none, but below it where such a size is
    asked for, of which this warns."""
    parameters, bounds = computed(job.structure)["parameters"], list[Constraint]()
    if asked := sizes_searched_for(job):
        trained = smallest_in_training(job)[1]
        bounds.append(Constraint(parameters, minimum=smallest_to_search(job)))
        if min(asked) <= trained:
            say(
                f"warning: nothing below {trained:,.0f} parameters was trained, and {min(asked):,} are asked for; "
                "a run of its own for that size trains them"
            )
    if (largest := largest_in_training(job)) != job.structure.base:
        bounds.append(Constraint(parameters, maximum=job.structure.parameters(largest)))
    return bounds


def part_record(part: Job, inputs: str, result: SearchResult) -> SearchPart:
    """What front.json holds of one search: what it was for, and how much was measured when it ended."""
    return {
        "inputs": inputs,
        "targets": part.recipe.targets.model_dump(),
        "evaluations": part.recipe.searching.evaluations or 0,
        "measured": len(result.evaluations),
        "generations": len(result.generations),
    }


def beside_chance(job: Job, result: SearchResult, predict: Callable[[Architecture], dict[str, float]]) -> BesideChance:
    """What front.json holds of how the search compares with a random one, and whether it could learn anything."""
    objectives, constraints = goals(job, predict)
    of = judged(objectives)
    control = predicted_control(job.space, result.evaluations, of, constraints, seed=job.recipe.seed)
    like = likeness(job.space, result.evaluations, of)
    for found in (control, like):
        if found is not None:
            say(found.text)
    return {
        "control": None if control is None else control.model_dump(),
        "likeness": None if like is None else like.model_dump(),
    }


def judged(objectives: Sequence[Objective]) -> Objective:
    """The objective that a search is judged by: the first that is measured."""
    return next(objective for objective in objectives if objective.kind == "measured")


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


def run_searches(
    job: Job,
    evaluator: SubnetEvaluator,
    predict: Callable[[Architecture], dict[str, float]],
    starts: list[Architecture],
    progress: SearchProgress,
    within: Sequence[Constraint],
    before: SearchResult | None = None,
) -> SearchResult:
    """Search by the recipe's algorithm, from what was measured `before` where anything was; the result holds both, and
    its front lies `within` these bounds.

    A first search begins with greedy perturbation, where the warm start names it, and ends among the sizes that are
    larger than those asked for (`LARGER_SHARE`).
    """
    settings = job.recipe.searching
    budget = settings.evaluations or 1
    objectives, constraints = goals(job, predict)
    common: dict[str, Any] = {
        "population": settings.population,
        "seed": job.recipe.seed,
        "on_evaluation": progress.evaluated,
    }
    searching = partial(
        run_search,
        job.space,
        objectives,
        evaluator.measure,
        algorithm=settings.algorithm,
        within=within,
        screening=partial(evaluator.measure, fidelity="screening") if "screening" in evaluator.keys else None,
        share=settings.screening or 0.0,
        on_generation=progress.generation,
        **common,
    )
    # 1. The sizes asked for.
    sizes = sizes_asked_for(job)
    larger = evaluations_of_larger(job) if before is None else 0
    known = [] if before is None else before.evaluations
    if GREEDY in settings.warm_start and before is None:
        share = int(GREEDY_SHARE * budget)
        known = greedy_path(
            job.space, objectives, evaluator.measure, evaluations=share, constraints=constraints, **common
        )
    result = searching(
        evaluations=(0 if before is None else len(known)) + budget - larger,
        constraints=constraints,
        include=uniform_architectures(job),
        warm_start=starts,
        known=known,
        generations=() if before is None else before.generations,
    )
    # 2. Those between them and the base.
    if larger:
        uniform = uniform_architectures(job, larger=True)
        result = searching(
            evaluations=len(result.evaluations) + larger,
            constraints=[Constraint(computed(job.structure)["parameters"], minimum=max(sizes))],
            include=uniform[: larger // 4],
            # So few evaluations are better spent on what is known to be good than on what may be fast.
            warm_start=proposals(job, above=max(sizes), most=larger - larger // 4),
            known=result.evaluations,
            generations=result.generations,
        )
    return result


def evaluations_of_larger(job: Job) -> int:
    """How many of the evaluations go to sizes between the largest asked for and the base (`LARGER_SHARE`): none where
    no size is asked for, and where nothing larger is trained, or there (what a vocabulary is cut to is smaller)."""
    sizes, base = sizes_asked_for(job), job.structure.base
    if not sizes or largest_in_training(job) != base or max(sizes) >= job.structure.parameters(base):
        return 0
    return round(LARGER_SHARE * (job.recipe.searching.evaluations or 1))


class SearchProgress:
    """Shows how the search goes: the best so far on the bar, each generation in the log, predictors that fail."""

    def __init__(self, job: Job, bar: Bar, evaluator: SubnetEvaluator) -> None:
        self._job, self._bar = job, bar
        self._evaluator, self._stored = evaluator, evaluator.stored
        self._largest = max(sizes_asked_for(job), default=None)
        self._best = (-math.inf, 0)
        """Quality, and parameters; of those as good, the fewest."""
        self._best_stderr = 0.0
        self._set_aside: dict[str, list[str]] = {}

    def evaluated(self, evaluation: Evaluation) -> None:
        """Move the bar by one measured sub-network. The best is of those that were scored on all documents of the
        search, by the quality that a pick has."""
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
        asked = evaluation.full and (self._largest is None or parameters <= self._largest)
        quality, best = evaluation.values["quality"], self._best
        if asked and (quality, -parameters) > (best[0], -best[1]):
            self._best = quality, parameters
            self._best_stderr = evaluation.values.get("quality_stderr", 0.0)
        share = self._best[1] / self._job.untouched_parameters
        self._bar.before = self._evaluator.stored - self._stored
        self._bar.advance(note=f"best quality {self._best[0]:.3f} at {share:.2f} of the parameters")

    @property
    def outcome(self) -> str:
        """The best that was measured, and how what is picked may differ from it."""
        quality, parameters = self._best
        share = parameters / self._job.untouched_parameters
        line = (
            f"best quality {quality:.3f} ± {self._best_stderr:.3f} on the search documents, at {share:.2f} of the "
            "parameters"
        )
        if self._job.recipe.targets.max_drop is None:
            line += "; of all that this does not tell from it, held-out loss and --prefer pick one"
        return line

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
        constraints.append(Constraint(exact["parameters"], maximum=max(sizes), minimum=smallest_to_search(job)))
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
    objectives, constraints = goals(for_search(job), lambda architecture: dict.fromkeys(SPEEDS, 1.0))
    sources(job)
    if not job.run.front.is_file():  # whoever goes on from a search may be on another machine
        check_workers(job)
    if job.recipe.searching.earlier:
        for part, _ in searches_in_turn(job):
            check_targets(part)
    try:
        algorithm(job.recipe.searching.algorithm)(job.space, objectives, constraints=constraints)
    except ValueError as error:
        raise RequestError(f"searching.algorithm: {error}") from error


def uniform_architectures(job: Job, larger: bool = False) -> list[Architecture]:
    """A few architectures that the plain layout can hold, within the sizes asked for, or `larger` ones: every search
    measures some."""
    sizes = sizes_asked_for(job)
    config, parameters = job.checkpoint.config, job.structure.parameters
    holds = partial(copies_hold, config=config, layouts=job.recipe.formats)
    most = None if larger else max(sizes, default=None)
    uniform = [a for a in uniform_members(job.space, 6, most, holds) if fits_plain_class(config, a)]
    if job.space.bits:
        return []  # as stored, they have more bytes than anything that is looked for
    if larger:
        return [a for a in uniform if max(sizes) < parameters(a) < parameters(job.structure.base)]
    if sizes:
        low = smallest_to_search(job)
        uniform = [a for a in uniform if parameters(a) >= low] or uniform[-1:]
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
