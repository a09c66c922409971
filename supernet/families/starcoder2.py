"""StarCoder2: Llama's attention, an MLP of two projections without a gate, LayerNorm with biases."""

from __future__ import annotations

from dataclasses import replace

from supernet.families.llama import LLAMA

ATTENTION = {name: axes for name, axes in LLAMA.layer.items() if not name.startswith("mlp.")}

STARCODER2 = replace(
    LLAMA,
    model_type="starcoder2",
    class_prefix="Starcoder2",
    layer={
        **ATTENTION,
        "input_layernorm.bias": ("hidden",),
        "post_attention_layernorm.bias": ("hidden",),
        "mlp.c_fc.weight": ("ffn", "hidden"),
        "mlp.c_fc.bias": ("ffn",),
        "mlp.c_proj.weight": ("hidden", "ffn"),
        "mlp.c_proj.bias": ("hidden",),
    },
    outer={**LLAMA.outer, "model.norm.bias": ("hidden",)},
)

FAMILIES = (STARCODER2,)
