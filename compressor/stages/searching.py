"""Measure sub-networks and find the Pareto front: fills `search/`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from itertools import takewhile
from typing import Any

from compressor.checks import check_targets
from compressor.job import Job
from compressor.sizing import (
    largest_in_training,
    sizes_asked_for,
    sizes_searched_for,
    smallest_in_training,
    smallest_to_search,
)
from compressor.stages.front import BesideChance, FrontRecord, SearchPart, read_front
from compressor.stages.goals import goals, judged
from compressor.stages.layer_timings import speed_table, untouched_decode_tps
from compressor.stages.repairing import repair_inputs, rounding_inputs, search_variants, searched_weights
from compressor.stages.requalify import current_front, quality_of
from compressor.stages.search_parts import earlier_result, for_search, parts_of, searches_in_turn
from compressor.stages.search_progress import SearchProgress
from compressor.stages.subnet_scores import SubnetEvaluator, check_workers
from compressor.stages.warm_start import proposals, sources
from evals.warm_starts import GREEDY
from export.layouts.gguf.checks import check_alike
from export.layouts.table import copies_hold
from search.algorithms import algorithm
from search.control import likeness, predicted_control
from search.objectives import SPEEDS, Constraint, computed
from search.run import SearchResult, greedy_path
from search.run import search as run_search
from search.sampling import any_uniform_member, uniform_members
from search.store import EvaluationStore
from supernet.architecture import Architecture
from supernet.common.errors import NotHeldError, RequestError
from supernet.common.files import write_json
from supernet.common.progress import bar, say
from supernet.slicing import fits_plain_class

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
    larger = evaluations_of_larger(job) if before is None else 0
    known, generations = ([], []) if before is None else (before.evaluations, before.generations)
    total = len(known) + budget - larger
    objectives, constraints = goals(job, predict)
    common: dict[str, Any] = {
        "population": settings.population,
        "seed": job.recipe.seed,
        "on_evaluation": progress.evaluated,
    }
    # 1. Greedy perturbation, which counts towards the budget.
    if GREEDY in settings.warm_start and before is None:
        share = int(GREEDY_SHARE * budget)
        known = greedy_path(
            job.space, objectives, evaluator.measure, evaluations=share, constraints=constraints, **common
        )
    # 2. The sizes asked for.
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
    result = searching(
        evaluations=total,
        constraints=constraints,
        include=uniform_architectures(job),
        warm_start=starts,
        known=known,
        generations=generations,
    )
    if not larger:
        return result
    # 3. Those between them and the base.
    largest, uniform = max(sizes_asked_for(job)), uniform_architectures(job, larger=True)
    return searching(
        evaluations=len(result.evaluations) + larger,
        constraints=[Constraint(computed(job.structure)["parameters"], minimum=largest)],
        include=uniform[: larger // 4],
        # So few evaluations are better spent on what is known to be good than on what may be fast.
        warm_start=proposals(job, above=largest, most=larger - larger // 4),
        known=result.evaluations,
        generations=result.generations,
    )


def evaluations_of_larger(job: Job) -> int:
    """How many of the evaluations go to sizes between the largest asked for and the base (`LARGER_SHARE`): none where
    no size is asked for, and where nothing larger is trained, or there (what a vocabulary is cut to is smaller)."""
    sizes, base = sizes_asked_for(job), job.structure.base
    if not sizes or largest_in_training(job) != base or max(sizes) >= job.structure.parameters(base):
        return 0
    return round(LARGER_SHARE * (job.recipe.searching.evaluations or 1))


def check_searching(job: Job) -> None:
    """Refuse, before anything is measured, what the search could not do."""
    # Speeds are not known yet, and not needed to see whether the rest makes sense.
    objectives, constraints = goals(for_search(job), lambda architecture: dict.fromkeys(SPEEDS, 1.0))
    sources(job)
    if not job.run.front.is_file():  # whoever goes on from a search may be on another machine
        check_workers(job)
        check_uniform(job)
    if job.recipe.searching.earlier:
        for part, _ in searches_in_turn(job):
            check_targets(part)
    try:
        algorithm(job.recipe.searching.algorithm)(job.space, objectives, constraints=constraints)
    except ValueError as error:
        raise RequestError(f"searching.algorithm: {error}") from error


def check_uniform(job: Job) -> None:
    """Refuse `--format uniform` where the search could measure nothing for it: in a space without a network whose
    layers are alike, of the sizes asked for, that the copies of it hold, or with too few evaluations for one."""
    if "uniform" not in job.recipe.formats:
        return
    size = min(sizes_asked_for(job), default=None)
    if any_uniform_member(job.space, size, partial(is_held_alike, job)) is None:
        small = "" if size is None else f" of at most {size:,} parameters"
        alike = any_uniform_member(job.space, size, partial(fits_plain_class, job.checkpoint.config))
        if alike is not None:  # so llama.cpp is in the way
            try:
                check_alike(job.checkpoint.config, alike)
            except NotHeldError as error:
                raise RequestError(
                    f"--format gguf: of networks{small} whose layers are alike, this space has none that llama.cpp "
                    f"holds: {error}; leave the format out"
                ) from error
        if any_uniform_member(job.space) is not None:
            raise RequestError(
                f"--format uniform: no network of this space{small} has layers that are alike; ask for a larger size, "
                "or leave the format out"
            )
        return  # of a base with layers of several kinds: what is alike is not made, but may be found
    if job.recipe.searching.evaluations == 2:  # the base and the smallest
        raise RequestError("--evaluations: --format uniform needs 3, so that the search measures a network for it")


def is_held_alike(job: Job, architecture: Architecture) -> bool:
    """Whether the family's plain class holds an architecture, and so do the layouts that are written of such ones."""
    config = job.checkpoint.config
    return fits_plain_class(config, architecture) and copies_hold(architecture, config, job.recipe.formats)


def uniform_architectures(job: Job, larger: bool = False) -> list[Architecture]:
    """A few architectures that the plain layout can hold, within the sizes asked for, or `larger` ones: every search
    measures some. First one of at most the smallest size, whatever is left of the budget."""
    if job.space.bits:
        return []  # as stored, they have more bytes than anything that is looked for
    sizes, parameters = sizes_asked_for(job), job.structure.parameters

    def members(most: int | None) -> list[Architecture]:
        return uniform_members(job.space, 6, most, partial(is_held_alike, job))

    if larger:
        return [a for a in members(None) if max(sizes) < parameters(a) < parameters(job.structure.base)]
    if not sizes:
        return members(None)
    low = smallest_to_search(job)
    largest_of_each = [a for size in sorted(sizes) for a in members(size)[-1:]]
    return list(dict.fromkeys([*largest_of_each, *(a for a in members(max(sizes)) if parameters(a) >= low)]))
