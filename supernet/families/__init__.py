"""Model families as small tables: which parameter is what. No modelling code is copied.

A `Family` names the axes of every parameter (`"hidden"`, `"query"`, `"kv"`, `"ffn"`, ...) and the modules of a
decoder layer that form its two half-blocks. From that and the real model on the meta device, `describe` derives the
`Structure` that accounting, ordering, activation and slicing all work from. One file in this folder is one family, or
a few that name their parts alike; files are found by themselves.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from supernet.architecture import Architecture, Axis, Half, LayerSizes, Structure, TensorSpec, Unit, unit_counts
from supernet.common.errors import RequestError

Axes = tuple[str | tuple[str, ...], ...]
"""Names of a parameter's axes, slowest first as stored; a tuple of names is one axis of several blocks (fused).

`hidden`, `ffn` and `experts` have one entry for each unit; `query` and `kv` a head's width; `query-gate` and
`query-key-value` that of two and three heads, interleaved head by head; `embedding` is `hidden` where embeddings are as
wide as the residual, and `fixed` never changes.
"""

Class = Literal["Config", "DecoderLayer", "Model", "ForCausalLM"]


@dataclass(frozen=True, eq=False)
class Family:
    """Names of one family's parts. Module and parameter names are relative to one decoder layer unless said.

    `layer` and `outer` map parameter names to the names of their axes; `outer` names are absolute. `class_prefix`
    starts the names of the family's classes (`LlamaForCausalLM`), `class_suffixes` are those that end otherwise than
    Llama's, and `package` is their folder in transformers where it is not named like the model type.

    `attention` and `mlp` are the modules that give what is added to the residual; `attention_norms` and `mlp_norms`
    disappear together with them: the norms before and behind, and whatever else leads only there.

    `settings` are the names of sizes in the configuration; without `kv` every query head has its own key and value.
    `dense_ffn` is that of the FFN width of layers without experts, in families that mix both. `layer_lists` are
    configuration values with one entry for each layer.

    `counts` are attributes of modules that the forward pass reads and that are multiples of a number of units.
    `reads_config` is a module that reads its number of heads from its configuration as it runs, and `router` one whose
    `top_k` says how many experts a token is sent to.

    `head_width_follows` says that the plain class (or what else loads it) derives a head's width from the number of
    heads, so that it can only hold all of them; `attention_resized` that even the attention module does, so that the
    uneven code cuts it after it was built. `fixed_hidden` is the reason why the residual width is not elastic, where it
    is not. `refused` are settings that are not supported, each with the reason.
    """

    model_type: str
    class_prefix: str
    layer: Mapping[str, Axes]
    outer: Mapping[str, Axes]
    package: str = ""
    class_suffixes: Mapping[Class, str] = field(default_factory=dict)
    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    settings: Mapping[Unit, str] = field(
        default_factory=lambda: {
            "query": "num_attention_heads",
            "kv": "num_key_value_heads",
            "ffn": "intermediate_size",
        }
    )
    dense_ffn: str = ""
    layer_lists: tuple[str, ...] = ("layer_types",)
    counts: Mapping[str, Unit] = field(default_factory=dict)
    reads_config: str = ""
    router: str = ""
    head_width_follows: bool = False
    attention_resized: bool = False
    fixed_hidden: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)

    def half(self, name: str) -> Half | None:
        """The half-block that a parameter of a layer belongs to."""
        for half, parts in (
            ("attention", (self.attention, *self.attention_norms)),
            ("mlp", (self.mlp, *self.mlp_norms)),
        ):
            if any(name.startswith(part + ".") for part in parts):
                return half  # type: ignore[return-value]
        return None

    def class_name(self, part: Class) -> str:
        """The name of one of the family's classes in transformers."""
        return self.class_prefix + self.class_suffixes.get(part, part)

    @property
    def module(self) -> str:
        """The family's folder in `transformers.models`."""
        return self.package or self.model_type


@cache
def families() -> dict[str, Family]:
    """All known families by Hugging Face `model_type`."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        for family in importlib.import_module(f"{__name__}.{module.name}").FAMILIES:
            found[family.model_type] = family
    return found


def family_of(config: Any) -> Family:
    """The family of a Hugging Face configuration.

    Raises `RequestError` with the supported ones where it is none of them, or uses what its table refuses.
    """
    known = families()
    if config.model_type not in known:
        raise RequestError(
            f"the model family '{config.model_type}' is not supported; supported are: {', '.join(sorted(known))}"
        )
    family = known[config.model_type]
    for name, reason in family.refused.items():
        if getattr(config, name, None):
            raise RequestError(f"a {config.model_type} model with {name} is not supported: {reason}")
    return family


def base_architecture(config: Any) -> Architecture:
    """The full network's own sizes, read through optimum's normalised configuration where it knows the family.

    A layer of linear attention has no attention heads in the sense of this project: it is kept or removed whole.
    """
    from optimum.utils import NormalizedConfigManager

    family = family_of(config)
    read: Any = config
    layers = "num_hidden_layers"
    try:
        read = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
        layers = "num_layers"
    except KeyError:
        pass  # a family that optimum does not know: Hugging Face's own names are read instead
    hidden_size, query_heads = read.hidden_size, read.num_attention_heads
    key_value_heads = getattr(config, family.settings.get("kv", ""), None) or query_heads
    width = getattr(config, family.settings["ffn"], None) or 4 * hidden_size  # what GPT-2 takes for None
    kinds = getattr(config, "layer_types", None) or ()
    sizes = []
    for index in range(getattr(read, layers)):
        attends = index >= len(kinds) or kinds[index] != "linear_attention"
        heads, groups = (query_heads, key_value_heads) if attends else (0, 0)
        if _is_dense(config, family, index):
            dense = getattr(config, family.dense_ffn) if family.dense_ffn else width
            sizes.append(LayerSizes(heads, groups, dense))
        else:
            sizes.append(LayerSizes(heads, groups, width, getattr(config, family.settings["experts"])))
    return Architecture(hidden_size, tuple(sizes))


def _is_dense(config: Any, family: Family, layer: int) -> bool:
    """Whether a layer's MLP has no experts."""
    if "experts" not in family.settings:
        return True
    every = getattr(config, "decoder_sparse_step", 1)
    return layer in (getattr(config, "mlp_only_layers", None) or ()) or (layer + 1) % every != 0


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
    tensors = tuple(_tensor(family, base, width, model, name, p.shape) for name, p in model.named_parameters())
    tied = not any(tensor.role == "head" for tensor in tensors)
    dtype = getattr(config, "dtype", None) or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    per_token = getattr(config, "num_experts_per_tok", 0) if "experts" in family.settings else 0
    windows = _windows(config, len(base.layers))
    return Structure(
        base, width, config.vocab_size, tied, dtype.itemsize, tensors, per_token, windows, family.fixed_hidden
    )


def _windows(config: Any, layers: int) -> tuple[int, ...]:
    """How many tokens each layer's attention reaches, 0 for all of them."""
    window = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _tensor(
    family: Family, base: Architecture, width: int, model: Any, name: str, shape: tuple[int, ...]
) -> TensorSpec:
    """One parameter's entry. Raises LookupError where the table does not name it, or its shape does not follow."""
    layer, half, rest = None, None, name
    if name.startswith(family.layers + "."):
        number, _, rest = name.removeprefix(family.layers + ".").partition(".")
        layer, half = int(number), family.half(rest)
        if half in base.layers[layer].skip:
            half = None  # in a layer of another kind (linear attention), whose parts stay together
    table = family.outer if layer is None else family.layer
    if rest not in table:
        raise LookupError(f"family {family.model_type}: its table does not name the parameter {name}")
    axes = tuple(_axis(axis, size, width, base) for axis, size in zip(table[rest], shape, strict=True))
    counts = unit_counts(base.hidden_size, None if layer is None else base.layers[layer])
    expected = tuple(axis.size(counts) for axis in axes)
    if expected != tuple(shape):
        raise LookupError(f"family {family.model_type}: its table makes {name} {expected}, the model {tuple(shape)}")
    return TensorSpec(name, axes, layer, half, _role(family, name, axes, layer, model))


def _role(family: Family, name: str, axes: tuple[Axis, ...], layer: int | None, model: Any) -> Any:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if name in (family.embedding, family.head):
        return "embedding" if name == family.embedding else "head"
    if len(axes) > 1 and axes[0].blocks[0][0] == "experts":
        return "experts" if len(axes) == 3 else "matrix"  # stacked weights of all experts, and their router's
    module = model.get_submodule(name.rpartition(".")[0])
    if len(axes) == 2 and isinstance(module, nn.Linear | Conv1D):
        return "matrix" if layer is None else "linear"
    return "other"


def _axis(names: str | tuple[str, ...], size: int, width: int, base: Architecture) -> Axis:
    blocks: dict[str, tuple[Unit, int]] = {
        "hidden": ("hidden", 1),
        # Embeddings have a width of their own where the network projects them to the residual's.
        "embedding": ("hidden", 1) if size == base.hidden_size else ("one", size),
        "ffn": ("ffn", 1),
        "experts": ("experts", 1),
        "query": ("query", width),
        "query-gate": ("query", 2 * width),
        "query-key-value": ("query", 3 * width),
        "kv": ("kv", width),
        "fixed": ("one", size),
    }
    return Axis(tuple(blocks[name] for name in ((names,) if isinstance(names, str) else names)))
