"""The padded layout: an uneven network made uniform by zeros and repeated key-value heads, its function unchanged.

A padded neuron has zero input and output weights; a padded head reads zeros and its output is multiplied by zeros; a
removed half-block is one whose output projection is all zeros. Layers whose query heads share key-value heads less
widely than others' get their key-value heads repeated. The result loads in the family's plain class everywhere, and
gives back part of the saving: it is a compatibility copy.
"""

from __future__ import annotations

import copy
from math import gcd
from typing import Any

from torch import Tensor, nn

from compressor.architecture import Architecture, LayerSizes
from compressor.elastic.slicing import build_standalone, materialise_buffers
from compressor.errors import RequestError
from compressor.families import Family, families
from export.package import UNEVEN_PREFIX


def padded_sizes(architecture: Architecture, base_heads: int) -> LayerSizes:
    """The sizes that every layer of the padded network has: the smallest that hold all kept layers.

    Query heads per key-value head is the greatest common divisor over the layers. The number of query heads divides
    the residual width, as plain configurations demand; the base's number always does.
    """
    kept = [architecture.layers[i] for i in architecture.kept]
    attending = [layer for layer in kept if layer.num_key_value_heads]
    share = gcd(base_heads, *(layer.num_attention_heads // layer.num_key_value_heads for layer in attending))
    heads = max((layer.num_attention_heads for layer in attending), default=share)
    while heads != base_heads and (architecture.hidden_size % heads or heads % share):
        heads += 1
    width = max((layer.intermediate_size for layer in kept), default=0) or 1
    return LayerSizes(heads, heads // share, width)


def pad(model: nn.Module, architecture: Architecture) -> nn.Module:
    """A plain-class copy of an uneven model (from `extract`) with identical logits.

    Raises `RequestError` where padding would change the function: experts that were removed, and norms over all heads
    together.
    """
    config: Any = model.config
    family = families()[config.model_type.removeprefix(UNEVEN_PREFIX)]
    if any(layer.num_experts for layer in architecture.layers):
        raise RequestError("the padded layout cannot hold removed experts: a router would choose the zeros")
    for name, axes in family.layer.items():
        if "norm" in name and any(unit in ("query", "kv", "ffn") for unit in axes):
            raise RequestError(
                f"the padded layout cannot hold {family.model_type} networks: {name} averages over all heads, zeros too"
            )
    target = padded_sizes(architecture, config.num_attention_heads)
    plain = _plain_config(config, architecture, target)
    padded: Any = build_standalone(plain)
    source = dict(model.named_parameters())
    weights = {name: value.detach().clone() for name, value in source.items() if not name.startswith(family.layers)}
    for index, kept in enumerate(architecture.kept):
        sizes = architecture.layers[kept]
        for name, parameter in padded.get_submodule(f"{family.layers}.{index}").named_parameters():
            full = f"{family.layers}.{index}.{name}"
            shape = tuple(parameter.shape)
            weights[full] = _padded(family, name, source.get(full), shape, sizes, target, plain.head_dim, model)
    missing, unexpected = padded.load_state_dict(weights, strict=False, assign=True)
    tied = {family.head} if family.head not in source else set()
    if unexpected or set(missing) - tied:
        raise RuntimeError(f"the padded network misses {missing} and does not know {unexpected}")
    padded.tie_weights()
    first = next(iter(weights.values()))
    materialise_buffers(padded, first.device)
    padded.config.dtype = first.dtype
    padded.generation_config = copy.deepcopy(model.generation_config)
    return padded.eval()


def _plain_config(config: Any, architecture: Architecture, target: LayerSizes) -> Any:
    from transformers import AutoConfig

    dropped = ("model_type", "architectures", "auto_map", "per_layer_config", "transformers_version")
    values = {k: v for k, v in config.to_dict().items() if k not in dropped}
    values |= {
        "num_attention_heads": target.num_attention_heads,
        "num_key_value_heads": target.num_key_value_heads,
        "intermediate_size": target.intermediate_size,
        "num_hidden_layers": len(architecture.kept),
    }
    return AutoConfig.for_model(config.model_type.removeprefix(UNEVEN_PREFIX), **values)


def _padded(
    family: Family,
    name: str,
    source: Tensor | None,
    shape: tuple[int, ...],
    sizes: LayerSizes,
    target: LayerSizes,
    head_dim: int,
    model: nn.Module,
) -> Tensor:
    """One parameter of the padded network: the source's in the leading corner, zeros (norms: ones) elsewhere."""
    like = next(model.parameters())
    if source is None:  # of a removed half-block
        return like.new_ones(shape) if "norm" in name else like.new_zeros(shape)
    part = source.detach()
    share = target.num_attention_heads // target.num_key_value_heads
    for dimension, axis in enumerate(family.layer[name]):
        if axis == "kv":
            repeats = sizes.num_attention_heads // share // sizes.num_key_value_heads
            part = part.unflatten(dimension, (-1, head_dim)).repeat_interleave(repeats, dimension)
            part = part.flatten(dimension, dimension + 1)
    result = like.new_zeros(shape)
    result[tuple(slice(size) for size in part.shape)] = part
    return result
