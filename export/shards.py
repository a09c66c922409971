"""Weight files: streamed into safetensors shards, listed and counted."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supernet.common.files import sha256, write_json

if TYPE_CHECKING:
    from torch import Tensor


MAX_SHARD_BYTES = 2 * 10**9
"""Of one weight file; writing takes twice as much memory."""

WEIGHT_FILES = ("*.safetensors", "*.gguf", "*.onnx", "*.onnx.data", "openvino_*.xml", "openvino_*.bin")


def weight_files(folder: Path) -> list[Path]:
    return sorted(file for pattern in WEIGHT_FILES for file in folder.glob(pattern))


def weight_bytes(folder: Path) -> int:
    """Bytes on disk of the weights: the sum of all files that hold them, headers and graphs included."""
    return sum(file.stat().st_size for file in weight_files(folder))


def file_record(file: Path) -> dict[str, Any]:
    """What compression.json records of a file: its SHA-256 and its bytes."""
    return {"sha256": sha256(file), "bytes": file.stat().st_size}


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
            return file_record(file)

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
