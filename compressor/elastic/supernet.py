"""Activation: any sub-network of a loaded model, as views of its weights, without touching its modelling code.

A module finds `self.weight` in its instance dictionary before it asks `nn.Module` for the registered parameter. So a
sub-network is a set of *shadows*: `module.__dict__["weight"]` holds a prefix view of the full parameter, which stays
registered under its own name, sees the gradients of its views, and is what optimizers, `state_dict` and `to` know.
The full network has no shadows at all: it is the original model, bit for bit and at no cost.

Prefixes are meaningful once neurons and heads are ordered by importance (`compressor.elastic.ordering`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.architecture import Architecture, Axis, Half, LayerSizes, Structure, unit_counts
from compressor.families import Family, describe, family_of


def prefix_rows(axis: Axis, full: dict[Any, int], kept: dict[Any, int]) -> int:
    """Leading entries of a one-block axis that a prefix of its units covers."""
    if len(axis.blocks) != 1:
        raise NotImplementedError("a fused axis has no contiguous prefix")
    unit, width = axis.blocks[0]
    assert kept[unit] <= full[unit]
    return width * kept[unit]


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
    """A parameter of one layer that shrinks: where it sits, and the axes of its full form."""

    module: nn.Module
    attribute: str
    axes: tuple[Axis, ...]


class SuperNetwork:
    """A Hugging Face causal language model whose sub-networks can be switched on by `Architecture`.

    `model` is used as it is and stays the owner of all weights; there is no second copy. Its layers keep their
    `layer_idx` in line with the attention blocks that are left, or a key-value cache would not work.
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
        for tensor in self.structure.tensors:
            elastic = any(unit in ("query", "kv", "ffn") for axis in tensor.axes for unit, _ in axis.blocks)
            if tensor.layer is not None and tensor.half is not None and elastic:
                module_name, _, attribute = tensor.name.rpartition(".")
                slot = _Slot(model.get_submodule(module_name), attribute, tensor.axes)
                self._slots[tensor.layer][tensor.half].append(slot)

    def activate(self, architecture: Architecture) -> None:
        """Switch `architecture` on; it stays on until the next call. Views follow the grad mode of the caller.

        Raises ValueError where a size exceeds the base's.
        """
        if not architecture.fits(self.base) or architecture.hidden_size != self.base.hidden_size:
            raise ValueError("the architecture is larger than the network, or changes its residual width")
        position = 0
        for index, (layer, sizes, full) in enumerate(
            zip(self._layers, architecture.layers, self.base.layers, strict=True)
        ):
            self._activate_layer(index, layer, sizes, full)
            if sizes.num_key_value_heads:
                attention = layer._modules[self.family.attention]
                if hasattr(attention, "layer_idx"):
                    attention.layer_idx = position
                position += 1
        shadow = self._decoder.__dict__
        if len(architecture.kept) < len(self._layers):
            shadow[self._layers_name] = [
                removed_layer if sizes.removed else layer
                for layer, sizes in zip(self._layers, architecture.layers, strict=True)
            ]
        else:
            shadow.pop(self._layers_name, None)
        self.current = architecture

    def _activate_layer(self, index: int, layer: nn.Module, sizes: LayerSizes, full: LayerSizes) -> None:
        family = self.family
        counts, full_counts = unit_counts(0, sizes), unit_counts(0, full)
        stand_ins = {
            "attention": (family.attention, family.attention_norms, removed_attention),
            "mlp": (family.mlp, family.mlp_norms, removed_mlp),
        }
        same = {
            "attention": (sizes.num_attention_heads, sizes.num_key_value_heads)
            == (full.num_attention_heads, full.num_key_value_heads),
            "mlp": sizes.intermediate_size == full.intermediate_size,
        }
        for half, (block, norms, stand_in) in stand_ins.items():
            gone = half in sizes.skip
            _shadow(layer, block, stand_in if gone else None)
            for norm in norms:
                _shadow(layer, norm, identity if gone else None)
            for slot in self._slots[index][half]:  # type: ignore[index]
                view: Tensor | None = None
                if not gone and not same[half]:
                    view = slot.module._parameters[slot.attribute]
                    assert view is not None
                    if not torch.is_grad_enabled():
                        view = view.detach()
                    for dimension, axis in enumerate(slot.axes):
                        if axis.blocks[0][0] in ("query", "kv", "ffn"):
                            view = view.narrow(dimension, 0, prefix_rows(axis, full_counts, counts))
                _shadow(slot.module, slot.attribute, view)

    @contextmanager
    def activated(self, architecture: Architecture) -> Iterator[nn.Module]:
        """`with supernet.activated(a) as model:` and the previous sub-network is back afterwards."""
        previous = self.current
        self.activate(architecture)
        try:
            yield self.model
        finally:
            self.activate(previous)


def _shadow(module: nn.Module, name: str, value: Any) -> None:
    if value is None:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = value
