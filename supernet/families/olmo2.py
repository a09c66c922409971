"""OLMo 2: norms behind the half-blocks only, and a QK-norm over all heads together.

That norm averages over the heads that are there, so the full network's function depends on all of them, and a
sub-network's on its own; its weights are ordered and cut with the heads.
"""

from __future__ import annotations

from dataclasses import replace

from supernet.families.llama import LLAMA

LAYER = {name: axes for name, axes in LLAMA.layer.items() if name != "input_layernorm.weight"}

OLMO2 = replace(
    LLAMA,
    model_type="olmo2",
    class_prefix="Olmo2",
    layer={
        **LAYER,
        "self_attn.q_norm.weight": ("query",),
        "self_attn.k_norm.weight": ("kv",),
        "post_feedforward_layernorm.weight": ("hidden",),
    },
    attention_norms=("post_attention_layernorm",),
    mlp_norms=("post_feedforward_layernorm",),
)

FAMILIES = (OLMO2,)
