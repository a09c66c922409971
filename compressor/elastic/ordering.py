"""Order neurons and head groups by importance, so that the best sub-network of any width is a prefix.

Permuting the neurons of an MLP, or the key-value groups of an attention block with their query heads, changes no
function: every unit keeps its own weights and only the order of a sum changes. How important a unit is, is for
`compressor.elastic.importance` to say. An ordering is stored with the run and can be used again in another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compressor.architecture import Architecture, Structure, Unit, unit_counts
from compressor.architecture import Tensor as TensorEntry
from compressor.elastic.supernet import SuperNetwork
from compressor.errors import RequestError

Units = tuple[int, Unit]
"""Which units of the network: `(layer, "kv")` are a layer's key-value groups, `(layer, "ffn")` its neurons."""

Scores = dict[Units, Tensor]
"""Importance of each unit, [number of units] in float64."""

Order = dict[Units, Tensor]
"""Permutation of each set of units, most important first, [number of units] in int64."""

ORDERED: tuple[Unit, ...] = ("kv", "ffn")
"""The units that can be ordered. Query heads travel with their key-value group."""


@dataclass(frozen=True, slots=True)
class Run:
    """Where the units of one kind lie along one dimension of a parameter: `count` units of `width` entries each, one
    behind the other from `start`. Entry `start + width * j + i` is the i-th of unit j."""

    units: Units
    dimension: int
    start: int
    count: int
    width: int

    def sums(self, along: Tensor) -> Tensor:
        """Totals of each unit, [count], of values [size of the dimension]."""
        return along.narrow(0, self.start, self.count * self.width).view(self.count, self.width).sum(1)


def runs(entry: TensorEntry, base: Architecture) -> Iterator[Run]:
    """All ordered units of a full parameter, along each of its dimensions."""
    if entry.layer is None or entry.half is None:
        return
    sizes = base.layers[entry.layer]
    counts = unit_counts(base.hidden_size, sizes)
    for dimension, axis in enumerate(entry.axes):
        start = 0
        for unit, width in axis.blocks:
            length = counts[unit] * width
            if unit == "query":
                unit, width = "kv", width * sizes.num_attention_heads // sizes.num_key_value_heads
            if unit in ORDERED:
                yield Run((entry.layer, unit), dimension, start, counts[unit], width)
            start += length


@dataclass(frozen=True, slots=True)
class Reader:
    """A linear module whose inputs are units: what they send, it reads."""

    entry: TensorEntry
    module: nn.Module
    run: Run


def readers(supernet: SuperNetwork) -> list[Reader]:
    """Every linear module that reads units, for Llama the output projections of attention and MLP."""
    found = []
    for entry in supernet.structure.tensors:
        name, _, attribute = entry.name.rpartition(".")
        module = supernet.model.get_submodule(name)
        if entry.role == "linear" and attribute == "weight" and isinstance(module, nn.Linear | Conv1D):
            inputs = 0 if isinstance(module, Conv1D) else 1  # transformers' Conv1D stores its weight transposed
            found += [Reader(entry, module, run) for run in runs(entry, supernet.base) if run.dimension == inputs]
    return found


def order_by(scores: Scores) -> Order:
    """The permutation of each set of units, most important first. Ties keep their place, so it is stable."""
    return {units: torch.argsort(value, descending=True, stable=True) for units, value in scores.items()}


def reordered(entry: TensorEntry, full: Tensor, order: Order, base: Architecture) -> Tensor:
    """A full parameter with its units permuted: `full` itself where `order` does not concern it."""
    for run in runs(entry, base):
        if run.units in order:
            index = torch.arange(full.shape[run.dimension])
            within = order[run.units][:, None] * run.width + torch.arange(run.width)
            index[run.start : run.start + run.count * run.width] = run.start + within.flatten()
            full = full.index_select(run.dimension, index.to(full.device))
    return full


def apply_ordering(supernet: SuperNetwork, order: Order) -> None:
    """Permute the network's units in place by `order` (from `order_by`). The full network's function is unchanged."""
    with torch.no_grad():
        for entry in supernet.structure.tensors:
            parameter = supernet.model.get_parameter(entry.name)
            permuted = reordered(entry, parameter, order, supernet.base)
            if permuted is not parameter:
                parameter.copy_(permuted)


def save_ordering(order: Order, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write an ordering as safetensors: `3.ffn` is the permutation of layer 3's neurons."""
    tensors = {f"{layer}.{unit}": value.cpu().contiguous() for (layer, unit), value in order.items()}
    save_file(tensors, path, dict(metadata or {}))


def load_ordering(path: Path, structure: Structure) -> Order:
    """An ordering from `save_ordering`. Raises `RequestError` where it is not one of this model's."""
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path}: not an ordering ({error})") from error
    counts = {run.units: run.count for entry in structure.tensors for run in runs(entry, structure.base)}
    order: Order = {}
    for (layer, unit), count in counts.items():
        value = stored.pop(f"{layer}.{unit}", None)
        if value is not None:
            if not torch.equal(value.sort().values, torch.arange(count)):
                raise RequestError(f"{path}: '{layer}.{unit}' does not order the {count} units of this model's layer")
            order[layer, unit] = value
    if stored or not order:
        raise RequestError(f"{path}: an ordering of another model (it names {next(iter(stored), 'nothing')})")
    return order
