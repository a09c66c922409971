"""Order neurons and head groups by importance, so that the best sub-network of any width is a prefix.

Permuting the neurons of an MLP, or the key-value groups of an attention block with their query heads, changes no
function: every unit keeps its own weights and only the order of a sum changes. An ordering is stored with the run.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor.architecture import Half
from compressor.elastic.supernet import SuperNetwork

Scores = dict[tuple[int, Half], Tensor]
"""Importance of each unit, `(layer, "mlp")` -> [intermediate_size], `(layer, "attention")` -> [num_key_value_heads]."""


def activation_importance(supernet: SuperNetwork, batches: Iterable[Tensor]) -> Scores:
    """Wanda-style importance: the norm of a unit's activation times the norm of its outgoing weights.

    For unit j of a half-block with output projection W (columns j), score_j = ||x_j||_2 * ||W[:, j]||_2, with x_j its
    activations over all calibration tokens (Sun et al., arXiv 2306.11695, eq. 1, summed over a structure's weights in
    quadrature). A key-value group's score is that of its query heads' channels together.

    `batches` are token ids of shape [batch, length]. The full network must be active.
    """
    sums: dict[tuple[int, Half], Tensor] = {}
    projections: dict[tuple[int, Half], nn.Module] = {}
    hooks = []
    family = supernet.family
    layers = supernet.model.get_submodule(family.layers)
    halves: tuple[Half, Half] = ("attention", "mlp")
    for index, layer in enumerate(layers.children()):
        for half in halves:
            module = layer.get_submodule(family.inputs(half)[0])
            projections[index, half] = module

            def collect(_: nn.Module, inputs: tuple[Tensor, ...], key: tuple[int, Half] = (index, half)) -> None:
                squares = inputs[0].detach().flatten(0, -2).double().square().sum(0)
                sums[key] = sums[key] + squares if key in sums else squares

            hooks.append(module.register_forward_pre_hook(collect))
    try:
        with torch.no_grad():
            for ids in batches:
                supernet.model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not sums:
        raise ValueError("no calibration batch was given")
    scores: Scores = {}
    for (index, half), squares in sums.items():
        weight = projections[index, half].weight
        assert isinstance(weight, Tensor)
        energy = squares * weight.detach().double().square().sum(0)
        groups = supernet.base.layers[index].num_key_value_heads
        scores[index, half] = (energy.view(groups, -1).sum(1) if half == "attention" else energy).sqrt()
    return scores


def order_by(scores: Scores) -> Scores:
    """The permutation of each half-block's units, most important first. Ties keep their place, so it is stable."""
    return {key: torch.argsort(value, descending=True, stable=True) for key, value in scores.items()}


def apply_ordering(supernet: SuperNetwork, order: Scores) -> None:
    """Permute the network's units in place by `order` (from `order_by`). The full network's function is unchanged."""
    for tensor in supernet.structure.tensors:
        if tensor.layer is None or tensor.half is None or (tensor.layer, tensor.half) not in order:
            continue
        permutation = order[tensor.layer, tensor.half]
        sizes = supernet.base.layers[tensor.layer]
        parameter = supernet.model.get_parameter(tensor.name)
        for dimension, axis in enumerate(tensor.axes):
            unit, width = axis.blocks[0]
            if unit not in ("query", "kv", "ffn"):
                continue
            # A group's query heads travel with it: a unit of the permutation is all of a group's channels.
            if unit == "query":
                width *= sizes.num_attention_heads // sizes.num_key_value_heads
            index = (permutation[:, None] * width + torch.arange(width)).flatten().to(parameter.device)
            with torch.no_grad():
                parameter.copy_(parameter.index_select(dimension, index))


def save_ordering(order: Scores, path: Path) -> None:
    save_file({f"{layer}.{half}": value.contiguous() for (layer, half), value in order.items()}, path)


def load_ordering(path: Path) -> Scores:
    order: Scores = {}
    for name, value in load_file(path).items():
        layer, _, half = name.partition(".")
        order[int(layer), half] = value  # type: ignore[index]
    return order
