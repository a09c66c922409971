"""lm-eval tasks, built once per run: which documents are for the search and which for the report, their prompts,
their metric, and how a group adds up. No torch.

Tasks, prompts, filters, metrics and aggregation are lm-eval's own. What is ours is the split: a document whose
lm-eval `doc_hash` begins with an even hexadecimal digit is for the search, the others are for the report, and
few-shot examples come from neither.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.config.group import AggMetricConfig

from evals.scoring.documents import Document, Prompting, Subtask
from evals.scoring.encoding import CannotScore, Encoder
from evals.scoring.prefix_tree import tokens_read
from evals.scoring.task_loading import build, index_tasks, lm_eval_seeds, prepare, scored_items
from search.scores import Split
from supernet.common.errors import RequestError

PREFERRED_METRICS = ("acc_norm", "acc", "exact_match")
CHOICE_METRICS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")


SubtaskDocuments = tuple[Subtask, list[Document]]


@dataclass(eq=False)
class ScoredTask:
    """A task or group that the user asked for, and the one metric that counts."""

    name: str
    metric: str
    filter: str
    subtasks: list[Subtask]
    higher_is_better: bool
    group: Group | None = None

    @property
    def key(self) -> str:
        """lm-eval's key of the metric."""
        return f"{self.metric},{self.filter}"

    @property
    def weighted(self) -> bool:
        """Whether a group's score weighs its subtasks by their number of documents."""
        return self.group is None or bool(self._aggregate().weight_by_size)

    def limits(self, split: Split, limit: int | None) -> list[int | None]:
        """Each subtask's share of `limit` documents; None for all."""
        if limit is None:
            return [None] * len(self.subtasks)
        sizes = [subtask.size(split) for subtask in self.subtasks]
        return list(spread(limit, sizes, sizes if self.weighted else [1] * len(sizes)))

    def documents(self, split: Split, limit: int | None = None) -> list[SubtaskDocuments]:
        """The documents by subtask; `limit` is for all of them together."""
        shares = self.limits(split, limit)
        return [
            (subtask, subtask.documents(split, share)) for subtask, share in zip(self.subtasks, shares, strict=True)
        ]

    def aggregate(
        self, values: Sequence[float], stderrs: Sequence[float | None], sizes: Sequence[int]
    ) -> tuple[float, float | None]:
        """Value and standard error from those of the subtasks, as lm-eval's group aggregates them. A subtask without
        documents takes no part; without any, the value is no number."""
        if self.group is None:
            return values[0], stderrs[0]
        only = dataclasses.replace(self.group, aggregate_metric_list=[self._aggregate()])
        error_key = f"{self.metric}_stderr,{self.filter}"
        rows = {
            subtask.name: {self.key: value, error_key: "N/A" if error is None else error, "sample_len": size}
            for subtask, value, error, size in zip(self.subtasks, values, stderrs, sizes, strict=True)
            if size
        }
        if not rows:
            return math.nan, None
        result = only.aggregate(rows)
        error = result[error_key]
        return float(result[self.key]), None if error == "N/A" else float(error)

    def chance(self, documents: Sequence[SubtaskDocuments]) -> float | None:
        """What uniform guessing scores on the documents, or None where that has no meaning."""
        if self.metric not in CHOICE_METRICS:
            return None
        levels = [(subtask.chance(docs, self.metric), len(docs)) for subtask, docs in documents if docs]
        total = 0.0
        for level, size in levels:
            if level is None:
                return None
            total += level * (size if self.weighted else 1)
        return total / sum(size if self.weighted else 1 for _, size in levels) if levels else None

    def _aggregate(self) -> AggMetricConfig:
        """How the group aggregates the metric."""
        assert self.group is not None and self.group.aggregate_metric_list
        return next(entry for entry in self.group.aggregate_metric_list if entry.metric == self.metric)


class EncodedRequests:
    """All requests of some documents, by lm-eval's kinds of requests (`loglikelihood`, `loglikelihood_rolling`,
    `generate_until`), and in tokens.

    `spans`: one for each request of `loglikelihood`, then `windows[i]` for each of `rolling`; those of `generation`
    are continued. Raises RequestError naming a document that lm-eval itself cannot score.
    """

    def __init__(self, documents: dict[str, list[SubtaskDocuments]], encoder: Encoder) -> None:
        self.documents = documents
        requests: dict[str, list[_Request]] = defaultdict(list)
        for subtasks in documents.values():
            for subtask, docs in subtasks:
                for document in docs:
                    for instance in document.instances:
                        requests[instance.request_type].append((subtask, document, instance))
        self.loglikelihood = [instance for _, _, instance in requests["loglikelihood"]]
        self.rolling = [instance for _, _, instance in requests["loglikelihood_rolling"]]
        self.generation = [instance for _, _, instance in requests["generate_until"]]
        pairs = [(str(instance.args[0]), str(instance.args[1])) for instance in self.loglikelihood]
        with _naming_the_document(requests["loglikelihood"]):
            self.spans = encoder.spans(pairs)
        rolling = encoder.rolling(instance.args[0] for instance in self.rolling)
        self.windows = [len(windows) for windows in rolling]
        self.spans += [span for windows in rolling for span in windows]
        for request in requests["generate_until"]:
            text, settings = request[2].args
            with _naming_the_document([request]):
                encoder.prompts([text], encoder.generation(settings).new)
        encoder.forget()


_Request = tuple[Subtask, Document, Instance]


@contextmanager
def _naming_the_document(requests: Sequence[_Request]) -> Iterator[None]:
    """Within, encoding a request that lm-eval cannot score raises RequestError with its task and document."""
    try:
        yield
    except CannotScore as error:
        subtask, document, _ = requests[error.position]
        raise RequestError(
            f"task {subtask.name}, document {document.index}: {error}; leave the task out, or use fewer few-shot "
            "examples or a network with a longer context"
        ) from error


@dataclass(eq=False)
class TaskSet:
    """The tasks of a run by name, with their documents and prompts."""

    tasks: dict[str, ScoredTask]
    encoder: Encoder
    groups: dict[str, Group] = field(default_factory=dict)
    _requests: dict[tuple[Split, int | None], EncodedRequests] = field(default_factory=dict, repr=False)
    _tokens: dict[tuple[Split, int | None], tuple[int, int]] = field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls,
        names: Sequence[str],
        *,
        encoder: Encoder,
        include_path: Sequence[str | Path] = (),
        num_fewshot: int | None = None,
        prompting: Prompting = Prompting(),  # noqa: B008 - immutable
        holdout: bool = True,
        kept: Path | None = None,
    ) -> TaskSet:
        """Build tasks by name (`T` or `T:METRIC`, METRIC as in lm-eval's results, its filter optional: `acc,none`).

        lm-eval's own tasks are indexed (seconds) only if a name is not found in `include_path`. `num_fewshot`
        overrides the tasks' own number of examples, except where a task says 0. Tags become their tasks. `kept`: the
        folder of prompts that `keep` wrote before.

        Raises RequestError for an unknown task or metric, a task that needs images, sound or code execution, a task
        whose data cannot be had, and a task asked for twice.
        """
        if not names:
            raise RequestError("no task was given: name at least one with --tasks")
        # 1. lm-eval's own tasks and groups.
        manager, wanted = index_tasks(names, include_path)
        with lm_eval_seeds():
            built = {name: build(manager, name) for name in wanted}
        # 2. A subtask for each of them that has documents, and the metric that counts.
        subtasks: dict[str, Subtask] = {}
        tasks: dict[str, ScoredTask] = {}
        groups: dict[str, Group] = {}
        for name, metric in wanted.items():
            for item in scored_items(built[name]):
                if isinstance(item, Group):
                    groups |= {group.name: group for group in [item, *item.get_all_groups()]}
                members = item.get_all_tasks() if isinstance(item, Group) else [item]
                for task in members:
                    if task.task_name in subtasks:
                        raise RequestError(f"task {task.task_name} is asked for twice: name it, or its group, once")
                    prepare(task, num_fewshot)
                    entry = manager.task_index.get(task.task_name)
                    subtask = Subtask(task, encoder, prompting, holdout, entry.yaml_path if entry else None)
                    subtasks[task.task_name] = subtask
                    if kept is not None:
                        subtask.restore(kept)
                scored = _choose_metric(item, [subtasks[task.task_name] for task in members], metric)
                tasks[scored.name] = scored
        return cls(tasks, encoder, groups)

    def encoded_by(self, encoder: Encoder) -> TaskSet:
        """The same tasks, documents and prompts in the tokens of another encoder."""
        return TaskSet(self.tasks, encoder, self.groups)

    def keep(self, folder: Path) -> None:
        """Write the prompts rendered so far, so that `load` with `kept=folder` need not render them again."""
        for task in self.tasks.values():
            for subtask in task.subtasks:
                subtask.keep(folder)

    def documents(self, split: Split, limit: int | None = None) -> dict[str, list[SubtaskDocuments]]:
        """Each task's documents by subtask. Raises RequestError where a task has none in this split."""
        chosen = {name: task.documents(split, limit) for name, task in self.tasks.items()}
        for name, subtasks in chosen.items():
            if not any(docs for _, docs in subtasks):
                where = "" if split == "all" else f" in the {split} split"
                raise RequestError(f"task {name} has no document{where}; leave it out or give it more documents")
        return chosen

    def by_metric(self, name: str, metric: str) -> ScoredTask:
        """A task of the set under another of its metrics. Raises RequestError for a metric that it does not have."""
        task = self.tasks[name]
        return _choose_metric(task.group or task.subtasks[0].task, task.subtasks, metric)

    def requests(self, split: Split, limit: int | None = None) -> EncodedRequests:
        """The requests of the split's documents, encoded once. Raises RequestError as `documents` and
        `EncodedRequests` do."""
        if (split, limit) not in self._requests:
            self._requests[split, limit] = EncodedRequests(self.documents(split, limit), self.encoder)
        return self._requests[split, limit]

    def tokens(self, split: Split, limit: int | None = None) -> tuple[int, int]:
        """Tokens that a network reads to answer these requests, shared prefixes once, and at most writes."""
        if (split, limit) not in self._tokens:
            requests = self.requests(split, limit)
            read, written = tokens_read(requests.spans), 0
            for instance in requests.generation:
                new = self.encoder.generation(instance.args[1]).new
                read += len(self.encoder.prompts([instance.args[0]], new)[0])
                written += new
            self._tokens[split, limit] = read, written
        return self._tokens[split, limit]

    def chance(self, name: str, split: Split = "report", limit: int | None = None) -> float | None:
        """The task's score under uniform guessing among the choices, or None if it is not multiple choice."""
        task = self.tasks[name]
        return task.chance(task.documents(split, limit))

    def fingerprint(self, name: str, split: Split, limit: int | None = None) -> str:
        """16 hexadecimal digits that identify the documents scored and their prompts."""
        digest = hashlib.sha256()
        for subtask, documents in self.tasks[name].documents(split, limit):
            digest.update(subtask.name.encode())
            for document in documents:
                requests = [[instance.request_type, instance.args] for instance in document.instances]
                digest.update(document.hash.encode())
                digest.update(json.dumps(requests, default=str, sort_keys=True).encode())
        return digest.hexdigest()[:16]


def spread(limit: int, sizes: Sequence[int], weights: Sequence[int]) -> list[int]:
    """How many of `limit` documents each task gives, of those with `sizes` documents, in proportion to `weights`.

    No task gives more than it has. Largest remainders first, ties in order. Every task that has documents gives one,
    even if that exceeds `limit`.
    """
    # 1. Quotas, exact: what small tasks cannot give goes to the others.
    quotas = [0.0] * len(sizes)
    left, unfilled = min(limit, sum(sizes)), [i for i, size in enumerate(sizes) if size]
    while unfilled:
        unit = left / sum(weights[i] for i in unfilled)
        filled = [i for i in unfilled if unit * weights[i] >= sizes[i]]
        for i in filled or unfilled:
            quotas[i] = sizes[i] if filled else unit * weights[i]
        left -= sum(sizes[i] for i in filled)
        unfilled = [i for i in unfilled if i not in filled] if filled else []
    # 2. Whole numbers.
    shares = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (shares[i] - quotas[i], i))
    for i in by_remainder[: min(limit, sum(sizes)) - sum(shares)]:
        shares[i] += 1
    return [max(share, 1) if size else 0 for share, size in zip(shares, sizes, strict=True)]


def _choose_metric(item: Task | Group, subtasks: list[Subtask], wanted: str | None) -> ScoredTask:
    """A task or group with the metric that counts: `wanted` (METRIC or METRIC,FILTER), or else the first of
    `PREFERRED_METRICS` that it has, or else its first. Raises RequestError for one that it does not have."""
    # 1. What there is.
    name = item.name if isinstance(item, Group) else item.task_name
    first = subtasks[0].task
    filters = [ensemble.name for ensemble in first._filters]
    if isinstance(item, Group):
        metrics = [entry.metric for entry in item.aggregate_metric_list or []]
    else:
        metrics = list(item.aggregation())
    # 2. What is wanted.
    metric, _, asked_filter = (wanted or "").partition(",")
    if wanted is None:
        metric = next((m for m in PREFERRED_METRICS if m in metrics), metrics[0])
    if metric not in metrics:
        raise RequestError(f"task {name} has no metric '{metric}'; it has {', '.join(metrics)}")
    if asked_filter and asked_filter not in filters:
        raise RequestError(f"task {name} has no filter '{asked_filter}'; it has {', '.join(filters)}")
    # 3. A group may restrict the filters of its metric.
    if isinstance(item, Group):
        entry = next(e for e in item.aggregate_metric_list or [] if e.metric == metric)
        filters = [f for f in entry.filter_list or filters if f in filters] or filters
    higher = bool(first.higher_is_better().get(metric, True))
    group = item if isinstance(item, Group) else None
    return ScoredTask(name, metric, asked_filter or filters[0], subtasks, higher, group)
