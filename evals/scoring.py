"""Scores of any causal network on lm-eval tasks: lm-eval's numbers, many times faster.

`NetworkLM` is an lm-eval `LM` over a module that is already in memory: a super-network with a sub-network active, an
extracted one, a quantized reload. `Scorer` asks it for the documents of a `TaskSet` and lets lm-eval's own filters,
metrics and aggregation turn the answers into scores.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import _bootstrap_internal, acc_all_stderr, mean_stderr, sample_stddev, stderr_for_metric

from compressor.architecture import Architecture
from compressor.errors import RequestError
from evals.encoding import CannotScore, Span
from evals.network import Answer, NetworkLM, Plan
from evals.tasks import Document, Leaf, ScoredTask, Split, TaskSet

BOOTSTRAP_ITERATIONS = 100
"""Resamples behind a bootstrapped standard error: lm-eval's 100,000 say the same within about 7 %."""

RawMetrics = dict[tuple[str, str], list[Any]]
"""{(metric, filter): one value for each document}, lm-eval's intermediate form."""


@dataclass(frozen=True)
class TaskScore:
    """A task's score: `n` documents of `split` under lm-eval's `metric`, with lm-eval's standard error of it.

    Where lm-eval states no standard error (bits per byte, and the like), it is bootstrapped over the documents.
    `chance`: the score of uniform guessing, where that means something. `per_document`: the metric for each document
    in the task's order, where it is a number for each.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    split: Split
    higher_is_better: bool
    chance: float | None = None
    per_document: list[float] | None = None

    @property
    def near_chance(self) -> bool:
        """Whether the score is within two standard errors of chance, so that it tells nothing."""
        if self.chance is None or self.stderr is None:
            return False
        return abs(self.value - self.chance) <= 2 * self.stderr


def quality(scores: Mapping[str, TaskScore], base: Mapping[str, TaskScore]) -> float:
    """Mean over tasks of score / base's score, inverted where lower is better: the base's own is 1.0.

    Raises RequestError where a base score is not positive, for nothing can be measured against it.
    """
    ratios = []
    for name, score in scores.items():
        reference = base[name].value
        if not reference > 0:
            raise RequestError(
                f"task {name}: the base scores {reference:g} {score.metric}, so that no share of it can be kept; "
                "leave the task out or choose another metric with --tasks TASK:METRIC"
            )
        if score.higher_is_better:
            ratios.append(score.value / reference)
        else:
            ratios.append(reference / score.value if score.value else math.inf)
    return sum(ratios) / len(ratios)


class Scorer:
    """Scores the network behind `lm` on `tasks`. Prompts and tokens are made once; whoever activates sub-networks
    between calls of `score` pays for the network's work only."""

    def __init__(self, tasks: TaskSet, lm: NetworkLM) -> None:
        self.tasks = tasks
        self.lm = lm
        self._questions: dict[tuple[Split, int | None], Questions] = {}

    def prepare(self, split: Split, limit: int | None = None) -> Questions:
        """The split's documents, ready to be asked. Raises RequestError naming a document that cannot be scored."""
        if (split, limit) not in self._questions:
            self._questions[split, limit] = Questions(self.tasks.documents(split, limit), self.lm)
        return self._questions[split, limit]

    def score(
        self, split: Split, limit: int | None = None, *, architecture: Architecture | None = None
    ) -> dict[str, TaskScore]:
        """Score the network as it stands, `limit` documents of each task (None: all of the split).

        `architecture`, where the network is a super-network: what is active. Leading layers that are equal to those
        of the call before are then not computed again.
        """
        questions = self.prepare(split, limit)
        layers = None
        if architecture is not None:
            layers = [(architecture.hidden_size, sizes) for sizes in architecture.layers]
        return self.scores(questions, questions.ask(self.lm, layers), split)

    def scores(self, questions: Questions, answers: Answers, split: Split) -> dict[str, TaskScore]:
        """What the answers to `questions` are worth."""
        return {
            name: self._task_score(self.tasks.tasks[name], documents, answers, split)
            for name, documents in questions.documents.items()
        }

    def _task_score(
        self, task: ScoredTask, documents: Sequence[tuple[Leaf, list[Document]]], answers: Answers, split: Split
    ) -> TaskScore:
        values, errors, sizes, everything = [], [], [], []
        for leaf, docs in documents:
            if docs:
                items = raw_metrics(leaf, docs, answers, only_filter=task.filter)[task.metric, task.filter]
                aggregation = leaf.task.aggregation().get(task.metric, _mean)
                values.append(float(aggregation(items)))
                errors.append(standard_error(aggregation, items))
            else:
                items = []
                values.append(math.nan)
                errors.append(None)
            sizes.append(len(items))
            everything += items
        value, error = task.aggregate(values, errors, sizes)
        numbers = all(isinstance(item, (int, float)) for item in everything)
        return TaskScore(
            task.name,
            task.metric,
            value,
            error,
            sum(sizes),
            split,
            task.higher_is_better,
            task.chance(documents),
            [float(item) for item in everything] if numbers else None,
        )


Answers = dict[int, list[Any]]
"""{id of an instance: its responses, as many as it asks for}."""


class Questions:
    """The requests of some documents in the form that `NetworkLM` takes, planned once and asked many times."""

    def __init__(self, documents: Mapping[str, Sequence[tuple[Leaf, list[Document]]]], lm: NetworkLM) -> None:
        self.documents = {name: list(leaves) for name, leaves in documents.items()}
        asked: dict[str, list[tuple[Leaf, Document, Instance]]] = defaultdict(list)
        for leaves in self.documents.values():
            for leaf, docs in leaves:
                for document in docs:
                    for instance in document.instances:
                        asked[instance.request_type].append((leaf, document, instance))
        self._scored = [instance for _, _, instance in asked["loglikelihood"]]
        self._rolled = [instance for _, _, instance in asked["loglikelihood_rolling"]]
        self._written = [instance for _, _, instance in asked["generate_until"]]
        encoder = lm.encoder
        spans: list[Span] = _blame(
            asked["loglikelihood"], lambda: encoder.spans([(str(i.args[0]), str(i.args[1])) for i in self._scored])
        )
        windows = encoder.rolling(instance.args[0] for instance in self._rolled)
        self._windows = [len(own) for own in windows]
        for leaf, document, instance in asked["generate_until"]:
            _blame([(leaf, document, instance)], lambda i=instance: lm.prompt(*i.args))  # type: ignore[misc]
        self._plan: Plan = lm.plan(spans + [span for own in windows for span in own])

    def ask(self, lm: NetworkLM, layers: Sequence[Any] | None = None) -> Answers:
        """The network's answers. `layers`: see `NetworkLM.answer`."""
        answers: Answers = {}
        scores = iter(lm.answer(self._plan, layers))
        for instance in self._scored:
            answers[id(instance)] = [next(scores)] * (instance.repeats or 1)
        for instance, count in zip(self._rolled, self._windows, strict=True):
            total = sum(next(scores)[0] for _ in range(count))
            answers[id(instance)] = [total] * (instance.repeats or 1)
        repeated = [instance for instance in self._written for _ in range(instance.repeats or 1)]
        for instance, text in zip(repeated, lm.generate_until(repeated) if repeated else [], strict=True):
            answers.setdefault(id(instance), []).append(text)
        return answers


def _blame(asked: Sequence[tuple[Leaf, Document, Instance]], encode: Callable[[], Any]) -> Any:
    """Run `encode`; where it finds a request that lm-eval cannot score, name the task and the document."""
    try:
        return encode()
    except CannotScore as error:
        leaf, document, _ = asked[error.position]
        raise RequestError(
            f"task {leaf.name}, document {document.index}: {error}; leave the task out, or use fewer few-shot examples "
            "or a network with a longer context"
        ) from error


def raw_metrics(
    leaf: Leaf, documents: Sequence[Document], answers: Answers, only_filter: str | None = None
) -> RawMetrics:
    """lm-eval's metrics of each document, from the answers to its requests."""
    instances = [instance for document in documents for instance in document.instances]
    raw: RawMetrics = defaultdict(list)
    try:
        for instance in instances:
            instance.resps = list(answers[id(instance)])
        for ensemble in leaf.task._filters:
            if only_filter is not None and ensemble.name != only_filter:
                continue
            ensemble.apply(instances)
            for document in documents:
                ordered = sorted(document.instances, key=lambda instance: instance.idx)
                responses = [instance.filtered_resps[ensemble.name] for instance in ordered]
                for metric, value in leaf.task.process_results(document.doc, responses).items():
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


def _mean(items: Sequence[float]) -> float:
    return sum(items) / len(items)


__all__ = ["Answer", "NetworkLM", "Questions", "Scorer", "TaskScore", "quality", "raw_metrics", "standard_error"]
