"""Sources of training text: local files, folders of them, and hub datasets, streamed through `datasets`.

A source is a `.txt`, `.jsonl`, `.json` or `.parquet` file, a folder of them, or a hub dataset written `name`,
`name:config` or `name:config:split` (`name::split` where it has only one configuration). Rows are read one after the
other, so sources need not fit into memory.

A row has `text`; or `prompt` and `completion`; or `messages`, a conversation of `role` and `content`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from supernet.common.errors import RequestError

Row = dict[str, Any]
READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
KINDS = "'text', 'prompt' and 'completion', or 'messages'"


def kind_of(row: Row) -> Literal["messages", "completion", "text"] | None:
    """Which of the three kinds of text a row holds, if any. Columns that only other rows of a file have are None."""
    if _is_conversation(row.get("messages")):
        return "messages"
    if all(isinstance(row.get(part), str) or _is_conversation(row.get(part)) for part in ("prompt", "completion")):
        return "completion"
    return "text" if isinstance(row.get("text"), str) else None


def _is_conversation(value: object) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and turn.get("role") for turn in value)
    )


def plain_text(row: Row) -> str:
    """All text of a row, in order, without a template."""
    kind = kind_of(row)
    if kind == "messages":  # a turn that calls a tool may have no content, and other content may not be text
        contents = [turn.get("content") for turn in row["messages"]]
        return "\n".join(content for content in contents if isinstance(content, str))
    if kind == "completion":
        parts = [row["prompt"], row["completion"]]
        return "".join(part if isinstance(part, str) else plain_text({"messages": part}) for part in parts)
    return row["text"]


def hub_dataset(source: str) -> str | None:
    """The name of the hub dataset that a source names, or None where it names a local file, missing or not."""
    path = Path(source).expanduser()
    if path.exists() or path.suffix in READERS or path.is_absolute() or source[:1] in ".~":
        return None
    return source.partition(":")[0]


def local_files(source: str) -> list[Path] | None:
    """The files of a local source, or None where `source` names a hub dataset.

    Raises `RequestError` for what is missing, empty, of another kind, or (JSON lines) not valid at some line.
    """
    if hub_dataset(source) is not None:
        return None
    path = Path(source).expanduser()
    if not path.exists():
        raise RequestError(f"--data {source}: no such file")
    files = sorted(f for f in path.iterdir() if f.suffix in READERS) if path.is_dir() else [path]
    if not files or any(f.suffix not in READERS for f in files):
        raise RequestError(f"--data {source}: expected {', '.join(READERS)} files")
    for file in files:
        if file.stat().st_size == 0:
            raise RequestError(f"--data {file}: the file is empty")
        if file.suffix == ".jsonl":
            _check_jsonl(file)
    return files


def read_rows(source: str) -> Iterator[Row]:
    """The rows of a source, in order. Raises `RequestError` where the source or a row cannot be used."""
    files = local_files(source)
    if files is None:
        name, _, rest = source.partition(":")
        config, _, split = rest.partition(":")
        rows = hub_rows(name, config or None, split or "train")
    else:
        rows = (row for file in files for row in _file_rows(file))
    for number, row in enumerate(rows, 1):
        if kind_of(row) is None:
            raise RequestError(f"--data {source}: row {number} has neither {KINDS} (it has {', '.join(row)})")
        yield row


def hub_rows(name: str, config: str | None, split: str) -> Iterator[Row]:
    """The rows of one split of a hub dataset (or of a folder laid out like one), streamed."""
    import datasets

    try:
        yield from datasets.load_dataset(name, config, split=split, streaming=True)
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        asked = ":".join(part for part in (name, config or "", split) if part)
        reason = str(error).strip().splitlines()[0]
        raise RequestError(f"--data {asked}: neither a local file nor a reachable hub dataset ({reason})") from error


def _file_rows(file: Path) -> Iterator[Row]:
    import datasets

    options = {"sample_by": "paragraph"} if file.suffix == ".txt" else {}
    try:
        yield from datasets.load_dataset(
            READERS[file.suffix], data_files=str(file), split="train", streaming=True, **options
        )
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise RequestError(f"--data {file}: cannot be read ({str(error).strip().splitlines()[0]})") from error


def _check_jsonl(file: Path) -> None:
    """Raises `RequestError` naming the first bad line; `datasets` would say only that generation failed."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RequestError(f"--data {file}: line {number} is not valid JSON ({error})") from error
            if not isinstance(row, dict) or kind_of(row) is None:
                raise RequestError(f"--data {file}: line {number} has neither {KINDS}")
