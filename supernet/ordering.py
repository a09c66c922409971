"""Order units by importance, so that the best sub-network of any size is a prefix.

Units are the neurons of an MLP, the experts of a layer with their router's rows, the key-value groups of an attention
block with their query heads, the query heads within a group, and the channels of the residual stream. Permuting them
leaves the network's function unchanged: every unit keeps its weights, and only the order of a sum changes.
`supernet.importance` scores the units. An ordering is stored with the run and can be used again in another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, Structure, TensorSpec, Unit, unit_counts
from supernet.common.errors import RequestError, reading

Units = tuple[int | None, Unit]
"""Which units of the network: `(3, "ffn")` are layer 3's neurons, `(3, "kv")` its key-value groups, `(3, "query")` the
query heads within each of these, `(3, "experts")` its experts, and `(None, "hidden")` the residual channels."""

Scores = dict[Units, Tensor]
"""Importance of each unit in float64, [units]; of query heads [key-value groups, query heads of each], from 2 on."""

Order = dict[Units, Tensor]
"""Permutation of each set of units in int64, most important first, [units]; query heads stay within their group."""


@dataclass(frozen=True, slots=True)
class UnitSlice:
    """Where the units of one kind lie along one dimension of a parameter: `prod(shape)` units of `width` entries each,
    from `start` on. Entry `start + width * j + i` is the i-th of unit j."""

    units: Units
    dimension: int
    start: int
    shape: tuple[int, ...]
    width: int

    @property
    def length(self) -> int:
        return prod(self.shape) * self.width

    def sums(self, along: Tensor) -> Tensor:
        """The sum over each unit's entries, in the shape that `Scores` have, of values [size of the dimension]."""
        return along.narrow(0, self.start, self.length).view(*self.shape, self.width).sum(-1)


def unit_slices(spec: TensorSpec, base: Architecture) -> Iterator[UnitSlice]:
    """All units of a full parameter that can be ordered, along each of its dimensions.

    Query heads come before the groups that they move with: both permutations are of the units in their first order.
    """
    sizes = None if spec.layer is None else base.layers[spec.layer]
    counts = unit_counts(base.hidden_size, sizes)
    for dimension, axis in enumerate(spec.axes):
        start = 0
        for unit, width in axis.blocks:
            if unit == "hidden":
                yield UnitSlice((None, unit), dimension, start, (counts[unit],), width)
            elif unit == "query" and counts[unit]:
                groups, heads = counts["kv"], counts[unit] // counts["kv"]
                if heads > 1:
                    yield UnitSlice((spec.layer, unit), dimension, start, (groups, heads), width)
                yield UnitSlice((spec.layer, "kv"), dimension, start, (groups,), heads * width)
            elif unit != "one" and counts[unit]:
                yield UnitSlice((spec.layer, unit), dimension, start, (counts[unit],), width)
            start += counts[unit] * width


@dataclass(frozen=True, slots=True)
class Reader:
    """A linear module that reads the outputs of units, its weight, and where the weight's inputs are those units."""

    spec: TensorSpec
    module: nn.Module
    inputs: UnitSlice


def readers(supernet: SuperNetwork) -> list[Reader]:
    """Every linear module that reads units: for Llama's neurons and heads the output projections of MLP and attention,
    for residual channels the projections into both, and the head where it is not tied to the embedding."""
    reading = []
    for spec in supernet.structure.tensors:
        name, _, attribute = spec.name.rpartition(".")
        module = supernet.model.get_submodule(name)
        if (
            spec.role in ("linear", "matrix", "head")
            and attribute == "weight"
            and isinstance(module, nn.Linear | Conv1D)
        ):
            dimension = 0 if isinstance(module, Conv1D) else 1  # transformers' Conv1D stores its weight transposed
            parts = unit_slices(spec, supernet.base)
            reading += [Reader(spec, module, part) for part in parts if part.dimension == dimension]
    return reading


def output_projections(supernet: SuperNetwork) -> dict[Units, Reader]:
    """The modules that project a layer's head groups, `(layer, "kv")`, or its neurons, `(layer, "ffn")`, back to the
    residual. Stacked experts have none, since no module reads their neurons alone."""
    return {reader.inputs.units: reader for reader in readers(supernet) if reader.inputs.units[1] in ("kv", "ffn")}


def order_by(scores: Scores) -> Order:
    """The permutation of each set of units, most important first. Ties keep their place, so it is stable."""
    order: Order = {}
    for units, value in scores.items():
        within = torch.argsort(value, descending=True, stable=True)
        order[units] = (within + torch.arange(value.numel()).view_as(value)[..., :1]).flatten()
    return order


def by_influence(influence: Sequence[float]) -> list[int]:
    """Indices of all layers, the one of the largest block influence first; of equals the earlier one."""
    return sorted(range(len(influence)), key=lambda layer: -influence[layer])


def reordered(spec: TensorSpec, full: Tensor, order: Order, base: Architecture) -> Tensor:
    """A full parameter with its units permuted, or `full` itself where `order` has none of its units."""
    for part in unit_slices(spec, base):
        if part.units in order:
            index = torch.arange(full.shape[part.dimension])
            within = order[part.units][:, None] * part.width + torch.arange(part.width)
            index[part.start : part.start + part.length] = part.start + within.flatten()
            full = full.index_select(part.dimension, index.to(full.device))
    return full


def apply_ordering(supernet: SuperNetwork, order: Order) -> None:
    """Permute the network's units in place by `order` (from `order_by`). The full network's function is unchanged."""
    with torch.no_grad():
        for spec in supernet.structure.tensors:
            parameter = supernet.model.get_parameter(spec.name)
            permuted = reordered(spec, parameter, order, supernet.base)
            if permuted is not parameter:
                parameter.copy_(permuted)


def score_shapes(structure: Structure) -> dict[Units, tuple[int, ...]]:
    """The shape of the scores of each set of units of a network."""
    return {part.units: part.shape for spec in structure.tensors for part in unit_slices(spec, structure.base)}


def _name(units: Units) -> str:
    layer, unit = units
    return unit if layer is None else f"{layer}.{unit}"


def _in_groups(permutation: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a permutation moves units only within the rows of `shape`."""
    size = shape[-1]
    return torch.equal(permutation // size, torch.arange(len(permutation)) // size)


def save_ordering(order: Order, influence: Sequence[float], path: Path, criterion: str) -> None:
    """Write an ordering as safetensors: `3.ffn` is the permutation of layer 3's neurons. The metadata hold the name of
    the criterion and each layer's block influence."""
    tensors = {_name(units): value.cpu().contiguous() for units, value in order.items()}
    save_file(tensors, path, {"criterion": criterion, "block_influence": json.dumps(list(influence))})


def stored_influence(path: Path) -> list[float] | None:
    """The block influence of each layer from a file of `save_ordering`; None where it has none."""
    with safe_open(path, "pt") as stored:
        return json.loads((stored.metadata() or {}).get("block_influence", "null"))


def has_hidden(path: Path) -> bool:
    """Whether a file of `save_ordering` has an order of residual channels."""
    if not path.is_file():
        return False
    with reading(f"{path}: not an ordering"), safe_open(path, "pt") as stored:
        return _name((None, "hidden")) in stored.keys()  # noqa: SIM118 - no mapping


def load_ordering(path: Path, structure: Structure) -> Order:
    """The ordering in a file of `save_ordering`. Raises `RequestError` where it is no ordering of this model."""
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path}: not an ordering ({error})") from error
    order: Order = {}
    for units, shape in score_shapes(structure).items():
        value = stored.pop(_name(units), None)
        if value is not None:
            indices = torch.arange(prod(shape))
            if not torch.equal(value.sort().values, indices) or not _in_groups(value, shape):
                raise RequestError(f"{path}: '{_name(units)}' does not order the {len(indices)} units of this model")
            order[units] = value
    if stored or not order:
        raise RequestError(f"{path}: an ordering of another model (it names {next(iter(stored), 'nothing')})")
    return order
