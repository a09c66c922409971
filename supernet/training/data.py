"""Training data: documents tokenised and packed into blocks of equal length, in a file, and read in random order.

Documents follow one another without padding, and none attends to another: positions count from 0 in every document
(and in every block), by which transformers' masks know packed sequences (`find_packed_sequence_indices`). The first
token of a document is not learnt from the token before it. OPT's masks and linear attention do not use positions:
there, a document does see the ones before it in its block.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from supernet.common.errors import RequestError
from supernet.tokens import check_rows, rendering
from supernet.training.sources import Message, Row, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_BLOCKS = 16
"""The least number of blocks that are held out for held-out losses, where there are twice as many."""
HELD_OUT_SHARE = 0.02
"""The share of the blocks that is held out where that is more."""

IGNORED = -100
"""Label of a token that is not learnt from, as in transformers."""


@dataclass(frozen=True)
class Batch:
    """Token ids, labels and positions within the document, each [rows, length], int64."""

    ids: Tensor
    labels: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(self.ids[rows], self.labels[rows], self.positions[rows])

    def to(self, device: torch.device) -> Batch:
        return Batch(self.ids.to(device), self.labels.to(device), self.positions.to(device))

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The arguments of a network's forward pass. The mask follows from the positions."""
        return {"input_ids": self.ids, "position_ids": self.positions}

    @property
    def learnt(self) -> Tensor:
        """Which positions predict a token that is learnt from, [rows, length - 1]."""
        return self.labels[:, 1:] != IGNORED

    def split(self, size: int) -> list[Batch]:
        return [self[start : start + size] for start in range(0, len(self), size)]


@dataclass(frozen=True)
class Blocks:
    """Packed training data. `table` [blocks, 3, length], int32, mapped from a file, holds ids, labels and positions."""

    table: Tensor
    fingerprint: str
    documents: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Rows that were passed over, by the reason."""
    _order: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return self.table.shape[0]

    @property
    def length(self) -> int:
        """Tokens in a block."""
        return self.table.shape[2]

    def __getitem__(self, rows: slice | list[int]) -> Batch:
        return Batch(*self.table[rows].long().unbind(1))

    def split(self, share: float = HELD_OUT_SHARE, least: int = HELD_OUT_BLOCKS) -> tuple[Blocks, Blocks]:
        """The training part and a held-out part of `share` (at least `least` blocks, at most half), from the end."""
        cut = len(self) - held_out_of(len(self), share, least)
        return self.part(0, cut), self.part(cut, len(self))

    def part(self, start: int, stop: int) -> Blocks:
        """Some of the blocks, in order; fingerprint and number of documents are those of all blocks."""
        return Blocks(self.table[start:stop], self.fingerprint, self.documents, self.skipped)

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """The `size` blocks of a step, a pure function of (seed, step), so that nothing has to be stored to resume.

        Every epoch visits all blocks once, in another random order.
        """
        positions = range(step * size, (step + 1) * size)
        return self[[int(self._epoch_order(p // len(self), seed)[p % len(self)]) for p in positions]]

    def _epoch_order(self, epoch: int, seed: int) -> Tensor:
        key = seed * 1_000_003 + epoch
        if key not in self._order:
            if len(self._order) > 1:  # a step can lie in two epochs
                self._order.clear()
            self._order[key] = torch.randperm(len(self), generator=torch.Generator().manual_seed(key))
        return self._order[key]


def held_out_of(blocks: int, share: float = HELD_OUT_SHARE, least: int = HELD_OUT_BLOCKS) -> int:
    """How many of so many blocks are held out."""
    return min(max(least, round(share * blocks)), blocks // 2)


def encode_row(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids and labels of one document, with an end mark. Raises `RequestError` that names the row."""
    if row.ids is not None:
        labels = [IGNORED] * len(row.ids)
        for start, stop in row.learnt:
            labels[start:stop] = row.ids[start:stop]
        return list(row.ids), labels
    prompt, content = row.prompt, row.content
    if row.chat and isinstance(prompt, str):
        if tokenizer.chat_template is None:
            prompt += "\n\n"
        else:
            prompt, content = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": content}]
    if isinstance(content, list):
        asked = prompt if isinstance(prompt, list) else []
        return _encode_messages([*asked, *content], tokenizer, row.where, first=len(asked))
    if isinstance(prompt, str):
        return _encode_completion(prompt, content, tokenizer)
    ids = _ended(tokenizer(content, verbose=False).input_ids, tokenizer)
    return ids, list(ids)


def _encode_completion(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """A prompt and its completion, learnt from only in the completion."""
    # Tokenised apart, as in generation.
    before = tokenizer(prompt, verbose=False).input_ids
    if before and before[-1] == tokenizer.eos_token_id:
        before = before[:-1]
    ids = [*before, *tokenizer(completion, add_special_tokens=False, verbose=False).input_ids]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)  # to end is part of the answer
    return ids, [IGNORED] * len(before) + ids[len(before) :]


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The document, with an end mark where the tokenizer marked neither its start nor its end."""
    starts_marked = bool(ids) and ids[0] == tokenizer.bos_token_id
    ends_marked = bool(ids) and ids[-1] == tokenizer.eos_token_id
    if not starts_marked and not ends_marked and tokenizer.eos_token_id is not None:
        return [*ids, tokenizer.eos_token_id]
    return ids


def _encode_messages(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, where: str, first: int = 0
) -> tuple[list[int], list[int]]:
    """A conversation, learnt from only in the assistant's turns from message `first` on.

    The tokens of the assistant's turn k are those that the template adds to the prompt for turn k. The template needs
    only to render earlier turns as prefixes.
    """
    if tokenizer.chat_template is None:
        raise RequestError(
            f"{where}: a conversation, but the tokenizer has no chat template; give 'text' (--text-key text where rows "
            "have both)"
        )
    ids: list[int] = []
    labels: list[int] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or turn < first:
            continue
        with rendering(where):
            prompt = _render(tokenizer, messages[:turn], prompt=True)
            full = _render(tokenizer, messages[: turn + 1], prompt=False)
        if full[: len(ids)] != ids or full[: len(prompt)] != prompt:
            raise RequestError(f"{where}: the chat template rewrites earlier turns; give 'text' instead")
        labels += [IGNORED] * (len(prompt) - len(ids)) + full[len(prompt) :]
        ids = full
    return ids, labels


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], prompt: bool) -> list[int]:
    """Token ids of messages in the chat template, with `prompt` those of the start of the assistant's turn too."""
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def pack(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    tokens: int | None = None,
    seen: Callable[[Row], None] | None = None,
    text_key: str | None = None,
    rows: int | None = None,
) -> Blocks:
    """`pack_rows` of a source's documents. `text_key` is that of `read_rows`."""
    skipped = Counter[str]()
    return pack_rows(source, read_rows(source, text_key, skipped), tokenizer, length, tokens, seen, rows, skipped)


def pack_rows(
    source: str,
    documents: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    tokens: int | None = None,
    seen: Callable[[Row], None] | None = None,
    rows: int | None = None,
    skipped: Counter[str] | None = None,
) -> Blocks:
    """Documents in blocks of `length` tokens, without the incomplete last block and without blocks that have nothing to
    learn from.

    Blocks are written to an unnamed temporary file that is mapped, so neither text nor tokens need to fit into memory.
    Reading stops after `tokens` tokens, if given. `seen` is called with every row. `source` names them all in messages;
    `skipped` counts rows that were passed over, those that reading passes over too. Raises `RequestError` for less than
    two blocks, and for a token without a row among the `rows` of the embedding.
    """
    digest, skipped = hashlib.sha256(), Counter[str]() if skipped is None else skipped
    pending: list[list[int]] = [[], [], []]  # ids, labels, document numbers
    number = read = blocks = 0
    with tempfile.TemporaryFile(prefix="compressor-") as file:
        for row in documents:
            if seen is not None:
                seen(row)
            # 1. Append the document to the pending tokens.
            ids, labels = encode_row(row, tokenizer)
            check_rows(row.where, ids, tokenizer, rows)
            if not ids:
                skipped["the assistant says nothing" if isinstance(row.content, list) else "the text is empty"] += 1
                continue
            digest.update(str(ids).encode())
            for part, values in zip(pending, (ids, [IGNORED, *labels[1:]], [number] * len(ids)), strict=True):
                part += values
            number += 1
            read += len(ids)
            # 2. Write the blocks that are complete.
            whole = len(pending[0]) // length * length
            for start in range(0, whole, length):
                block = np.array([part[start : start + length] for part in pending], dtype=np.int32)
                block[2] = _positions(block[2])
                if (block[1, 1:] != IGNORED).any():
                    file.write(block.tobytes())
                    blocks += 1
            if whole:
                pending = [part[whole:] for part in pending]
            if tokens is not None and read >= tokens + length:
                break
        if blocks < 2:
            raise RequestError(
                f"--data {source}: {read} tokens in {number} documents do not fill two blocks of {length} tokens "
                "with something to learn from"
            )
        file.flush()
        # Copy on write, since torch needs a writable array. The map stays valid after the file is closed.
        table = np.memmap(file, np.int32, mode="c", shape=(blocks, 3, length))
    return Blocks(torch.from_numpy(table), digest.hexdigest()[:16], number, dict(skipped))


def _positions(documents: np.ndarray) -> np.ndarray:
    """Positions that count from 0 in every document, from the document number of each token of a block, [length]."""
    index = np.arange(len(documents))
    starts = np.concatenate(([True], documents[1:] != documents[:-1]))
    return index - np.maximum.accumulate(np.where(starts, index, 0))
