"""Scores of any causal network on lm-eval tasks: lm-eval's numbers, many times faster.

`NetworkLM` is an lm-eval `LM` over a module that is already in memory: a super-network with a sub-network active, an
extracted one, a quantized reload. `Scorer` gives it the requests of a `TaskSet`, and turns its answers into scores with
lm-eval's own filters, metrics and aggregation.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.metrics import (
    _bootstrap_internal,
    acc_all_stderr,
    mean,
    mean_stderr,
    sample_stddev,
    stderr_for_metric,
)

from evals.scoring.documents import Document, Subtask
from evals.scoring.lm import NetworkLM
from evals.scoring.tasks import ScoredTask, SubtaskDocuments, TaskSet
from evals.scoring.tree_attention import Plan
from search.scores import Score, Split
from supernet.architecture import Architecture
from supernet.common.errors import reading

BOOTSTRAP_ITERATIONS = 100
"""Resamples behind a bootstrapped standard error: lm-eval's 100,000 say the same within about 7 %."""

Answers = dict[int, list[Any]]
"""{id of an instance: its responses, as many as it asks for}."""

DocumentValues = dict[str, list[list[Any]]]
"""{task: for each of its subtasks, lm-eval's intermediate value of each document}, always in the same order."""

RawMetrics = dict[tuple[str, str], list[Any]]
"""{(metric, filter): one value for each document}, lm-eval's intermediate form."""


class Scorer:
    """Scores the network behind `lm` on `tasks`. Prompts and tokens are made once, so scoring one sub-network after
    another costs the network's work only."""

    def __init__(self, tasks: TaskSet, lm: NetworkLM) -> None:
        self.tasks = tasks
        self.lm = lm
        self._plans: dict[tuple[Split, int | None], Plan] = {}

    def score(
        self, split: Split, limit: int | None = None, *, architecture: Architecture | None = None
    ) -> dict[str, Score]:
        """Each task's score of the network as it is now, on `limit` documents of each (None: all of the split).

        `architecture`, where the network is a super-network: what is active. Leading layers that are equal to those
        of the call before are then not computed again.
        """
        return self.scores(split, limit, self.ask(split, limit, architecture))

    def score_with_documents(self, split: Split, limit: int | None = None) -> tuple[dict[str, Score], DocumentValues]:
        """As `score`, and every document's value."""
        answers = self.ask(split, limit)
        return self.scores(split, limit, answers), self.document_values(split, limit, answers)

    def ask(self, split: Split, limit: int | None = None, architecture: Architecture | None = None) -> Answers:
        """The network's answers to all requests of the documents; the arguments are those of `score`."""
        requests = self.tasks.requests(split, limit)
        if (split, limit) not in self._plans:
            self._plans[split, limit] = self.lm.plan(requests.spans)
        answers: Answers = {}
        scores = iter(self.lm.answer(self._plans[split, limit], architecture))
        for instance in requests.loglikelihood:
            answers[id(instance)] = [next(scores)] * (instance.repeats or 1)
        for instance, windows in zip(requests.rolling, requests.windows, strict=True):
            total = sum(next(scores)[0] for _ in range(windows))
            answers[id(instance)] = [total] * (instance.repeats or 1)
        repeated = [instance for instance in requests.generation for _ in range(instance.repeats or 1)]
        for instance, text in zip(repeated, self.lm.generate_until(repeated) if repeated else [], strict=True):
            answers.setdefault(id(instance), []).append(text)
        return answers

    def scores(
        self, split: Split, limit: int | None, answers: Answers, tasks: Mapping[str, ScoredTask] | None = None
    ) -> dict[str, Score]:
        """Scores from the answers to the documents' requests, by the metric of each task, or by those of `tasks`, which
        may name one task several times (`TaskSet.by_metric`)."""
        tasks = tasks or self.tasks.tasks
        documents = self.tasks.requests(split, limit).documents
        values = self.document_values(split, limit, answers, tasks)
        return {name: score_of(task, documents[task.name], values[name], split) for name, task in tasks.items()}

    def document_values(
        self, split: Split, limit: int | None, answers: Answers, tasks: Mapping[str, ScoredTask] | None = None
    ) -> DocumentValues:
        """lm-eval's intermediate value of each document, which an aggregation adds up: by task, for each of its
        subtasks in order."""
        documents = self.tasks.requests(split, limit).documents
        return {
            name: [
                raw_metrics(subtask, docs, answers, only_filter=task.filter)[task.metric, task.filter] if docs else []
                for subtask, docs in documents[task.name]
            ]
            for name, task in (tasks or self.tasks.tasks).items()
        }


def score_of(
    task: ScoredTask, documents: Sequence[SubtaskDocuments], values: Sequence[list[Any]], split: Split
) -> Score:
    """A task's score from its documents' values, with lm-eval's standard error.

    Where lm-eval states no standard error (bits per byte, and the like), it is bootstrapped over the documents.
    """
    of_subtasks = [
        aggregated(subtask, task.metric, items) if items else (math.nan, None)
        for (subtask, _), items in zip(documents, values, strict=True)
    ]
    sizes = [len(items) for items in values]
    value, stderr = task.aggregate([value for value, _ in of_subtasks], [error for _, error in of_subtasks], sizes)
    return Score(
        metric=task.metric,
        value=value,
        stderr=stderr,
        n=sum(sizes),
        split=split,
        higher_is_better=task.higher_is_better,
        chance=task.chance(documents),
    )


def raw_metrics(
    subtask: Subtask, documents: Sequence[Document], answers: Answers, only_filter: str | None = None
) -> RawMetrics:
    """lm-eval's metrics of each document, from the answers to its requests."""
    instances = [instance for document in documents for instance in document.instances]
    raw: RawMetrics = defaultdict(list)
    try:
        for instance in instances:
            instance.resps = list(answers[id(instance)])
        for ensemble in subtask.task._filters:
            if only_filter is not None and ensemble.name != only_filter:
                continue
            ensemble.apply(instances)
            for document in documents:
                ordered = sorted(document.instances, key=lambda instance: instance.idx)
                responses = [instance.filtered_resps[ensemble.name] for instance in ordered]
                with reading(f"task {subtask.task.task_name}: document {document.index + 1} cannot be scored"):
                    values = subtask.task.process_results(document.doc, responses)
                for metric, value in values.items():
                    raw[metric, ensemble.name].append(value)
    finally:
        for instance in instances:
            instance.resps, instance.filtered_resps = [], {}
    return raw


def standard_error(
    aggregation: Callable[[Sequence[Any]], float], items: Sequence[Any], everywhere: bool = True
) -> float | None:
    """lm-eval's standard error of an aggregate, with fewer resamples (lm-eval's own first ones) where it bootstraps.

    Where lm-eval states none, it is bootstrapped too, or None unless `everywhere`. None for a single document.
    """
    own = stderr_for_metric(aggregation, bootstrap_iters=1)
    if len(items) < 2 or (own is None and not everywhere):
        return None
    if own in (mean_stderr, acc_all_stderr):
        return float(own(items))
    return float(sample_stddev(_bootstrap_internal(aggregation, BOOTSTRAP_ITERATIONS)((0, items))))


def aggregated(
    subtask: Subtask, metric: str, items: Sequence[Any], everywhere: bool = True
) -> tuple[float, float | None]:
    """A metric of all documents, from its value for each, and `standard_error`. Infinity where lm-eval's perplexities
    overflow, beyond 709 nats a word. Raises `RequestError` where the task's own aggregation fails."""
    aggregation = subtask.task.aggregation().get(metric, mean)
    with reading(f"task {subtask.name}: its metric {metric} cannot be computed of {len(items)} documents"):
        try:
            return float(aggregation(items)), standard_error(aggregation, items, everywhere)
        except OverflowError:
            return math.inf, None
