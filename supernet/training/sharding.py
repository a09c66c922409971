"""Sharded layers: each process keeps its part of every layer's weights, which are whole only while the layer computes.

torch's `fully_shard` (FSDP2; Zhao et al., arXiv 2304.11277) gathers the whole parameters before a layer's forward or
backward pass, and puts this process's parts (`DTensor`, along dimension 0) back after it. Gradients and moments exist
only in parts. A sub-network's weights are views of whole ones, so they are made again each time a layer is gathered.
Embeddings, last norm and head, which are outside the layers, stay whole in every process.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from supernet.activation import SuperNetwork


def shard(supernet: SuperNetwork) -> None:
    """Share the weights of a super-network's layers among all processes, for good. Its parameters are replaced."""
    for index, layer in enumerate(supernet.layers):
        fully_shard(layer, reshard_after_forward=True)  # registers the hook that gathers, before ours
        layer.register_forward_pre_hook(partial(_remake, supernet, index))


def _remake(supernet: SuperNetwork, index: int, *_: object) -> None:
    supernet.remake_views(index)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, which every process must ask for; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_index(tensor: Tensor, dimension: int, index: Tensor) -> Tensor:
    """Those of the indices along a dimension that lie in this process's part of a tensor, counted from its start."""
    if not isinstance(tensor, DTensor) or dimension > 0:
        return index
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return index[(index >= offset[0]) & (index < offset[0] + shape[0])] - offset[0]


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same in every process, sharded as `parameter` is."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def by_sharding(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The whole parameters and the sharded ones, in one list for each kind that there is."""
    kinds: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    return list(kinds.values())


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> None:
    """Scale the gradients, whole and sharded ones, down to a common norm of at most `largest`."""
    kinds = by_sharding(parameter for parameter in parameters if parameter.grad is not None)
    norms = [full_tensor(torch.nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in kinds]
    if norms:
        total = torch.linalg.vector_norm(torch.stack(norms))
        for kind in kinds:
            torch.nn.utils.clip_grads_with_norm_(kind, largest, total)
