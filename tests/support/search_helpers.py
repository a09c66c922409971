"""Structures and a landscape by formula for the tests of `search`; no network is built."""

from __future__ import annotations

from supernet.architecture import Architecture, Axis, Half, LayerSizes, Structure, TensorSpec


def llama(
    layers: int, hidden: int, ffn: int, heads: int, kv: int, head_dim: int, vocab: int, tied: bool = False
) -> Structure:
    """The structure of a Llama of these sizes, without biases, in 2-byte weights."""
    one = {"hidden": Axis((("hidden", 1),)), "vocab": Axis((("one", vocab),)), "ffn": Axis((("ffn", 1),))}
    one |= {"query": Axis((("query", head_dim),)), "kv": Axis((("kv", head_dim),))}
    parts: list[tuple[str, Half, tuple[str, ...]]] = [
        ("input_layernorm", "attention", ("hidden",)),
        ("self_attn.q_proj", "attention", ("query", "hidden")),
        ("self_attn.k_proj", "attention", ("kv", "hidden")),
        ("self_attn.v_proj", "attention", ("kv", "hidden")),
        ("self_attn.o_proj", "attention", ("hidden", "query")),
        ("post_attention_layernorm", "mlp", ("hidden",)),
        ("mlp.gate_proj", "mlp", ("ffn", "hidden")),
        ("mlp.up_proj", "mlp", ("ffn", "hidden")),
        ("mlp.down_proj", "mlp", ("hidden", "ffn")),
    ]
    tensors = [
        TensorSpec(
            f"model.layers.{i}.{name}.weight",
            tuple(one[axis] for axis in axes),
            i,
            half,
            "linear" if len(axes) == 2 else "other",
        )
        for i in range(layers)
        for name, half, axes in parts
    ]
    tensors.append(TensorSpec("model.embed_tokens.weight", (one["vocab"], one["hidden"]), role="embedding"))
    tensors.append(TensorSpec("model.norm.weight", (one["hidden"],)))
    if not tied:
        tensors.append(TensorSpec("lm_head.weight", (one["vocab"], one["hidden"]), role="head"))
    base = Architecture(hidden, (LayerSizes(heads, kv, ffn),) * layers)
    return Structure(base, head_dim, vocab, tied, 2, tuple(tensors))


PROSE = llama(8, 256, 768, 8, 4, 32, 4096)
LLAMA_2_7B = llama(32, 4096, 11008, 32, 32, 128, 32000)
SMALL = llama(3, 16, 128, 4, 2, 4, 50, tied=True)


def quality(structure: Structure, architecture: Architecture) -> float:
    """A score by formula: 1 for the base, less for every cut, most for cuts of early layers, and more than the sum of
    both where both halves of a layer are thin."""
    degradation = 0.0
    for i, (layer, full) in enumerate(zip(architecture.layers, structure.base.layers, strict=True)):
        attention = 1 - layer.num_attention_heads / full.num_attention_heads
        mlp = 1 - layer.intermediate_size / full.intermediate_size
        degradation += (0.3 * attention + 0.5 * mlp**2 + 0.4 * attention * mlp) / (1 + i)
    degradation += 0.5 * (1 - architecture.hidden_size / structure.base.hidden_size)
    return 1 / (1 + degradation)
