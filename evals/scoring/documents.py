"""The documents of an lm-eval task: which are for the search and which for the report, and their prompts. No torch."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import Task
from lm_eval.utils import handle_non_serializable, hash_string

from evals.scoring.encoding import Encoder
from search.scores import Split
from supernet.common.errors import RequestError, reading
from supernet.common.files import read_json, write_text

SEARCH_DIGITS = "02468ace"

FEWSHOT_SEED = 1234  # lm-eval's default
IMPOSSIBLE = -1e5
"""Log-likelihood of what is not chosen."""


Doc = Mapping[str, object]
"""A document as lm-eval's data set gives it."""


def doc_hash(doc: Doc) -> str:
    """lm-eval's `doc_hash` of a document, as `lm_eval.evaluator.evaluate` computes it."""
    return hash_string(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False))


@dataclass(frozen=True, eq=False)
class Document:
    """One document of a task, its place in the task's test split, and its requests with their prompts."""

    index: int
    doc: Doc
    hash: str
    instances: tuple[Instance, ...]


@dataclass(frozen=True)
class Prompting:
    """How prompts are rendered. `chat`: under the tokenizer's chat template, each few-shot example as a turn if
    `multiturn`."""

    chat: bool = False
    system: str | None = None
    multiturn: bool = True


_Rendered = tuple[str, list[Any], int]
"""A request as it is written to disk: its type, its arguments, and which of its document's it is."""


class Subtask:
    """One lm-eval task that has documents (a group has none), split, with their requests built on demand.

    With `holdout`, few-shot examples are kept out of both splits: where examples are drawn from the scored documents
    themselves, a fixed seeded set of them is set aside and used for every prompt; where they come from elsewhere,
    scored documents that are also there are dropped. Without it, prompts are exactly lm-eval's.

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
        """Number of documents."""
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
                with reading(f"task {self.name}: its templates cannot render document {index + 1}"):
                    self._built[index] = Document(index, doc, digest, self._requests(doc, index))
        return [self._built[index] for index in chosen]

    def restore(self, folder: Path) -> None:
        """Take prompts from what `keep` wrote, where they would be rendered the same today."""
        file = self._file(folder)
        if file.is_file():
            with reading(f"{file}: not what this version writes; remove it"):
                self._rendered = {int(index): requests for index, requests in read_json(file).items()}

    def keep(self, folder: Path) -> None:
        """Write down the prompts rendered so far."""
        if self._built.keys() <= self._rendered.keys():
            return
        for index, document in self._built.items():
            self._rendered[index] = [(i.request_type, list(i.args), i.idx) for i in document.instances]
        folder.mkdir(parents=True, exist_ok=True)
        write_text(self._file(folder), json.dumps(self._rendered))

    def _file(self, folder: Path) -> Path:
        """A file name that changes with everything that prompts depend on."""
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
            [file.read_text(encoding="utf-8") for file in code],
        ]
        digest = hash_string(json.dumps(parts, default=handle_non_serializable))[:16]
        return folder / f"{self.name.replace('/', '_')}-{digest}.json"

    def chance(self, documents: Sequence[Document], metric: str) -> float | None:
        """Mean of a metric of accuracy under uniform guessing among each document's choices; None if the task is not
        multiple choice."""
        if getattr(self.task, "OUTPUT_TYPE", None) != "multiple_choice" or not documents:
            return None
        scored_by_itself = self.task.config.process_results is not None
        levels = []
        for document in documents:
            if scored_by_itself:
                levels += self._when_each_is_certain(document, metric)
                continue
            choices = len(self.task.doc_to_choice(document.doc))
            target = self.task.doc_to_target(document.doc)
            levels.append((len(set(target)) if isinstance(target, list) else 1) / choices)
        return sum(levels) / len(levels)

    def _when_each_is_certain(self, document: Document, metric: str) -> list[float]:
        """The mean of what the task's own code gives where one choice is certain, over the choices: truthfulqa_mc2
        counts the probability of all that are true."""
        answers = range(len(document.instances))
        given = [[(0.0 if one == certain else IMPOSSIBLE, one == certain) for one in answers] for certain in answers]
        values = [float(self.task.process_results(document.doc, results)[metric]) for results in given]
        return [sum(values) / len(values)]

    def _set_examples_aside(self, docs: list[Doc], hashes: list[str]) -> set[str]:
        """Hashes of the documents that are not scored because they are, or may become, few-shot examples. Raises
        RequestError where there are too few documents for that."""
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

    def _requests(self, doc: Doc, index: int) -> tuple[Instance, ...]:
        """A document's requests, as `lm_eval.api.task.Task.build_all_requests` builds them."""
        prompting, task = self._prompting, self.task
        metadata = (task.config["task"], index, task.config.repeats)
        if index in self._rendered:
            return tuple(
                Instance(request_type=kind, doc=doc, arguments=tuple(arguments), idx=i, metadata=metadata)
                for kind, arguments, i in self._rendered[index]
            )
        template = self._encoder.chat if prompting.chat else None
        context = task.fewshot_context(
            doc,
            num_fewshot=self.shots,
            system_instruction=prompting.system,
            apply_chat_template=prompting.chat,
            fewshot_as_multiturn=prompting.multiturn,
            chat_template=template,
            gen_prefix=task.doc_to_prefix(doc),
        )
        requests = task.construct_requests(
            doc=doc,
            ctx=context,
            metadata=metadata,
            apply_chat_template=prompting.chat,
            chat_template=template,
        )
        return tuple(requests) if isinstance(requests, list) else (requests,)


def _remember_rendering(task: Task) -> None:
    """Let a task render each document's text, target and choices once. lm-eval 0.4.13 renders the templates anew at
    every score, which takes longer than scoring a small network."""
    for method in ("doc_to_target", "doc_to_choice", "doc_to_text"):
        render = getattr(task, method, None)
        if render is not None:
            setattr(task, method, _rendered_once(render))


def _rendered_once(render: Callable[..., object]) -> Callable[..., object]:
    """`render`, remembering what it gives for a document alone. Documents are kept, so that their identity is a key."""
    rendered: dict[int, tuple[Doc, object]] = {}

    def remembered(doc: Doc, *args: object, **kwargs: object) -> object:
        if args or kwargs:
            return render(doc, *args, **kwargs)
        if id(doc) not in rendered:
            rendered[id(doc)] = (doc, render(doc))
        return rendered[id(doc)][1]

    return remembered
