"""OPT: learned positions; its MLP is two projections that lie in the decoder layer itself."""

from __future__ import annotations

from supernet.families import Family

OPT = Family(
    model_type="opt",
    class_prefix="OPT",
    layer={
        "self_attn_layer_norm.weight": ("hidden",),
        "self_attn_layer_norm.bias": ("hidden",),
        "self_attn.q_proj.weight": ("query", "hidden"),
        "self_attn.q_proj.bias": ("query",),
        "self_attn.k_proj.weight": ("kv", "hidden"),
        "self_attn.k_proj.bias": ("kv",),
        "self_attn.v_proj.weight": ("kv", "hidden"),
        "self_attn.v_proj.bias": ("kv",),
        "self_attn.out_proj.weight": ("hidden", "query"),
        "self_attn.out_proj.bias": ("hidden",),
        "final_layer_norm.weight": ("hidden",),
        "final_layer_norm.bias": ("hidden",),
        "fc1.weight": ("ffn", "hidden"),
        "fc1.bias": ("ffn",),
        "fc2.weight": ("hidden", "ffn"),
        "fc2.bias": ("hidden",),
    },
    outer={
        "model.decoder.embed_tokens.weight": ("fixed", "embedding"),
        "model.decoder.embed_positions.weight": ("fixed", "hidden"),
        "model.decoder.project_in.weight": ("hidden", "embedding"),
        "model.decoder.project_out.weight": ("embedding", "hidden"),
        "model.decoder.final_layer_norm.weight": ("hidden",),
        "model.decoder.final_layer_norm.bias": ("hidden",),
        "lm_head.weight": ("fixed", "embedding"),
    },
    layers="model.decoder.layers",
    mlp="fc2",
    attention_norms=("self_attn_layer_norm",),
    mlp_norms=("final_layer_norm", "fc1"),
    embedding="model.decoder.embed_tokens.weight",
    settings={"query": "num_attention_heads", "ffn": "ffn_dim"},
    counts={"self_attn.num_heads": "query"},
    head_width_follows=True,
    attention_resized=True,
    fixed_hidden="the width of a head follows from it",
)

FAMILIES = (OPT,)
