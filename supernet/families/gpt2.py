"""GPT-2: learned positions, fused query-key-value, weights stored [inputs, outputs]."""

from __future__ import annotations

from supernet.families import Family

GPT2 = Family(
    model_type="gpt2",
    class_prefix="GPT2",
    class_suffixes={"DecoderLayer": "Block", "ForCausalLM": "LMHeadModel"},
    layer={
        "ln_1.weight": ("hidden",),
        "ln_1.bias": ("hidden",),
        "attn.c_attn.weight": ("hidden", ("query", "kv", "kv")),
        "attn.c_attn.bias": (("query", "kv", "kv"),),
        "attn.c_proj.weight": ("query", "hidden"),
        "attn.c_proj.bias": ("hidden",),
        "ln_2.weight": ("hidden",),
        "ln_2.bias": ("hidden",),
        "mlp.c_fc.weight": ("hidden", "ffn"),
        "mlp.c_fc.bias": ("ffn",),
        "mlp.c_proj.weight": ("ffn", "hidden"),
        "mlp.c_proj.bias": ("hidden",),
    },
    outer={
        "transformer.wte.weight": ("fixed", "hidden"),
        "transformer.wpe.weight": ("fixed", "hidden"),
        "transformer.ln_f.weight": ("hidden",),
        "transformer.ln_f.bias": ("hidden",),
        "lm_head.weight": ("fixed", "hidden"),
    },
    layers="transformer.h",
    attention="attn",
    attention_norms=("ln_1",),
    mlp_norms=("ln_2",),
    embedding="transformer.wte.weight",
    settings={"query": "num_attention_heads", "ffn": "n_inner"},
    counts={"attn.split_size": "query", "attn.c_attn.nf": "query", "mlp.c_fc.nf": "ffn"},
    head_width_follows=True,
    attention_resized=True,
    fixed_hidden="the width of a head follows from it",
    refused={
        "scale_attn_by_inverse_layer_idx": "a layer's function would change with the layers that are removed below it",
        "add_cross_attention": "it is the decoder of an encoder",
    },
)

FAMILIES = (GPT2,)
