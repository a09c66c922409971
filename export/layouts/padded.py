"""The padded layout: an uneven network made uniform by zeros and repeated key-value heads, its function unchanged.

A padded neuron has zero input and output weights; a padded head reads zeros and its output is multiplied by zeros; a
removed half-block is one whose output projection is all zeros. In layers where fewer query heads share a key-value head
than in others, key-value heads are repeated. The result loads in the family's plain class everywhere, but loses part of
the saving: it is a copy for compatibility.
"""

from __future__ import annotations

import copy
from math import gcd
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoConfig

from supernet.activation import CACHE_MODES
from supernet.architecture import Architecture, Axis, LayerSizes, unit_counts
from supernet.common.errors import NotHeldError
from supernet.families import Family, describe
from supernet.slicing import build_standalone, fill
from supernet.uneven import family_of_standalone

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def padded_sizes(architecture: Architecture, base_heads: int, all_heads: bool = False) -> LayerSizes:
    """The sizes that every layer of the padded network has: the smallest that hold all kept layers.

    Query heads per key-value head is the greatest common divisor over the layers. The number of query heads divides
    the residual width, as plain configurations demand; the base's number always does, and is taken with `all_heads`.
    """
    kept = [architecture.layers[i] for i in architecture.kept]
    attending = [layer for layer in kept if layer.num_key_value_heads]
    share = gcd(base_heads, *(layer.num_attention_heads // layer.num_key_value_heads for layer in attending))
    heads = base_heads if all_heads else max((layer.num_attention_heads for layer in attending), default=share)
    while heads != base_heads and (architecture.hidden_size % heads or heads % share):
        heads += 1
    width = max((layer.intermediate_size for layer in kept), default=0) or 8  # grouped products of experts need 8
    return LayerSizes(heads, heads // share, width, max((layer.num_experts for layer in kept), default=0))


def pad(model: PreTrainedModel, architecture: Architecture) -> PreTrainedModel:
    """A plain-class copy of an uneven model (from `extract`) with identical logits.

    Raises `NotHeldError` where padding would change the function, as `check_network` does.
    """
    config = model.config
    family = family_of_standalone(config)
    check_network(config, architecture)
    # 1. An empty network of the plain class.
    target = padded_sizes(architecture, config.num_attention_heads, family.head_width_follows)
    plain = _plain_config(config, family, architecture, target)
    padded: PreTrainedModel = build_standalone(plain)
    # 2. Its weights: zeros around those of the uneven network.
    source = {name: value.detach() for name, value in model.named_parameters()}
    like = next(iter(source.values()))
    weights = {}
    for tensor in describe(plain).tensors:
        shape = tuple(padded.get_parameter(tensor.name).shape)
        if tensor.name not in source:  # of a removed half-block
            weights[tensor.name] = like.new_ones(shape) if "norm" in tensor.name else like.new_zeros(shape)
        elif tensor.layer is None:
            weights[tensor.name] = source[tensor.name].clone()
        else:
            sizes = architecture.layers[architecture.kept[tensor.layer]]
            weights[tensor.name] = _padded(source[tensor.name], tensor.axes, sizes, target, architecture.hidden_size)
    padded.generation_config = copy.deepcopy(model.generation_config)
    return fill(padded, weights)


def check_family(config: PreTrainedConfig) -> None:
    """Raises `NotHeldError` for a family whose function padding changes at any sizes: norms over all heads."""
    family = family_of_standalone(config)
    for name, axes in family.layer.items():
        if "norm" in name and any(unit in ("query", "kv", "ffn") for unit in axes):
            raise NotHeldError(
                f"--format padded does not hold {family.model_type} networks: {name} averages over all heads, zeros too"
            )


def check_network(config: PreTrainedConfig, architecture: Architecture) -> None:
    """Raises `NotHeldError` where padding would change the function: as `check_family`, and for experts that were
    removed, layers of two kinds, and norms that would stay behind a removed half-block. `config` is the standalone
    network's."""
    check_family(config)
    family = family_of_standalone(config)
    kind = family.model_type
    kept = [architecture.layers[i] for i in architecture.kept]
    if family.dense_ffn and len({bool(layer.num_experts) for layer in kept if layer.intermediate_size}) > 1:
        raise NotHeldError(f"the padded layout cannot hold this {kind} network: some of its layers have experts")
    all_experts = getattr(config, family.settings.get("experts", ""), 0)
    if any(layer.num_experts not in (0, all_experts) for layer in kept):
        raise NotHeldError("the padded layout cannot hold removed experts: a router would choose the zeros")
    if not getattr(config, "do_layer_norm_before", True) and any(layer.skip for layer in kept):
        raise NotHeldError(
            f"the padded layout cannot hold this {kind} network: a removed half-block's norm would remain"
        )


def _plain_config(
    config: PreTrainedConfig, family: Family, architecture: Architecture, target: LayerSizes
) -> PreTrainedConfig:
    """The configuration of the family's plain class with the target's sizes in every layer."""
    dropped = ("model_type", "architectures", "auto_map", "per_layer_config", "transformers_version", CACHE_MODES)
    values = {k: v for k, v in config.to_dict().items() if k not in dropped}
    sizes = {"query": target.num_attention_heads, "kv": target.num_key_value_heads, "ffn": target.intermediate_size}
    values |= {name: sizes[unit] for unit, name in family.settings.items() if unit in sizes}
    values["num_hidden_layers"] = len(architecture.kept)
    return AutoConfig.for_model(family.model_type, **values)


def _padded(source: Tensor, axes: tuple[Axis, ...], sizes: LayerSizes, target: LayerSizes, hidden_size: int) -> Tensor:
    """One parameter of the padded network: the source's entries first in every block of every axis, zeros behind."""
    kept, wanted = unit_counts(hidden_size, sizes), unit_counts(hidden_size, target)
    for dimension, axis in enumerate(axes):
        parts, start = [], 0
        for unit, width in axis.blocks:
            length = width * kept[unit]
            part = source.narrow(dimension, start, length)
            start += length
            if unit == "kv" and length:
                share = target.num_attention_heads // target.num_key_value_heads
                repeats = sizes.num_attention_heads // share // sizes.num_key_value_heads
                part = part.unflatten(dimension, (-1, width)).repeat_interleave(repeats, dimension)
                part = part.flatten(dimension, dimension + 1)
            missing = list(part.shape)
            missing[dimension] = width * wanted[unit] - part.shape[dimension]
            parts += [part, part.new_zeros(missing)]
        source = torch.cat(parts, dimension)
    return source.contiguous()
