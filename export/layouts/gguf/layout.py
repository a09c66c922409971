"""The gguf layout: one file for llama.cpp, weights and tokenizer, written with the `gguf` package.

Networks that the plain class holds go under the family's own architecture name. Uneven ones go under `deci`, whose
sizes are lists over layers; only families whose blocks are Llama's can (`export.layouts.gguf.header`).

What a family's parameters are called and how their values change is in `export.layouts.gguf.families`; the file itself
is written, and read back, in `export.layouts.gguf.file`.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from export.layouts.gguf.checks import check_network, table_of
from export.layouts.gguf.file import kinds_of, write_file
from export.layouts.gguf.header import network_header
from export.layouts.gguf.tokenizer import (
    check_tokenizer,
    composes,
    sample_texts,
    strips_behind,
    tokenization,
)
from export.layouts.gguf.types import (
    MIXED,
    QUANTIZED,
    TYPES,
    asked_type,
)
from export.package import check_destination, package_draft
from export.package_record import PackageRecord, Probe, read_record
from export.probe import TOP, default_ids, greedy, logits_of, make_probe, stored_network
from export.shards import weight_bytes
from supernet.architecture import Architecture
from supernet.common.errors import RequestError
from supernet.common.versions import versions
from supernet.hooks import Hooks
from supernet.trust import load_tokenizer
from supernet.uneven import family_of_standalone

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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

    Raises `NotHeldError` for a network or a rotary embedding that llama.cpp does not know, and
    `RequestError` for such a tokenizer.
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
    # llama.cpp knows by this name alone that special tokens take the spaces behind them.
    phi = " (phi-3)" if kind == "llama" and strips_behind(described) else ""
    header = {**network_header(config, table_of(config), architecture), "name": f"{entry['name']}{phi}"}
    context = header["context_length"] - 1  # llama.cpp's server takes no longer prompts
    ids = (probe_ids if probe_ids is not None else default_ids(config))[:, :context]
    probe = _probe(network, ids, context, tokenizer, texts, gguf_type)
    importance = {} if calibration is None or not quantized else input_squares(network, calibration[:, :context])
    # 3. The file, and what it costs.
    with package_draft(destination, needed, entry=entry, lineage=lineage, card=card) as draft:
        file = draft.folder / f"model-{gguf_type}.gguf"
        kinds = kinds_of(gguf_type, embedding, bits)
        matrices = write_file(file, network, architecture, header, tokenizer, kinds, importance)
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


def _probe(
    network: PreTrainedModel,
    ids: Tensor,
    context: int,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    gguf_type: str,
) -> Probe:
    """What llama.cpp is compared with: what transformers says about `ids` [sequences, length] of the network as a file
    of the type holds it, and how the tokenizer splits fixed texts and `texts`."""
    held = _as_held(network, gguf_type)
    half_activation = table_of(network.config).half_activation
    return make_probe(
        logits_of(held, ids),
        ids,
        tokenizer,
        tokenization=tokenization(tokenizer, [*sample_texts(), *texts]),
        composed=composes(tokenizer),
        greedy=greedy(held, ids, context),
        exact_to="f16" if half_activation and gguf_type == "f32" else gguf_type,
        rounding=rounding(held, ids, HALVES[gguf_type]) if gguf_type in HALVES else 0.0,
    )


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


@torch.no_grad()
def input_squares(network: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """The mean square of every input channel of each linear layer of the blocks on some text, [inputs], by the name of
    its weight: what llama.cpp calls an importance matrix."""
    sums: dict[str, Tensor] = {}
    tokens: Counter[str] = Counter()

    def adds(name: str) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
        def before(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            squares = inputs[0].detach().float().square().flatten(0, -2)
            sums[name] = sums.get(name, 0.0) + squares.sum(0)
            tokens[name] += len(squares)

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
    return {name: total / max(1, tokens[name]) for name, total in sums.items()}


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
