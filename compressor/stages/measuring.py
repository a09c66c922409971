"""Measure the base and every package: scores on the report split, speed side by side, and samples of text."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from functools import cache, partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from compressor.inputs import weights_fingerprint
from compressor.job import Job
from compressor.schedule import stage
from compressor.stages.report_text import continuations, learnt_tokens, openings, split_again, unread_text
from compressor.stages.score_keys import task_key
from compressor.stages.subnet_scores import Measured, stored_scores
from compressor.stages.subnet_scores import record as store_scores
from evals.quality import QualityScale
from evals.scoring.scorer import DocumentValues
from evals.speed.measured import Speed, speed_beside
from export.layouts import graphs
from export.layouts.elastic import load_size
from export.layouts.gguf import runtime as llama_cpp
from export.layouts.gguf.file import take_stored_weights
from export.models import Model
from export.package_record import ElasticSize, PackageRecord, read_record, update_record
from export.report.card import read_base_card
from export.report.schema import Base, Sample
from search.scores import Score
from search.store import EvaluationStore
from supernet.architecture import Architecture
from supernet.common.errors import reading
from supernet.common.files import read_json, write_json
from supernet.common.metrics import record
from supernet.common.progress import bar
from supernet.device import device_name
from supernet.loading import load_network, unpack
from supernet.training.losses import held_out_loss
from supernet.trust import check_code

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from evals.scoring.tasks import TaskSet

LOADABLE = ("uneven", "uniform", "padded", "elastic")
"""Layouts that transformers loads."""


class Measurements(Model):
    """`packages/base.json`: the base as the report shows it, and what packages say beside it."""

    base: Base
    conditions: dict[str, str | int | None]
    """What the measurements depend on beside the networks."""
    packages: list[str]
    quantized_base: list[str] = Field(default_factory=list)
    """The packages that hold the base itself in few bits."""
    left_out: dict[str, str] = Field(default_factory=dict)
    """Why packages that were asked for were not made, by name."""
    samples: list[Sample]

    @classmethod
    def read(cls, file: Path) -> Measurements:
        """Raises `RequestError` for a file that this version does not write."""
        with reading(f"{file}: not what this version writes; remove it and export again"):
            return cls.model_validate(read_json(file))


class ReportDocuments(BaseModel):
    """`search/documents/WEIGHTS.json`: what one network scored on every document of the report split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fingerprints: dict[str, str]
    """Of the documents of each task."""
    values: DocumentValues

    @classmethod
    def of(cls, job: Job, values: DocumentValues) -> ReportDocuments:
        return cls(fingerprints={name: job.tasks.fingerprint(name, "report") for name in values}, values=values)

    @classmethod
    def read(cls, job: Job, weights: str) -> DocumentValues:
        """The values of the run's tasks, of those that are known: an earlier version kept none."""
        file = job.run.documents / f"{weights}.json"
        if not file.is_file():
            return {}
        with reading(f"{file}: not what this version writes; remove it"):
            kept = cls.model_validate(read_json(file))
        now = {name: job.tasks.fingerprint(name, "report") for name in job.tasks.tasks}
        return {name: values for name, values in kept.values.items() if kept.fingerprints.get(name) == now.get(name)}

    def write(self, job: Job, weights: str) -> None:
        job.run.documents.mkdir(exist_ok=True)
        write_json(job.run.documents / f"{weights}.json", self.model_dump(mode="json"))


@stage("measuring")
def measure_packages(job: Job, names: list[str], bases: list[str], left_out: Mapping[str, str]) -> None:
    """Score base and packages, and those of the base itself in few bits, on the report split, time them side by side,
    and record it in each package. What was `left_out`, and why, is recorded beside the base.

    Scores are rows of evaluations.db like any other, so nothing is scored twice, and what was timed before an
    interruption is not timed again.
    """
    job.threads(scoring=True)
    job.run.search.mkdir(exist_ok=True)
    measurer = PackageMeasurer(job, left_out)
    with EvaluationStore(job.run.evaluations) as store, bar("measuring", len(names) + len(bases) + 1) as progress:
        progress.advance(0, "the base")
        measurer.measure_base(store)
        for number, name in enumerate((*names, *bases)):
            progress.advance(note=name)
            measurer.measure(name, store, of_base=name in bases)
            done = number + 1
            measurer.write(names[:done], bases[: max(0, done - len(names))], measurer.interrupted)
        progress.advance()
    measurer.write(names, bases, measurer.file)
    measurer.interrupted.unlink(missing_ok=True)


class PackageMeasurer:
    """The base, and everything beside it one at a time: only these two are in memory.

    What `packages/base.json`, or what an interrupted measuring left instead, and a package's own record hold already is
    kept while the conditions of its measuring are the same. `losses`, `texts` (by prompt) and `scores` go by name,
    "base" among them.
    """

    def __init__(self, job: Job, left_out: Mapping[str, str]) -> None:
        self.job, self.base = job, cache(job.load_untouched)
        self.left_out = dict(left_out)
        self.text, self.prompts = unread_text(job), openings(job)
        self.base_text = self.text if job.vocabulary is None else split_again(job, self.text)
        self.conditions: dict[str, str | int | None] = {
            "text": self.text.fingerprint,
            "base": job.untouched_fingerprint,
            "device": device_name(job.device),
            "dtype": str(job.compute_dtype),
            "threads": torch.get_num_threads() if job.device.type == "cpu" else None,
        }
        self.file = job.run.packages / "base.json"
        self.interrupted = self.file.with_name(".measured.json")
        kept = next((file for file in (self.interrupted, self.file) if file.exists()), None)
        before = Measurements.read(kept) if kept else None
        if before is not None and before.conditions != self.conditions:
            before = None
        self.speed = before.base.speed if before else None
        """The base's, beside the first package that was timed."""
        loss = before.base.held_out_loss if before else None
        self.losses: dict[str, float] = {} if loss is None else {"base": loss}
        self.texts: dict[str, dict[str, str]] = {}
        self.scores: dict[str, dict[str, Score]] = {}
        self.weights: dict[str, str] = {}  # of what was scored, by name
        self._earlier_texts: dict[str, dict[str, str]] = {}  # of the last time, by name
        for row in before.samples if before else []:
            for name, text in row.continuations.items():
                self._earlier_texts.setdefault(name, {})[row.prompt] = text

    def measure_base(self, store: EvaluationStore) -> None:
        job = self.job
        architecture, weights = job.untouched.structure.base, job.untouched_fingerprint
        self.scores["base"] = report_scores(job, store, self.base, architecture, weights, job.untouched_tasks)
        if "base" not in self.losses:
            self.losses["base"] = held_out_loss(self.base(), self.base_text, 1, job.device)
        prompts, tokenizer = self.prompts, job.untouched_tokenizer
        if job.vocabulary is not None:
            prompts = {text: tokenizer(text, return_tensors="pt").input_ids.to(job.device) for text in prompts}
        known = self._earlier_texts.get("base", {})
        self.texts["base"] = continuations(tokenizer, prompts, self.base, known)

    @property
    def scale(self) -> QualityScale:
        """What qualities on the report split are measured against."""
        return QualityScale(self.scores["base"], self.losses["base"])

    def measure(self, name: str, store: EvaluationStore, of_base: bool = False) -> None:
        """Measure one package, after the one that it is a copy of, and record it there. `of_base`: one of the untouched
        base in few bits, which reads the base's tokens and of which no text is sampled.

        What transformers does not load is timed in its own runtime. A gguf file is scored with the weights that it
        holds, and a graph has the scores and the loss of the package that it is a copy of: that both compute the same
        in their runtimes is for the proof to say.
        """
        job, package = self.job, self.job.run.packages / name
        held = read_record(package)
        entry, lineage = held.entry, held.lineage
        model = cache(partial(scored_network, job, held))  # loaded when, and if, it is needed
        current = self.speed is not None and lineage.base_speed == self.speed
        if entry.layout in ("onnx", "openvino"):
            original = lineage.copy_of or ""
            self.scores[name], self.losses[name] = self.scores[original], self.losses[original]
            self.weights[name] = self.weights[original]
        else:
            tasks = job.untouched_tasks if of_base else job.tasks
            self.weights[name] = weights_fingerprint(package)
            self.scores[name] = report_scores(job, store, model, entry.architecture, self.weights[name], tasks)
            loss = entry.held_out_loss if current else None
            self.losses[name] = self.loss_of(model(), of_base) if loss is None else loss
        speed = (entry.speed if current else None) or self.time(held, model)
        if entry.layout in LOADABLE and not of_base:
            kept = self._earlier_texts.get(name, {}) if current else {}
            self.texts[name] = continuations(job.tokenizer, self.prompts, model, kept)
        quality = self.scale.quality(self.scores[name], self.losses[name])
        measured: dict[str, object] = {
            "tasks": dumped(self.scores[name]),
            "quality": quality,
            "held_out_loss": self.losses[name],
            "speed": speed.model_dump(),
        }
        if entry.sizes:
            measured["sizes"] = [size.model_dump(mode="json") for size in self.sizes(held, store)]
        scores = {task: score.value for task, score in self.scores[name].items()}
        record("package", name=name, quality=quality, decode_tps=speed.decode_tps, **scores)
        documents = {task: job.tasks.fingerprint(task, "report") for task in self.scores[name]}
        base_speed = self.speed and self.speed.model_dump()
        made_of = {"task_documents": documents, "scored_weights": self.weights[name], "base_speed": base_speed}
        update_record(package, entry=measured, lineage=made_of)

    def sizes(self, record: PackageRecord, store: EvaluationStore) -> list[ElasticSize]:
        """The sizes of an elastic package, with the scores of those that are proved."""
        job, sizes = self.job, []
        for size in record.entry.sizes:
            if size.proof is not None:
                model = cache(partial(load_one_size, job, record.folder, size.name))
                weights = f"{self.weights[record.entry.name]}-{size.name}"
                scores = report_scores(job, store, model, size.architecture, weights)
                loss = self.loss_of(model(), False) if self.scale.by_text else None
                size = size.model_copy(update={"tasks": scores, "report_quality": self.scale.quality(scores, loss)})
            sizes.append(size)
        return sizes

    def loss_of(self, model: PreTrainedModel, of_base: bool) -> float:
        """A package's held-out loss in nats for each of the untouched base's tokens, so that both compare."""
        if of_base:
            return held_out_loss(model, self.base_text, 1, self.job.device)
        loss = held_out_loss(model, self.text, 1, self.job.device)
        return loss * (learnt_tokens(self.text) / learnt_tokens(self.base_text))

    def time(self, record: PackageRecord, model: Callable[[], PreTrainedModel]) -> Speed:
        """Speed of a package, in turn with the base where transformers loads it."""
        self.job.threads(scoring=True)
        if record.entry.layout not in LOADABLE:
            assert self.speed is not None  # a package of a pick's own layout comes first
            tokens = record.entry.vocabulary.rows if record.entry.vocabulary else self.job.structure.vocab_size
            return speed_in_its_runtime(record, self.speed, tokens)
        speed, self.speed = speed_beside(model(), self.base(), self.speed)
        return speed

    def write(self, names: list[str], bases: list[str], file: Path) -> None:
        """Write to `file` what was measured of the base and beside these packages."""
        job = self.job
        base = Base(
            name=Path(job.recipe.model).name,
            path=job.given.model,
            params=job.untouched_parameters,
            bytes=job.untouched.weight_bytes,
            dtype=str(job.stored_dtype).removeprefix("torch."),
            architecture=job.untouched.structure.base,
            card=read_base_card(job.untouched.path),
            hub_id=None if Path(job.recipe.model).expanduser().is_dir() else job.given.model,
            tasks=self.scores["base"],
            bytes_per_token=None if job.vocabulary is None else job.vocabulary.record.base_bytes_per_token,
            held_out_loss=self.losses["base"],
            speed=self.speed,
        )
        samples = [
            Sample(prompt=prompt, continuations={name: texts[prompt] for name, texts in self.texts.items()})
            for prompt in self.prompts
        ]
        measured = Measurements(
            base=base,
            conditions=self.conditions,
            packages=names,
            quantized_base=bases,
            left_out=self.left_out,
            samples=samples,
        )
        write_json(file, measured.model_dump(mode="json"))


def scored_network(job: Job, record: PackageRecord) -> Any:
    """What a package's scores are computed with: the package; for a gguf file, what it is a copy of, with its weights.

    That the file's own runtime computes the same is for the proof to say.
    """
    if record.entry.layout != "gguf":
        return load_package(record.folder, job.compute_dtype, job.device)
    if record.lineage.copy_of == "base":
        return take_stored_weights(job.load_untouched(), record.folder)
    original = job.run.packages / (record.lineage.copy_of or "")
    return take_stored_weights(load_package(original, job.compute_dtype, job.device), record.folder)


def load_package(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A package as users load it, through transformers. Its code file runs only if it is what this version writes."""
    with redirect_stderr(StringIO()):  # compressed-tensors draws bars of its own
        model, _ = load_network(folder, dtype, check_code(folder))
    model = model.to(device).eval()
    unpack(model)
    return model


def load_one_size(job: Job, folder: Path, name: str) -> Any:
    """One size of an elastic package, ready to be scored."""
    return load_size(folder, name, job.compute_dtype).to(job.device).eval()


def speed_in_its_runtime(record: PackageRecord, like: Speed, vocabulary: int) -> Speed:
    """Speed of a package of so many tokens that transformers does not load, at the work and on the threads that the
    base was timed at."""
    work = {"prompt": like.prompt, "new": like.new, "threads": like.threads or 1, "vocabulary": vocabulary}
    if record.entry.layout == "gguf":
        return llama_cpp.measure_speed(record, **work)
    return graphs.measure_speed(record, **work)


def report_scores(
    job: Job,
    store: EvaluationStore,
    model: Callable[[], PreTrainedModel],
    architecture: Architecture,
    weights: str,
    tasks: TaskSet | None = None,
) -> dict[str, Score]:
    """Every task's score on the report split. `model` is loaded where a score is missing, and `tasks` are in its
    tokens; every document's value is kept then, so that networks can be compared over the same documents."""
    keys = {name: task_key(job, task, "report") for name, task in job.tasks.tasks.items()}

    def measure() -> Measured:
        began = time.monotonic()
        scores, documents = job.scorer(model(), tasks).score_with_documents("report")
        seconds = (time.monotonic() - began) / len(scores)
        ReportDocuments.of(job, documents).write(job, weights)
        return [(keys[name], score, seconds) for name, score in scores.items()]

    if not set(keys) <= set(ReportDocuments.read(job, weights)):  # as in a run of an earlier version
        store_scores(store, architecture, weights, measure())
    return stored_scores(store, architecture, weights, keys, measure)


def dumped(scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
    """Scores as JSON holds them."""
    return {name: score.model_dump() for name, score in scores.items()}
