"""A package: the folder that leaves this house. Written whole or not at all, and readable without torch.

`compression.json` in it holds the package's own entry of report.json, its lineage, a probe of its outputs, and a hash
of every other file. Weights are safetensors, sharded as the hub's loaders expect; there is no pickle.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supernet.architecture import Architecture
from supernet.common.errors import RequestError, VerificationError
from supernet.common.files import read_json, sha256, temporary_name, write_json
from supernet.common.formatting import size
from supernet.common.versions import versions
from supernet.trust import UNEVEN_PREFIX, check_code, load_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from supernet.streaming import StreamedNetwork

SCHEMA = 1
RECORD = "compression.json"
SECTIONS = ("entry", "lineage", "probe", "files")
ENTRY = ("name", "layout", "quantization", "architecture", "params", "bytes")
"""What the entry of every package has; reports and layouts add to it."""
CARD = "README.md"
MAX_SHARD_BYTES = 2 * 10**9
"""Of one weight file; writing takes twice as much memory."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
WEIGHT_FILES = ("*.safetensors", "*.gguf", "*.onnx", "*.onnx.data", "openvino_*.xml", "openvino_*.bin")
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


def weight_files(folder: Path) -> list[Path]:
    return sorted(file for pattern in WEIGHT_FILES for file in folder.glob(pattern))


def weight_bytes(folder: Path) -> int:
    """Bytes on disk of the weights: the sum of all files that hold them, headers and graphs included."""
    return sum(file.stat().st_size for file in weight_files(folder))


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
    record["files"][CARD] = _fingerprint(package / CARD)
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


@contextmanager
def staged(destination: Path, needed: int) -> Iterator[Path]:
    """A temporary sibling folder that becomes `destination` when the block ends well, and vanishes otherwise.

    An earlier package at `destination` is replaced, and what killed processes left beside it is removed. Raises
    `RequestError` as `check_destination` does, and where the disk turns out to be full.
    """
    partial, old = temporary_name(destination, "partial"), temporary_name(destination, "old")
    check_destination(destination, needed)
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir()
    try:
        yield partial
        if destination.exists():
            destination.rename(old)
            partial.rename(destination)
            shutil.rmtree(old)
        else:
            partial.rename(destination)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise RequestError(f"{destination}: the disk is full; {size(needed)} are needed") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_destination(destination: Path, needed: int) -> None:
    """Raises `RequestError` where `destination` holds no earlier package but something else, and where the disk lacks
    `needed` bytes."""
    if destination.exists() and not (destination / RECORD).exists():
        if not destination.is_dir():
            raise RequestError(f"{destination}: a file is in the way; choose another output folder")
        if any(destination.iterdir()):
            raise RequestError(f"{destination}: the folder holds something else; choose another one or empty it")
    existing = next(parent for parent in (destination.absolute(), *destination.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RequestError(
            f"{destination}: needs {size(needed)} of disk space, {size(free)} are free; "
            f"free {size(needed - free)} or choose another disk"
        )


def path_in_run(destination: Path) -> str:
    """The path that a package's entry holds: seen from the run directory, and telling nothing of this machine."""
    return f"{destination.parent.name}/{destination.name}"


class WeightWriter:
    """Streams tensors into hub-standard safetensors shards; one that is filled and one that is written take memory.

    `with WeightWriter(folder) as w: w.add(name, tensor)`; on leaving, shards get their final names and, if there are
    several, model.safetensors.index.json. A shard is written and hashed while the next one is filled: `fingerprints`
    then holds what `write_record` records of each.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder, self.max_shard_bytes = folder, max_shard_bytes
        self.fingerprints: dict[str, dict[str, Any]] = {}
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shards: list[tuple[list[str], Future[dict[str, Any]]]] = []
        self._total = 0
        self._writing: Future[None] | None = None
        self._writer, self._hasher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def __enter__(self) -> WeightWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._writer.shutdown()
            self._hasher.shutdown()

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self.max_shard_bytes:
            self._flush()
        # A view would be written with a name of its own but pin, and be refused for, all of its storage.
        self._held[name] = tensor.detach().cpu().contiguous()
        self._held_bytes += size
        self._total += size

    def _flush(self) -> None:
        from safetensors.torch import save_file

        def write(tensors: dict[str, Tensor], file: Path) -> None:
            save_file(tensors, file, {"format": "pt"})
            tensors.clear()

        def hashed(written: Future[None], file: Path) -> dict[str, Any]:
            written.result()
            return _fingerprint(file)

        if self._writing is not None:
            self._writing.result()  # or two shards would wait in memory
        file = self.folder / f"shard-{len(self._shards)}.safetensors"
        names = list(self._held)
        self._writing = self._writer.submit(write, self._held, file)
        self._shards.append((names, self._hasher.submit(hashed, self._writing, file)))
        self._held, self._held_bytes = {}, 0

    def _finish(self) -> None:
        self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for index, (names, fingerprint) in enumerate(self._shards):
            final = "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self.fingerprints[final] = fingerprint.result()
            (self.folder / f"shard-{index}.safetensors").rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index_file = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            write_json(self.folder / "model.safetensors.index.json", index_file)


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer object, or copy the tokenizer files (with the chat template) of a checkpoint's folder."""
    if not isinstance(tokenizer, Path):
        tokenizer.save_pretrained(folder)
        return
    found = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
    if not any(file.name.startswith("tokenizer") for file in found):
        raise RequestError(f"{tokenizer}: no tokenizer files; a package needs the base's tokenizer")
    for file in found:
        shutil.copyfile(file, folder / file.name)


def write_config(model: nn.Module, folder: Path, dtype: torch.dtype) -> str:
    """Write config.json, generation_config.json and, for an uneven network, its code file. Returns the layout."""
    from supernet.families import families
    from supernet.uneven import auto_map, modeling_file_name, modeling_source

    config: Any = model.config
    config.save_pretrained(folder)
    written = read_json(folder / "config.json")
    written["architectures"] = [type(model).__name__]
    written["dtype"] = str(dtype).removeprefix("torch.")
    layout = "uniform"
    if config.model_type.startswith(UNEVEN_PREFIX):
        layout = "uneven"
        family = families()[config.model_type.removeprefix(UNEVEN_PREFIX)]
        written["auto_map"] = auto_map(family)
        (folder / modeling_file_name(family)).write_text(modeling_source(family), encoding="utf-8")
    write_json(folder / "config.json", written)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    return layout


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
        "files": {name: known.get(name) or _fingerprint(folder / name) for name in files},
    }
    write_json(folder / RECORD, record)


def write_package(
    model: nn.Module | StreamedNetwork,
    destination: Path,
    *,
    tokenizer: Any,
    entry: Mapping[str, Any],
    dtype: torch.dtype,
    lineage: Mapping[str, Any] | None = None,
    probe_ids: Tensor | None = None,
    reference: Path | None = None,
    card: str | None = None,
    layout: str | None = None,
    expected: nn.Module | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> PackageInfo:
    """Write a standalone model (from `supernet.slicing.extract`) as an unquantized package.

    A model may also be streamed, from the files that it is cut out of to those of the package.

    `tokenizer` is a tokenizer object or the folder of the base's tokenizer files. `entry` must hold `name` and
    `architecture` (as a dict); whatever else the report wants may be there. Weights are stored in `dtype`, the
    base's. `probe_ids` [sequences, length] are token ids to compare on (held-out text is best; random ids
    otherwise); with `reference`, the full logits on them go to that safetensors file, for `verify`. The logits are
    those of `expected` where the package must equal another network than the one it holds (a padded one).

    Raises `RequestError` where the destination holds something else, the disk is too small, or the tokenizer missing.
    """
    from transformers.core_model_loading import revert_weight_conversion

    from export import probe as probes
    from supernet.streaming import StreamedNetwork

    streamed = model if isinstance(model, StreamedNetwork) else None
    network: Any = streamed.model if streamed else model
    parameters = dict(network.named_parameters())  # a tied head appears once, under the embedding's name
    params = sum(p.numel() for p in parameters.values())
    if entry.get("params", params) != params:
        raise ValueError(f"the entry says {entry['params']} parameters, the network has {params}")
    with staged(destination, params * dtype.itemsize + 2**24) as folder:
        written_layout = write_config(network, folder, dtype)
        write_tokenizer(tokenizer, folder)
        ids = probe_ids if probe_ids is not None else probes.default_ids(network.config)
        with WeightWriter(folder, max_shard_bytes) as weights:

            def add(name: str, weight: Tensor) -> None:
                # Under the hub's own names where they differ (experts): plain packages load wherever the base does.
                for written, part in revert_weight_conversion(network, {name: _stored(name, weight, dtype)}).items():
                    weights.add(written, part)

            if streamed:
                logits = streamed.logits(ids, dtype, each=add)
            else:
                for name, parameter in parameters.items():
                    add(name, parameter)
                logits = probes.logits_of(probes.stored_network(expected or network, dtype), ids)
        if reference is not None:
            probes.save_reference(reference, ids, logits)
        if isinstance(tokenizer, Path):
            tokenizer = load_tokenizer(folder)
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")
        own = {
            **entry,
            "path": path_in_run(destination),
            "layout": layout or written_layout,
            "quantization": None,
            "params": params,
            "bytes": weight_bytes(folder),
        }
        probe = probes.make_probe(logits, ids, tokenizer)
        write_record(folder, entry=own, lineage=lineage or {}, probe=probe, fingerprints=weights.fingerprints)
    return read_package(destination)


def _stored(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as it is stored. Raises ValueError where `dtype` cannot hold its values."""
    import torch

    stored = weight.detach().to(dtype)
    if not torch.isfinite(torch.stack(stored.aminmax())).all():  # far faster than to ask every value
        raise ValueError(f"{name} holds values that {dtype} cannot: not finite")
    return stored


def _fingerprint(file: Path) -> dict[str, Any]:
    return {"sha256": sha256(file), "bytes": file.stat().st_size}
