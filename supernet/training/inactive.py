"""Slices that took no part in a step, and an optimizer step that leaves them where they are.

A sub-network's gradient is a full-sized tensor with zeros outside its slice. AdamW would still decay those entries and
carry them along by their momentum: units that a step did not look at would drift. So their weights and moments are put
back after the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from supernet.activation import slice_parameter
from supernet.architecture import Architecture, Structure, unit_counts
from supernet.training.sharding import local_shard, own_index

Inactive = Mapping[str, "list[tuple[int, Tensor]] | None"]
"""By parameter name: the (dimension, indices) that no member used, or None where no member used the parameter."""


def inactive_slices(structure: Structure, members: Iterable[Architecture]) -> Inactive:
    """What none of a step's members used. A parameter that is used whole is not listed.

    A tensor with several elastic dimensions counts as used where each of its indices was used by some member.
    """
    members = list(members)
    if structure.base in members:
        return {}
    idle: dict[str, list[tuple[int, Tensor]] | None] = {}
    for tensor in structure.tensors:
        users = [member for member in members if structure.shape(tensor, member) is not None]
        if not users:
            idle[tensor.name] = None
            continue
        unused = []
        for dimension, axis in enumerate(tensor.axes):
            full = _counts(structure.base, tensor.layer)
            every = torch.arange(axis.size(full))
            used = torch.zeros(len(every), dtype=torch.bool)
            for member in users:
                used[slice_parameter(every, (axis,), full, _counts(member, tensor.layer))] = True
            if not used.all():
                unused.append((dimension, (~used).nonzero().flatten()))
        if unused:
            idle[tensor.name] = unused
    return idle


def _counts(architecture: Architecture, layer: int | None) -> dict:
    return unit_counts(architecture.hidden_size, None if layer is None else architecture.layers[layer])


@contextmanager
def restore_inactive(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], idle: Inactive
) -> Iterator[None]:
    """Put idle slices back to what they were, after the optimizer stepped inside.

    A parameter that no member used must have no gradient; optimizers pass those over. Of the optimizer's state, what
    has the parameter's shape and is a floating-point number is put back too (moments kept in 8 bits are not: there one
    scale is shared by used and idle entries).
    """
    kept: list[tuple[Tensor, int, Tensor, Tensor]] = []
    with torch.no_grad():
        for name, slices in idle.items():
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
