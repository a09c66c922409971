"""Phi-3: query, key and value in one projection, gate and up in another."""

from __future__ import annotations

from dataclasses import replace

from supernet.families.llama import LLAMA

PHI3 = replace(
    LLAMA,
    model_type="phi3",
    class_prefix="Phi3",
    layer={
        "input_layernorm.weight": ("hidden",),
        "self_attn.qkv_proj.weight": (("query", "kv", "kv"), "hidden"),
        "self_attn.o_proj.weight": ("hidden", "query"),
        "post_attention_layernorm.weight": ("hidden",),
        "mlp.gate_up_proj.weight": (("ffn", "ffn"), "hidden"),
        "mlp.down_proj.weight": ("hidden", "ffn"),
    },
    counts={"self_attn.num_key_value_heads": "kv"},
    reads_config="self_attn",
    # The configuration checks its rotary factors against a head width that it derives from the number of heads.
    head_width_follows=True,
    fixed_hidden="the width of a head follows from it",
)

FAMILIES = (PHI3,)
