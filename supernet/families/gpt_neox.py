"""GPT-NeoX (Pythia): both half-blocks read the same residual; query, key and value are fused head by head."""

from __future__ import annotations

from supernet.families import Family

GPT_NEOX = Family(
    model_type="gpt_neox",
    class_prefix="GPTNeoX",
    class_suffixes={"DecoderLayer": "Layer"},
    layer={
        "input_layernorm.weight": ("hidden",),
        "input_layernorm.bias": ("hidden",),
        "attention.query_key_value.weight": ("query-key-value", "hidden"),
        "attention.query_key_value.bias": ("query-key-value",),
        "attention.dense.weight": ("hidden", "query"),
        "attention.dense.bias": ("hidden",),
        "post_attention_layernorm.weight": ("hidden",),
        "post_attention_layernorm.bias": ("hidden",),
        "mlp.dense_h_to_4h.weight": ("ffn", "hidden"),
        "mlp.dense_h_to_4h.bias": ("ffn",),
        "mlp.dense_4h_to_h.weight": ("hidden", "ffn"),
        "mlp.dense_4h_to_h.bias": ("hidden",),
    },
    outer={
        "gpt_neox.embed_in.weight": ("fixed", "hidden"),
        "gpt_neox.final_layer_norm.weight": ("hidden",),
        "gpt_neox.final_layer_norm.bias": ("hidden",),
        "lm_head.weight": ("fixed", "hidden"),
    },
    layers="gpt_neox.layers",
    attention="attention",
    embedding="gpt_neox.embed_in.weight",
    settings={"query": "num_attention_heads", "ffn": "intermediate_size"},
    head_width_follows=True,
    attention_resized=True,
    fixed_hidden="the width of a head follows from it",
)

FAMILIES = (GPT_NEOX,)
