"""The gguf layout: one file for llama.cpp, weights and tokenizer, written with the `gguf` package.

Networks that the plain class holds go under the family's own architecture name. Uneven ones go under `deci`, whose
sizes are lists over layers; only families whose blocks are Llama's can. llama.cpp mis-executes a `deci` layer with
attention and no FFN, so such a layer gets a narrow FFN of zeros, which adds nothing.

A tokenizer is written where llama.cpp knows its kind, and refused by name otherwise: it knows pre-tokenizers by name
only, not by their rules. Whether both agree is checked by `check_gguf`, which asks llama.cpp itself.
"""

from __future__ import annotations

import json
import math
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.architecture import Architecture
from compressor.errors import RequestError, VerificationError
from evals.trust import UNEVEN_PREFIX
from export.layouts import check_installed
from export.package import (
    CARD,
    PackageInfo,
    check_destination,
    path_in_run,
    read_package,
    staged,
    versions,
    weight_bytes,
    write_record,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
QUANTIZED = ("q8_0", "q4_0")
BLOCK = 32
"""Weights that share a scale in q8_0 and q4_0; also the width of the zero FFN."""

# Largest |Δ log-probability| (nats) against transformers, for each nat of the largest |logit|: llama.cpp rounds
# activations to the type of the weights that they meet. Quantized: largest mean, as for other packages.
TOLERANCE = {"f32": 2e-5, "f16": 2e-3, "bf16": 8e-3}
BOUNDS = {"q8_0": 0.1, "q4_0": 1.0}
CHECKED_POSITIONS = 8

_OWN_NAME = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_LIKE_LLAMA = ("llama", "mistral", "qwen2")
_PERMUTED = ("llama", "deci")
"""Architectures that rotate neighbouring channels, where transformers rotates halves."""

_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def write(
    model: nn.Module,
    architecture: Architecture,
    destination: Path,
    *,
    tokenizer: Any,
    entry: Mapping[str, Any],
    gguf_type: str = "f16",
    dtype: Any = None,
    lineage: Mapping[str, Any] | None = None,
    probe_ids: Tensor | None = None,
    texts: Sequence[str] = (),
    card: str | None = None,
    reference: Path | None = None,
) -> PackageInfo:
    """Write a standalone model as `model-TYPE.gguf` with compression.json beside it.

    Weights whose rows are no multiple of 32 stay f16 in the quantized types, and so are listed; embeddings and head
    are never below 8 bits. `texts` are compared between the two tokenizers besides fixed ones. `dtype` is the base's:
    weights are rounded to it first, so that the file holds what the other packages hold.

    Raises `RequestError` for a network, a rotary embedding or a tokenizer that llama.cpp does not know.
    """
    import torch

    from export import probe as probes

    if gguf_type not in TYPES:
        raise RequestError(f"unknown gguf type '{gguf_type}'; known are: {', '.join(TYPES)}")
    config: Any = model.config
    parameters = dict(model.named_parameters())
    params = sum(p.numel() for p in parameters.values())
    needed = params * (4 if gguf_type == "f32" else 2) + 2**24
    check_destination(destination, needed)
    if isinstance(tokenizer, Path):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    network = probes.stored_network(model, dtype or torch.float32)
    ids = probe_ids if probe_ids is not None else probes.default_ids(config)
    exact = {"f16": torch.float16, "bf16": torch.bfloat16}.get(gguf_type, torch.float32)
    logits = probes.logits_of(probes.stored_network(network, exact), ids)
    with staged(destination, needed) as folder:
        file = folder / f"model-{gguf_type}.gguf"
        exceptions = _write_file(file, network, architecture, tokenizer, gguf_type, str(entry["name"]))
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")
        probe = probes.make_probe(logits, ids, tokenizer)
        probe["tokenization"] = [[text, tokenizer(text, verbose=False).input_ids] for text in [*sample_texts(), *texts]]
        probe["greedy"] = probes.greedy(network, ids[:1, : max(1, ids.shape[1] // 2)])
        own = {
            **entry,
            "path": path_in_run(destination),
            "layout": "gguf",
            "file": file.name,
            "quantization": gguf_type if gguf_type in QUANTIZED else None,
            "architecture": architecture.to_dict(),
            "params": params,
            "bytes": weight_bytes(folder),
        }
        if gguf_type in QUANTIZED:
            linear = {n: p for n, p in parameters.items() if p.dim() == 2 and ".layers." in n}
            bits = sum(p.numel() * _bits(_type_of(n, tuple(p.shape), gguf_type)) for n, p in linear.items())
            own["quantization_report"] = {
                "scheme": gguf_type,
                "group_size": BLOCK,
                "iterations": 0,
                "bits_per_weight": bits / sum(p.numel() for p in linear.values()),
                "bits_per_parameter": 8 * weight_bytes(folder) / params,
                "exceptions": exceptions,
            }
        origin = {**(lineage or {}), "gguf": {"type": gguf_type, **versions(("gguf",))}}
        write_record(folder, entry=own, lineage=origin, probe=probe)
    return read_package(destination)


def _write_file(
    file: Path, model: nn.Module, architecture: Architecture, tokenizer: Any, gguf_type: str, name: str
) -> dict[str, str]:
    """Returns the weights that are not of `gguf_type`, and what they are."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    config: Any = model.config
    plain = config.model_type.removeprefix(UNEVEN_PREFIX)
    uneven = plain != config.model_type
    check_family(plain)
    if uneven and plain not in _LIKE_LLAMA:
        raise RequestError(f"llama.cpp has no architecture for uneven {plain} networks; use --format padded")
    target = "deci" if uneven else _OWN_NAME[plain]
    writer = GGUFWriter(file, target)
    writer.add_name(name)
    tensors = dict(model.named_parameters())
    sizes = [architecture.layers[i] for i in architecture.kept]
    heads = [layer.num_attention_heads for layer in sizes]
    groups = [layer.num_key_value_heads for layer in sizes]
    widths = [layer.intermediate_size or BLOCK for layer in sizes]
    if target == "deci" and not heads[0]:
        heads[0], groups[0] = 1, 1  # llama.cpp takes the size of a head from the first layer
    writer.add_block_count(len(sizes))
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(widths if uneven else widths[0])
    writer.add_head_count(heads if uneven else heads[0])
    writer.add_head_count_kv(groups if uneven else groups[0])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    rotary = _write_rotary(writer, config)
    _write_tokenizer(writer, tokenizer, config.vocab_size)
    exceptions: dict[str, str] = {}

    def add(name: str, values: Any, source: str) -> None:
        kind = _type_of(source, values.shape, gguf_type)
        if values.ndim == 2 and kind != gguf_type:
            exceptions[name.removesuffix(".weight")] = kind
        ggml = GGMLQuantizationType[kind.upper()]
        writer.add_tensor(name, quants.quantize(np.ascontiguousarray(values), ggml), raw_dtype=ggml)

    if rotary is not None:
        writer.add_tensor("rope_freqs.weight", rotary)
    for source, final in _OUTER_NAMES.items():
        if source in tensors:
            add(final, tensors[source].detach().float().cpu().numpy(), source)
    for index, (layer, query, group, width) in enumerate(zip(sizes, heads, groups, widths, strict=True)):
        for part, short in _LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                source = f"model.layers.{index}.{part}.{kind}"
                tensor = tensors.get(source)
                if tensor is None:
                    shape = _stand_in(part, kind, layer.skip, query, group, width, config)
                    if shape is None:
                        continue
                    values = np.ones(shape, np.float32) if "norm" in part else np.zeros(shape, np.float32)
                else:
                    values = tensor.detach().float().cpu().numpy()
                if target in _PERMUTED and part in ("self_attn.q_proj", "self_attn.k_proj"):
                    values = _neighbours(values, config.head_dim)
                add(f"blk.{index}.{short}.{kind}", values, source)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exceptions


def _stand_in(
    part: str, kind: str, skip: Sequence[str], heads: int, groups: int, width: int, config: Any
) -> tuple[int, ...] | None:
    """Shape of a tensor that llama.cpp wants though its half-block is removed; None where it wants none."""
    hidden, query, key = config.hidden_size, heads * config.head_dim, groups * config.head_dim
    if kind == "bias" or (not heads and part.startswith(("self_attn", "input_layernorm"))):
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    if "mlp" in skip:
        shapes |= {
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (width, hidden),
            "mlp.up_proj": (width, hidden),
            "mlp.down_proj": (hidden, width),
        }
    if "attention" in skip:
        shapes |= {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (key, hidden),
            "self_attn.v_proj": (key, hidden),
            "self_attn.o_proj": (hidden, query),
        }
    return shapes.get(part)


def _type_of(source: str, shape: tuple[int, ...], gguf_type: str) -> str:
    """The stored type of a weight: vectors are f32; rows that blocks do not divide are f16."""
    if len(shape) == 1:
        return "f32"
    if gguf_type in QUANTIZED and shape[-1] % BLOCK:
        return "f16"
    if gguf_type == "q4_0" and source in _OUTER_NAMES:
        return "q8_0"
    return gguf_type


def _bits(kind: str) -> float:
    """Stored bits for each weight: blocks of 32 share one 16-bit scale."""
    return {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q4_0": 4.5}[kind]


def _neighbours(values: Any, head_dim: int) -> Any:
    """Rows of a query or key projection, from halves that rotate together to neighbours that do."""
    halves = values.reshape(-1, 2, head_dim // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _halves(values: Any, head_dim: int) -> Any:
    """The rows as they were before `_neighbours`."""
    pairs = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _context(config: Any) -> int:
    """Positions for which the file computes what transformers does: llama.cpp has no window for these families."""
    window = getattr(config, "sliding_window", None)
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def _write_rotary(writer: Any, config: Any) -> Any:
    """Rotary base and scaling; returns llama.cpp's `rope_freqs` where the scaling differs by frequency."""
    import numpy as np
    from gguf import RopeScalingType

    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        return None
    if kind != "llama3":
        known = "default, linear, llama3"
        raise RequestError(f"the gguf layout knows no rotary embeddings of type '{kind}'; known are: {known}")
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
    context = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _write_tokenizer(writer: Any, tokenizer: Any, vocabulary: int) -> None:
    from gguf import TokenType

    kind, pre, described = check_tokenizer(tokenizer)
    model = described["model"]
    tokens = [f"[unused {i}]" for i in range(vocabulary)]
    types = [TokenType.UNUSED] * vocabulary
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, TokenType.NORMAL
        if kind == "llama" and len(token) == 6 and token.startswith("<0x"):
            types[number] = TokenType.BYTE
    for added in described["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if kind == "llama":
        # SentencePiece merges the pair with the highest score first: that of the earliest merge.
        ranks = {"".join(pair): -float(rank) for rank, pair in reversed(list(enumerate(pairs)))}
        writer.add_token_scores([ranks.get(token, 0.0) for token in tokens])
        if tokenizer.unk_token_id is not None:
            types[tokenizer.unk_token_id] = TokenType.UNKNOWN
        writer.add_add_space_prefix(True)
    else:
        writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_token_types(types)
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    plain, full = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    writer.add_add_bos_token(full[: len(full) - len(plain)] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(len(full) > len(plain) and full[-1] == tokenizer.eos_token_id != plain[-1])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def check_family(model_type: str) -> None:
    """Raises `RequestError` for a family that this layout does not write."""
    if model_type not in _OWN_NAME:
        known = ", ".join(_OWN_NAME)
        raise RequestError(f"--format gguf does not know {model_type} networks; it writes {known}")


def check_tokenizer(tokenizer: Any) -> tuple[str, str, dict[str, Any]]:
    """What `tokenizer_kind` says of a tokenizer, and its description. Raises `RequestError` as that does."""
    if not getattr(tokenizer, "is_fast", False):
        raise RequestError("the gguf layout needs a tokenizer.json; this tokenizer has none")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    kind, pre = tokenizer_kind(described)
    if kind == "gpt2" and not described["model"]["merges"]:
        raise RequestError("llama.cpp loads no BPE tokenizer without merges")
    return kind, pre, described


def tokenizer_kind(described: Mapping[str, Any]) -> tuple[str, str]:
    """llama.cpp's names for a tokenizer (tokenizer.json as a dictionary) and its pre-tokenizer.

    Raises `RequestError` that names the part which llama.cpp has no name for.
    """
    model, pre = described["model"], described.get("pre_tokenizer")
    if model["type"] != "BPE":
        raise RequestError(f"llama.cpp knows no tokenizer of type {model['type']} for these networks (gguf needs BPE)")
    if model.get("byte_fallback"):
        steps = described.get("normalizer") or {}
        kinds = [step["type"] for step in steps.get("normalizers", [steps])]
        if kinds == ["Prepend", "Replace"] and pre is None:
            return "llama", "default"
        raise RequestError(
            f"llama.cpp knows no byte-fallback tokenizer with the normalizer {kinds} and the pre-tokenizer "
            f"{pre and pre['type']}"
        )
    parts = (pre or {}).get("pretokenizers", [pre] if pre else [])
    found = [_part(part) for part in parts]
    normalizer = (described.get("normalizer") or {}).get("type")
    names = {
        ("bytes+words",): "gpt-2",
        ("digits", "bytes+words"): "smollm",
        (_LLAMA3_SPLIT, "bytes"): "llama-bpe",
        (_QWEN2_SPLIT, "bytes"): "qwen2",
    }
    name = names.get(tuple(found))
    if name is None or (normalizer is not None and (name, normalizer) != ("qwen2", "NFC")):
        rules = ", ".join(found) or "none"
        raise RequestError(f"llama.cpp has no name for the pre-tokenizer ({rules}; normalizer {normalizer})")
    return "gpt2", name


def _part(part: Mapping[str, Any]) -> str:
    """One step of a pre-tokenizer, reduced to what tells it from others."""
    kind = part["type"]
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return "bytes+words" if part.get("use_regex", True) else "bytes"
    if kind == "Digits" and part.get("individual_digits"):
        return "digits"
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return str(part["pattern"].get("Regex"))
    return kind


def sample_texts(count: int = 200) -> list[str]:
    """Texts on which tokenizers part: words, digits, contractions, spaces, accents, other scripts, code. Seeded."""
    import random

    rng = random.Random(0)
    words = ["the", "quick", "brown", "Fox", "jumped", "over", "LAZY", "dogs", "didn't", "we've", "I'll", "Anna's"]
    words += ["o'clock", "'re", "naïve", "café", "Straße", "日本語", "привет", "שלום", "🙂", "e\u0301", "½"]
    words += ["7", "42", "1234567", "3.14", "10%", "x=y+1;", "def f(a):", "http://a.b/c?d=e", "...", "—", "(a)", "#!"]
    spaces = [" ", " ", " ", " ", "  ", "   ", "\n", "\n\n", "\t", ", ", ". "]
    texts = []
    for _ in range(count):
        pieces = [rng.choice(words) + rng.choice(spaces) for _ in range(rng.randint(1, 12))]
        texts.append("".join(pieces).strip() if rng.random() < 0.7 else "".join(pieces))
    return texts


# --- the check -------------------------------------------------------------------------------------------------------


class LlamaCpp:
    """llama.cpp with one model, in this process: a wheel's server, asked over the loopback interface."""

    def __init__(self, file: Path, context: int, threads: int = 1) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx = context
        settings.n_parallel = 1
        settings.warmup = False
        settings.fit_params = False
        settings.verbosity = 0
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = xllamacpp.Server(settings)
        self.address = self._server.listening_address
        self._harmless = self.tokenize("a")[-1]

    def ask(self, path: str, **values: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.address}{path}", json.dumps(values).encode(), {"Content-Type": "application/json"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=600) as reply:
            return json.load(reply)

    def tokenize(self, text: str) -> list[int]:
        return self.ask("/tokenize", content=text, add_special=True)["tokens"]

    def log_probabilities(self, ids: Sequence[int], top: int) -> dict[int, float]:
        """Natural log-probabilities of the `top` likeliest next tokens.

        The server reports none where the sampled token ends the text or is a part of a character, so a harmless one is
        forced; the reported probabilities are those before sampling.
        """
        found = self.ask(
            "/completion",
            prompt=list(ids),
            n_predict=1,
            n_probs=top,
            temperature=0.0,
            cache_prompt=True,
            logit_bias=[[self._harmless, 1e6]],
        )
        return {entry["id"]: entry["logprob"] for entry in found["completion_probabilities"][0]["top_logprobs"]}

    def timed(self, ids: Sequence[int], new: int) -> tuple[float, float]:
        """Seconds to read the prompt, and to write each of `new` tokens behind it, by the server's own clock."""
        found = self.ask(
            "/completion", prompt=list(ids), n_predict=new, temperature=0.0, ignore_eos=True, cache_prompt=False
        )["timings"]
        return found["prompt_ms"] / 1e3, found["predicted_per_token_ms"] / 1e3

    def greedy(self, ids: Sequence[int], new: int) -> list[int]:
        found = self.ask(
            "/completion", prompt=list(ids), n_predict=new, temperature=0.0, return_tokens=True, ignore_eos=False
        )
        return found["tokens"]


def measure_speed(package: Path, *, prompt: int, new: int, threads: int, repeats: int = 5) -> dict[str, Any]:
    """Speed of a gguf package in llama.cpp at batch 1, as report.json holds it: medians over `repeats` runs."""
    import statistics

    (file,) = package.glob("*.gguf")
    runtime = LlamaCpp(file, prompt + new + 8, threads)
    runs = [runtime.timed([1 + i % 200 for i in range(prompt)], new) for _ in range(repeats + 1)][1:]
    return {
        "runtime": "llama.cpp",
        "device": "cpu",
        "threads": threads,
        "dtype": file.stem.rpartition("-")[2],
        "batch": 1,
        "prompt": prompt,
        "new": new,
        "prefill_tps": prompt / statistics.median(first for first, _ in runs),
        "decode_tps": 1 / statistics.median(each for _, each in runs),
    }


def take_stored_weights(network: nn.Module, package: Path) -> nn.Module:
    """Give a standalone network (of the same architecture) the values that a gguf package's file holds for it.

    Scores are computed with these in transformers; `check_gguf` proves that llama.cpp says the same of the file.
    """
    import torch
    from gguf import GGUFReader, quants

    (file,) = package.glob("*.gguf")
    reader = GGUFReader(file)
    permuted = str(reader.fields["general.architecture"].contents()) in _PERMUTED
    names = {final: source for source, final in _OUTER_NAMES.items()}
    parts = {short: part for part, short in _LAYER_NAMES.items()}
    config: Any = network.config
    found = {}
    for tensor in reader.tensors:
        name = names.get(tensor.name)
        values = quants.dequantize(tensor.data, tensor.tensor_type).astype("float32")
        if tensor.name.startswith("blk."):
            _, index, short, kind = tensor.name.split(".")
            name = f"model.layers.{index}.{parts[short]}.{kind}"
            if permuted and short in ("attn_q", "attn_k"):
                values = _halves(values, config.head_dim)
        if name is not None:
            found[name] = torch.from_numpy(values.copy())
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(found[name].view(parameter.shape))
    return network


def check_gguf(package: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Load the file in llama.cpp and compare tokens, log-probabilities and greedy text with what transformers said.

    Raises `VerificationError` that says what differs, and `RequestError` where llama.cpp is not installed.
    """
    check_installed("gguf")
    (file,) = package.glob("*.gguf")
    probe, gguf_type = record["probe"], file.stem.rpartition("-")[2]
    sequences = probe["ids"]
    longest = max(map(len, sequences)) + len(probe["greedy"]["ids"]) + 8
    try:
        runtime = LlamaCpp(file, max(64, longest))
    except Exception as error:
        raise VerificationError(f"{file}: llama.cpp does not load it: {error}") from error
    for text, ids in probe["tokenization"]:
        found = runtime.tokenize(text)
        if found != ids:
            raise VerificationError(f"{file}: llama.cpp tokenizes {text!r} as {found}, transformers as {ids}")
    differences = []
    step = max(1, len(sequences[0]) // CHECKED_POSITIONS)
    for row, ids in enumerate(sequences):
        for position in range(step - 1, len(ids), step):
            found_here = runtime.log_probabilities(ids[: position + 1], 100)
            expected = zip(probe["top_ids"][row][position], probe["top_logprob"][row][position], strict=True)
            for token, value in expected:
                # A token that llama.cpp ranks below a hundred others is off by at least this much.
                differences.append(abs(found_here.get(token, min(found_here.values())) - value))
    result: dict[str, Any] = {
        "layout": "gguf",
        "quantization": record["entry"]["quantization"],
        "tokenizer_equal": len(probe["tokenization"]),
        "compared_with": "transformers' log-probabilities",
    }
    mean, largest = sum(differences) / len(differences), max(differences)
    if gguf_type in QUANTIZED:
        if not mean <= BOUNDS[gguf_type]:
            raise VerificationError(f"{file}: log-probabilities are off by {mean:.4f} on average")
        result |= {"mean_abs_logprob_difference": mean, "bound": BOUNDS[gguf_type]}
    else:
        allowed = TOLERANCE[gguf_type] * max(1.0, probe["max_abs_logit"])
        if not largest <= allowed:
            by = f"by up to {largest:.3g}, allowed are {allowed:.3g}"
            raise VerificationError(f"{file}: log-probabilities differ {by}")
        result |= {"max_abs_logprob_difference": largest, "tolerance": allowed}
        result["greedy_equal"] = _compare_greedy(file, runtime, probe["greedy"], allowed)
    return result | {"runtime": f"llama.cpp ({versions(('xllamacpp',))['xllamacpp']})", "device": "cpu"}


def _compare_greedy(file: Path, runtime: LlamaCpp, expected: Mapping[str, Any], allowed: float) -> int:
    """Tokens of the greedy continuation that agree; only where two tokens were as good as equal may it part."""
    found = runtime.greedy(expected["prompt"], len(expected["ids"]))
    for position, (mine, theirs) in enumerate(zip(found, expected["ids"], strict=False)):
        if mine != theirs:
            if expected["lead"][position] <= 2 * allowed:
                return position
            theirs = expected["ids"]
            raise VerificationError(f"{file}: llama.cpp continues with {found}, transformers with {theirs}")
    return len(found)
