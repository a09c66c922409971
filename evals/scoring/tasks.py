"""lm-eval tasks, built once per run: which documents are for the search and which for the report, their prompts,
their metric, and how a group adds up. No torch.

Tasks, prompts, filters, metrics and aggregation are lm-eval's own. What is ours is the split: a document whose
lm-eval `doc_hash` begins with an even hexadecimal digit is for the search, the others are for the report, and
few-shot examples come from neither.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.utils import handle_non_serializable, hash_string

from evals.scoring.encoding import CannotScore, Encoder, Span
from supernet.common.errors import RequestError, nearest
from supernet.common.files import write_text

Split = Literal["search", "report", "all"]
SEARCH_DIGITS = "02468ace"
FEWSHOT_SEED = 1234  # lm-eval's default
PREFERRED_METRICS = ("acc_norm", "acc", "exact_match")
CHOICE_METRICS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")


def doc_hash(doc: Any) -> str:
    """lm-eval's `doc_hash` of a document, as `lm_eval.evaluator.evaluate` computes it."""
    return hash_string(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False))


@dataclass(frozen=True, eq=False)
class Document:
    """One document of a task, its place in the task's test split, and its requests with their prompts."""

    index: int
    doc: Any
    hash: str
    instances: tuple[Instance, ...]


@dataclass(frozen=True)
class Prompting:
    """How prompts are rendered. `chat`: under the tokenizer's chat template, few-shot examples as turns of their own
    if `multiturn`."""

    chat: bool = False
    system: str | None = None
    multiturn: bool = True


_Rendered = tuple[str, list[Any], int]
"""A request as it is written down: its type, its arguments, and which of its document's it is."""


class Leaf:
    """One lm-eval task that has documents of its own, with its documents split and their requests built on demand.

    With `holdout`, few-shot examples are kept out of both splits: where examples are drawn from the scored documents
    themselves, a fixed seeded set of them is set aside and used for every prompt; where they come from elsewhere,
    scored documents that also stand there are dropped. Without it, prompts are exactly lm-eval's.

    Rendering prompts is most of the work of building a task; `keep` writes them down and `restore` reads them back.
    """

    def __init__(
        self, task: Task, encoder: Encoder, prompting: Prompting, holdout: bool, yaml: Path | None = None
    ) -> None:
        self.task = task
        self._yaml = yaml
        self.name: str = task.task_name
        self._encoder = encoder
        self._prompting = prompting
        self.shots = int(task.config.num_fewshot or 0)
        docs = list(task.eval_docs)
        hashes = [doc_hash(doc) for doc in docs]
        excluded = self._set_examples_aside(docs, hashes) if holdout and self.shots else set()
        self._holdout = holdout
        self._docs = list(zip(docs, hashes, strict=True))
        self._indices: dict[Split, list[int]] = {"search": [], "report": [], "all": []}
        for index, digest in enumerate(hashes):
            if digest not in excluded:
                self._indices["search" if digest[0] in SEARCH_DIGITS else "report"].append(index)
                self._indices["all"].append(index)
        self._built: dict[int, Document] = {}
        self._rendered: dict[int, list[_Rendered]] = {}
        _remember_rendering(task)

    def size(self, split: Split) -> int:
        return len(self._indices[split])

    def documents(self, split: Split, limit: int | None = None) -> list[Document]:
        """The split's documents in the task's order; with `limit`, those with the smallest hashes, so that a smaller
        limit's documents are among a larger one's."""
        chosen = self._indices[split]
        if limit is not None and limit < len(chosen):
            chosen = sorted(sorted(chosen, key=lambda index: (self._docs[index][1], index))[:limit])
        # A sampler that draws anew for every document gives lm-eval's prompts only if it is asked in lm-eval's order.
        random_shots = self.shots and not isinstance(getattr(self.task, "sampler", None), FirstNSampler)
        for index in range(len(self._docs)) if random_shots else chosen:
            if index not in self._built:
                doc, digest = self._docs[index]
                self._built[index] = Document(index, doc, digest, self._requests(doc, index))
        return [self._built[index] for index in chosen]

    def restore(self, folder: Path) -> None:
        """Take prompts from what `keep` wrote, where they would be rendered the same today."""
        file = self._file(folder)
        if file.is_file():
            self._rendered = {int(index): requests for index, requests in json.loads(file.read_text()).items()}

    def keep(self, folder: Path) -> None:
        """Write down the prompts rendered so far."""
        if self._built.keys() <= self._rendered.keys():
            return
        for index, document in self._built.items():
            self._rendered[index] = [(i.request_type, list(i.args), i.idx) for i in document.instances]
        folder.mkdir(parents=True, exist_ok=True)
        write_text(self._file(folder), json.dumps(self._rendered))

    def _file(self, folder: Path) -> Path:
        """A name that changes with anything that prompts are made of."""
        sampler = getattr(self.task, "sampler", None)
        code = sorted(self._yaml.parent.glob("*.py")) if self._yaml is not None else []
        parts = [
            importlib.metadata.version("lm-eval"),
            self.task.dump_config(),
            [digest for _, digest in self._docs],
            [doc_hash(doc) for doc in sampler.df] if self.shots and sampler is not None else [],
            self._holdout,
            dataclasses.astuple(self._prompting),
            self._encoder.tokenizer.chat_template if self._prompting.chat else None,
            [file.read_text() for file in code],
        ]
        digest = hash_string(json.dumps(parts, default=handle_non_serializable))[:16]
        return folder / f"{self.name.replace('/', '_')}-{digest}.json"

    def chance(self, documents: Sequence[Document]) -> float | None:
        """Mean accuracy of uniform guessing among each document's choices; None if the task is not multiple choice."""
        if getattr(self.task, "OUTPUT_TYPE", None) != "multiple_choice" or not documents:
            return None
        levels = []
        for document in documents:
            choices = len(self.task.doc_to_choice(document.doc))
            target = self.task.doc_to_target(document.doc)
            levels.append((len(set(target)) if isinstance(target, list) else 1) / choices)
        return sum(levels) / len(levels)

    def _set_examples_aside(self, docs: list[Any], hashes: list[str]) -> set[str]:
        sampler = getattr(self.task, "sampler", None)
        pool = list(sampler.df) if sampler is not None else []
        pool_hashes = [doc_hash(doc) for doc in pool]
        common = set(hashes) & set(pool_hashes)
        if 2 * len(common) <= len(docs):
            return common
        if not isinstance(sampler, FirstNSampler):
            pool = random.Random(FEWSHOT_SEED).sample(pool, min(self.shots, len(pool)))
        examples = pool[: self.shots]
        if len(examples) < self.shots or len(examples) >= len(docs):
            raise RequestError(
                f"task {self.name}: {self.shots} few-shot examples cannot be set aside from {len(docs)} documents; "
                "ask for fewer"
            )
        self.task.sampler = FirstNSampler(examples)
        return {doc_hash(doc) for doc in examples}

    def _requests(self, doc: Any, index: int) -> tuple[Instance, ...]:
        """As `lm_eval.api.task.Task.build_all_requests` builds them."""
        how, task = self._prompting, self.task
        metadata = (task.config["task"], index, task.config.repeats)
        if index in self._rendered:
            return tuple(
                Instance(request_type=kind, doc=doc, arguments=tuple(arguments), idx=i, metadata=metadata)
                for kind, arguments, i in self._rendered[index]
            )
        template = self._encoder.chat if how.chat else None
        context = task.fewshot_context(
            doc,
            num_fewshot=self.shots,
            system_instruction=how.system,
            apply_chat_template=how.chat,
            fewshot_as_multiturn=how.multiturn,
            chat_template=template,
            gen_prefix=task.doc_to_prefix(doc),
        )
        requests = task.construct_requests(
            doc=doc,
            ctx=context,
            metadata=metadata,
            apply_chat_template=how.chat,
            chat_template=template,
        )
        return tuple(requests) if isinstance(requests, list) else (requests,)


@dataclass(eq=False)
class ScoredTask:
    """A task or group that the user asked for, and the one metric that counts."""

    name: str
    metric: str
    filter: str
    leaves: list[Leaf]
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
        """Each leaf's share of `limit` documents."""
        if limit is None:
            return [None] * len(self.leaves)
        sizes = [leaf.size(split) for leaf in self.leaves]
        return list(spread(limit, sizes, sizes if self.weighted else [1] * len(sizes)))

    def documents(self, split: Split, limit: int | None = None) -> list[tuple[Leaf, list[Document]]]:
        shares = self.limits(split, limit)
        return [(leaf, leaf.documents(split, share)) for leaf, share in zip(self.leaves, shares, strict=True)]

    def aggregate(
        self, values: Sequence[float], stderrs: Sequence[float | None], sizes: Sequence[int]
    ) -> tuple[float, float | None]:
        """Value and standard error from the leaves', as lm-eval's group adds them up."""
        if self.group is None:
            return values[0], stderrs[0]
        only = dataclasses.replace(self.group, aggregate_metric_list=[self._aggregate()])
        error_key = f"{self.metric}_stderr,{self.filter}"
        rows: dict[str, Any] = {
            leaf.name: {self.key: value, error_key: "N/A" if error is None else error, "sample_len": size}
            for leaf, value, error, size in zip(self.leaves, values, stderrs, sizes, strict=True)
        }
        result: Any = only.aggregate(rows)
        error = result[error_key]
        return float(result[self.key]), None if error == "N/A" else float(error)

    def chance(self, documents: Sequence[tuple[Leaf, list[Document]]]) -> float | None:
        """The metric's level under uniform guessing, or None where there is no such thing."""
        if self.metric not in CHOICE_METRICS:
            return None
        levels = [(leaf.chance(docs), len(docs)) for leaf, docs in documents if docs]
        total = 0.0
        for level, size in levels:
            if level is None:
                return None
            total += level * (size if self.weighted else 1)
        return total / sum(size if self.weighted else 1 for _, size in levels) if levels else None

    def _aggregate(self) -> Any:
        assert self.group is not None and self.group.aggregate_metric_list
        return next(entry for entry in self.group.aggregate_metric_list if entry.metric == self.metric)


class Questions:
    """All requests of some documents, in tokens.

    `spans`: one for each request of `scored`, then `windows[i]` for each of `rolled`; `written` are to be generated.
    Raises RequestError naming a document that lm-eval itself cannot score.
    """

    def __init__(self, documents: dict[str, list[tuple[Leaf, list[Document]]]], encoder: Encoder) -> None:
        self.documents = documents
        asked: dict[str, list[tuple[Leaf, Document, Instance]]] = defaultdict(list)
        for leaves in documents.values():
            for leaf, docs in leaves:
                for document in docs:
                    for instance in document.instances:
                        asked[instance.request_type].append((leaf, document, instance))
        self.scored = [instance for _, _, instance in asked["loglikelihood"]]
        self.rolled = [instance for _, _, instance in asked["loglikelihood_rolling"]]
        self.written = [instance for _, _, instance in asked["generate_until"]]
        pairs = [(str(instance.args[0]), str(instance.args[1])) for instance in self.scored]
        self.spans: list[Span] = _blame(asked["loglikelihood"], lambda: encoder.spans(pairs))
        rolling = encoder.rolling(instance.args[0] for instance in self.rolled)
        self.windows = [len(windows) for windows in rolling]
        self.spans += [span for windows in rolling for span in windows]
        for row in asked["generate_until"]:
            text, settings = row[2].args
            _blame([row], partial(encoder.prompts, [text], encoder.generation(settings).new))
        encoder.forget()


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


@dataclass(eq=False)
class TaskSet:
    """The tasks of a run by name, with their documents and prompts."""

    tasks: dict[str, ScoredTask]
    encoder: Encoder
    groups: dict[str, Group] = field(default_factory=dict)
    _questions: dict[tuple[Split, int | None], Questions] = field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls,
        names: Sequence[str],
        *,
        encoder: Encoder,
        include_path: Sequence[str | Path] = (),
        num_fewshot: int | None = None,
        prompting: Prompting = Prompting(),
        holdout: bool = True,
        kept: Path | None = None,
    ) -> TaskSet:
        """Build tasks by name (`T` or `T:METRIC`, METRIC as in lm-eval's results, its filter optional: `acc,none`).

        lm-eval's own tasks are indexed (seconds) only if a name is not found in `include_path`. `num_fewshot`
        overrides the tasks' own number of examples, except where a task says 0. Tags become their tasks. `kept`: the
        folder of prompts that `keep` wrote before. Raises
        RequestError for an unknown task or metric, a task that needs images, sound or code execution, a task whose
        data cannot be had, and a task asked for twice.
        """
        if not names:
            raise RequestError("no task was given: name at least one with --tasks")
        index, wanted = _index(names, include_path)
        with _lm_eval_seeds():
            built = {name: _build(index, name) for name in wanted}
        leaves: dict[str, Leaf] = {}
        tasks: dict[str, ScoredTask] = {}
        groups: dict[str, Group] = {}
        for name, metric in wanted.items():
            for item in _scored(built[name]):
                if isinstance(item, Group):
                    groups |= {group.name: group for group in [item, *item.get_all_groups()]}
                members = item.get_all_tasks() if isinstance(item, Group) else [item]
                for task in members:
                    if task.task_name in leaves:
                        raise RequestError(f"task {task.task_name} is asked for twice: name it, or its group, once")
                    _prepare(task, num_fewshot)
                    entry = index.task_index.get(task.task_name)
                    leaf = Leaf(task, encoder, prompting, holdout, entry.yaml_path if entry else None)
                    leaves[task.task_name] = leaf
                    if kept is not None:
                        leaf.restore(kept)
                scored = _choose_metric(item, [leaves[task.task_name] for task in members], metric)
                tasks[scored.name] = scored
        return cls(tasks, encoder, groups)

    def keep(self, folder: Path) -> None:
        """Write down the prompts rendered so far, so that `load` with `kept=folder` need not render them again."""
        for task in self.tasks.values():
            for leaf in task.leaves:
                leaf.keep(folder)

    def documents(self, split: Split, limit: int | None = None) -> dict[str, list[tuple[Leaf, list[Document]]]]:
        """Each task's documents by leaf. Raises RequestError where a task has none in this split."""
        chosen = {name: task.documents(split, limit) for name, task in self.tasks.items()}
        for name, leaves in chosen.items():
            empty = [leaf.name for leaf, docs in leaves if not docs]
            if len(empty) == len(leaves):
                where = "" if split == "all" else f" in the {split} split"
                raise RequestError(f"task {name} has no document{where}; leave it out or give it more documents")
        return chosen

    def by_metric(self, name: str, metric: str) -> ScoredTask:
        """A task of the set under another of its metrics. Raises RequestError for a metric that it does not have."""
        task = self.tasks[name]
        return _choose_metric(task.group or task.leaves[0].task, task.leaves, metric)

    def questions(self, split: Split, limit: int | None = None) -> Questions:
        """The requests of the split's documents, encoded once. Raises RequestError as `documents` and `Questions`."""
        if (split, limit) not in self._questions:
            self._questions[split, limit] = Questions(self.documents(split, limit), self.encoder)
        return self._questions[split, limit]

    def chance(self, name: str, split: Split = "report", limit: int | None = None) -> float | None:
        """The task's score under uniform guessing among the choices, or None if it is not multiple choice."""
        task = self.tasks[name]
        return task.chance(task.documents(split, limit))

    def fingerprint(self, name: str, split: Split, limit: int | None = None) -> str:
        """16 hexadecimal digits that stand for the documents scored and the prompts they are scored with."""
        digest = hashlib.sha256()
        for leaf, documents in self.tasks[name].documents(split, limit):
            digest.update(leaf.name.encode())
            for document in documents:
                requests = [[instance.request_type, instance.args] for instance in document.instances]
                digest.update(document.hash.encode())
                digest.update(json.dumps(requests, default=str, sort_keys=True).encode())
        return digest.hexdigest()[:16]


def spread(limit: int, sizes: Sequence[int], weights: Sequence[int]) -> list[int]:
    """`limit` documents over tasks of `sizes` documents, in proportion to `weights`, none beyond its size.

    Largest remainders first, ties in order. Every task that has documents gets one, even if that exceeds `limit`.
    """
    quotas = [0.0] * len(sizes)
    left, unfilled = min(limit, sum(sizes)), [i for i, size in enumerate(sizes) if size]
    while unfilled:
        unit = left / sum(weights[i] for i in unfilled)
        filled = [i for i in unfilled if unit * weights[i] >= sizes[i]]
        for i in filled or unfilled:
            quotas[i] = sizes[i] if filled else unit * weights[i]
        left -= sum(sizes[i] for i in filled)
        unfilled = [i for i in unfilled if i not in filled] if filled else []
    shares = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (shares[i] - quotas[i], i))
    for i in by_remainder[: min(limit, sum(sizes)) - sum(shares)]:
        shares[i] += 1
    return [max(share, 1) if size else 0 for share, size in zip(shares, sizes, strict=True)]


def _index(names: Sequence[str], include_path: Sequence[str | Path]) -> tuple[TaskManager, dict[str, str | None]]:
    """A task manager that knows all `names` and what they are made of, and {name: metric asked for}."""
    paths = [Path(path) for path in include_path]
    for path in paths:
        if not path.is_dir():
            raise RequestError(f"--include-path {path} is not a folder")
    unknown: list[str] = []
    for defaults in (False, True):
        manager = TaskManager(include_path=[*paths], include_defaults=defaults)
        wanted: dict[str, str | None] = {}
        unknown = []
        for spec in names:
            name, metric = spec, None
            if spec not in manager.task_index and ":" in spec:
                name, _, metric = spec.rpartition(":")
            if name in wanted:
                raise RequestError(f"task {name} is asked for twice: name it once")
            wanted[name] = metric or None
            if not _complete(name, manager.task_index):
                unknown.append(name)
        if not unknown:
            return manager, wanted
    name = unknown[0]
    raise RequestError(
        f"unknown task '{name}'{nearest(name, manager.all_tasks)}; give the folder of your own task files with "
        "--include-path"
    )


def _complete(name: str, index: dict[str, Entry]) -> bool:
    """Whether a task, and everything that a group or tag refers to by name, is in the index."""
    entry = index.get(name)
    if entry is None:
        return False
    if entry.kind is Kind.TAG:
        return all(_complete(member, index) for member in entry.tags)
    if entry.kind is Kind.GROUP:
        members = (entry.cfg or {}).get("task") or []
        for member in [members] if isinstance(members, str) else members:
            reference, defined_here = member, False
            if isinstance(member, dict):
                reference = member.get("group") or member.get("task")
                defined_here = reference not in index and len(member) > 2
            if isinstance(reference, str) and not defined_here and not _complete(reference, index):
                return False
    return True


def _build(manager: TaskManager, name: str) -> Task | Group | list[Task]:
    entry = manager.task_index[name]
    try:
        return manager._load_spec(name)
    except RequestError:
        raise
    except Exception as error:  # a task file is somebody else's program: whatever it raises is about that file
        reason = " ".join(str(error).split()) or type(error).__name__
        where = f" ({entry.yaml_path})" if entry.yaml_path else ""
        raise RequestError(f"task {name}{where} cannot be built: {reason[:300]}") from error


def _scored(item: Task | Group | list[Task]) -> Iterable[Task | Group]:
    """What gets a score of its own: tasks, and groups that say how to add up."""
    if isinstance(item, list):
        return item
    if isinstance(item, Group) and not item.has_aggregation:
        return [scored for child in item for scored in _scored(child)]
    return [item]


def _prepare(task: Task, num_fewshot: int | None) -> None:
    """Few-shot settings as `lm_eval.evaluator.simple_evaluate` makes them."""
    if getattr(task, "MULTIMODAL", False):
        raise RequestError(f"task {task.task_name} needs images or sound: only text tasks can be scored")
    if getattr(task, "UNSAFE_CODE", False):
        raise RequestError(f"task {task.task_name} runs code that the network writes: choose another task")
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _choose_metric(item: Task | Group, leaves: list[Leaf], wanted: str | None) -> ScoredTask:
    name = item.name if isinstance(item, Group) else item.task_name
    first = leaves[0].task
    filters = [ensemble.name for ensemble in first._filters]
    if isinstance(item, Group):
        metrics = [entry.metric for entry in item.aggregate_metric_list or []]
    else:
        metrics = list(item.aggregation())
    metric, _, asked_filter = (wanted or "").partition(",")
    if wanted is None:
        metric = next((m for m in PREFERRED_METRICS if m in metrics), metrics[0])
    if metric not in metrics:
        raise RequestError(f"task {name} has no metric '{metric}'; it has {', '.join(metrics)}")
    if asked_filter and asked_filter not in filters:
        raise RequestError(f"task {name} has no filter '{asked_filter}'; it has {', '.join(filters)}")
    if isinstance(item, Group):
        entry: Any = next(e for e in item.aggregate_metric_list or [] if e.metric == metric)
        filters = [f for f in entry.filter_list or filters if f in filters] or filters
    higher = bool(first.higher_is_better().get(metric, True))
    group = item if isinstance(item, Group) else None
    return ScoredTask(name, metric, asked_filter or filters[0], leaves, higher, group)


def _remember_rendering(task: Task) -> None:
    """Let a task render each document's target and choices once: lm-eval renders the templates anew at every score,
    which takes longer than scoring a small network. Documents are kept, so their identity is a key."""
    for method in ("doc_to_target", "doc_to_choice", "doc_to_text"):
        render = getattr(task, method, None)
        if render is not None:
            setattr(task, method, _Remember(render))


class _Remember:
    def __init__(self, render: Any) -> None:
        self._render = render
        self._known: dict[int, tuple[Any, Any]] = {}

    def __call__(self, doc: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return self._render(doc, *args, **kwargs)
        if id(doc) not in self._known:
            self._known[id(doc)] = (doc, self._render(doc))
        return self._known[id(doc)][1]


@contextmanager
def _lm_eval_seeds() -> Any:
    """The global seeds that simple_evaluate sets, for tasks that shuffle while they load; restored afterwards."""
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
