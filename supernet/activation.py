"""Activation: any sub-network of a loaded model, as views of its weights, without a change to its modelling code.

A module finds `self.weight` in its instance dictionary before it asks `nn.Module` for the registered parameter. So a
sub-network is a set of *shadows*: `module.__dict__["weight"]` holds a prefix view of the full parameter. The full
parameter stays registered under its name and gets the gradients of its views; optimizers, `state_dict` and `to` see
only that one. The full network has no shadows: it is the original model, bit for bit and at no cost. Where a parameter
is fused (query, key and value in one), its part is a copy, made by every activation.

Prefixes are useful once neurons and heads are ordered by importance (`supernet.ordering`). Where a provider of
variants is used (`SuperNetwork.use`), what it has stands in the place of the prefix.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from supernet.architecture import Architecture, Axis, Half, LayerSizes, Structure, Unit, unit_counts
from supernet.families import Family, describe, family_of
from supernet.variants import RoundingVariants, Variants

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Counts = Mapping[Unit, int]
"""How many of each unit there are, from `unit_counts`."""

ELASTIC: tuple[Unit, ...] = ("query", "kv", "ffn", "experts")
"""The units within a layer that a sub-network has fewer of."""

CACHE_MODES = "kv_sharing_modes"
"""The configuration value that tells transformers (since 5.23) which layers have no place in the key-value cache."""


def mixed_cache(config: PreTrainedConfig) -> bool:
    """Whether layers of different kinds (`layer_types`) keep different things in a key-value cache."""
    return len(set(getattr(config, "layer_types", None) or ())) > 1


def mixes_tokens(sizes: LayerSizes, full: LayerSizes) -> bool:
    """Whether a layer has attention or linear attention left, and so something to keep in a cache."""
    return not sizes.removed and ("attention" not in sizes.skip or "attention" in full.skip)


def slice_parameter(full: Tensor, axes: tuple[Axis, ...], counts: Counts, kept: Counts) -> Tensor:
    """The part of a full parameter that belongs to the first `kept` of its `counts` units; of query heads, the first of
    every kept key-value group.

    A view where the part is contiguous along its axes, else (a fused axis, fewer query heads in a group) a copy.
    """
    for dimension, axis in enumerate(axes):
        if full.shape[dimension] == axis.size(kept):
            continue
        parts, start = [], 0
        for unit, width in axis.blocks:
            if unit == "query" and counts["query"] * kept["kv"] != kept["query"] * counts["kv"]:
                block = full.narrow(dimension, start, width * counts[unit])
                grouped = block.unflatten(dimension, (counts["kv"], -1, width)).narrow(dimension, 0, kept["kv"])
                block = grouped.narrow(dimension + 1, 0, kept["query"] // kept["kv"])
                parts.append(block.flatten(dimension, dimension + 2))
            else:
                parts.append(full.narrow(dimension, start, width * kept[unit]))
            start += width * counts[unit]
        full = parts[0] if len(parts) == 1 else torch.cat(parts, dimension)
    return full


def removed_layer(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
    """A removed layer: its input. The layers behind it keep their positions."""
    return hidden_states


def removed_attention(hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
    """A removed attention block: zero, added to the residual."""
    return hidden_states.new_zeros(()), None


def removed_mlp(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
    """A removed MLP: zero, added to the residual."""
    return hidden_states.new_zeros(())


def identity(hidden_states: Tensor) -> Tensor:
    """The norm of a removed half-block: its input."""
    return hidden_states


@dataclass(frozen=True, slots=True)
class _ElasticParameter:
    """A parameter that a sub-network has less of: its module, its name there, and the axes of the full parameter."""

    module: nn.Module
    attribute: str
    axes: tuple[Axis, ...]

    def show(self, counts: Counts, kept: Counts) -> None:
        """Shadow the parameter by the part that belongs to the first `kept` of its `counts` units."""
        full = self.module._parameters[self.attribute]
        assert full is not None
        if isinstance(full, DTensor):  # sharded: `remake_views` is called once the whole parameter is gathered
            _shadow(self.module, self.attribute, None)
            return
        part = slice_parameter(full, self.axes, counts, kept)
        _shadow(self.module, self.attribute, None if part is full else part)


@dataclass(frozen=True, slots=True)
class _ElasticAttribute:
    """An attribute of a module that is a multiple of a number of units, and its value in the full network."""

    module: nn.Module
    attribute: str
    unit: Unit
    full: int


@dataclass(frozen=True, slots=True)
class _Block:
    """A half-block of one layer: the names of its module and its norms, the function that replaces it where it is
    removed, its units, and the parameters that depend on them."""

    half: Half
    module: str
    norms: tuple[str, ...]
    replacement: Callable[..., object]
    units: tuple[Unit, ...]
    parameters: list[_ElasticParameter] = field(default_factory=list)


class _Layer:
    """A decoder layer and everything in it that depends on sizes, looked up once: a search activates thousands."""

    def __init__(self, module: nn.Module, family: Family, structure: Structure, full: LayerSizes) -> None:
        self.module = module
        self.full = full
        self._counts = unit_counts(structure.base.hidden_size, full)
        halves = (
            _Block("attention", family.attention, family.attention_norms, removed_attention, ("hidden", "query", "kv")),
            _Block("mlp", family.mlp, family.mlp_norms, removed_mlp, ("hidden", "ffn", "experts")),
        )
        self.blocks = {block.half: block for block in halves if block.half not in full.skip}
        self.parameters: list[tuple[str, nn.Module, str, bool]] = []  # name, module, name there, elastic within layers
        self.attention = module._modules.get(family.attention)
        self._has_groups = hasattr(self.attention, "num_key_value_groups")
        # By name; dense layers among experts lack some. The layer itself, named "", is left out.
        parts = {name: part for name, part in module.named_modules() if name}
        attributes = [(*path.rpartition(".")[::2], unit) for path, unit in family.counts.items()]
        self._attributes = [
            _ElasticAttribute(parts[name], attribute, unit, getattr(parts[name], attribute))
            for name, attribute, unit in attributes
            if name in parts
        ]
        self._router = parts.get(family.router)
        self._experts_per_token = structure.experts_per_token
        self._reads_config = parts.get(family.reads_config) if "attention" in self.blocks else None
        self._query_setting = family.settings["query"]

    def show_variants(self, sizes: LayerSizes, variants: Variants) -> None:
        """Shadow by its variant every parameter that has one in a layer of `sizes`. After `activate`, which knows of
        none; a parameter that is elastic in no unit keeps no shadow from there."""
        for name, module, attribute, elastic in self.parameters:
            if name in variants.names:
                variant = variants.tensor(name, sizes)
                if variant is not None or not elastic:
                    _shadow(module, attribute, variant)

    def activate(self, sizes: LayerSizes, hidden_size: int, config: PreTrainedConfig) -> None:
        """Reduce the layer to `sizes` in a residual stream of `hidden_size`; `config` is the full network's."""
        full, counts, kept = self.full, self._counts, unit_counts(hidden_size, sizes)
        # 1. Blocks, norms and parameters.
        for block in self.blocks.values():
            removed = block.half in sizes.skip
            whole = all(counts[unit] == kept[unit] for unit in block.units)
            _shadow(self.module, block.module, block.replacement if removed else None)
            for norm in block.norms:
                _shadow(self.module, norm, identity if removed else None)
            for parameter in block.parameters:
                if removed or whole:
                    _shadow(parameter.module, parameter.attribute, None)
                else:
                    parameter.show(counts, kept)
        # 2. Sizes that the forward pass reads from attributes or from the configuration.
        if sizes.num_key_value_heads and self._has_groups:
            _shadow(self.attention, "num_key_value_groups", sizes.num_attention_heads // sizes.num_key_value_heads)
        for count in self._attributes:
            setattr(count.module, count.attribute, count.full * kept[count.unit] // counts[count.unit])
        if self._router is not None:
            _shadow(self._router, "top_k", min(self._experts_per_token, sizes.num_experts))
        if self._reads_config is not None:
            layer_config = config
            if sizes.num_attention_heads not in (0, full.num_attention_heads):
                layer_config = copy.copy(config)
                setattr(layer_config, self._query_setting, sizes.num_attention_heads)
            _shadow(self._reads_config, "config", layer_config)


class SuperNetwork:
    """A Hugging Face causal language model whose sub-networks are switched on by `Architecture`.

    `model` is used as it is and owns all weights; there is no second copy. Its full network must be active, since
    sizes are read from it. Key-value caches work with every sub-network (`_activate_cache`).
    """

    def __init__(
        self, model: PreTrainedModel, family: Family | None = None, structure: Structure | None = None
    ) -> None:
        self.model = model
        self.family = family or family_of(model.config)
        self.structure = structure or describe(model.config)
        self.base = self.structure.base
        self.current = self.base
        self.variants: Variants | None = None
        self._tables: dict[str, list[nn.Module]] = {"embedding": [], "head": []}  # whose weight each is
        path, _, self._layers_name = self.family.layers.rpartition(".")
        self._decoder = model.get_submodule(path)
        self._layers = [
            _Layer(layer, self.family, self.structure, full)
            for layer, full in zip(getattr(self._decoder, self._layers_name), self.base.layers, strict=True)
        ]
        self._residual: list[_ElasticParameter] = []  # those that depend on the residual width alone
        for tensor in self.structure.tensors:
            units = {unit for axis in tensor.axes for unit, _ in axis.blocks}
            module_name, _, attribute = tensor.name.rpartition(".")
            parameter = _ElasticParameter(model.get_submodule(module_name), attribute, tensor.axes)
            elastic = tensor.half is not None and bool(units & set(ELASTIC))
            if tensor.layer is not None:
                self._layers[tensor.layer].parameters.append((tensor.name, parameter.module, attribute, elastic))
            if tensor.layer is not None and tensor.half is not None and elastic:
                self._layers[tensor.layer].blocks[tensor.half].parameters.append(parameter)
            elif "hidden" in units:
                self._residual.append(parameter)
                if tensor.role == "embedding" and self.structure.tied:
                    head = model.get_output_embeddings()
                    self._residual.append(_ElasticParameter(head, "weight", tensor.axes))
            if tensor.role in self._tables and attribute == "weight":
                self._tables[tensor.role].append(parameter.module)
                if tensor.role == "embedding" and self.structure.tied:
                    self._tables[tensor.role].append(model.get_output_embeddings())

    def activate(self, architecture: Architecture) -> None:
        """Switch `architecture` on, until the next call. Views follow the grad mode of the caller.

        Raises ValueError where a size exceeds the base's, where the family's residual width is fixed and differs, or
        where it has bits, and nothing that rounds is in use, or another residual width.
        """
        if not architecture.fits(self.base):
            raise ValueError("the architecture is larger than the network")
        if self.structure.fixed_hidden and architecture.hidden_size != self.base.hidden_size:
            raise ValueError(f"the residual width cannot change: {self.structure.fixed_hidden}")
        narrow = {architecture.hidden_size, self.current.hidden_size} != {self.base.hidden_size}
        if architecture.has_bits and (narrow or not isinstance(self.variants, RoundingVariants)):
            raise ValueError("bits need a provider of rounded weights, and the base's residual width")
        changed = [
            (layer, sizes)
            for layer, sizes, before in zip(self._layers, architecture.layers, self.current.layers, strict=True)
            if narrow or not sizes == before == layer.full  # a layer that was and stays whole has no shadows
        ]
        for layer, sizes in changed:
            layer.activate(sizes, architecture.hidden_size, self.model.config)
        self._show_tables(architecture, self.current)
        if narrow:
            self._activate_residual(architecture.hidden_size)
        if self.variants is not None and architecture.hidden_size == self.base.hidden_size:
            for layer, sizes in changed:
                layer.show_variants(sizes, self.variants)
        self._activate_cache(architecture)
        shadow = self._decoder.__dict__
        if len(architecture.kept) < len(self._layers):
            shadow[self._layers_name] = [
                removed_layer if sizes.removed else layer.module
                for layer, sizes in zip(self._layers, architecture.layers, strict=True)
            ]
        else:
            shadow.pop(self._layers_name, None)
        self.current = architecture

    @property
    def layers(self) -> list[nn.Module]:
        """The base's decoder layers, also those that are removed in the active sub-network."""
        return [layer.module for layer in self._layers]

    def halves(self, index: int) -> dict[Half, nn.Module]:
        """The modules of a layer's half-blocks, of those that can be removed."""
        layer = self._layers[index]
        return {half: layer.module.get_submodule(block.module) for half, block in layer.blocks.items()}

    def use(self, variants: Variants | None) -> None:
        """From here on, what `variants` has stands in the place of prefixes, in the active sub-network too. None: all
        are prefixes. Outputs of layers that were kept from before must not be used any more. Raises ValueError where
        the active sub-network has bits and these do not round."""
        if self.current.has_bits and not isinstance(variants, RoundingVariants):
            raise ValueError("bits need a provider of rounded weights")
        for layer in self._layers:
            for _, module, attribute, _ in layer.parameters:
                _shadow(module, attribute, None)
        self.variants = variants
        for index in range(len(self._layers)):
            self.remake_views(index)
        self._show_tables(self.current, replace(self.current, embedding_bits=-1, head_bits=-1))
        if self.current.hidden_size != self.base.hidden_size:
            self._activate_residual(self.current.hidden_size)

    def remake_views(self, index: int) -> None:
        """Activate the current sub-network again in layer `index`, whose parameters have become other tensors."""
        layer, sizes = self._layers[index], self.current.layers[index]
        layer.activate(sizes, self.current.hidden_size, self.model.config)
        if self.variants is not None and self.current.hidden_size == self.base.hidden_size:
            layer.show_variants(sizes, self.variants)

    def _show_tables(self, architecture: Architecture, before: Architecture) -> None:
        """Embedding and head in the bits that `architecture` says; `before`: what was shown last."""
        for role, bits, shown in (
            ("embedding", architecture.embedding_bits, before.embedding_bits),
            ("head", architecture.head_bits, before.head_bits),
        ):
            if bits == shown:
                continue
            name = next((tensor.name for tensor in self.structure.tensors if tensor.role == role), "")
            table = self.variants.table(name, bits) if bits and isinstance(self.variants, RoundingVariants) else None
            for module in self._tables[role]:
                _shadow(module, "weight", table)

    def _activate_residual(self, hidden_size: int) -> None:
        counts, kept = unit_counts(self.base.hidden_size), unit_counts(hidden_size)
        for parameter in self._residual:
            parameter.show(counts, kept)
            if isinstance(parameter.module, nn.LayerNorm):
                parameter.module.normalized_shape = (hidden_size,)

    def _activate_cache(self, architecture: Architecture) -> None:
        """Leave out of key-value caches the layers that have nothing to keep there.

        Where all layers are cached alike, those with attention get new indices, which count from 0. Where they are not
        (sliding windows beside full attention, linear attention), a layer's index is bound to its kind; there the
        configuration marks the layers without an entry, as transformers does for layers that share keys and values.
        """
        config = self.model.config
        held = [mixes_tokens(*pair) for pair in zip(architecture.layers, self.base.layers, strict=True)]
        if mixed_cache(config):
            _shadow(config, CACHE_MODES, None if all(held) else [None if holds else "reuse" for holds in held])
            return
        position = 0
        for layer, holds in zip(self._layers, held, strict=True):
            if holds and layer.attention is not None:
                _shadow(layer.attention, "layer_idx", position)
                position += 1

    @contextmanager
    def activated(self, architecture: Architecture) -> Iterator[PreTrainedModel]:
        """The model with `architecture` active; afterwards the previous sub-network is active again."""
        previous = self.current
        self.activate(architecture)
        try:
            yield self.model
        finally:
            self.activate(previous)


def _shadow(holder: object, name: str, value: object) -> None:
    """Set an attribute in the instance's dictionary or, where `value` is None, remove it from there. `setattr` of a
    module takes several times as long."""
    if value is None:
        holder.__dict__.pop(name, None)
    else:
        holder.__dict__[name] = value
