"""Mixture of experts: Mixtral and Qwen3-MoE. The number of experts is elastic, and so is their width.

A router's rows are ordered and cut with the experts, and a token goes to as many as before, or to all that are left.
"""

from __future__ import annotations

from dataclasses import replace

from supernet.families.llama import LLAMA, QK_NORM

EXPERTS = {
    "mlp.gate.weight": ("experts", "hidden"),
    "mlp.experts.gate_up_proj": ("experts", ("ffn", "ffn"), "hidden"),
    "mlp.experts.down_proj": ("experts", "hidden", "ffn"),
}
ATTENTION = {name: axes for name, axes in LLAMA.layer.items() if not name.startswith("mlp.")}

MIXTRAL = replace(
    LLAMA,
    model_type="mixtral",
    class_prefix="Mixtral",
    layer={**ATTENTION, **EXPERTS},
    settings={**LLAMA.settings, "experts": "num_local_experts"},
    counts={"mlp.gate.num_experts": "experts", "mlp.experts.num_experts": "experts", "mlp.gate.hidden_dim": "hidden"},
    router="mlp.gate",
)
# Layers that the configuration lists, or skips over, have a dense MLP of another width.
QWEN3_MOE = replace(
    MIXTRAL,
    model_type="qwen3_moe",
    class_prefix="Qwen3Moe",
    layer={**LLAMA.layer, **QK_NORM, **EXPERTS},
    settings={**MIXTRAL.settings, "ffn": "moe_intermediate_size"},
    dense_ffn="intermediate_size",
)

FAMILIES = (MIXTRAL, QWEN3_MOE)
