"""The one file of a gguf package: written, its size known beforehand, and read back."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from export.layouts.gguf.checks import table_of
from export.layouts.gguf.families import Header
from export.layouts.gguf.header import network_header, rotary_factors, stand_ins
from export.layouts.gguf.tokenizer import add_tokenizer
from export.layouts.gguf.types import MIXED, TYPES, blocks_of, stored_bytes, type_by_bits, type_of
from supernet.architecture import Architecture
from supernet.common.errors import RequestError
from supernet.slicing import build_standalone, standalone_config

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Kinds = Callable[[str, tuple[int, ...]], str]
"""The stored type of a tensor of a file, by its name and shape."""


def kinds_of(gguf_type: str, embedding: int | None, bits: Architecture | None) -> Kinds:
    """The stored type of every tensor of a file of a type, by name and shape."""
    if gguf_type != MIXED:
        return partial(type_of, gguf_type=gguf_type, embedding=embedding)
    if bits is None:
        raise RequestError("a mixed gguf file needs the bits of every half-block")
    return partial(type_by_bits, bits=bits)


def write_file(
    file: Path,
    model: PreTrainedModel,
    architecture: Architecture,
    header: Header,
    tokenizer: PreTrainedTokenizerBase,
    kind_of: Kinds,
    importance: Mapping[str, Tensor],
) -> dict[str, tuple[str, int]]:
    """Write the file, each tensor in the type that `kind_of` gives its name and shape. `importance` has that of the
    inputs of matrices, by their parameters' names. Returns the type and the number of weights of each matrix, by its
    name in the file."""
    from gguf import GGMLQuantizationType, quants  # an optional dependency

    config, family = model.config, table_of(model.config)
    # 1. The header.
    writer = _begun(file, config, header, tokenizer)
    # 2. The tensors.
    matrices: dict[str, tuple[str, int]] = {}

    def add(name: str, values: Tensor, kind: str, weight: Tensor | None = None) -> None:
        ggml = GGMLQuantizationType[kind.upper()]
        if TYPES[kind].searched:
            stored = blocks_of(values, kind, weight)
        else:
            stored = quants.quantize(np.ascontiguousarray(values.numpy()), ggml)
        writer.add_tensor(name, stored, raw_dtype=ggml)

    for factors, values in rotary_factors(config, family.rope(config)).items():
        add(f"{factors}.weight", values, "f32")
    for source, parameter in model.named_parameters():
        stored, weights = family.stored(source), importance.get(source)
        if weights is not None:
            weights = stored.inputs_to_file(weights, config)
        for final, values in stored.to_file(parameter.detach().float().cpu(), config).items():
            kind = "f32" if stored.exact else kind_of(final, tuple(values.shape))
            if values.dim() > 1:
                matrices[final.removesuffix(".weight")] = kind, values.numel()
            add(final, values, kind, weights)
    for final, values in stand_ins(config, family, architecture).items():
        add(final, values, kind_of(final, tuple(values.shape)))
    # 3. Write both.
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return matrices


def _begun(file: Path, config: PreTrainedConfig, header: Header, tokenizer: PreTrainedTokenizerBase) -> GGUFWriter:
    """The writer of a file, header and tokenizer added."""
    from gguf import GGUFWriter  # an optional dependency

    family = table_of(config)
    writer = GGUFWriter(file, family.name)
    for key, value in header.items():
        if "." in key:
            writer.add_array(f"{family.name}.{key}", value)
        else:
            getattr(writer, f"add_{key}")(value)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    return writer


class FileSize:
    """What the file of a sub-network of the base with this configuration takes, in any types."""

    def __init__(self, config: PreTrainedConfig, architecture: Architecture) -> None:
        self._model = build_standalone(standalone_config(config, architecture))
        self._architecture, family = architecture, table_of(self._model.config)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._exact: set[str] = set()
        """Tensors that are f32 in every file."""
        for source, parameter in self._model.named_parameters():
            stored = family.stored(source)
            for final, values in stored.to_file(parameter.detach(), self._model.config).items():
                self._shapes[final] = tuple(values.shape)
                if stored.exact:
                    self._exact.add(final)
        for final, values in stand_ins(self._model.config, family, architecture).items():
            self._shapes[final] = tuple(values.shape)
        for factors, values in rotary_factors(self._model.config, family.rope(self._model.config)).items():
            self._shapes[f"{factors}.weight"] = tuple(values.shape)
            self._exact.add(f"{factors}.weight")

    def tensors(self, kind_of: Kinds) -> int:
        """Bytes of all tensors: the file less its header."""
        kinds = {name: "f32" if name in self._exact else kind_of(name, shape) for name, shape in self._shapes.items()}
        return sum(stored_bytes(self._shapes[name], kind) for name, kind in kinds.items())

    def header(self, tokenizer: PreTrainedTokenizerBase, name: str) -> int:
        """Bytes of everything else, which are the same in every type. `name` is that of the package."""
        from gguf import GGMLQuantizationType  # an optional dependency

        config = self._model.config
        header = {**network_header(config, table_of(config), self._architecture), "name": name}
        with tempfile.TemporaryDirectory(prefix="compressor-gguf-") as folder:
            file = Path(folder) / "header.gguf"
            writer = _begun(file, config, header, tokenizer)
            for final, shape in self._shapes.items():
                dtype, size = np.dtype(np.float32), 4 * math.prod(shape)
                writer.add_tensor_info(final, shape, dtype, size, raw_dtype=GGMLQuantizationType.F32)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            written = file.stat().st_size
        return -(-written // writer.data_alignment) * writer.data_alignment


def weight_file(package: Path) -> tuple[Path, str]:
    """The one file of a gguf package, and its type."""
    (file,) = package.glob("*.gguf")
    return file, file.stem.rpartition("-")[2]


def take_stored_weights(network: PreTrainedModel, package: Path) -> PreTrainedModel:
    """`network` with the values that the file of a gguf package of the same architecture holds for it.

    Scores are computed with these in transformers; that llama.cpp computes the same from the file is proved by
    `export.layouts.gguf.runtime.check_gguf`.
    """
    from gguf import GGUFReader, quants  # an optional dependency

    file, _ = weight_file(package)
    config, family = network.config, table_of(network.config)
    held = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            stored = family.stored(name)
            tensors = {
                final: torch.from_numpy(quants.dequantize(held[final].data, held[final].tensor_type).astype("float32"))
                for final in stored.names
            }
            parameter.copy_(stored.from_file(tensors, config).view(parameter.shape))
    return network
