"""Activation: any sub-network of a loaded model, as views of its weights, without touching its modelling code.

A module finds `self.weight` in its instance dictionary before it asks `nn.Module` for the registered parameter. So a
sub-network is a set of *shadows*: `module.__dict__["weight"]` holds a prefix view of the full parameter, which stays
registered under its own name, sees the gradients of its views, and is what optimizers, `state_dict` and `to` know.
The full network has no shadows at all: it is the original model, bit for bit and at no cost. Where a parameter holds
several things in one (query, key and value), its part is a copy, taken anew by every activation.

Prefixes are meaningful once neurons and heads are ordered by importance (`supernet.ordering`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from supernet.architecture import Architecture, Axis, Half, LayerSizes, Structure, Unit, unit_counts
from supernet.families import Family, describe, family_of

Counts = Mapping[Unit, int]
"""How many of each unit there are, from `unit_counts`."""

ELASTIC: tuple[Unit, ...] = ("query", "kv", "ffn", "experts")
"""The units within a layer that a sub-network has fewer of."""

CACHE_MODES = "kv_sharing_modes"
"""The configuration value by which transformers (5.23) knows layers without a place of their own in the cache."""


def mixed_cache(config: Any) -> bool:
    """Whether layers of different kinds (`layer_types`) keep different things in a key-value cache."""
    return len(set(getattr(config, "layer_types", None) or ())) > 1


def mixes_tokens(sizes: LayerSizes, full: LayerSizes) -> bool:
    """Whether a layer still attends, or has linear attention, and so has something to keep in a cache."""
    return not sizes.removed and ("attention" not in sizes.skip or "attention" in full.skip)


def slice_parameter(full: Tensor, axes: tuple[Axis, ...], counts: Counts, kept: Counts) -> Tensor:
    """The part of a full parameter that the first `kept` of its `counts` units have; of query heads, the first of
    every key-value group that is kept.

    A view, except where what is kept does not lie together (a fused axis, fewer query heads in a group): a copy then.
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


def removed_layer(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Stands where a removed layer stood, so that the layers behind it keep their positions."""
    return hidden_states


def removed_attention(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Adds exactly zero to the residual, like an attention block that is not there."""
    return hidden_states.new_zeros(()), None


def removed_mlp(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Adds exactly zero to the residual, like an MLP that is not there."""
    return hidden_states.new_zeros(())


def identity(hidden_states: Tensor) -> Tensor:
    """Stands where the norm of a removed half-block stood."""
    return hidden_states


@dataclass(frozen=True, slots=True)
class _Slot:
    """A parameter that shrinks: where it sits, and the axes of its full form."""

    module: nn.Module
    attribute: str
    axes: tuple[Axis, ...]

    def show(self, counts: Counts, kept: Counts) -> None:
        """Shadow the parameter by the part that the first `kept` of its `counts` units have."""
        full = self.module._parameters[self.attribute]
        assert full is not None
        if isinstance(full, DTensor):  # this process's part of a sharded one: `remake_views` comes when it is gathered
            _shadow(self.module, self.attribute, None)
            return
        part = slice_parameter(full, self.axes, counts, kept)
        _shadow(self.module, self.attribute, None if part is full else part)


@dataclass(frozen=True, slots=True)
class _Count:
    """An attribute of a module of one layer that is a multiple of a number of units, and its full value."""

    module: nn.Module
    attribute: str
    unit: Unit
    value: int


@dataclass(frozen=True, slots=True)
class _Block:
    """A half-block of one layer, by name: its module, the norms that go with it, what stands where it was removed, the
    units that it has, and its parameters that shrink with them."""

    half: Half
    module: str
    norms: tuple[str, ...]
    stand_in: Callable[..., Any]
    units: tuple[Unit, ...]
    slots: list[_Slot] = field(default_factory=list)


class _Layer:
    """A decoder layer, and all of it that sizes change; looked up once, since a search activates thousands of times."""

    def __init__(self, module: nn.Module, family: Family, structure: Structure, full: LayerSizes) -> None:
        self.module = module
        self.full = full
        self._counts = unit_counts(structure.base.hidden_size, full)
        halves = (
            _Block("attention", family.attention, family.attention_norms, removed_attention, ("hidden", "query", "kv")),
            _Block("mlp", family.mlp, family.mlp_norms, removed_mlp, ("hidden", "ffn", "experts")),
        )
        self.blocks = {block.half: block for block in halves if block.half not in full.skip}
        self.attention: Any = module._modules.get(family.attention)
        self._has_groups = hasattr(self.attention, "num_key_value_groups")
        # By name; dense layers among experts lack some. The layer itself, named "", is none of its parts.
        present: dict[str, Any] = {name: part for name, part in module.named_modules() if name}
        counts = [(*path.rpartition(".")[::2], unit) for path, unit in family.counts.items()]
        self._multiples = [
            _Count(present[name], attribute, unit, getattr(present[name], attribute))
            for name, attribute, unit in counts
            if name in present
        ]
        self._router = present.get(family.router)
        self._experts_per_token = structure.experts_per_token
        self._reads_config = present.get(family.reads_config) if "attention" in self.blocks else None
        self._query_setting = family.settings["query"]

    def activate(self, sizes: LayerSizes, hidden_size: int, config: Any) -> None:
        """Leave the layer `sizes` in a residual stream of `hidden_size`; `config` is the full network's."""
        full, counts, kept = self.full, self._counts, unit_counts(hidden_size, sizes)
        for block in self.blocks.values():
            gone = block.half in sizes.skip
            whole = all(counts[unit] == kept[unit] for unit in block.units)
            _shadow(self.module, block.module, block.stand_in if gone else None)
            for norm in block.norms:
                _shadow(self.module, norm, identity if gone else None)
            for slot in block.slots:
                if gone or whole:
                    _shadow(slot.module, slot.attribute, None)
                else:
                    slot.show(counts, kept)
        if sizes.num_key_value_heads and self._has_groups:
            _shadow(self.attention, "num_key_value_groups", sizes.num_attention_heads // sizes.num_key_value_heads)
        for count in self._multiples:
            setattr(count.module, count.attribute, count.value * kept[count.unit] // counts[count.unit])
        if self._router is not None:
            self._router.top_k = min(self._experts_per_token, sizes.num_experts)
        if self._reads_config is not None:
            own = config
            if sizes.num_attention_heads not in (0, full.num_attention_heads):
                own = copy.copy(config)
                setattr(own, self._query_setting, sizes.num_attention_heads)
            self._reads_config.config = own


class SuperNetwork:
    """A Hugging Face causal language model whose sub-networks can be switched on by `Architecture`.

    `model` is used as it is and stays the owner of all weights; there is no second copy. It must be whole: what another
    super-network left active in it would be taken for the base. A key-value cache is told which layers have no
    attention left, or it would not work (`_activate_cache`).
    """

    def __init__(self, model: nn.Module, family: Family | None = None, structure: Structure | None = None) -> None:
        self.model = model
        self.family = family or family_of(model.config)
        self.structure = structure or describe(model.config)
        self.base = self.structure.base
        self.current = self.base
        path, _, self._layers_name = self.family.layers.rpartition(".")
        self._decoder = model.get_submodule(path)
        self._layers = [
            _Layer(layer, self.family, self.structure, full)
            for layer, full in zip(getattr(self._decoder, self._layers_name), self.base.layers, strict=True)
        ]
        self._residual: list[_Slot] = []  # those that only the residual width changes
        for tensor in self.structure.tensors:
            units = {unit for axis in tensor.axes for unit, _ in axis.blocks}
            module_name, _, attribute = tensor.name.rpartition(".")
            slot = _Slot(model.get_submodule(module_name), attribute, tensor.axes)
            if tensor.layer is not None and tensor.half is not None and units & set(ELASTIC):
                self._layers[tensor.layer].blocks[tensor.half].slots.append(slot)
            elif "hidden" in units:
                self._residual.append(slot)
                if tensor.role == "embedding" and self.structure.tied:
                    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
                    self._residual.append(_Slot(head, "weight", tensor.axes))

    def activate(self, architecture: Architecture) -> None:
        """Switch `architecture` on; it stays on until the next call. Views follow the grad mode of the caller.

        Raises ValueError where a size exceeds the base's, or the residual width is not the family's to change.
        """
        if not architecture.fits(self.base):
            raise ValueError("the architecture is larger than the network")
        if self.structure.fixed_hidden and architecture.hidden_size != self.base.hidden_size:
            raise ValueError(f"the residual width cannot change: {self.structure.fixed_hidden}")
        narrow = {architecture.hidden_size, self.current.hidden_size} != {self.base.hidden_size}
        for layer, sizes, before in zip(self._layers, architecture.layers, self.current.layers, strict=True):
            if narrow or not sizes == before == layer.full:  # what was whole and stays whole has no shadows
                layer.activate(sizes, architecture.hidden_size, self.model.config)
        if narrow:
            self._activate_residual(architecture.hidden_size)
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
        """The base's decoder layers, whatever is active."""
        return [layer.module for layer in self._layers]

    def remake_views(self, index: int) -> None:
        """Show the active sub-network in a layer whose parameters are other tensors than when it was activated."""
        self._layers[index].activate(self.current.layers[index], self.current.hidden_size, self.model.config)

    def _activate_residual(self, hidden_size: int) -> None:
        counts, kept = unit_counts(self.base.hidden_size), unit_counts(hidden_size)
        for slot in self._residual:
            slot.show(counts, kept)
            if isinstance(slot.module, nn.LayerNorm):
                slot.module.normalized_shape = (hidden_size,)

    def _activate_cache(self, architecture: Architecture) -> None:
        """Leave no place in key-value caches for layers that have nothing to keep there.

        Where all layers are cached alike, those with attention are counted anew. Where they are not (sliding windows
        beside full attention, linear attention), a layer's place is bound to its kind: there the configuration marks
        those without, as transformers' own do whose layers share keys and values.
        """
        config: Any = self.model.config
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
    def activated(self, architecture: Architecture) -> Iterator[nn.Module]:
        """`with supernet.activated(a) as model:` and the previous sub-network is back afterwards."""
        previous = self.current
        self.activate(architecture)
        try:
            yield self.model
        finally:
            self.activate(previous)


def _shadow(holder: Any, name: str, value: Any) -> None:
    """Set or (None) take away an attribute of the instance's own. Where there is one, `setattr` of a module does the
    same at several times the cost."""
    if value is None:
        holder.__dict__.pop(name, None)
    else:
        holder.__dict__[name] = value
