"""What commands print: results as JSON on stdout; everything else goes to stderr."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from supernet.common.errors import RequestError
from supernet.training.accelerator import is_main


def emit(value: Any, as_json: bool) -> None:
    """Print a result where JSON was asked for, models as our files hold them; of several processes, the first does."""
    if as_json and is_main():
        print(json.dumps(value, indent=1, default=_as_json))


def _as_json(value: object) -> object:
    from pydantic import BaseModel  # keeps --help quick

    if not isinstance(value, BaseModel):
        raise TypeError(f"{type(value).__name__} is not for JSON")
    return value.model_dump(mode="json", by_alias=True)


def writable(option: str, file: Path) -> Path:
    """The file that a command will write at its end, its folder made. Raises `RequestError`, before any work, where it
    cannot be one."""
    if file.is_dir():
        raise RequestError(f"{option} {file}: is a folder; name a file")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{option} {file}: {file.parent} cannot be made a folder: {error.strerror}") from error
    try:
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise RequestError(f"{option} {file}: nothing can be written to {file.parent}: {error.strerror}") from error
    return file
