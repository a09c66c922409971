"""Where training text comes from: local files, folders of them, and hub datasets, read row by row.

A source is a file of one of the kinds in `READERS`, a folder of them, however deep, or a hub dataset written `name`,
`name:config` or `name:config:split` (`name::split` where it has but one configuration). Text and JSON may be compressed
(`COMPRESSED`). Only a JSON file that is one array is ever held in memory.

A row has `text`; `prompt` and `completion`; `messages`, a conversation of `role` and `content`; `conversations`, the
same with `from` and `value` (ShareGPT); or `instruction`, `input` and `output` (Alpaca). All become a `Row`.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from supernet.common.errors import RequestError, did_you_mean, first_line, out_of_space
from supernet.common.formatting import parse_tokens

Columns: TypeAlias = Mapping[str, Any]
"""A row as it lies in its file."""

Message: TypeAlias = dict[str, Any]
Text: TypeAlias = "str | list[Message]"
"""Plain text, or a conversation of messages with `role` and `content`."""

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""How a compressed file's name ends, and pyarrow's name of the compression."""

METADATA = ("dataset_info.json", "dataset_infos.json", "state.json")
"""Files that `datasets` writes beside the rows of a folder."""
SPLITS = "dataset_dict.json"
"""The file that `datasets` writes beside a folder for each split."""

UNREAD = ("tools", "functions", "system")
"""Columns beside a conversation or an instruction that say something of it, but are not read."""

SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
"""Roles of ShareGPT's `from`; others are roles already."""

GENERATED = "generated"
"""The source that is no file and no dataset: text that the base writes."""

KINDS = "'text'; 'prompt' and 'completion'; 'messages'; 'conversations'; or 'instruction' and 'output'"


@dataclass(frozen=True)
class Row:
    """One document to learn from.

    With a `prompt`, only `content` is learnt from; without, all of it, of a conversation what the assistant says.
    `where` names the file and the row, for messages. `chat`: a prompt and an answer in plain text, which are a
    conversation for a tokenizer that has a chat template. `ids`: what a network wrote, token by token, and from where
    to where it is learnt from.
    """

    where: str
    content: Text
    prompt: Text | None = None
    chat: bool = False
    unread: Sequence[str] = ()
    """Columns that say something of the row, but are not read."""
    ids: Sequence[int] | None = None
    learnt: Sequence[tuple[int, int]] = ()

    @property
    def text(self) -> str:
        """All that the row says, in order, without a template."""
        return "".join(
            part if isinstance(part, str) else "\n".join(filter(None, (turn["content"] for turn in part)))
            for part in (self.prompt, self.content)
            if part is not None
        )


def read_rows(source: str, text_key: str | None = None, skipped: Counter[str] | None = None) -> Iterator[Row]:
    """The rows of a source, in order. `text_key`: the one column to read, instead of those that have a meaning.

    Rows without a text are passed over, and counted in `skipped` by the reason. Raises `RequestError` for what is
    missing, empty, of another kind, or not valid, with the file and the row.
    """
    for where, values in _raw_rows(source):
        row = _keyed(where, values, text_key) if text_key is not None else _meant(where, values)
        if isinstance(row, Row) and not _is_unicode(row.text):
            row = "the text is not valid Unicode"
        if isinstance(row, Row):
            spoken = text_key is None and (row.chat or not isinstance(row.content, str))
            yield replace(row, unread=[name for name in UNREAD if values.get(name)]) if spoken else row
        elif skipped is not None:
            skipped[row] += 1


def _raw_rows(source: str) -> Iterator[tuple[str, Columns]]:
    """Where each row is, and its columns."""
    files = local_files(source)
    numbered: list[tuple[str, Numbered]] = [(str(file), READERS[kind_of(file) or ""](file)) for file in files or ()]
    if files is None:
        name, _, rest = source.partition(":")
        config, _, split = rest.partition(":")
        numbered.append((source, iter(enumerate(hub_rows(name, config or None, split or "train"), 1))))
    for name, rows in numbered:
        for number, columns in rows:
            where = f"--data {name}: row {number}"
            if not isinstance(columns, dict):
                raise RequestError(f"{where} is {described(columns)}, not an object with {KINDS}")
            yield where, columns


def _keyed(where: str, columns: Columns, key: str) -> Row | str:
    """The row in the column of this name, or why it is passed over."""
    if key not in columns:
        raise RequestError(f"{where} has no '{key}' (--text-key); it has {named(columns)}")
    value = columns[key]
    if value is None:
        return f"'{key}' is null"
    if not isinstance(value, str):
        raise RequestError(f"{where}: '{key}' is {described(value)}, not a text")
    return Row(where, value)


def _meant(where: str, columns: Columns) -> Row | str:
    """The row in the columns that have a meaning, or why it is passed over."""
    present = {key: value for key, value in columns.items() if value is not None}
    for read in MEANINGS:
        if (row := read(where, present)) is not None:
            return row
    known = [key for key in MEANT if key in present]
    for key in known:
        partner = PARTNERS.get(key, key)
        if partner in columns and partner not in present:
            return f"'{partner}' is null"
        if present[key] == []:
            return f"'{key}' is empty"
        raise RequestError(f"{where}: {problem(key, present)}")
    for key in MEANT:
        if key in columns:
            return f"'{key}' is null"
    raise RequestError(f"{where} has neither {KINDS} (it has {named(columns)}); --text-key names another column")


def _is_unicode(text: str) -> bool:
    """False where JSON held half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# -- Columns --------------------------------------------------------------------------------------------------------


def conversation(where: str, values: Columns) -> Row | None:
    """A row with `messages` or `conversations`, if it is one."""
    for key in ("messages", "conversations"):
        if (messages := as_messages(where, values.get(key))) is not None:
            return Row(where, messages)
    return None


def completion(where: str, values: Columns) -> Row | None:
    """A row with `prompt` and `completion`, both texts or both conversations, if it is one."""
    prompt, answer = (as_text(where, values.get(key)) for key in ("prompt", "completion"))
    if prompt is None or answer is None:
        return None
    if isinstance(prompt, str) != isinstance(answer, str):
        raise RequestError(f"{where}: 'prompt' and 'completion' must both be texts or both lists of messages")
    return Row(where, answer, prompt)


def instruction(where: str, values: Columns) -> Row | None:
    """A row with `instruction` and `output`, if it is one; the prompt is the instruction and, if given, the `input`."""
    asked, given, answer = (values.get(key) for key in ("instruction", "input", "output"))
    if not (isinstance(asked, str) and isinstance(answer, str)):
        return None
    return Row(where, answer, f"{asked}\n\n{given}" if isinstance(given, str) and given else asked, chat=True)


def plain(where: str, values: Columns) -> Row | None:
    """A row with `text`, if it is one."""
    return Row(where, text) if isinstance(text := values.get("text"), str) else None


MEANINGS: tuple[Callable[[str, Columns], Row | None], ...] = (conversation, completion, plain, instruction)
"""What the columns of a row can mean, in this order. A reader is given the columns that are not null."""


def as_text(where: str, value: object) -> Text | None:
    """A text or a conversation, else None."""
    return value if isinstance(value, str) else as_messages(where, value)


def as_messages(where: str, value: object) -> list[Message] | None:
    """A conversation as chat templates take it, or None where it is none.

    Content that is null is empty, and parts of text are joined. Other keys of a message (such as `tool_calls`) stay
    where they are not null: to a template, a key with no value is still defined.
    """
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, turn, strict=False)) for turn in zip(*value.values(), strict=False)]  # by column
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        return None
    messages = []
    for number, turn in enumerate(value, 1):
        role, content = turn.get("role"), turn.get("content")
        if role is None and isinstance(speaker := turn.get("from"), str):
            role, content = SPEAKERS.get(speaker, speaker), turn.get("value")
        if not isinstance(role, str):
            return None
        kept = {k: v for k, v in turn.items() if v is not None and k not in ("from", "value")}
        messages.append(kept | {"role": role, "content": joined(f"{where}: message {number}", content)})
    return messages


def joined(where: str, content: object) -> str:
    """The content of a message as one text: null is empty, parts of text are joined."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = f"a part of type '{part['type']}'" if isinstance(part, dict) and "type" in part else described(part)
            raise RequestError(f"{where}: its content is {kind}, not text")
        texts.append(text)
    return "".join(texts)


MEANT = ("text", "prompt", "completion", "messages", "conversations", "instruction", "output")
"""Columns that have a meaning."""
PARTNERS = {"prompt": "completion", "completion": "prompt", "instruction": "output", "output": "instruction"}
"""The column without which another means nothing."""


def problem(key: str, values: Columns) -> str:
    """What is wrong with a column that has a meaning, where the row has none."""
    if key in ("messages", "conversations"):
        return f"'{key}' is {described(values[key])}, not a list of messages with 'role' and 'content'"
    partner = PARTNERS.get(key, key)
    if partner not in values:
        return f"'{key}' without '{partner}'"
    wrong = key if as_text("", values[key]) is None or key == "text" else partner
    return f"'{wrong}' is {described(values[wrong])}, not a text"


def described(value: object) -> str:
    """A value by its kind, for messages: `a number (5)`."""
    if value is None:
        return "null"
    if isinstance(value, int | float):
        return f"a {'truth value' if isinstance(value, bool) else 'number'} ({value})"
    kinds = {str: "a text", list: "a list", dict: "an object", bytes: "bytes"}
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), f"a {type(value).__name__}")


def named(columns: Columns) -> str:
    """The names of a row's columns."""
    return ", ".join(columns) or "nothing"


# -- Files ----------------------------------------------------------------------------------------------------------


def is_generated(source: str) -> bool:
    """Whether a source is text that the base writes itself (`supernet.training.generated`), `generated` or
    `generated:2M`; a file of that name is written `./generated`."""
    return source.partition(":")[0] == GENERATED


def generated_limit(source: str) -> int | None:
    """The most tokens that the base is to write, or None. Raises ValueError for another number than such as `2M`."""
    _, colon, size = source.partition(":")
    if not colon:
        return None
    try:
        return parse_tokens(size)
    except ValueError as error:
        raise ValueError(f"{error}; write {GENERATED}, or {GENERATED}:2M for at most so many tokens") from None


def hub_dataset(source: str) -> str | None:
    """The name of the hub dataset that a source is, or None where it is of this machine, missing or not."""
    path = Path(source).expanduser()
    if is_generated(source) or path.exists() or kind_of(path) is not None or path.is_absolute() or source[:1] in ".~":
        return None
    return source.partition(":")[0]


def kind_of(file: Path) -> str | None:
    """How a file is read, a key of `READERS`; None for a file of another kind."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if len(suffixes) == 2 and suffixes[-1] in COMPRESSED and suffixes[0] in (".txt", ".jsonl", ".ndjson", ".json"):
        return suffixes[0]
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def local_files(source: str) -> list[Path] | None:
    """The files of a local source, or None where `source` names a hub dataset."""
    if hub_dataset(source) is not None:
        return None
    path = Path(source).expanduser()
    if not path.exists():
        raise RequestError(f"--data {source}: no such file")
    files = [file for file in _files_of(path) if kind_of(file) is not None]
    if not files:
        raise RequestError(f"--data {source}: expected {', '.join(READERS)} files, or those compressed")
    for file in files:
        if file.stat().st_size == 0:
            raise RequestError(f"--data {file}: the file is empty")
    return files


def other_files(source: str) -> list[Path]:
    """The files in a local folder that are not read."""
    path = Path(source).expanduser()
    return [file for file in _files_of(path) if kind_of(file) is None] if path.is_dir() else []


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if (path / SPLITS).is_file():
        path = _training_split(path)
    inside = sorted(file for file in path.rglob("*") if file.is_file() and file.name not in METADATA)
    return [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]


def _training_split(folder: Path) -> Path:
    """The folder of the split that is read of several that `datasets` saved: `train`, as of a hub dataset, or the only
    one there is."""
    splits = [part for part in sorted(folder.iterdir()) if part.is_dir()]
    train = [part for part in splits if part.name == "train"] or splits
    if len(train) != 1:
        names = ", ".join(part.name for part in splits) or "nothing"
        raise RequestError(f"--data {folder}: holds {names}, and no split 'train'; name the folder of one split")
    return train[0]


def hub_rows(name: str, config: str | None, split: str) -> Iterator[object]:
    """The rows of one split of a hub dataset (or of a folder laid out like one), streamed."""
    import datasets

    try:
        yield from datasets.load_dataset(name, config, split=split, streaming=True)
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        if out_of_space(error):
            raise
        asked = ":".join(part for part in (name, config or "", split) if part)
        hint = did_you_mean(name, [GENERATED])
        what = f"neither a local file nor a reachable hub dataset ({first_line(error)}){hint}"
        raise RequestError(f"--data {asked}: {what}") from error


EMPTY_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")

Numbered: TypeAlias = Iterator[tuple[int, object]]
"""The rows of a file with their numbers, from 1 on; in JSON lines, those of the lines."""


def _paragraphs(file: Path) -> Numbered:
    """What empty lines separate, those of nothing but spaces among them."""
    number, rest = 0, ""
    with _opened(file) as stream:
        while chunk := stream.read(2**20):
            *whole, rest = EMPTY_LINES.split(rest + chunk)
            for text in whole:
                if text := text.lstrip("\n"):
                    yield (number := number + 1), {"text": text}
    if rest.strip():
        yield number + 1, {"text": rest.lstrip("\n")}


def _json_lines(file: Path) -> Numbered:
    with _opened(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, _parsed(line, f"{file}: line {number}")


def _json(file: Path) -> Numbered:
    """A file that is one array of objects, or one object on each line."""
    with _opened(file) as stream:
        first = next((line for line in stream if line.strip()), "").strip()
    if first.startswith("["):
        with _opened(file) as stream:
            rows = _parsed(stream.read(), f"{file}: it")
        yield from enumerate(rows if isinstance(rows, list) else [rows], 1)
    elif first == "{":
        raise RequestError(f"--data {file}: one object; write its rows as an array, or one on each line")
    else:
        yield from _json_lines(file)


def _tables(kind: str) -> Callable[[Path], Numbered]:
    """The reader of a kind of table that `datasets` knows."""

    def read(file: Path) -> Numbered:
        import datasets

        try:
            rows: Iterable[object] = datasets.load_dataset(kind, data_files=str(file), split="train", streaming=True)
            yield from enumerate(rows, 1)
        except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
            if out_of_space(error):
                raise
            raise RequestError(f"--data {file}: cannot be read ({first_line(error)})") from error

    return read


READERS: Mapping[str, Callable[[Path], Numbered]] = {
    ".txt": _paragraphs,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _tables("parquet"),
    ".arrow": _tables("arrow"),
}


@contextmanager
def _opened(file: Path) -> Iterator[io.TextIOWrapper]:
    """The text of a file. What goes wrong while it is read becomes one line that names it."""
    import pyarrow  # here, since reading a recipe needs only the names in this file

    try:
        with pyarrow.input_stream(str(file), compression=COMPRESSED.get(file.suffix.lower())) as stream:
            yield io.TextIOWrapper(stream, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"--data {file}: not text in UTF-8 ({error})") from error
    except OSError as error:
        raise RequestError(f"--data {file}: cannot be read ({first_line(error)})") from error


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"--data {where} is not valid JSON ({error})") from error
