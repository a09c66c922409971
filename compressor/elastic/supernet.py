"""Activation: any sub-network of a loaded model, as views of its weights, without touching its modelling code.

A module finds `self.weight` in its instance dictionary before it asks `nn.Module` for the registered parameter. So a
sub-network is a set of *shadows*: `module.__dict__["weight"]` holds a prefix view of the full parameter, which stays
registered under its own name, sees the gradients of its views, and is what optimizers, `state_dict` and `to` know.
The full network has no shadows at all: it is the original model, bit for bit and at no cost. Where a parameter holds
several things in one (query, key and value), its part is a copy, taken anew by every activation.

Prefixes are meaningful once neurons and heads are ordered by importance (`compressor.elastic.ordering`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.architecture import Architecture, Axis, Half, LayerSizes, Structure, Unit, unit_counts
from compressor.families import Family, describe, family_of

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


def leading(full: Tensor, axes: tuple[Axis, ...], counts: Counts, kept: Counts) -> Tensor:
    """The part of a full parameter that the first `kept` of its `counts` units have; of query heads, the first of
    every key-value group that is kept.

    A view, except where what is kept does not lie together (a fused axis, fewer query heads in a group): a copy then.
    """
    for dimension, axis in enumerate(axes):
        if axis.size(counts) == axis.size(kept):
            continue
        parts, start = [], 0
        for unit, width in axis.blocks:
            block = full.narrow(dimension, start, width * counts[unit])
            if unit == "query" and counts["query"] * kept["kv"] != kept["query"] * counts["kv"]:
                grouped = block.unflatten(dimension, (counts["kv"], -1, width)).narrow(dimension, 0, kept["kv"])
                block = grouped.narrow(dimension + 1, 0, kept["query"] // kept["kv"])
                parts.append(block.flatten(dimension, dimension + 2))
            else:
                parts.append(block.narrow(dimension, 0, width * kept[unit]))
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
        part = leading(full if torch.is_grad_enabled() else full.detach(), self.axes, counts, kept)
        _shadow(self.module, self.attribute, None if part is full else part)


@dataclass(frozen=True, slots=True)
class _Count:
    """An attribute of a module of one layer that is a multiple of a number of units, and its full value."""

    module: nn.Module
    attribute: str
    unit: Unit
    value: int


class SuperNetwork:
    """A Hugging Face causal language model whose sub-networks can be switched on by `Architecture`.

    `model` is used as it is and stays the owner of all weights; there is no second copy. A key-value cache is told
    which layers have no attention left, or it would not work (`_activate_cache`).
    """

    def __init__(self, model: nn.Module, family: Family | None = None, structure: Structure | None = None) -> None:
        self.model = model
        self.family = family or family_of(model.config)
        self.structure = structure or describe(model.config)
        self.base = self.structure.base
        self.current = self.base
        path, _, self._layers_name = self.family.layers.rpartition(".")
        self._decoder = model.get_submodule(path)
        self._layers = list(getattr(self._decoder, self._layers_name))
        self._slots: list[dict[Half, list[_Slot]]] = [{"attention": [], "mlp": []} for _ in self._layers]
        self._residual: list[_Slot] = []  # those that only the residual width changes
        for tensor in self.structure.tensors:
            units = {unit for axis in tensor.axes for unit, _ in axis.blocks}
            module_name, _, attribute = tensor.name.rpartition(".")
            slot = _Slot(model.get_submodule(module_name), attribute, tensor.axes)
            if tensor.layer is not None and tensor.half is not None and units & set(ELASTIC):
                self._slots[tensor.layer][tensor.half].append(slot)
            elif "hidden" in units:
                self._residual.append(slot)
                if tensor.role == "embedding" and self.structure.tied:
                    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
                    self._residual.append(_Slot(head, "weight", tensor.axes))
        self._counts: list[list[_Count]] = []
        self._routers: list[Any] = []
        for layer in self._layers:
            present = dict(layer.named_modules())  # dense layers among experts lack some
            counts = [(*path.rpartition(".")[::2], unit) for path, unit in self.family.counts.items()]
            self._counts.append(
                [
                    _Count(present[name], attribute, unit, getattr(present[name], attribute))
                    for name, attribute, unit in counts
                    if name in present
                ]
            )
            self._routers.append(present.get(self.family.router) if self.family.router else None)

    def activate(self, architecture: Architecture) -> None:
        """Switch `architecture` on; it stays on until the next call. Views follow the grad mode of the caller.

        Raises ValueError where a size exceeds the base's, or the residual width is not the family's to change.
        """
        if not architecture.fits(self.base):
            raise ValueError("the architecture is larger than the network")
        if self.structure.fixed_hidden and architecture.hidden_size != self.base.hidden_size:
            raise ValueError(f"the residual width cannot change: {self.structure.fixed_hidden}")
        for index, layer in enumerate(self._layers):
            self._activate_layer(index, layer, architecture)
        if {architecture.hidden_size, self.current.hidden_size} != {self.base.hidden_size}:
            self._activate_residual(architecture.hidden_size)
        self._activate_cache(architecture)
        shadow = self._decoder.__dict__
        if len(architecture.kept) < len(self._layers):
            shadow[self._layers_name] = [
                removed_layer if sizes.removed else layer
                for layer, sizes in zip(self._layers, architecture.layers, strict=True)
            ]
        else:
            shadow.pop(self._layers_name, None)
        self.current = architecture

    def _activate_residual(self, hidden_size: int) -> None:
        counts, kept = unit_counts(self.base.hidden_size), unit_counts(hidden_size)
        for slot in self._residual:
            slot.show(counts, kept)
            if isinstance(slot.module, nn.LayerNorm):
                slot.module.normalized_shape = (hidden_size,)

    def _activate_layer(self, index: int, layer: nn.Module, architecture: Architecture) -> None:
        family, sizes, full = self.family, architecture.layers[index], self.base.layers[index]
        counts, kept = unit_counts(self.base.hidden_size, full), unit_counts(architecture.hidden_size, sizes)
        blocks: dict[Half, tuple[str, tuple[str, ...], Any, tuple[Unit, Unit]]] = {
            "attention": (family.attention, family.attention_norms, removed_attention, ("query", "kv")),
            "mlp": (family.mlp, family.mlp_norms, removed_mlp, ("ffn", "experts")),
        }
        for half, (block, norms, stand_in, units) in blocks.items():
            if half in full.skip:
                continue
            gone = half in sizes.skip
            whole = all(counts[unit] == kept[unit] for unit in (*units, "hidden"))
            _shadow(layer, block, stand_in if gone else None)
            for norm in norms:
                _shadow(layer, norm, identity if gone else None)
            for slot in self._slots[index][half]:
                if gone or whole:
                    _shadow(slot.module, slot.attribute, None)
                else:
                    slot.show(counts, kept)
        attention: Any = layer._modules.get(family.attention)
        if sizes.num_key_value_heads and hasattr(attention, "num_key_value_groups"):
            attention.num_key_value_groups = sizes.num_attention_heads // sizes.num_key_value_heads
        for count in self._counts[index]:
            setattr(count.module, count.attribute, count.value * kept[count.unit] // counts[count.unit])
        router = self._routers[index]
        if router is not None:
            router.top_k = min(self.structure.experts_per_token, sizes.num_experts)
        if family.reads_config and "attention" not in full.skip:
            own = None
            if sizes.num_attention_heads not in (0, full.num_attention_heads):
                own = copy.copy(self.model.config)
                setattr(own, family.settings["query"], sizes.num_attention_heads)
            module = layer._modules[family.reads_config]
            assert module is not None
            module.config = own or self.model.config

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
            attention = layer._modules[self.family.attention]
            if holds and attention is not None:
                attention.layer_idx = position
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
    if value is None:
        holder.__dict__.pop(name, None)
    else:
        holder.__dict__[name] = value
