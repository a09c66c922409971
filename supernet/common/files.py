"""Reading, writing and fingerprinting files. A written file appears complete or not at all."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from supernet.common.errors import RequestError

NEW_FILE = 0o666
UMASK = os.umask(0)
"""What this process takes away from the mode of a new file; it can only be asked for by setting it."""
os.umask(UMASK)


def fingerprint(value: object) -> str:
    """16 hexadecimal digits of a JSON value; parts that are not JSON count by their text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_fingerprint(files: Sequence[Path], prefix: bytes = b"", *, names: bool = False) -> str:
    """16 hexadecimal digits of `prefix` and the files' contents in this order; with `names`, of their names too."""
    digest = hashlib.sha256(prefix)
    for file in files:
        if names:
            digest.update(file.name.encode())
        digest.update(bytes.fromhex(sha256(file)))
    return digest.hexdigest()[:16]


def temporary_name(path: Path, kind: str) -> Path:
    """A name beside `path` for an unfinished file or folder of this process. Removes those of dead processes."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{kind}-*"):
        process = left.name.rpartition("-")[2]
        if process.isdecimal() and (int(process) == os.getpid() or not _runs(int(process))):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}")


def _runs(process: int) -> bool:
    """Whether this machine has a process of this number."""
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user
        return True
    return True


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, whose file is renamed to `path` when the block ends without an error. It has the
    mode of any new file, whoever writes it.

    Readers never see an incomplete file, and a kill at any moment leaves the old file or the new one.
    """
    temporary = temporary_name(path, "tmp")
    try:
        yield temporary
        temporary.chmod(NEW_FILE & ~UMASK)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def follow_umask(folder: Path) -> None:
    """Give all files in a folder the mode of any new file; safetensors lets only their owner read those it writes."""
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(NEW_FILE & ~UMASK)


def write_text(path: Path, text: str) -> None:
    """Write a text file, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file, completely or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises `RequestError` that names the file where it is not valid JSON."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not valid JSON ({error})") from None


def kept_json(path: Path, inputs: object, make: Callable[[], Mapping[str, object]]) -> Any:
    """The object of a JSON file that was made from these inputs, whose fingerprint it holds as `inputs`; where there is
    none, or one of other inputs, what `make` returns, which is kept there."""
    of = fingerprint(inputs)
    if not path.is_file() or read_json(path)["inputs"] != of:
        write_json(path, {"inputs": of, **make()})
    return read_json(path)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8. Raises `RequestError` for other encodings, and FileNotFoundError.

    Folders, pipes, at which one waits for ever, and links to nothing are refused too.
    """
    if path.is_symlink() and not path.exists():
        raise RequestError(f"{path}: a link to nothing")
    if path.exists() and not path.is_file():
        raise RequestError(f"{path}: not a file that can be read")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not text in UTF-8 ({error})") from None


class _PlainLoader(yaml.SafeLoader):
    """Refuses what YAML takes in silence and nobody means: a key that stands twice, of which the last would count, and
    numbers such as 010, which is 8. 1:30, which is 90, stays the text that it is."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # as it is written: nothing is merged into it yet
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.composer.ComposerError(None, None, f"'{key[1]}' stands there twice", node.start_mark)
        return node

    def plain_int(self, node: yaml.ScalarNode) -> int | str:
        if ":" in node.value:
            return str(node.value)
        if re.fullmatch(r"[-+]?0[0-7_]+", node.value):
            problem = f"{node.value} begins with 0, as numbers in base 8 do; leave the 0 out"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return self.construct_yaml_int(node)

    def plain_float(self, node: yaml.ScalarNode) -> float | str:
        return str(node.value) if ":" in node.value else self.construct_yaml_float(node)


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.plain_int)
_PlainLoader.add_constructor("tag:yaml.org,2002:float", _PlainLoader.plain_float)


def load_yaml(text: str) -> Any:
    """What YAML says, of plain values only. Raises `yaml.YAMLError`, also for a key that stands twice in one place and
    for a number with a leading 0."""
    return yaml.load(text, _PlainLoader)
