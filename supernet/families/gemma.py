"""Gemma 2 and the text network of Gemma 3: a norm in front of and behind each half-block."""

from __future__ import annotations

from dataclasses import replace

from supernet.families.llama import LLAMA, QK_NORM

GEMMA2 = replace(
    LLAMA,
    model_type="gemma2",
    class_prefix="Gemma2",
    layer={
        **LLAMA.layer,
        "pre_feedforward_layernorm.weight": ("hidden",),
        "post_feedforward_layernorm.weight": ("hidden",),
    },
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    scaled_embedding=True,
    fixed_hidden="embeddings are scaled by its root",
    refused={"use_bidirectional_attention": "it is no causal language model"},
)
GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    package="gemma3",
    class_prefix="Gemma3",
    class_suffixes={"Config": "TextConfig", "Model": "TextModel"},
    layer={**GEMMA2.layer, **QK_NORM},
)

FAMILIES = (GEMMA2, GEMMA3)
