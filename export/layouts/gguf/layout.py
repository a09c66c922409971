"""The gguf layout: one file for llama.cpp, weights and tokenizer, written with the `gguf` package.

Networks that the plain class holds go under the family's own architecture name. Uneven ones go under `deci`, whose
sizes are lists over layers; only families whose blocks are Llama's can. llama.cpp computes a `deci` layer that has
attention and no FFN wrongly, so such a layer gets a narrow FFN of zeros, which adds nothing.

What a family's parameters are called and how their values change is in `export.layouts.gguf.families`.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from export.layouts.gguf.checks import check_network, table_of
from export.layouts.gguf.families import GGUFFamily, Header
from export.layouts.gguf.tokenizer import (
    check_tokenizer,
    composes,
    sample_texts,
    strips_behind,
    tokenization,
    write_tokenizer,
)
from export.layouts.gguf.types import (
    MIXED,
    QUANTIZED,
    TYPES,
    asked_type,
    blocks_of,
    stored_bytes,
    type_by_bits,
    type_of,
)
from export.package import check_destination, package_draft
from export.package_record import PackageRecord, read_record
from export.probe import TOP, default_ids, greedy, logits_of, make_probe, stored_network
from export.shards import weight_bytes
from supernet.architecture import Architecture, LayerSizes
from supernet.common.errors import RequestError
from supernet.common.versions import versions
from supernet.families import head_dim
from supernet.hooks import Hooks
from supernet.slicing import build_standalone, family_of_standalone, standalone_config
from supernet.trust import load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

NARROW = 32
"""Width of the zero FFN: the smallest that quantized types hold."""
Kinds = Callable[[str, tuple[int, ...]], str]
"""The stored type of a tensor of a file, by its name and shape."""
HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}
MODELFILE = "Modelfile"
"""What Ollama makes its model from; the chat template is in the gguf file."""
OLLAMA_CONTEXT = 4096
"""Tokens that Ollama is to hold, where the network can: its memory for keys and values grows with them."""


def write(
    model: PreTrainedModel,
    architecture: Architecture,
    destination: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | Path,
    entry: Mapping[str, object],
    gguf_type: str = "f16",
    embedding: int | None = None,
    bits: Architecture | None = None,
    calibration: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    lineage: Mapping[str, object] | None = None,
    probe_ids: Tensor | None = None,
    texts: Sequence[str] = (),
    card: str | None = None,
) -> PackageRecord:
    """Write a standalone model as `model-TYPE.gguf` with compression.json beside it; returns the package's record.

    Weights whose rows a type's blocks do not divide are stored in another type (`types.type_of`), and so are listed;
    `embedding` are the bits of embedding and head in quantized files (None: 8). Where `gguf_type` is `mixed`, every
    half-block, embedding and head have the type of their `bits`. `calibration` are token ids [sequences,
    length], by whose activations the types whose scales are searched weigh the inputs. `texts` are compared between
    the two tokenizers besides fixed ones. `dtype` is the base's: weights are rounded to it first, so that the file
    holds what the other packages hold.

    Raises `RequestError` for a network, a rotary embedding or a tokenizer that llama.cpp does not know.
    """
    # 1. Refuse what llama.cpp cannot compute, before anything is computed or written.
    if gguf_type not in (*TYPES, MIXED):
        raise RequestError(f"unknown gguf type '{gguf_type}'; known are: {', '.join((*TYPES, MIXED))}")
    quantized = gguf_type in (*QUANTIZED, MIXED)
    config = model.config
    check_network(config, dict(model.named_parameters()))
    params = sum(p.numel() for p in model.parameters())
    needed = params * (4 if gguf_type == "f32" else 2) + 2**24
    check_destination(destination, needed)
    if isinstance(tokenizer, Path):
        tokenizer = load_tokenizer(tokenizer)
    kind, _, described = check_tokenizer(tokenizer)
    # 2. What transformers says of the weights as the file holds them.
    network = stored_network(model, dtype)
    family = table_of(config)
    # llama.cpp knows by this name alone that special tokens take the spaces behind them.
    phi = " (phi-3)" if kind == "llama" and strips_behind(described) else ""
    header = {**_header(config, family, architecture), "name": f"{entry['name']}{phi}"}
    context = header["context_length"] - 1  # llama.cpp's server takes no longer prompts
    ids = (probe_ids if probe_ids is not None else default_ids(config))[:, :context]
    held = _as_held(network, gguf_type)
    searched = quantized and calibration is not None
    importance = input_squares(network, calibration[:, :context]) if searched and calibration is not None else {}
    probe = make_probe(
        logits_of(held, ids),
        ids,
        tokenizer,
        tokenization=tokenization(tokenizer, [*sample_texts(), *texts]),
        composed=composes(tokenizer),
        greedy=greedy(held, ids, context),
        exact_to="f16" if family.half_activation and gguf_type == "f32" else gguf_type,
        rounding=rounding(held, ids, HALVES[gguf_type]) if gguf_type in HALVES else 0.0,
    )
    # 3. The file, and what it costs.
    with package_draft(destination, needed, entry=entry, lineage=lineage, card=card) as draft:
        file = draft.folder / f"model-{gguf_type}.gguf"
        kinds = kinds_of(gguf_type, embedding, bits)
        matrices = _write_file(file, network, architecture, header, tokenizer, kinds, importance)
        read = min(header["context_length"], OLLAMA_CONTEXT)
        (draft.folder / MODELFILE).write_text(f"FROM ./{file.name}\nPARAMETER num_ctx {read}\n", encoding="utf-8")
        draft.probe = probe
        draft.lineage["gguf"] = {"type": gguf_type, **versions(("gguf",))}
        draft.entry |= {"layout": "gguf", "file": file.name, "quantization": None, "params": params}
        if quantized:
            bits_per_parameter = 8 * weight_bytes(draft.folder) / params
            report = _quantization_report(matrices, gguf_type, bits, bits_per_parameter)
            draft.entry |= {"quantization": gguf_type, "quantization_report": report}
    return read_record(destination)


def kinds_of(gguf_type: str, embedding: int | None, bits: Architecture | None) -> Kinds:
    """The stored type of every tensor of a file of a type, by name and shape."""
    if gguf_type != MIXED:
        return partial(type_of, gguf_type=gguf_type, embedding=embedding)
    if bits is None:
        raise RequestError("a mixed gguf file needs the bits of every half-block")
    return partial(type_by_bits, bits=bits)


def _quantization_report(
    matrices: Mapping[str, tuple[str, int]], gguf_type: str, bits: Architecture | None, bits_per_parameter: float
) -> dict[str, object]:
    """The fields of a `QuantizationReport`, from every matrix's type and number of weights."""
    in_layers = [(kind, count) for name, (kind, count) in matrices.items() if name.startswith("blk.")]
    if bits is None:
        exceptions = {name: kind for name, (kind, _) in matrices.items() if kind != gguf_type}
    else:
        asked = {name: asked_type(name, bits) for name in matrices if name.startswith("blk.")}
        others = {name: kind for name, kind in asked.items() if kind != matrices[name][0]}
        exceptions = {name: f"{matrices[name][0]} for {kind}" for name, kind in others.items()}
    return {
        "scheme": gguf_type,
        "group_size": min((TYPES[kind].block for kind, _ in in_layers if kind in QUANTIZED), default=-1),
        "iterations": 0,
        "embedding": TYPES[matrices["token_embd"][0]].bits,
        "head": TYPES[matrices.get("output", matrices["token_embd"])[0]].bits,
        "bits_per_weight": sum(TYPES[kind].bits * n for kind, n in in_layers) / sum(n for _, n in in_layers),
        "bits_per_parameter": bits_per_parameter,
        "exceptions": exceptions,
        "bits": None if bits is None else bits.to_dict(),
    }


def _as_held(network: PreTrainedModel, gguf_type: str) -> PreTrainedModel:
    """The network with its weights rounded as a file of an exact type holds them; as it is for a quantized type.

    Returns `network` itself where that changes nothing.
    """
    dtype = HALVES.get(gguf_type)
    if dtype is None:
        return network
    held, family = copy.deepcopy(network), table_of(network.config)
    for name, parameter in held.named_parameters():
        if parameter.dim() > 1 and not family.stored(name).exact:
            parameter.data = parameter.data.to(dtype).float()
    return held


@torch.no_grad()
def rounding(network: PreTrainedModel, ids: Tensor, dtype: torch.dtype, ways: int = 8) -> float:
    """By how much log-probabilities of top tokens change where every matrix product reads activations in `dtype`.

    llama.cpp does that, and sums in another order, so this is computed in several `ways`, each with random changes of a
    quarter of a rounding step. It bounds what the format costs in networks that amplify rounding (linear attention) or
    decide by it (a router between two experts that are almost equal). Nats.
    """
    generator = torch.Generator().manual_seed(0)
    step = torch.finfo(dtype).eps / 4

    def half(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return (value * (1 + step * torch.randn(value.shape, generator=generator))).to(dtype).to(value.dtype)

    def before(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(map(half, inputs))

    # Experts hold their matrices themselves, and GPT-2's have a class of transformers' own.
    matrices = [
        module
        for module in network.modules()
        if any(parameter.dim() > 1 for parameter in module._parameters.values() if parameter is not None)
        and not isinstance(module, torch.nn.Embedding)
    ]
    exact = logits_of(network, ids).log_softmax(-1)
    top = exact.topk(min(TOP, exact.shape[-1])).indices
    with Hooks([module.register_forward_pre_hook(before) for module in matrices]):
        rounded = [logits_of(network, ids).log_softmax(-1) for _ in range(ways)]
    return max(float((one - exact).gather(-1, top).abs().max()) for one in rounded)


def _write_file(
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

    for factors, values in _rotary_factors(config, family.rope(config)).items():
        add(f"{factors}.weight", values, "f32")
    for source, parameter in model.named_parameters():
        stored = family.stored(source)
        for final, values in stored.to_file(parameter.detach().float().cpu(), config).items():
            kind = "f32" if stored.exact else kind_of(final, tuple(values.shape))
            if values.dim() > 1:
                matrices[final.removesuffix(".weight")] = kind, values.numel()
            add(final, values, kind, importance.get(source))
    for final, values in _stand_ins(config, family, architecture).items():
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
    write_tokenizer(writer, tokenizer, config.vocab_size)
    return writer


@torch.no_grad()
def input_squares(network: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """The mean square of every input channel of each linear layer of the blocks on some text, [inputs], by the name of
    its weight: what llama.cpp calls an importance matrix."""
    sums: dict[str, Tensor] = {}

    def adds(name: str) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
        def before(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            squares = inputs[0].detach().float().square().flatten(0, -2).mean(0)
            sums[name] = sums.get(name, 0.0) + squares

        return before

    blocks = family_of_standalone(network.config).layers + "."
    linear = {
        f"{name}.weight": module
        for name, module in network.named_modules()
        if name.startswith(blocks) and isinstance(module, torch.nn.Linear | Conv1D)
    }
    with Hooks([module.register_forward_pre_hook(adds(name)) for name, module in linear.items()]):
        for part in ids.split(8):
            logits_of(network, part)
    return sums


class FileSize:
    """What the files that `write` writes of a sub-network of the base with this configuration take, in any types."""

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
        for final, values in _stand_ins(self._model.config, family, architecture).items():
            self._shapes[final] = tuple(values.shape)
        for factors, values in _rotary_factors(self._model.config, family.rope(self._model.config)).items():
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
        header = {**_header(config, table_of(config), self._architecture), "name": name}
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


def _header(config: PreTrainedConfig, family: GGUFFamily, architecture: Architecture) -> Header:
    """The header but for the tokenizer, by the writer's methods (without `add_`)."""
    sizes = _sizes(family, architecture)
    lists = {
        "feed_forward_length": [layer.intermediate_size for layer in sizes],
        "head_count": [layer.num_attention_heads for layer in sizes],
        "head_count_kv": [layer.num_key_value_heads for layer in sizes],
    }
    width, rope = head_dim(config), family.rope(config)
    return {
        "block_count": len(sizes),
        "context_length": _context(config, rope),
        "embedding_length": config.hidden_size,
        **{key: values if family.listed else max(values) for key, values in lists.items()},
        "key_length": width,
        "value_length": width,
        "vocab_size": config.vocab_size,
        **_rotary(config, rope),
        **family.header(config),
    }


def _sizes(family: GGUFFamily, architecture: Architecture) -> list[LayerSizes]:
    """Sizes of the layers that are kept, as the file states them: a listed one has an FFN in every layer."""
    sizes = [architecture.layers[i] for i in architecture.kept]
    if not family.listed:
        return sizes
    sizes = [replace(layer, intermediate_size=layer.intermediate_size or NARROW) for layer in sizes]
    if not sizes[0].num_attention_heads:  # llama.cpp takes the width of a head from the first layer
        sizes[0] = replace(sizes[0], num_attention_heads=1, num_key_value_heads=1)
    return sizes


def _stand_ins(config: PreTrainedConfig, family: GGUFFamily, architecture: Architecture) -> dict[str, Tensor]:
    """Tensors that llama.cpp requires of an uneven network though their half-block is removed: they add nothing."""
    hidden, width = config.hidden_size, head_dim(config)
    tensors: dict[str, Tensor] = {}

    def half_block(layer: int, norm: str, inward: Sequence[str], outward: str, between: int) -> dict[str, Tensor]:
        return {
            f"blk.{layer}.{norm}.weight": torch.ones(hidden),
            **{f"blk.{layer}.{name}.weight": torch.zeros(between, hidden) for name in inward},
            f"blk.{layer}.{outward}.weight": torch.zeros(hidden, between),
        }

    if family.listed:
        for index, layer in enumerate(architecture.layers[i] for i in architecture.kept):
            if "mlp" in layer.skip:
                tensors |= half_block(index, "ffn_norm", ("ffn_gate", "ffn_up"), "ffn_down", NARROW)
            if "attention" in layer.skip and not index:
                tensors |= half_block(index, "attn_norm", ("attn_q", "attn_k", "attn_v"), "attn_output", width)
    return tensors


def _context(config: PreTrainedConfig, rope: Mapping[str, Any]) -> int:
    """Positions for which the file computes what transformers does.

    Where the family has no layers with windows in llama.cpp, those within a window; with `longrope`, those that
    transformers takes the short factors for, since llama.cpp takes the long ones for short texts too.
    """
    limits = [config.max_position_embeddings, getattr(config, "sliding_window", None)]
    if rope.get("rope_type") == "longrope":
        limits.append(rope["original_max_position_embeddings"])
    return min(limit for limit in limits if limit)


def _rotary(config: PreTrainedConfig, rope: Mapping[str, Any]) -> Header:
    """Rotary base, width and scaling; nothing for learned positions."""
    from gguf import RopeScalingType  # an optional dependency

    if not rope:
        return {}
    header: Header = {
        "rope_freq_base": float(rope["rope_theta"]),
        "rope_dimension_count": int(head_dim(config) * rope.get("partial_rotary_factor", 1.0)),
    }
    kind = rope.get("rope_type")
    if kind == "linear":
        header |= {"rope_scaling_type": RopeScalingType.LINEAR, "rope_scaling_factor": float(rope["factor"])}
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        factor = rope.get("factor") or config.max_position_embeddings / original
        attention = rope.get("attention_factor")
        if attention is None:  # LongRoPE (Ding et al. 2024), as transformers computes it
            attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        header |= {"rope_scaling_orig_ctx_len": original, "rope_scaling_attn_factors": attention}
    return header


def _rotary_factors(config: PreTrainedConfig, rope: Mapping[str, Any]) -> dict[str, Tensor]:
    """What each frequency is divided by, where the scaling differs by frequency."""
    kind = rope.get("rope_type")
    if kind == "longrope":
        return {f"rope_factors_{length}": torch.tensor(rope[f"{length}_factor"]) for length in ("short", "long")}
    if kind != "llama3":
        return {}
    width = head_dim(config)
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
    context = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs": (1 / ((1 - smooth) / factor + smooth)).float()}


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
