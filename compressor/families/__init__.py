"""Model families as small tables: which parameter is what. No modelling code is copied.

A `Family` names the axes of every parameter (`"hidden"`, `"query"`, `"kv"`, `"ffn"`, ...) and the modules of a
decoder layer that form its two half-blocks. From that and the real model on the meta device, `describe` derives the
`Structure` that accounting, ordering, activation and slicing all work from. One file in this folder is one family;
files are found by themselves.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from compressor.architecture import Architecture, Axis, Half, LayerSizes, Structure, Tensor, Unit
from compressor.errors import RequestError


@dataclass(frozen=True, eq=False)
class Family:
    """Names of one family's parts. Module and parameter names are relative to one decoder layer unless said.

    `layer` and `outer` map parameter names to the names of their axes, slowest first as stored; `outer` names are
    absolute. `class_prefix` starts the names of the family's classes (`LlamaForCausalLM`). `attention_norms` and
    `mlp_norms` are the norms that disappear together with their half-block.
    """

    model_type: str
    class_prefix: str
    layer: Mapping[str, tuple[str, ...]]
    outer: Mapping[str, tuple[str, ...]]
    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"

    def half(self, name: str) -> Half | None:
        """The half-block that a parameter of a layer belongs to."""
        for half, parts in (
            ("attention", (self.attention, *self.attention_norms)),
            ("mlp", (self.mlp, *self.mlp_norms)),
        ):
            if any(name.startswith(part + ".") for part in parts):
                return half  # type: ignore[return-value]
        return None

    def inputs(self, half: Half) -> tuple[str, str]:
        """Module (within a layer) whose *input* is the half-block's activation, unit by unit, and that unit.

        For Llama: the attention output projection, fed by query heads, and the MLP's down projection, fed by neurons.
        """
        unit = "query" if half == "attention" else "ffn"
        for name, axes in self.layer.items():
            if name.endswith(".weight") and axes[-1] == unit and self.half(name) == half and len(axes) == 2:
                return name.removesuffix(".weight"), unit
        raise LookupError(f"family {self.model_type} names no projection out of its {half} block")


@cache
def families() -> dict[str, Family]:
    """All known families by Hugging Face `model_type`."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        for family in importlib.import_module(f"{__name__}.{module.name}").FAMILIES:
            found[family.model_type] = family
    return found


def family_of(config: Any) -> Family:
    """The family of a Hugging Face configuration. Raises `RequestError` with the supported ones otherwise."""
    known = families()
    if config.model_type not in known:
        raise RequestError(
            f"the model family '{config.model_type}' is not supported; supported are: {', '.join(sorted(known))}"
        )
    return known[config.model_type]


def base_architecture(config: Any) -> Architecture:
    """The full network's own sizes, read through optimum's normalised configuration where it knows the family."""
    from optimum.utils import NormalizedConfigManager

    read: Any = config
    layers, hidden, heads = "num_hidden_layers", "hidden_size", "num_attention_heads"
    try:
        read = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
        layers = "num_layers"
    except KeyError:
        pass  # a family that optimum does not know: Hugging Face's own names are read instead
    query_heads = getattr(read, heads)
    key_value_heads = getattr(config, "num_key_value_heads", None) or query_heads
    sizes = LayerSizes(query_heads, key_value_heads, config.intermediate_size)
    return Architecture(getattr(read, hidden), (sizes,) * getattr(read, layers))


def head_dim(config: Any) -> int:
    """Channels of one attention head, derived where the configuration does not say."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def describe(config: Any, trust_remote_code: bool = False) -> Structure:
    """The `Structure` of the network that `config` describes, from its parameters on the meta device.

    Raises LookupError where the family's table and the real model disagree: a mistake in the table.
    """
    import torch
    from transformers import AutoModelForCausalLM

    family = family_of(config)
    base = base_architecture(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    width = head_dim(config)
    tensors = tuple(_tensor(family, base, width, name, tuple(p.shape)) for name, p in model.named_parameters())
    tied = not any(tensor.role == "head" for tensor in tensors)
    dtype = getattr(config, "dtype", None) or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return Structure(base, width, config.vocab_size, tied, dtype.itemsize, tensors)


def _tensor(family: Family, base: Architecture, width: int, name: str, shape: tuple[int, ...]) -> Tensor:
    layer, half, rest = None, None, name
    if name.startswith(family.layers + "."):
        number, _, rest = name.removeprefix(family.layers + ".").partition(".")
        layer, half = int(number), family.half(rest)
    table = family.outer if layer is None else family.layer
    if rest not in table:
        raise LookupError(f"family {family.model_type}: its table does not name the parameter {name}")
    axes = tuple(_axis(axis, size, width) for axis, size in zip(table[rest], shape, strict=True))
    role: Any = "other"
    if name == family.embedding:
        role = "embedding"
    elif name == family.head:
        role = "head"
    elif len(shape) == 2 and layer is not None:
        role = "linear"
    return Tensor(name, axes, layer, half, role)


def _axis(name: str, size: int, width: int) -> Axis:
    blocks: dict[str, tuple[tuple[Unit, int], ...]] = {
        "hidden": (("hidden", 1),),
        "ffn": (("ffn", 1),),
        "query": (("query", width),),
        "kv": (("kv", width),),
        "fixed": (("one", size),),
    }
    return Axis(blocks[name])
