"""Weight files: written shard by shard as safetensors, listed and counted."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from export.models import Model
from supernet.architecture import Architecture, StorageFormat, Structure, TensorSpec
from supernet.common.files import sha256, write_json

if TYPE_CHECKING:
    from torch import Tensor


MAX_SHARD_BYTES = 2 * 10**9
"""Of one weight file; writing takes twice as much memory."""

WEIGHT_FILES = ("*.safetensors", "*.gguf", "*.onnx", "*.onnx.data", "openvino_*.xml", "openvino_*.bin")


HEADER = len('........{"__metadata__":{"format":"pt"}}')
ENTRY = len(',"":{"dtype":"BF16","shape":[],"data_offsets":[,]}')
"""Bytes of a safetensors header without tensors, and for each tensor beside its name, shape and place."""


class FileRecord(Model):
    """What compression.json records of a file."""

    sha256: str
    bytes: int

    @classmethod
    def of(cls, file: Path) -> FileRecord:
        return cls(sha256=sha256(file), bytes=file.stat().st_size)


def weight_files(folder: Path) -> list[Path]:
    """The files in a folder that hold weights, graphs included."""
    return sorted(file for pattern in WEIGHT_FILES for file in folder.glob(pattern))


def weight_bytes(folder: Path) -> int:
    """Bytes on disk of all files that hold weights, headers and graphs included."""
    return sum(file.stat().st_size for file in weight_files(folder))


def header_bytes(structure: Structure, architecture: Architecture, storage: StorageFormat | None) -> int:
    """Bytes of the header of a package's weight file, a few more than it will have: all places are taken to have as
    many digits as the last, and where bits are the architecture's, all weights to be packed. Experts that a family's
    files hold one by one are counted as stacked."""
    digits = 2 * len(str(structure.bytes(architecture, storage)))
    bytes_ = HEADER
    for tensor in structure.tensors:
        if (shape := structure.shape(tensor, architecture)) is None:
            continue
        entry = ENTRY + len(tensor.name) + len(",".join(map(str, shape))) + digits
        bytes_ += sum(entry + len(suffix) for suffix in _suffixes(tensor, architecture, storage))
    return bytes_


def _suffixes(tensor: TensorSpec, architecture: Architecture, storage: StorageFormat | None) -> tuple[str, ...]:
    """What the names of the tensors end in that a weight is stored as."""
    if storage is None or tensor.role not in ("linear", "embedding", "head"):
        return ("",)
    if not storage.by_architecture and storage.bits_of(tensor, architecture) == 16:
        return ("",)
    if tensor.role == "linear" and not storage.extra:
        return "", "_scale"
    return "_packed", "_scale", "_shape"


class WeightWriter:
    """Writes tensors into safetensors shards as the hub's loaders expect them, in the memory of two shards.

    `with WeightWriter(folder) as writer: writer.add(name, tensor)`. On leaving the block, shards get their final names
    and, if there are several, model.safetensors.index.json. A shard is written and hashed while the next one is filled:
    `hashed` then holds the record of each.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder, self.max_shard_bytes = folder, max_shard_bytes
        self.hashed: dict[str, FileRecord] = {}
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shards: list[tuple[list[str], Future[FileRecord]]] = []
        self._total = 0
        self._writing: Future[None] | None = None
        self._writer, self._hasher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def __enter__(self) -> WeightWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._writer.shutdown()
            self._hasher.shutdown()

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor; a shard that it would overfill is written first."""
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self.max_shard_bytes:
            self._flush()
        # safetensors refuses a view that shares its storage, and a view keeps all of that storage in memory.
        self._held[name] = tensor.detach().cpu().contiguous()
        self._held_bytes += size
        self._total += size

    def _flush(self) -> None:
        """Begin to write what is held as the next shard."""
        from safetensors.torch import save_file  # torch stays out of processes that only read packages

        def write(tensors: dict[str, Tensor], file: Path) -> None:
            save_file(tensors, file, {"format": "pt"})
            tensors.clear()

        def hash_when_written(written: Future[None], file: Path) -> FileRecord:
            written.result()
            return FileRecord.of(file)

        if self._writing is not None:
            self._writing.result()  # or two shards would wait in memory
        file = self.folder / f"shard-{len(self._shards)}.safetensors"
        names = list(self._held)
        self._writing = self._writer.submit(write, self._held, file)
        self._shards.append((names, self._hasher.submit(hash_when_written, self._writing, file)))
        self._held, self._held_bytes = {}, 0

    def _finish(self) -> None:
        """Write the last shard, give all their final names, and add the index where there are several."""
        self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for index, (names, record) in enumerate(self._shards):
            final = "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self.hashed[final] = record.result()
            (self.folder / f"shard-{index}.safetensors").rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index_file = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            write_json(self.folder / "model.safetensors.index.json", index_file)
