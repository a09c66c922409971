"""A tiny random network of every family, in the variants that matter, for parity tests."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    Starcoder2Config,
)

from supernet.architecture import Architecture, LayerSizes

COMMON: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SIZES: dict[str, Any] = COMMON | {"intermediate_size": 56, "num_key_value_heads": 3}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 16,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-rope-biases-tied": lambda: LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=12, rope_parameters=LLAMA3_ROPE
    ),
    "llama-mha": lambda: LlamaConfig(**SIZES | {"num_key_value_heads": 6}),
    "llama-mqa": lambda: LlamaConfig(**SIZES | {"num_key_value_heads": 1}),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**SIZES, sliding_window=4),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2-windows": lambda: Qwen2Config(**SIZES, sliding_window=4, use_sliding_window=True, max_window_layers=2),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "granite": lambda: GraniteConfig(
        **SIZES,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
        logits_scaling=2.0,
        attention_bias=True,
    ),
    "smollm3": lambda: SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1, 1], tie_word_embeddings=True),
    "smollm3-windows": lambda: SmolLM3Config(
        **SIZES, no_rope_layers=[0, 1, 1, 0], use_sliding_window=True, sliding_window=4
    ),
    "gemma2": lambda: Gemma2Config(**SIZES, **WINDOW, head_dim=12, query_pre_attn_scalar=10),
    "gemma3_text": lambda: Gemma3TextConfig(**SIZES, **WINDOW, head_dim=12, query_pre_attn_scalar=10),
    "olmo2": lambda: Olmo2Config(**SIZES),
    "phi3": lambda: Phi3Config(**SIZES),
    "phi3-window": lambda: Phi3Config(**SIZES, sliding_window=4),
    "gpt2": lambda: GPT2Config(**COMMON, n_inner=56),
    "gpt_neox": lambda: GPTNeoXConfig(**COMMON, intermediate_size=56, tie_word_embeddings=False),
    "gpt_neox-serial": lambda: GPTNeoXConfig(
        **COMMON, intermediate_size=56, use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True
    ),
    "opt": lambda: OPTConfig(**COMMON, ffn_dim=56, word_embed_proj_dim=48),
    "opt-projected": lambda: OPTConfig(**COMMON, ffn_dim=56, word_embed_proj_dim=32, do_layer_norm_before=False),
    "starcoder2": lambda: Starcoder2Config(**SIZES, tie_word_embeddings=True),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=3, head_dim=16, norm_topk_prob=True
    ),
    "qwen3_moe-dense": lambda: Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=3, head_dim=16, mlp_only_layers=[1]
    ),
    "qwen3_5_text": lambda: Qwen3_5TextConfig(**SIZES, **LINEAR, full_attention_interval=2),
}


def tiny_network(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    network: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():  # biases and norms start at constants, which would hide a wrong permutation
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def random_architecture(base: Architecture, rng: random.Random) -> Architecture:
    """Every size of every layer drawn by itself, 0 included, and the query heads of a group; at least one layer keeps
    its attention."""
    layers = []
    share = rng.choice([0.5, 1.0])
    for full in base.layers:
        groups = rng.randint(0, full.num_key_value_heads)
        of_each = full.num_attention_heads // max(full.num_key_value_heads, 1)
        heads = groups * max(1, round(of_each * share))
        # torch's grouped matrix product, which experts use, wants multiples of 16 bytes.
        width = rng.choice([0, 8, 20, full.intermediate_size // 8 * 4, full.intermediate_size])
        layers.append(LayerSizes(heads, groups, width, rng.randint(1, full.num_experts) if full.num_experts else 0))
    if not any(layer.num_key_value_heads for layer in layers):
        last = max(i for i, full in enumerate(base.layers) if full.num_key_value_heads)
        layers[last] = base.layers[last]
    return Architecture(base.hidden_size, tuple(layers))


IDS = torch.tensor([[1, 5, 9, 17, 33, 65, 2, 7, 100, 3], [1, 88, 7, 6, 5, 4, 3, 2, 9, 11]])


def logits(network: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return network(**({"input_ids": IDS} | inputs)).logits


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
