"""Training text that a network writes itself, for where there is no other (LLM-QAT, Liu et al., arXiv 2305.17888,
section 2.1): token ids are kept as they were drawn, so that what is trained on is what was written.

A row is as many tokens as a training block, filled with documents: one that ends makes room for the next. A document's
first token is drawn from the whole vocabulary, the `CONFIDENT` next ones are the likeliest, all others are drawn by
their probability. Where the tokenizer has a chat template, every second row is a conversation: the network writes the
user's turn too, behind the template's marks (Magpie, Xu et al., arXiv 2406.08464), and then the assistant's. Learnt
from is what was drawn by probability: not the template's marks, the user's turns and how a document begins.

What is random in a row follows from the seed and the row's number alone, so rows can be written in any order.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from supernet.common.errors import RequestError, reading
from supernet.common.files import read_text, write_text
from supernet.device import logits_at_once
from supernet.tokens import rendering
from supernet.training.sources import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = 1
"""Counted up when another text is written from the same network and seed."""
CONFIDENT = 4
"""Tokens after a document's first that are the likeliest ones: early tokens decide where a text goes (3 to 5 in the
paper)."""

Ids = Sequence[int]


@dataclass(frozen=True)
class Template:
    """Token ids of a chat template between the turns: before the first question, before an answer, and before the next
    question. The first of each but the opening ends the turn before it."""

    opening: Ids
    answer: Ids
    question: Ids


@dataclass(frozen=True)
class Vocabulary:
    """What is written with."""

    known: Tensor
    """Which rows of the embedding are tokens, [vocabulary]."""
    special: frozenset[int]
    """Marks, at which a document ends."""
    firsts: Ids
    """What a document's first token is drawn from: every token that is no mark."""
    opening: Ids
    """What the tokenizer puts before a text."""
    template: Template | None
    """None: no conversations."""

    @property
    def words(self) -> Tensor:
        """Which rows of the embedding are tokens and no marks, [vocabulary]."""
        words = torch.zeros_like(self.known)
        words[list(self.firsts)] = True
        return words


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, config: Any, rows: int, length: int) -> Vocabulary:
    """What a network writes rows of `length` tokens with; its embedding has `rows` rows."""
    known = torch.zeros(rows, dtype=torch.bool)
    known[[index for index in set(tokenizer.get_vocab().values()) if index < rows]] = True
    ends = getattr(config, "eos_token_id", None)
    special = {*tokenizer.all_special_ids, *(ends if isinstance(ends, list) else [] if ends is None else [ends])}
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    firsts = [index for index in known.nonzero().flatten().tolist() if index not in special]
    whole, bare = (tokenizer("a", add_special_tokens=marked, verbose=False).input_ids for marked in (True, False))
    opening = list(takewhile(lambda index: index not in bare, whole))
    return Vocabulary(known, frozenset(special), firsts, opening, _template(tokenizer, length))


def _template(tokenizer: PreTrainedTokenizerBase, length: int) -> Template | None:
    """A tokenizer's chat template between turns. None where it has none, where it does not render plain turns as they
    are, and where it leaves a row of `length` tokens no room."""
    if tokenizer.chat_template is None:
        return None
    turns = ["zqja", "zqjb", "zqjc"]  # words that no template has
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
    try:
        with rendering("--data generated"):
            asked, talked = (
                str(tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=True))
                for part in (messages[:1], messages)
            )
    except RequestError:
        return None
    before, between = asked.split(turns[0]), re.split(f"{turns[1]}|{turns[2]}", talked)
    if len(before) != 2 or len(between) != 3:
        return None
    opening, answer, question = (
        tokenizer(part, add_special_tokens=False, verbose=False).input_ids for part in (*before, between[1])
    )
    if not (answer and question) or 2 * len(opening + answer + question) > length:
        return None
    return Template(opening, answer, question)


@dataclass(frozen=True)
class Document:
    """What a network wrote."""

    ids: list[int]
    learnt: list[list[int]]
    """From where to where it is learnt from."""
    chat: bool
    """Whether it is a conversation."""


@dataclass
class _Page:
    """A row while it is written."""

    number: int
    length: int
    vocabulary: Vocabulary
    seed: int
    ids: list[int] = field(default_factory=list)
    learnt: list[bool] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    """Where each document begins."""

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.seed, self.number])
        self.draws = rng.random(self.length)
        """For every token, where it stands in the sum of the probabilities."""
        self.firsts = rng.integers(len(self.vocabulary.firsts), size=self.length + 1)
        self.template = self.vocabulary.template if self.number % 2 else None
        self.forced: deque[int] = deque()
        self.begin()

    @property
    def start(self) -> int:
        """Where the document that is written begins."""
        return self.starts[-1]

    def begin(self) -> None:
        """From here on another document is written."""
        self.starts.append(len(self.ids))
        self.confident, self.turn = 0, ""
        if self.template is not None:
            self.forced.extend(self.template.opening)
            self.ask()
        else:
            first = self.vocabulary.firsts[int(self.firsts[len(self.ids)])]
            self.forced.extend([*self.vocabulary.opening, first])
            self.confident = CONFIDENT

    def ask(self) -> None:
        """From here on the user speaks: in a quarter of a row at most, where no mark ends the turn."""
        self.turn, self.left = "question", self.length // 4

    def write(self, likeliest: int, drawn: int) -> None:
        """Write one more token: what must come, or one of these two."""
        token, learnt = drawn, self.turn != "question"
        if self.forced:
            token, learnt = self.forced.popleft(), False
        elif self.confident:
            self.confident -= 1
            token, learnt = likeliest, False
        elif self.turn == "question":
            token = self._asked(token)
        self.ids.append(token)
        self.learnt.append(learnt)
        if learnt and token in self.vocabulary.special:
            self._ended(token)

    def _asked(self, token: int) -> int:
        """The next token of the user's turn; the template's mark, and what follows it, where the turn ends."""
        assert self.template is not None
        self.left -= 1
        if token not in self.vocabulary.special and self.left:
            return token
        self.turn = "answer"
        self.forced.extend(self.template.answer[1:])
        return self.template.answer[0]

    def _ended(self, token: int) -> None:
        """After a mark: the user's next turn, where it ended the assistant's; another document otherwise."""
        if self.template is not None and token == self.template.question[0]:
            self.forced.extend(self.template.question[1:])
            self.ask()
        else:
            self.begin()

    def documents(self) -> list[Document]:
        """What was written, by document."""
        starts = [start for start in self.starts if start < len(self.ids)]
        return [
            Document(self.ids[start:stop], _spans(self.learnt[start:stop]), chat=self.template is not None)
            for start, stop in zip(starts, [*starts[1:], len(self.ids)], strict=True)
        ]


def _spans(learnt: Sequence[bool]) -> list[list[int]]:
    """From where to where a list is true."""
    edges = np.flatnonzero(np.diff([False, *learnt, False]))
    return edges.reshape(-1, 2).tolist()


@torch.inference_mode()
def write_rows(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    numbers: range,
    length: int,
    seed: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[list[Document]]:
    """The documents of each of these rows, written side by side with one cache. `advance` is told how many tokens were
    written. Raises `RequestError` where logits are no numbers, as half precision has it in some networks.

    Networks with linear attention, which no mask reaches, see the document before in a row, as they do in training.
    """
    device = model.device
    pages = [_Page(number, length, vocabulary, seed) for number in numbers]
    draws = torch.tensor(np.array([page.draws for page in pages]), device=device)
    known, words = vocabulary.known.to(device), vocabulary.words.to(device)
    cache, likeliest, drawn = None, [0] * len(pages), [0] * len(pages)
    for position in range(length):
        # 1. Every row takes a token.
        for page, *offered in zip(pages, likeliest, drawn, strict=True):
            page.write(*offered)
        advance(len(pages))
        if position + 1 == length:
            break
        # 2. The network reads it; within a row it sees nothing before the document's first token.
        starts = torch.tensor([min(page.start, position) for page in pages])
        out = model(
            input_ids=torch.tensor([page.ids[-1:] for page in pages]).to(device),
            attention_mask=(torch.arange(position + 1) >= starts[:, None]).long().to(device),
            position_ids=(position - starts)[:, None].to(device),
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        # 3. What may come next.
        logits = out.logits[:, -1]
        parts = max(1, logits_at_once(device) // logits.shape[1])
        chosen = [
            _choose(part.float(), known, words, draw)
            for part, draw in zip(logits.split(parts), draws[:, position + 1].split(parts), strict=True)
        ]
        likeliest, drawn = torch.cat(chosen, dim=1).tolist()
        if min(drawn) < 0:
            dtype = str(model.dtype).removeprefix("torch.")
            raise RequestError(f"--data generated: in {dtype} the base's logits are no numbers; say another --dtype")
    return [page.documents() for page in pages]


def _choose(logits: Tensor, known: Tensor, words: Tensor, draws: Tensor) -> Tensor:
    """The likeliest token that is no mark, and the one that the draws of [0, 1) fall on, [2, rows]; -1 where logits are
    no numbers.

    In float64, since the probabilities of a large vocabulary are summed up.
    """
    likeliest = logits.masked_fill(~words, -torch.inf).argmax(dim=1)
    sums = logits.masked_fill(~known, -torch.inf).softmax(dim=1).cumsum(dim=1, dtype=torch.float64)
    drawn = torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    return torch.stack([likeliest, drawn.where(sums[:, -1].isfinite(), -1)])


# -- Files ----------------------------------------------------------------------------------------------------------


def rows_file(folder: Path, rows: range) -> Path:
    """Where these rows stand; the name alone says which they are."""
    return folder / f"{rows.start:08d}-{rows.stop:08d}.jsonl"


def written_rows(folder: Path) -> list[range]:
    """The rows in each file of a folder, in order."""
    names = [re.fullmatch(r"(\d{8,})-(\d{8,})\.jsonl", file.name) for file in folder.glob("*.jsonl")]
    return sorted((range(int(name[1]), int(name[2])) for name in names if name), key=lambda rows: rows.start)


def missing_rows(folder: Path, rows: int, at_once: int) -> list[range]:
    """Which of the first `rows` rows no file has, in portions of `at_once`. The last one is whole too, so that more
    rows, asked for later, are those that would have been written at once."""
    missing, row = [], 0
    for have in [*written_rows(folder), None]:
        limit = rows if have is None else have.start
        while row < min(limit, rows):
            portion = range(row, row + at_once if have is None else min(row + at_once, limit))
            missing.append(portion)
            row = portion.stop
        row = row if have is None else max(row, have.stop)
    return missing


def keep_rows(
    folder: Path, rows: range, written: Sequence[Sequence[Document]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write a portion's file: a line for each document, with its text for the reader."""
    lines = [
        {"row": number, **vars(document), "text": tokenizer.decode(document.ids, skip_special_tokens=True)}
        for number, documents in zip(rows, written, strict=True)
        for document in documents
    ]
    write_text(rows_file(folder, rows), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_documents(folder: Path, rows: int) -> Iterator[Row]:
    """The documents of the first `rows` rows, in order. Raises `RequestError` for a file that is missing or damaged."""
    row = 0
    for have in written_rows(folder):
        if row >= rows:
            return
        file = rows_file(folder, have)
        if have.start != row:
            break
        with reading(f"{file}: damaged; remove it to have it written again"):
            lines = [json.loads(line) for line in read_text(file).split("\n") if line]
            documents = [_as_row(f"{file}: line {n}", line) for n, line in enumerate(lines, 1) if line["row"] < rows]
        yield from documents
        row = have.stop
    if row < rows:
        raise RequestError(f"{folder}: row {row} is missing; run the command again to have it written")


def _as_row(where: str, line: dict[str, Any]) -> Row:
    """A document as the packing takes it. Raises ValueError, TypeError or KeyError for a line that is none."""
    ids, learnt = [int(index) for index in line["ids"]], [(int(start), int(stop)) for start, stop in line["learnt"]]
    if min(ids) < 0:
        raise ValueError("a token id below 0")
    return Row(where, str(line["text"]), chat=bool(line["chat"]), ids=ids, learnt=learnt)
