"""Measure sub-networks of a run's super-network, here or in other processes, and keep every score in evaluations.db."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compressor.inputs import training_blocks
from compressor.job import Job
from compressor.recipe import Recipe
from compressor.run import Run
from compressor.stages.score_keys import (
    HELD_OUT,
    Keys,
    first_look_limit,
    held_out_keys,
    row_key,
    score_keys,
    scored_tasks,
)
from evals.quality import check_base, quality_stderr, relative_quality, standard_error
from search.workers import Processes, RayWorkers, Workers, WorkersLost
from supernet.architecture import Architecture
from supernet.common.errors import RequestError
from supernet.common.progress import bar, say
from supernet.families import family_of
from supernet.training.data import HELD_OUT_BLOCKS
from supernet.training.losses import divergence, token_losses
from supernet.training.traces import HiddenStates, trace

if TYPE_CHECKING:
    from evals.scoring.documents import Split
    from evals.scoring.scorer import TaskScore
    from search.store import EvaluationStore, Measurement


@dataclass(frozen=True)
class Request:
    """A sub-network to measure, on all documents of the search or, for a first look, on part of them."""

    architecture: Architecture
    first_look: bool = False

    def __str__(self) -> str:
        return f"architecture {self.architecture.key}"


@dataclass(frozen=True)
class Score:
    """One number of a sub-network, as the store keeps it."""

    task: str
    documents: str
    value: float
    stderr: float | None
    n: int
    seconds: float


class SubnetScorer:
    """Scores sub-networks of a run's super-network. Opens everything it needs once; may live in another process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        job.threads(scoring=True)
        self.supernet = job.load_supernet()
        self.scorer = job.scorer(self.supernet.model)
        self.keys = {look: score_keys(job, look) for look in ((False, True) if first_look_limit(job) else (False,))}
        self.held_out = HeldOut(job) if any(name in self.keys[False] for name in HELD_OUT) else None

    @torch.no_grad()
    def __call__(self, request: Request) -> list[Score]:
        """Everything that an evaluation measures. A full one brings the first look's numbers along: they are about
        some of the same documents."""
        self.supernet.activate(request.architecture)
        keys = {True: self.keys[True]} if request.first_look else self.keys
        scores = task_scores(self.job, self.scorer, keys, request.architecture)
        if self.held_out is not None:
            scores += self.held_out.scores(self.supernet.model, self.keys[False])
        return scores


def task_scores(job: Job, scorer: Any, keys: dict[bool, Keys], architecture: Architecture | None = None) -> list[Score]:
    """The scores of the network behind `scorer` on all documents of the search (`keys[False]`), on a first look's
    (`keys[True]`), or on both, from one pass: the latter are among the former.

    A score that is not a number (a network whose numbers overflowed) counts as the worst there is.
    """
    limits = {look: first_look_limit(job) if look else job.recipe.searching.limit for look in keys}
    began = time.monotonic()
    answers = scorer.ask("search", limits[False] if False in limits else limits[True], architecture)
    tasks = scored_tasks(job)
    found = {look: scorer.scores("search", limit, answers, tasks) for look, limit in limits.items()}
    seconds = (time.monotonic() - began) / sum(map(len, found.values()))
    return [
        Score(*keys[look][name], _finite(score), score.stderr, score.n, seconds)
        for look, scores in found.items()
        for name, score in scores.items()
    ]


def _finite(score: TaskScore) -> float:
    if not math.isnan(score.value):
        return score.value
    return 0.0 if score.higher_is_better else math.inf


class HeldOut:
    """Loss on the text that the fine-tuning held out, and how far the predictions there are from the base's, both in
    nats per token."""

    def __init__(self, job: Job) -> None:
        _, held_out = training_blocks(job, job.recipe.finetuning.tokens or 0).split()
        self.blocks = held_out[:HELD_OUT_BLOCKS].to(job.device).split(1)
        self.base: list[HiddenStates] = []
        if "kl_to_base" in job.recipe.searching.objectives:
            model = job.load_base().eval()
            with torch.no_grad():
                self.base = [trace(model, block) for block in self.blocks]
            # From here on only its head is needed, and a second copy of all layers might not fit.
            parent, _, layers = family_of(model.config).layers.rpartition(".")
            setattr(model.get_submodule(parent), layers, nn.ModuleList())

    @torch.no_grad()
    def scores(self, model: Any, keys: Keys) -> list[Score]:
        """Mean and standard error over the blocks, of those of the two that `keys` name."""
        began = time.monotonic()
        found: dict[str, list[float]] = {name: [] for name in HELD_OUT if name in keys}
        for number, block in enumerate(self.blocks):
            student = trace(model, block)
            if "held_out_loss" in found:
                loss = token_losses({"ce": 1.0}, student, None, 1.0) / max(1, len(student.targets))
                found["held_out_loss"].append(float(loss))
            if "kl_to_base" in found:
                found["kl_to_base"].append(float(divergence(student, self.base[number])))
        seconds = (time.monotonic() - began) / len(found)
        scores = []
        for name, values in found.items():
            numbers = torch.tensor(values, dtype=torch.float64)
            value = float(numbers.mean())
            stderr = float(numbers.std() / math.sqrt(len(values))) if len(values) > 1 else None
            scores.append(Score(*keys[name], math.inf if math.isnan(value) else value, stderr, len(values), seconds))
        return scores


def held_out_losses(job: Job, architectures: Sequence[Architecture]) -> list[float]:
    """Held-out loss of sub-networks of the run's super-network, in nats per token: from the store, or else measured
    and recorded."""
    from search.store import EvaluationStore

    keys = held_out_keys(job, ["held_out_loss"])
    key, weights = keys["held_out_loss"], job.run.supernet_weights
    with EvaluationStore(job.run.evaluations) as store:
        unknown = [one for one in architectures if store.get(one, weights, *key) is None]
        if unknown:
            job.threads(scoring=True)
            supernet, held_out = job.load_supernet(), HeldOut(job)
            with bar("held-out loss of the best", len(unknown)) as progress:
                for architecture in unknown:
                    supernet.activate(architecture)
                    record(store, architecture, weights, held_out.scores(supernet.model, keys))
                    progress.advance()
        rows = [store.get(one, weights, *key) for one in architectures]
    return [row.score for row in rows if row is not None]


def open_scorer(path: Path, recipe: dict[str, Any]) -> SubnetScorer:
    """A scorer of its own for a worker, from what the run holds on disk."""
    job = Job(Run(path), Recipe.model_validate(recipe))
    job.processes = job.recipe.searching.workers
    return SubnetScorer(job)


def open_workers(job: Job) -> Workers[Request, list[Score]]:
    """Who measures: as many workers as the recipe says, where it says. Raises `RequestError` where that cannot be."""
    settings = job.recipe.searching
    build = partial(open_scorer, job.run.path.resolve(), job.recipe.model_dump())
    if settings.executor == "processes":
        return Processes(build, settings.workers)
    try:
        return RayWorkers(build, settings.workers, gpus=int(job.device.type == "cuda"))
    except ValueError as error:
        raise RequestError(f"searching.executor: {error}") from error


class SubnetEvaluator:
    """All scores of the sub-networks of one super-network, from the store or else measured and recorded."""

    def __init__(self, job: Job, store: EvaluationStore, weights: str) -> None:
        self.job = job
        self.store = store
        self.weights = weights
        self.keys = {False: score_keys(job, False)}
        self.base = {False: base_scores(job, store, self.keys[False], first_look=False)}
        if first_look_limit(job):
            self.keys[True] = score_keys(job, True)
            self.base[True] = base_scores(job, store, self.keys[True], first_look=True)
        self._workers: Workers[Request, list[Score]] | None = None
        self._scorer: SubnetScorer | None = None

    def measure(
        self, asked: Sequence[Architecture], first_look: bool = False
    ) -> Iterator[tuple[Architecture, dict[str, float]]]:
        """Values by name of everything asked for, each recorded before it is told."""
        waiting = []
        for architecture in asked:
            if known := self._known(architecture, first_look):
                yield architecture, known
            else:
                waiting.append(Request(architecture, first_look))
        # Neighbours in this order share most leading layers, which are then computed once.
        waiting.sort(key=lambda request: (request.architecture.hidden_size, request.architecture.layers))
        for request, scores in self._map(waiting):
            record(self.store, request.architecture, self.weights, scores)
            yield request.architecture, self._known(request.architecture, first_look)

    def _known(self, architecture: Architecture, first_look: bool) -> dict[str, float]:
        """All values, or none where the store lacks one."""
        keys = self.keys[first_look]
        rows = {name: self.store.get(architecture, self.weights, *key) for name, key in keys.items()}
        known = {name: row for name, row in rows.items() if row is not None}
        if len(known) < len(keys):
            return {}
        values, base = {name: row.score for name, row in known.items()}, self.base[first_look]
        errors = {name: standard_error(row) for name, row in known.items()}
        return values | {
            "quality": relative_quality(self.job.tasks.tasks, values, base),
            "quality_stderr": quality_stderr(self.job.tasks.tasks, values, errors, base),
        }

    def _map(self, requests: list[Request]) -> Iterator[tuple[Request, list[Score]]]:
        settings = self.job.recipe.searching
        if settings.workers == 1 and settings.executor == "processes":
            if self._scorer is None and requests:
                self._scorer = SubnetScorer(self.job)
            yield from ((request, self._scorer(request)) for request in requests if self._scorer)
            return
        if self._workers is None:
            self._workers = open_workers(self.job)
        try:
            yield from self._workers.map(requests)
        except WorkersLost as error:
            raise RequestError(
                f"{error}, most likely for want of memory; use fewer --workers, or a smaller batch_tokens; "
                "what was measured is kept"
            ) from error

    def close(self) -> None:
        """End the workers, if there are any."""
        if self._workers is not None:
            self._workers.close()


def record(store: EvaluationStore, architecture: Architecture, weights: str, scores: Sequence[Score]) -> None:
    """Put scores into the store; they are on disk when this returns."""
    for score in scores:
        store.put(
            architecture,
            weights,
            score.task,
            score.documents,
            score=score.value,
            stderr=score.stderr,
            n=score.n,
            seconds=score.seconds,
        )


def base_scores(job: Job, store: EvaluationStore, keys: Keys, first_look: bool) -> dict[str, float]:
    """The base's own scores on the search documents. Raises `RequestError` where nothing can be measured against it."""
    wanted = {name: keys[name] for name in scored_tasks(job)}

    def known() -> dict[str, Measurement]:
        rows = {k: store.get(job.structure.base, job.base_fingerprint, *key) for k, key in wanted.items()}
        return {name: row for name, row in rows.items() if row is not None}

    if len(known()) < len(wanted):
        say("scoring the base")
        job.threads(scoring=True)
        with torch.no_grad():
            scores = task_scores(job, job.scorer(job.load_base()), {first_look: keys})
        record(store, job.structure.base, job.base_fingerprint, scores)
    found = {name: row.score for name, row in known().items()}
    for name in job.tasks.tasks:
        check_base(name, found[name])
    return found


def stored_scores(
    job: Job,
    store: EvaluationStore,
    architecture: Architecture,
    weights: str,
    split: Split,
    score: Callable[[], dict[str, TaskScore]],
) -> dict[str, Measurement]:
    """Every task's score of a network on all documents of a split: from the store, or else from `score`, recorded."""
    keys = {name: (row_key(job, name), job.tasks.fingerprint(name, split)) for name in job.tasks.tasks}

    def known() -> dict[str, Measurement]:
        rows = {name: store.get(architecture, weights, *key) for name, key in keys.items()}
        return {name: row for name, row in rows.items() if row is not None}

    if len(known()) < len(keys):
        began = time.monotonic()
        fresh = score()
        seconds = (time.monotonic() - began) / len(fresh)
        scores = [Score(*keys[name], _finite(s), s.stderr, s.n, seconds) for name, s in fresh.items()]
        record(store, architecture, weights, scores)
    return known()
