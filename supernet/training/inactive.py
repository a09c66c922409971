"""Inactive slices, which no sub-network of a step used, and an optimizer step that does not change them.

A sub-network's gradient is a full-sized tensor with zeros outside its slice. An optimizer would still decay those
entries and move them by their momentum, so that units would drift in steps that do not train them. So their weights and
moments are restored after the step. (Muon makes a matrix orthogonal together with the momentum of its inactive part,
which changes how far the active part moves, by a tenth or two.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from supernet.activation import Counts, slice_parameter
from supernet.architecture import Architecture, Structure, unit_counts
from supernet.training.sharding import local_shard, own_index

Inactive = Mapping[str, "list[tuple[int, Tensor]] | None"]
"""By parameter name: the (dimension, indices) that no member used, or None where no member used the parameter."""


def inactive_slices(structure: Structure, members: Iterable[Architecture]) -> Inactive:
    """The slices that none of a step's members used. A parameter that was used whole is not listed.

    An entry of a tensor with several elastic dimensions counts as used where each of its indices was used by a member.
    """
    members = list(members)
    if structure.base in members:
        return {}
    inactive: dict[str, list[tuple[int, Tensor]] | None] = {}
    for tensor in structure.tensors:
        users = [member for member in members if structure.shape(tensor, member) is not None]
        if not users:
            inactive[tensor.name] = None
            continue
        unused = []
        for dimension, axis in enumerate(tensor.axes):
            full = _counts(structure.base, tensor.layer)
            indices = torch.arange(axis.size(full))
            used = torch.zeros(len(indices), dtype=torch.bool)
            for member in users:
                used[slice_parameter(indices, (axis,), full, _counts(member, tensor.layer))] = True
            if not used.all():
                unused.append((dimension, (~used).nonzero().flatten()))
        if unused:
            inactive[tensor.name] = unused
    return inactive


def _counts(architecture: Architecture, layer: int | None) -> Counts:
    return unit_counts(architecture.hidden_size, None if layer is None else architecture.layers[layer])


@contextmanager
def restore_inactive(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], inactive: Inactive
) -> Iterator[None]:
    """Within, the optimizer steps; at the end inactive slices get back the values that they had before.

    A parameter that no member used must have no gradient, since optimizers skip those. Of the optimizer's state,
    floating-point tensors of the parameter's shape are restored too. Moments in 8 bits are not: active and inactive
    entries share scales there.
    """
    kept: list[tuple[Tensor, int, Tensor, Tensor]] = []  # tensor, dimension, indices and their values
    with torch.no_grad():
        for name, slices in inactive.items():
            parameter = parameters.get(name)
            if parameter is None or slices is None:
                continue
            state = [s for s in optimizer.state.get(parameter, {}).values() if isinstance(s, Tensor)]
            moments = [s for s in state if s.shape == parameter.shape and s.is_floating_point()]
            for dimension, index in slices:
                index = own_index(parameter, dimension, index).to(parameter.device)
                for tensor in map(local_shard, (parameter.data, *moments)):
                    kept.append((tensor, dimension, index, tensor.index_select(dimension, index)))
        yield
        for tensor, dimension, index, values in kept:
            tensor.index_copy_(dimension, index, values)
