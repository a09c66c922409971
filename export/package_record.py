"""`compression.json`: what a package says of itself, and a hash of every other file in it. Readable without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.shards import file_record, weight_bytes
from supernet.architecture import Architecture
from supernet.common.errors import RequestError, VerificationError
from supernet.common.files import read_json, sha256, write_json
from supernet.common.versions import versions
from supernet.trust import check_code

SCHEMA = 1
RECORD = "compression.json"
SECTIONS = ("entry", "lineage", "probe", "files")
ENTRY = ("name", "layout", "quantization", "architecture", "params", "bytes")
"""What the entry of every package has; reports and layouts add to it."""

CARD = "README.md"
FORBIDDEN = {".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle"}


@dataclass(frozen=True)
class PackageInfo:
    """What a package says of itself. `bytes` are those of its weights on disk; `files` maps names to their hashes."""

    path: Path
    name: str
    layout: str
    quantization: str | None
    architecture: Architecture
    params: int
    bytes: int
    files: dict[str, str]
    verified: dict[str, Any] | None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `VerificationError` that names the file where it is missing or broken."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise VerificationError(f"{path}: the file is missing") from None
    except ValueError as error:
        raise VerificationError(str(error)) from None
    if not isinstance(value, dict):
        raise VerificationError(f"{path}: expected a JSON object")
    return value


def read_record(package: Path) -> dict[str, Any]:
    """compression.json. Raises `RequestError` where the folder is no package."""
    if not package.is_dir():
        raise RequestError(f"{package}: no such folder")
    if not (package / RECORD).exists():
        raise RequestError(f"{package}: not a package of nas-compressor ({RECORD} is missing)")
    record = read_object(package / RECORD)
    file = package / RECORD
    if record.get("schema") != SCHEMA or not all(isinstance(record.get(name), dict) for name in SECTIONS):
        raise VerificationError(f"{file}: not of schema {SCHEMA}, or a section is missing")
    if absent := [key for key in ENTRY if key not in record["entry"]]:
        raise VerificationError(f"{file}: its entry lacks {', '.join(absent)}")
    for name, recorded in record["files"].items():
        if not isinstance(recorded, dict) or set(recorded) != {"sha256", "bytes"}:
            raise VerificationError(f"{file}: what it says of the file {name} is not a hash and a size")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise VerificationError(f"{file}: names a file outside the package, {name}")
    return record


def read_package(package: Path) -> PackageInfo:
    """What the package in this folder is, from its files alone."""
    record = read_record(package)
    entry = record["entry"]
    return PackageInfo(
        path=package,
        name=entry["name"],
        layout=entry["layout"],
        quantization=entry["quantization"],
        architecture=Architecture.from_dict(entry["architecture"]),
        params=entry["params"],
        bytes=weight_bytes(package),
        files={name: file["sha256"] for name, file in record["files"].items()},
        verified=entry.get("verified"),
    )


def update_record(package: Path, **sections: Mapping[str, Any]) -> None:
    """Add to sections of compression.json: `update_record(package, entry={"quality": 0.98})`."""
    record = read_record(package)
    for name, values in sections.items():
        record[name] |= values
    write_json(package / RECORD, record)


def write_card(package: Path, text: str) -> None:
    """Write the model card and record its hash."""
    record = read_record(package)
    (package / CARD).write_text(text, encoding="utf-8")
    record["files"][CARD] = file_record(package / CARD)
    write_json(package / RECORD, record)


def check_files(package: Path) -> None:
    """Every recorded file is there and unchanged, and nothing was slipped in that a loader would run or read.

    Raises `VerificationError` that names the file.
    """
    record = read_record(package)
    for name, recorded in record["files"].items():
        file = package / name
        if not file.is_file():
            raise VerificationError(f"{file}: the file is missing")
        if file.stat().st_size != recorded["bytes"]:
            raise VerificationError(f"{file}: {file.stat().st_size} bytes where {recorded['bytes']} were written")
        if sha256(file) != recorded["sha256"]:
            raise VerificationError(f"{file}: its content is not what was written (SHA-256 differs)")
    for file in sorted(package.rglob("*")):
        loadable = file.suffix in FORBIDDEN | {".py", ".safetensors", ".gguf", ".onnx", ".xml"}
        if file.is_file() and loadable and file.relative_to(package).as_posix() not in record["files"]:
            raise VerificationError(f"{file}: the file was not part of the package when it was written")
    check_code(package)


def path_in_run(destination: Path) -> str:
    """The path that a package's entry holds: seen from the run directory, and telling nothing of this machine."""
    return f"{destination.parent.name}/{destination.name}"


def write_record(
    folder: Path,
    *,
    entry: Mapping[str, Any],
    lineage: Mapping[str, Any],
    probe: Mapping[str, Any],
    fingerprints: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Write compression.json over the files that are in the folder now; `fingerprints` are those known already."""
    known = fingerprints or {}
    files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file() and f.name != RECORD)
    record = {
        "schema": SCHEMA,
        "versions": versions(),
        "entry": {**entry, "verified": None},
        "lineage": dict(lineage),
        "probe": dict(probe),
        "files": {name: known.get(name) or file_record(folder / name) for name in files},
    }
    write_json(folder / RECORD, record)
