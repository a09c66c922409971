"""Training text: read through `datasets`, tokenised, and packed into blocks of equal length.

A source is a local `.txt`, `.jsonl`, `.json` or `.parquet` file, a folder of them, or a hub dataset written
`name`, `name:config` or `name:config:split`. A row has `text`, or `messages` (rendered with the tokenizer's chat
template, loss on the assistant's turns only).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import RequestError

IGNORED = -100
"""Label of a token that is not learnt from, as in transformers."""

_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Blocks:
    """Packed training data: `ids` and `labels` of shape [blocks, length], and where the text came from."""

    ids: Tensor
    labels: Tensor
    fingerprint: str
    documents: int

    def __len__(self) -> int:
        return self.ids.shape[0]

    def split(self, share: float = 0.02, least: int = 8) -> tuple[Blocks, Blocks]:
        """The training part and a held-out part of `share` (at least `least` blocks, at most half), from the end."""
        held = min(max(least, round(share * len(self))), len(self) // 2)
        cut = len(self) - held
        return (
            Blocks(self.ids[:cut], self.labels[:cut], self.fingerprint, self.documents),
            Blocks(self.ids[cut:], self.labels[cut:], self.fingerprint, self.documents),
        )

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """The `size` blocks of a step. A pure function of (seed, step): resuming needs no saved reader state.

        Every epoch visits all blocks once in an order of its own.
        """
        positions = range(step * size, (step + 1) * size)
        rows = [int(self._epoch_order(p // len(self), seed)[p % len(self)]) for p in positions]
        return self.ids[rows], self.labels[rows]

    def _epoch_order(self, epoch: int, seed: int) -> Tensor:
        cached = self.__dict__.get("_order")
        if cached is None or cached[0] != (epoch, seed):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            cached = ((epoch, seed), torch.randperm(len(self), generator=generator))
            object.__setattr__(self, "_order", cached)
        return cached[1]


def local_files(source: str) -> list[Path] | None:
    """The files of a local source, or None where `source` names a hub dataset.

    Raises `RequestError` for what is missing, empty, of another kind, or (JSON lines) not valid at some line.
    """
    path = Path(source).expanduser()
    if not path.exists() and path.suffix not in _READERS and not path.is_absolute() and source[:1] not in ".~":
        return None
    if not path.exists():
        raise RequestError(f"--data {source}: no such file")
    files = sorted(f for f in path.iterdir() if f.suffix in _READERS) if path.is_dir() else [path]
    if not files or any(f.suffix not in _READERS for f in files):
        raise RequestError(f"--data {source}: expected {', '.join(_READERS)} files")
    for file in files:
        if file.stat().st_size == 0:
            raise RequestError(f"--data {file}: the file is empty")
        if file.suffix == ".jsonl":
            _check_jsonl(file)
    return files


def read_rows(source: str) -> Iterator[dict[str, Any]]:
    """The rows of a source, in order. Raises `RequestError` for every way in which a source can be unusable."""
    import datasets

    files = local_files(source)
    if files is not None:
        for file in files:
            try:
                options = {"sample_by": "paragraph"} if file.suffix == ".txt" else {}
                yield from datasets.load_dataset(
                    _READERS[file.suffix], data_files=str(file), split="train", streaming=True, **options
                )
            except datasets.exceptions.DatasetGenerationError as error:
                raise RequestError(f"--data {file}: cannot be read ({error})") from error
        return
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        yield from datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(f"--data {source}: neither a local file nor a reachable hub dataset ({reason})") from error


def _check_jsonl(file: Path) -> None:
    """Name the first bad line; `datasets` would say only that generation failed. Reads no further than it must."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RequestError(f"--data {file}: line {number} is not valid JSON ({error})") from error
            if not isinstance(row, dict) or not ("text" in row or "messages" in row):
                raise RequestError(f"--data {file}: line {number} has neither 'text' nor 'messages'")


def encode_row(row: dict[str, Any], tokenizer: Any, source: str) -> tuple[list[int], list[int]]:
    """Token ids and labels of one document, with the marks that separate it from the next."""
    if "messages" in row:
        return _encode_messages(row["messages"], tokenizer, source)
    if not isinstance(row.get("text"), str):
        raise RequestError(f"--data {source}: a row has neither 'text' nor 'messages'")
    ids = tokenizer(row["text"]).input_ids
    starts_marked = bool(ids) and ids[0] == tokenizer.bos_token_id
    ends_marked = bool(ids) and ids[-1] == tokenizer.eos_token_id
    if not starts_marked and not ends_marked and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return ids, list(ids)


def _encode_messages(messages: list[dict[str, str]], tokenizer: Any, source: str) -> tuple[list[int], list[int]]:
    """A conversation, learnt from only where the assistant speaks.

    The assistant's span in turn k is what the template adds between the prompt for turn k and the conversation
    including it; this asks nothing of the template but that earlier turns render as prefixes.
    """
    if tokenizer.chat_template is None:
        raise RequestError(f"--data {source}: rows hold 'messages' but the tokenizer has no chat template; give 'text'")
    ids: list[int] = []
    labels: list[int] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:turn], prompt=True)
        full = _render(tokenizer, messages[: turn + 1], prompt=False)
        if full[: len(ids)] != ids or full[: len(prompt)] != prompt:
            raise RequestError(f"--data {source}: the chat template rewrites earlier turns; give 'text' instead")
        labels += [IGNORED] * (len(prompt) - len(ids)) + full[len(prompt) :]
        ids = full
    return ids, labels


def _render(tokenizer: Any, messages: list[dict[str, str]], prompt: bool) -> list[int]:
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def pack(source: str, tokenizer: Any, length: int, tokens: int | None = None) -> Blocks:
    """The source's documents, end to end, in blocks of `length` tokens; the last, incomplete block is left out.

    Reading stops after `tokens` tokens where given. Raises `RequestError` if not even one block comes together.
    """
    ids: list[int] = []
    labels: list[int] = []
    digest = hashlib.sha256()
    documents = 0
    for row in read_rows(source):
        row_ids, row_labels = encode_row(row, tokenizer, source)
        digest.update(str(row_ids).encode())
        ids += row_ids
        labels += row_labels
        documents += 1
        if tokens is not None and len(ids) >= tokens + length:
            break
    blocks = len(ids) // length
    if blocks < 2:
        raise RequestError(
            f"--data {source}: {len(ids)} tokens in {documents} documents do not fill two blocks of {length}"
        )
    cut = blocks * length
    return Blocks(
        torch.tensor(ids[:cut]).view(blocks, length),
        torch.tensor(labels[:cut]).view(blocks, length),
        digest.hexdigest()[:16],
        documents,
    )
