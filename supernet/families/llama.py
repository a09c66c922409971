"""Llama and the families that name their parts the same way."""

from __future__ import annotations

from dataclasses import replace

from supernet.families import Family

LLAMA = Family(
    model_type="llama",
    class_prefix="Llama",
    layer={
        "input_layernorm.weight": ("hidden",),
        "self_attn.q_proj.weight": ("query", "hidden"),
        "self_attn.q_proj.bias": ("query",),
        "self_attn.k_proj.weight": ("kv", "hidden"),
        "self_attn.k_proj.bias": ("kv",),
        "self_attn.v_proj.weight": ("kv", "hidden"),
        "self_attn.v_proj.bias": ("kv",),
        "self_attn.o_proj.weight": ("hidden", "query"),
        "self_attn.o_proj.bias": ("hidden",),
        "post_attention_layernorm.weight": ("hidden",),
        "mlp.gate_proj.weight": ("ffn", "hidden"),
        "mlp.gate_proj.bias": ("ffn",),
        "mlp.up_proj.weight": ("ffn", "hidden"),
        "mlp.up_proj.bias": ("ffn",),
        "mlp.down_proj.weight": ("hidden", "ffn"),
        "mlp.down_proj.bias": ("hidden",),
    },
    outer={
        "model.embed_tokens.weight": ("fixed", "hidden"),
        "model.norm.weight": ("hidden",),
        "lm_head.weight": ("fixed", "hidden"),
    },
)

MISTRAL = replace(LLAMA, model_type="mistral", class_prefix="Mistral")
QWEN2 = replace(LLAMA, model_type="qwen2", class_prefix="Qwen2")
# QK-norm acts within each head, so its weights do not follow the number of heads.
QK_NORM = {"self_attn.q_norm.weight": ("fixed",), "self_attn.k_norm.weight": ("fixed",)}
QWEN3 = replace(LLAMA, model_type="qwen3", class_prefix="Qwen3", layer={**LLAMA.layer, **QK_NORM})
# Granite's multipliers of embeddings, residual, attention and logits are numbers of its configuration.
GRANITE = replace(LLAMA, model_type="granite", class_prefix="Granite")
# Some layers have no rotary positions: a list over the layers says which.
SMOLLM3 = replace(LLAMA, model_type="smollm3", class_prefix="SmolLM3", layer_lists=("layer_types", "no_rope_layers"))

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, GRANITE, SMOLLM3)
