"""What a file for llama.cpp says of a network besides weights and tokenizer: its header, and tensors that follow from
the configuration and the sizes alone.

Uneven networks go under `deci`, whose sizes are lists over layers. llama.cpp computes a `deci` layer that has attention
and no FFN wrongly, so such a layer gets a narrow FFN of zeros, which adds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from export.layouts.gguf.families import GGUFFamily, Header
from supernet.architecture import Architecture, LayerSizes
from supernet.families import head_dim

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NARROW = 32
"""Width of the zero FFN: the smallest that quantized types hold."""


def network_header(config: PreTrainedConfig, family: GGUFFamily, architecture: Architecture) -> Header:
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


def stand_ins(config: PreTrainedConfig, family: GGUFFamily, architecture: Architecture) -> dict[str, Tensor]:
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


def rotary_factors(config: PreTrainedConfig, rope: Mapping[str, Any]) -> dict[str, Tensor]:
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
