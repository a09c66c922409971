"""Model families as small tables: the axes of every parameter. No modelling code is copied.

A `Family` names the axes of every parameter (`"hidden"`, `"query"`, `"kv"`, `"ffn"`, ...) and the modules of a
decoder layer that form its two half-blocks. From that and the real model on the meta device, `describe` derives the
`Structure` that accounting, ordering, activation and slicing work from. One file in this folder is one family, or
several that name their parts alike; `families` finds the files.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Literal

from supernet.architecture import (
    HALVES,
    Architecture,
    Axis,
    Half,
    LayerSizes,
    Role,
    Structure,
    TensorSpec,
    Unit,
    unit_counts,
)
from supernet.common.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Axes = tuple[str | tuple[str, ...], ...]
"""Names of a parameter's axes, slowest first as stored; a tuple of names is one axis of several blocks (fused).

`hidden`, `ffn` and `experts` have one entry for each unit; `query` and `kv` a head's width; `query-gate` and
`query-key-value` that of two and three heads, interleaved head by head; `embedding` is `hidden` where embeddings are as
wide as the residual, and `fixed` never changes.
"""

Class = Literal["Config", "DecoderLayer", "Model", "ForCausalLM"]


@dataclass(frozen=True, eq=False)
class Family:
    """Names of one family's parts. Names of modules and parameters are relative to one decoder layer, but for those in
    `outer`, `layers`, `embedding` and `head`.

    `layer` and `outer` map parameter names to the names of their axes. `class_prefix` starts the names of the family's
    classes (`LlamaForCausalLM`), `class_suffixes` are the endings that differ from Llama's, and `package` is their
    folder in transformers where it differs from the model type.

    `attention` and `mlp` are the modules whose outputs are added to the residual. `attention_norms` and `mlp_norms` are
    removed together with them: the norms before and behind, and other modules that serve the half-block alone.

    `settings` are the names of sizes in the configuration; without `kv` every query head has its own key and value.
    `dense_ffn` is the name of the FFN width of layers without experts, in families that have both kinds. `layer_lists`
    are configuration values with one entry for each layer.

    `counts` are attributes of modules that the forward pass reads and that are multiples of a number of units.
    `reads_config` is a module that reads its number of heads from its configuration in the forward pass. `router` is
    one whose `top_k` says how many experts a token is sent to.

    With `head_width_follows`, the plain class (or another loader of it) derives a head's width from the number of
    heads, so it can hold only the full number. With `attention_resized`, the attention module does so too, and the
    uneven code cuts it after it was built. With `scaled_embedding`, the embedding module multiplies by a buffer of its
    own. `fixed_hidden` is the reason why the residual width is not elastic, or
    empty. `refused` are settings that are not supported, each with the reason.
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
    scaled_embedding: bool = False
    fixed_hidden: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)

    def half(self, name: str) -> Half | None:
        """The half-block that a parameter of a layer belongs to, if any."""
        parts: dict[Half, tuple[str, ...]] = {
            "attention": (self.attention, *self.attention_norms),
            "mlp": (self.mlp, *self.mlp_norms),
        }
        return next((half for half in HALVES if any(name.startswith(f"{part}.") for part in parts[half])), None)

    def class_name(self, part: Class) -> str:
        """The name of one of the family's classes in transformers."""
        return self.class_prefix + self.class_suffixes.get(part, part)

    @property
    def module(self) -> str:
        """The family's folder in `transformers.models`."""
        return self.package or self.model_type


@cache
def families() -> dict[str, Family]:
    """All supported families by Hugging Face `model_type`."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return {family.model_type: family for module in modules for family in module.FAMILIES}


def family_named(model_type: str) -> Family:
    """The family of a `model_type`. Raises `RequestError` with the supported ones where it is none of them."""
    if model_type not in families():
        supported = ", ".join(sorted(families()))
        raise RequestError(f"the model family '{model_type}' is not supported; supported are: {supported}")
    return families()[model_type]


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a configuration. Raises `RequestError` where there is none, or for a setting that it refuses."""
    family = family_named(config.model_type)
    for name, reason in family.refused.items():
        if getattr(config, name, None):
            raise RequestError(f"a {config.model_type} model with {name} is not supported: {reason}")
    return family


def base_architecture(config: PreTrainedConfig) -> Architecture:
    """The full network's sizes, read through optimum's normalised configuration where optimum knows the family.

    A layer of linear attention has 0 attention heads here: it is kept or removed whole.
    """
    from optimum.utils import NormalizedConfigManager

    family = family_of(config)
    try:
        normalized = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    except KeyError:  # a family that optimum does not know: Hugging Face's names are read instead
        normalized, depth = config, config.num_hidden_layers
    else:
        depth = normalized.num_layers
    hidden_size, query_heads = normalized.hidden_size, normalized.num_attention_heads
    key_value_heads = getattr(config, family.settings.get("kv", ""), None) or query_heads
    width = getattr(config, family.settings["ffn"], None) or 4 * hidden_size  # what GPT-2 takes for None
    kinds = getattr(config, "layer_types", None) or ()
    sizes = []
    for index in range(depth):
        attends = index >= len(kinds) or kinds[index] != "linear_attention"
        heads, groups = (query_heads, key_value_heads) if attends else (0, 0)
        if _is_dense(config, family, index):
            dense = getattr(config, family.dense_ffn) if family.dense_ffn else width
            sizes.append(LayerSizes(heads, groups, dense))
        else:
            sizes.append(LayerSizes(heads, groups, width, getattr(config, family.settings["experts"])))
    return Architecture(hidden_size, tuple(sizes))


def _is_dense(config: PreTrainedConfig, family: Family, layer: int) -> bool:
    """Whether a layer's MLP has no experts."""
    if "experts" not in family.settings:
        return True
    step = getattr(config, "decoder_sparse_step", 1)
    return layer in (getattr(config, "mlp_only_layers", None) or ()) or (layer + 1) % step != 0


def head_dim(config: PreTrainedConfig) -> int:
    """Channels of one attention head, derived where the configuration does not say."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def describe(config: PreTrainedConfig, trust_remote_code: bool = False) -> Structure:
    """The `Structure` of the network of a configuration, from its parameters on the meta device.

    Raises LookupError where the family's table and the real model disagree, which is a mistake in the table.
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


def _windows(config: PreTrainedConfig, layers: int) -> tuple[int, ...]:
    """How many tokens each layer's attention reaches, 0 for all of them."""
    window = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _tensor(
    family: Family, base: Architecture, width: int, model: PreTrainedModel, name: str, shape: tuple[int, ...]
) -> TensorSpec:
    """One parameter's entry. Raises LookupError where the table does not name it or gives it another shape."""
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


def _role(family: Family, name: str, axes: tuple[Axis, ...], layer: int | None, model: PreTrainedModel) -> Role:
    """What a parameter is used for."""
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
    """The axis that a table names, of a dimension of `size` entries and heads of `width` channels."""
    blocks: dict[str, tuple[Unit, int]] = {
        "hidden": ("hidden", 1),
        # Where embeddings have another width than the residual, the network projects them.
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
