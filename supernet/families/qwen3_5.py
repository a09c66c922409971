"""The dense text network of Qwen3.5: three layers of linear attention (a gated delta rule) to one of full attention.

Elastic are the FFN width, the layers, and the key-value groups of the full-attention layers. A layer of linear
attention has no heads to choose from: it is kept whole, but for its FFN width, or removed.
"""

from __future__ import annotations

from dataclasses import replace

from supernet.families.llama import LLAMA, QK_NORM

QWEN3_5 = replace(
    LLAMA,
    model_type="qwen3_5_text",
    package="qwen3_5",
    class_prefix="Qwen3_5",
    class_suffixes={"Config": "TextConfig", "Model": "TextModel"},
    layer={
        **LLAMA.layer,
        **QK_NORM,
        "self_attn.q_proj.weight": ("query-gate", "hidden"),
        "self_attn.q_proj.bias": ("query-gate",),
        "linear_attn.dt_bias": ("fixed",),
        "linear_attn.A_log": ("fixed",),
        "linear_attn.conv1d.weight": ("fixed", "fixed", "fixed"),
        "linear_attn.norm.weight": ("fixed",),
        "linear_attn.out_proj.weight": ("hidden", "fixed"),
        "linear_attn.in_proj_qkv.weight": ("fixed", "hidden"),
        "linear_attn.in_proj_z.weight": ("fixed", "hidden"),
        "linear_attn.in_proj_b.weight": ("fixed", "hidden"),
        "linear_attn.in_proj_a.weight": ("fixed", "hidden"),
    },
)

FAMILIES = (QWEN3_5,)
