"""The searches of a run, one after another: what each depends on, and what one takes over from those before it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from compressor.job import Job
from compressor.recipe import EarlierSearch, Searching, Targets, former_names
from compressor.run import Run
from compressor.stages.front import FrontRecord, SearchPart, read_front
from compressor.stages.repairing import rounding_inputs, search_repair_inputs
from compressor.stages.score_keys import fidelities, score_keys
from compressor.stages.warm_start import sources
from search.objectives import Evaluation
from search.run import SearchResult
from supernet.common.files import fingerprint
from supernet.device import device_name

BESIDE = {"workers", "executor", "earlier", "targets"}
"""Of the recipe's section: who measures, which moves no number, and what stands elsewhere among the inputs."""


def search_inputs(job: Job, weights: str) -> dict[str, object]:
    """All that the search depends on; another value of any of it makes another search."""
    recipe = job.recipe
    return {
        "weights": weights,
        "scores": [{name: key.place for name, key in score_keys(job, one).items()} for one in fidelities(job)],
        "searching": former_names(job.given.searching.model_dump(exclude=BESIDE)),
        "warm_start": sources(job),
        "targets": recipe.targets.model_dump(),
        "space": job.space.to_dict(),
        "seed": recipe.seed,
        "device": device_name(job.device),
        "speed_table": repr(job.given_speed_table()) if recipe.speed_table is not None else None,
        **search_repair_inputs(job),
        **rounding_inputs(job),
    }


def for_search(job: Job) -> Job:
    """The job with the targets of the search, where others are picked for now."""
    if job.recipe.searching.targets is None:
        return job
    searching = copy.copy(job)
    for name in ("recipe", "given"):
        own = getattr(job, name)
        section = own.searching.model_copy(update={"targets": None})
        setattr(searching, name, own.model_copy(update={"targets": own.searched_for, "searching": section}))
    return searching


def searches_in_turn(job: Job) -> list[tuple[Job, str]]:
    """Every search that the recipe names, as a job of its own, with the fingerprint of all that it and those before it
    depend on; the present one is the last."""
    recipe, weights = job.recipe, job.run.supernet_weights
    present = EarlierSearch.model_construct(targets=recipe.searched_for, evaluations=recipe.searching.evaluations)
    _ = job.space, job.tasks, job.device  # opened once for all of them
    searches: list[tuple[Job, str]] = []
    for one in [*recipe.searching.earlier, present]:
        part = copy.copy(job)
        changed = {"evaluations": one.evaluations, "earlier": [], "targets": None}
        for name in ("recipe", "given"):
            own = getattr(job, name)
            searching = own.searching.model_copy(update=changed)
            setattr(part, name, own.model_copy(update={"targets": one.targets, "searching": searching}))
        inputs = search_inputs(part, weights)
        if searches:
            inputs["after"] = searches[-1][1]
        searches.append((part, fingerprint(inputs)))
    return searches


def parts_of(front: FrontRecord | None) -> list[SearchPart]:
    """The searches that a front.json holds, in turn, each with its inputs and how much was measured when it ended. An
    older file holds one search, and does not say what it was for."""
    if front is None:
        return []
    whole: SearchPart = {
        "inputs": front["inputs"],
        "measured": len(front["evaluations"]),
        "generations": len(front["generations"]),
    }
    return front.get("parts") or [whole]


def earlier_result(job: Job, front: FrontRecord, parts: Sequence[SearchPart]) -> SearchResult:
    """What the searches `parts` of a front.json measured, for another to go on from."""
    evaluations = [Evaluation.from_dict(row) for row in front["evaluations"][: parts[-1]["measured"]]]
    generations = front["generations"][: parts[-1]["generations"]]
    return SearchResult(job.space, (), (), front["algorithm"], job.recipe.seed, evaluations, generations)


def named_in(targets: Mapping[str, object]) -> dict[str, object]:
    """The targets that say anything."""
    return {name: value for name, value in targets.items() if value not in (None, [])}


def further_search(run: Run, given: Mapping[str, object]) -> dict[str, object]:
    """Options of `compressor search` that ask a searched run for another size or a further budget, as keys of the
    recipe: with them, the search goes on from what was measured. Nothing where they ask for anything else.

    The same search asked for again is none that goes on: it is there, or resumed.
    """
    keys = {"targets.max_params", "searching.evaluations"}
    if not keys & set(given) or set(given) - keys - {"searching.workers"} or not run.front.is_file():
        return {}
    front = read_front(run.front)
    parts = front.get("parts", [])
    if not parts or front["weights"] != run.supernet_weights:
        return {}
    recipe = run.recipe().resolved()
    sizes = given.get("targets.max_params")
    targets = recipe.searched_for if sizes is None else Targets.model_validate({"max_params": sizes})
    named = given.get("searching.evaluations", parts[-1]["evaluations"])
    evaluations = Searching.model_validate({"evaluations": named}).evaluations
    searches: list[dict[str, object]] = [
        {"targets": named_in(part["targets"]), "evaluations": part["evaluations"]} for part in parts
    ]
    asked: dict[str, object] = {"targets": named_in(targets.model_dump()), "evaluations": evaluations}
    earlier = searches[: searches.index(asked)] if asked in searches else searches
    return {"searching.earlier": earlier, "searching.evaluations": evaluations}
