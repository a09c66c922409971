"""Measure sub-networks of a run's super-network, here or in other processes, and keep every score in evaluations.db."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from compressor.stages.repairing import load_searched, searched_weights
from compressor.stages.score_keys import (
    HELD_OUT,
    Fidelity,
    Keys,
    document_limit,
    fidelities,
    held_out_keys,
    score_keys,
    scored_tasks,
)
from evals.quality import QualityScale
from search.scores import Score, ScoreKey
from search.store import EvaluationStore
from search.workers import Processes, RayWorkers, Workers, WorkersLost, check_ray
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture
from supernet.common.errors import RequestError
from supernet.common.progress import bar, say
from supernet.families import family_of
from supernet.training.data import HELD_OUT_BLOCKS
from supernet.training.losses import divergence, token_losses
from supernet.training.traces import HiddenStates, LayerCache, trace

if TYPE_CHECKING:
    from evals.scoring.scorer import Scorer

FIRST_BLOCKS, FINALISTS = 4, 3
"""Blocks of held-out text on which all sub-networks are measured that tasks do not tell apart, and how many of the
best of them, and of the fastest, then on all blocks."""

Measured = list[tuple[ScoreKey, Score, float]]
"""Scores with where they are kept and the seconds that each took."""


@dataclass(frozen=True)
class Request:
    """A sub-network to measure, on all documents of the search or, for screening, on part of them."""

    architecture: Architecture
    fidelity: Fidelity = "full"

    def __str__(self) -> str:
        return f"architecture {self.architecture.key}"


class SubnetScorer:
    """Scores sub-networks of a run's super-network. Opens everything it needs once; may live in another process."""

    def __init__(self, job: Job, by_text: bool = False) -> None:
        """`by_text`: the held-out loss is needed for the quality (`QualityScale.by_text`)."""
        self.job = job
        job.threads(scoring=True)
        self._opened: dict[Path, tuple[SuperNetwork, Scorer]] = {}
        self.open(job.structure.base)
        self.keys = {fidelity: search_keys(job, fidelity, by_text) for fidelity in fidelities(job)}
        self.held_out = HeldOut(job) if any(name in self.keys["full"] for name in HELD_OUT) else None

    def open(self, architecture: Architecture) -> tuple[SuperNetwork, Scorer]:
        """The super-network that a sub-network is one of, with what scores it."""
        folder = self.job.supernet_folder(architecture)
        if folder not in self._opened:
            supernet = load_searched(self.job, architecture)
            self._opened[folder] = supernet, self.job.scorer(supernet.model)
        return self._opened[folder]

    @torch.no_grad()
    def __call__(self, request: Request) -> Measured:
        """Everything that an evaluation measures. A full one gives the screening scores too: they are about some of
        the same documents."""
        supernet, scorer = self.open(request.architecture)
        supernet.activate(request.architecture)
        keys = {key: value for key, value in self.keys.items() if request.fidelity in ("full", key)}
        measured = task_scores(self.job, scorer, keys, request.architecture)
        if self.held_out is not None:
            measured += self.held_out.scores(supernet, self.keys["full"])
        return measured


def task_scores(
    job: Job, scorer: Scorer, keys: Mapping[Fidelity, Keys], architecture: Architecture | None = None
) -> Measured:
    """The scores of the network behind `scorer` at the fidelities of `keys`, from one pass: the documents of the
    screening are among all of the search."""
    limits = {fidelity: document_limit(job, fidelity) for fidelity in keys}
    began = time.monotonic()
    answers = scorer.ask("search", limits["full"] if "full" in limits else limits["screening"], architecture)
    tasks = scored_tasks(job)
    scores = {fidelity: scorer.scores("search", limit, answers, tasks) for fidelity, limit in limits.items()}
    seconds = (time.monotonic() - began) / sum(map(len, scores.values()))
    return [(keys[fidelity][name], score, seconds) for fidelity, rows in scores.items() for name, score in rows.items()]


class HeldOut:
    """Loss on the text that the fine-tuning held out, and how far the predictions there are from the base's, both in
    nats per token."""

    def __init__(self, job: Job) -> None:
        _, held_out = training_blocks(job, job.recipe.finetuning.tokens or 0).split()
        self.blocks = held_out[:HELD_OUT_BLOCKS].to(job.device).split(1)
        self.passes: LayerCache | None = None
        """Where sub-networks come one after another, what keeps the leading layers that they have in common."""
        self.base: list[HiddenStates] = []
        if "kl_to_base" in job.recipe.searching.objectives:
            model = job.load_base().eval()
            with torch.no_grad():
                self.base = [trace(model, block) for block in self.blocks]
            # From here on only its head is needed, and a second copy of all layers might not fit.
            parent, _, layers = family_of(model.config).layers.rpartition(".")
            setattr(model.get_submodule(parent), layers, nn.ModuleList())

    @torch.no_grad()
    def scores(self, supernet: SuperNetwork, keys: Keys, blocks: int = HELD_OUT_BLOCKS) -> Measured:
        """Of the active sub-network, mean and standard error over the first blocks, of those of the two that `keys`
        name."""
        began = time.monotonic()
        values: dict[str, list[float]] = {name: [] for name in HELD_OUT if name in keys}
        for number, block in enumerate(self.blocks[:blocks]):
            student = trace(supernet.model, block) if self.passes is None else self.passes.trace(number, block)
            if "held_out_loss" in values:
                loss = token_losses({"ce": 1.0}, student, None, 1.0) / max(1, len(student.targets))
                values["held_out_loss"].append(float(loss))
            if "kl_to_base" in values:
                values["kl_to_base"].append(float(divergence(student, self.base[number])))
        seconds = (time.monotonic() - began) / len(values)
        measured: Measured = []
        for name, row in values.items():
            numbers = torch.tensor(row, dtype=torch.float64)
            stderr = float(numbers.std() / math.sqrt(len(row))) if len(row) > 1 else None
            measured.append((keys[name], keys[name].score(float(numbers.mean()), stderr, len(row)), seconds))
        return measured


def held_out_losses(job: Job, architectures: Sequence[Architecture], blocks: int) -> list[float]:
    """Held-out losses of sub-networks of the run's super-network on the first blocks, nats per token: from the store,
    or else measured and recorded."""
    return [score.value for score in HeldOutLosses(job).of(architectures, blocks)]


class HeldOutLosses:
    """Held-out losses from the store; the super-network is loaded once, where one is missing."""

    def __init__(self, job: Job) -> None:
        self._job, self._weights = job, searched_weights(job)
        self._opened: dict[Path, tuple[SuperNetwork, HeldOut]] = {}

    def of(self, architectures: Sequence[Architecture], blocks: int) -> list[Score]:
        """Of sub-networks of the run's super-network on the first blocks, in nats per token: from the store, or else
        measured and recorded."""
        keys = held_out_keys(self._job, ["held_out_loss"], blocks)
        key, weights = keys["held_out_loss"], self._weights
        with EvaluationStore(self._job.run.evaluations) as store:
            unknown = [architecture for architecture in architectures if store.get(architecture, weights, key) is None]
            if unknown:
                # Neighbours in this order share most leading layers, which are then computed once.
                unknown.sort(key=lambda architecture: (architecture.hidden_size, architecture.layers))
                with bar(f"held-out loss of the best, {blocks} blocks", len(unknown)) as progress:
                    for architecture in unknown:
                        supernet, held_out = self._open(architecture)
                        supernet.activate(architecture)
                        record(store, architecture, weights, held_out.scores(supernet, keys, blocks))
                        progress.advance()
            scores = [store.get(architecture, weights, key) for architecture in architectures]
        return [score for score in scores if score is not None]

    def _open(self, architecture: Architecture) -> tuple[SuperNetwork, HeldOut]:
        folder = self._job.supernet_folder(architecture)
        if folder not in self._opened:
            self._job.threads(scoring=True)
            supernet = load_searched(self._job, architecture)
            held_out = HeldOut(self._job)
            held_out.passes = LayerCache(supernet)
            self._opened[folder] = supernet, held_out
        return self._opened[folder]


def open_scorer(path: Path, recipe: dict[str, Any], by_text: bool = False) -> SubnetScorer:
    """A scorer for a worker, from what the run holds on disk."""
    job = Job(Run(path), Recipe.model_validate(recipe))
    job.processes = job.recipe.searching.workers
    return SubnetScorer(job, by_text)


def check_workers(job: Job) -> None:
    """Refuse workers that cannot be had."""
    settings = job.recipe.searching
    if settings.executor == "ray":
        try:
            check_ray()
        except ValueError as error:
            raise RequestError(f"searching.executor: {error}") from error
    if job.device.type == "cuda" and settings.executor == "processes" and settings.workers > 1:
        raise RequestError(
            "--workers: processes would share one GPU, which makes none of them faster; leave it at 1, or give each "
            "worker a GPU through Ray (searching.executor: ray)"
        )


def open_workers(job: Job, by_text: bool = False) -> Workers[Request, Measured]:
    """The workers that the recipe asks for. Raises `RequestError` where they cannot be had."""
    check_workers(job)
    settings = job.recipe.searching
    build = partial(open_scorer, job.run.path.resolve(), job.given.model_dump(), by_text)
    if settings.executor == "processes":
        return Processes(build, settings.workers)
    return RayWorkers(build, settings.workers, gpus=int(job.device.type == "cuda"))


class SubnetEvaluator:
    """All scores of the sub-networks of one super-network, from the store or else measured and recorded."""

    def __init__(self, job: Job, store: EvaluationStore, weights: str) -> None:
        self.job = job
        self.store = store
        self.weights = weights
        self.base = base_scores(job, store)
        self.scale = search_scale(job, store, self.base)
        self.keys = {fidelity: search_keys(job, fidelity, self.scale.by_text) for fidelity in fidelities(job)}
        self.stored = 0
        """How many of those that were asked for in full the store had already."""
        self._workers: Workers[Request, Measured] | None = None
        self._scorer: SubnetScorer | None = None

    def measure(
        self, asked: Sequence[Architecture], fidelity: Fidelity = "full"
    ) -> Iterator[tuple[Architecture, dict[str, float]]]:
        """Values by name of everything asked for, each recorded before it is told."""
        waiting = []
        for architecture in asked:
            if values := self._known(architecture, fidelity):
                self.stored += fidelity == "full"
                yield architecture, values
            else:
                waiting.append(Request(architecture, fidelity))
        # Neighbours in this order share most leading layers, which are then computed once.
        waiting.sort(key=lambda request: (request.architecture.hidden_size, request.architecture.layers))
        for request, measured in self._map(waiting):
            record(self.store, request.architecture, self.weights, measured)
            yield request.architecture, self._known(request.architecture, fidelity)

    def _known(self, architecture: Architecture, fidelity: Fidelity) -> dict[str, float]:
        """All values, or none where the store lacks one. Those of a screening have the scale of all documents: by how
        much it is off is for the search to learn."""
        keys = self.keys[fidelity]
        scores = known_scores(self.store, architecture, self.weights, keys)
        if len(scores) < len(keys):
            return {}
        text = scores.get("held_out_loss")
        loss, loss_stderr = (text.value, text.stderr) if text is not None else (None, None)
        return {name: score.value for name, score in scores.items()} | {
            "quality": self.scale.quality(scores, loss, capped=True),
            "quality_stderr": self.scale.stderr(scores, loss, loss_stderr),
        }

    def _map(self, requests: list[Request]) -> Iterator[tuple[Request, Measured]]:
        settings = self.job.recipe.searching
        if settings.workers == 1 and settings.executor == "processes":
            if self._scorer is None and requests:
                self._scorer = SubnetScorer(self.job, self.scale.by_text)
            yield from ((request, self._scorer(request)) for request in requests if self._scorer)
            return
        if self._workers is None:
            self._workers = open_workers(self.job, self.scale.by_text)
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


def record(store: EvaluationStore, architecture: Architecture, weights: str, measured: Measured) -> None:
    """Put scores into the store; they are on disk when this returns."""
    for key, score, seconds in measured:
        store.put(architecture, weights, key, score.or_worst(), seconds)


def known_scores(
    store: EvaluationStore, architecture: Architecture, weights: str, keys: Mapping[str, ScoreKey]
) -> dict[str, Score]:
    """Those scores of a network that the store holds, by name."""
    scores = {name: store.get(architecture, weights, key) for name, key in keys.items()}
    return {name: score for name, score in scores.items() if score is not None}


def stored_scores(
    store: EvaluationStore,
    architecture: Architecture,
    weights: str,
    keys: Mapping[str, ScoreKey],
    measure: Callable[[], Measured],
) -> dict[str, Score]:
    """All scores that `keys` name of a network: from the store, or else from `measure`, recorded."""
    if len(known_scores(store, architecture, weights, keys)) < len(keys):
        record(store, architecture, weights, measure())
    return known_scores(store, architecture, weights, keys)


def base_scores(job: Job, store: EvaluationStore) -> dict[str, Score]:
    """The base's own scores on the search documents, by name of the objective. Once they are measured, it is said which
    tasks do not count.

    Raises `RequestError` where nothing can be measured against the base.
    """
    anew = False

    def measure() -> Measured:
        nonlocal anew
        anew = True
        say("scoring the base")
        job.threads(scoring=True)
        with torch.no_grad():
            scorer = job.scorer(job.load_untouched(), job.untouched_tasks)
            return task_scores(job, scorer, {"full": keys})

    keys = score_keys(job, "full")
    wanted = {name: keys[name] for name in scored_tasks(job)}
    scores = stored_scores(store, job.untouched.structure.base, job.untouched_fingerprint, wanted, measure)
    remark = QualityScale({name: scores[name] for name in job.tasks.tasks}).remark
    if anew and remark:
        say(f"warning: {remark}")
    return scores


def check_base(job: Job) -> None:
    """Score the base on the search documents, as every search needs: before anything is trained, since a task on which
    it scores nothing is refused."""
    job.run.search.mkdir(exist_ok=True)
    with EvaluationStore(job.run.evaluations) as store:
        base_scores(job, store)


def search_scale(job: Job, store: EvaluationStore, scores: Mapping[str, Score]) -> QualityScale:
    """What the search's qualities are measured against, from the base's scores; where no task counts, its held-out loss
    is measured, or taken from the store."""
    scale = QualityScale({name: scores[name] for name in job.tasks.tasks})
    if not scale.by_text:
        return scale

    def measure() -> Measured:
        job.threads(scoring=True)
        return HeldOut(job).scores(job.supernet_of(job.load_base().eval()), keys)

    keys = held_out_keys(job, ["held_out_loss"])
    loss = stored_scores(store, job.structure.base, job.base_fingerprint, keys, measure)["held_out_loss"]
    return QualityScale(scale.base, loss.value)


def search_keys(job: Job, fidelity: Fidelity, by_text: bool) -> Keys:
    """Where the store keeps all that an evaluation measures, with what the quality needs where no task counts."""
    return score_keys(job, fidelity) | (held_out_keys(job, ["held_out_loss"]) if by_text else {})
