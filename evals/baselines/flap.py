"""FLAP: remove what fluctuates least around its mean, and give its mean back as a bias."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compressor.architecture import HALVES, Architecture, Half, LayerSizes, Unit
from compressor.elastic.ordering import Scores, Units, apply_ordering, order_by
from compressor.elastic.slicing import extract
from compressor.elastic.supernet import SuperNetwork
from compressor.errors import RequestError
from compressor.families import describe
from evals.baselines import TOLERANCE, Baseline, Bench, Cut

BIASES = ("attention_bias", "mlp_bias")
"""Switches of Hugging Face configurations that give the projections out of the half-blocks a bias."""

UNIT: dict[Half, Unit] = {"attention": "kv", "mlp": "ffn"}
"""What a half-block is made of."""


def fluctuation(variance: Tensor, weight: Tensor) -> Tensor:
    """Var(x_j) * ||W[:, j]||^2 of each input channel: `variance` [inputs], `weight` [outputs, inputs] -> [inputs].

    An et al., FLAP, arXiv 2312.11983, the weighted fluctuation metric (WIFV) summed over output channels.
    """
    return variance.double() * weight.double().square().sum(0)


def flap(bench: Bench) -> Cut:
    """Units of all layers and both kinds compete: standardised within their own half-block, the lowest go first.

    A unit is a neuron or a key-value group with its query heads; the removed units' mean contribution is added to the
    bias of the projection that read them, where the family's classes have one.
    """
    model = with_biases(bench.model)
    structure = describe(model.config)
    supernet = SuperNetwork(model, structure=structure)
    means, variances = moments(supernet, bench.calibration)
    scores: Scores = {}
    for index, layer in enumerate(supernet.base.layers):
        for half, count in units_of(layer).items():
            units = index, UNIT[half]
            weight = projection(supernet, index, half).weight.detach()
            scores[units] = fluctuation(variances[units], weight).view(count, -1).sum(1)
    architecture = competed(bench.parameters, structure, scores)
    order = order_by(scores)
    for index, layer in enumerate(architecture.layers):
        for half, kept in units_of(layer).items():
            permutation = order[index, UNIT[half]]
            mean = means[index, UNIT[half]]
            compensate(projection(supernet, index, half), mean, permutation[kept:], len(permutation))
    apply_ordering(supernet, order)
    return extract(supernet.model, structure, architecture), architecture


def with_biases(model: nn.Module) -> nn.Module:
    """A copy with zero biases wherever the configuration can switch them on: the same function."""
    config: Any = copy.deepcopy(model.config)
    for name in BIASES:
        if getattr(config, name, None) is False:
            setattr(config, name, True)
    parameter = next(model.parameters())
    biased = AutoModelForCausalLM.from_config(config).to(parameter.device, parameter.dtype).eval()
    with torch.no_grad():
        for name, bias in biased.named_parameters():
            if name.endswith(".bias"):
                bias.zero_()
    biased.load_state_dict(model.state_dict(), strict=False)
    biased.generation_config = copy.deepcopy(model.generation_config)
    return biased


def moments(supernet: SuperNetwork, batches: tuple[Tensor, ...]) -> tuple[dict[Units, Tensor], dict[Units, Tensor]]:
    """Mean and variance, over all calibration tokens, of every input channel of the projections out of half-blocks."""
    rows: dict[Units, int] = {}
    sums: dict[Units, Tensor] = {}
    squares: dict[Units, Tensor] = {}

    def collect(units: Units, inputs: Tensor) -> None:
        flat = inputs.detach().flatten(0, -2).double()
        total, square = flat.sum(0), flat.square().sum(0)
        rows[units] = rows.get(units, 0) + len(flat)
        sums[units] = sums[units] + total if units in sums else total
        squares[units] = squares[units] + square if units in squares else square

    hooks = [
        projection(supernet, index, half).register_forward_pre_hook(
            lambda _, inputs, units=(index, UNIT[half]): collect(units, inputs[0])
        )
        for index in range(len(supernet.base.layers))
        for half in HALVES
    ]
    try:
        with torch.no_grad():
            for ids in batches:
                supernet.model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    means = {units: total / rows[units] for units, total in sums.items()}
    variances = {
        units: (square - rows[units] * means[units].square()) / max(1, rows[units] - 1)
        for units, square in squares.items()
    }
    return means, variances


def competed(parameters: int, structure: Any, scores: Scores) -> Architecture:
    """Remove units by rising standardised score until the network has the size asked for."""
    standard = {key: (value - value.mean()) / value.std(correction=0).clamp_min(1e-12) for key, value in scores.items()}
    ranked = sorted((float(score), key, unit) for key, value in standard.items() for unit, score in enumerate(value))
    counts = {key: len(value) for key, value in scores.items()}
    base = structure.base

    def sizes() -> Architecture:
        layers = []
        for index, full in enumerate(base.layers):
            groups = counts[index, "kv"]
            queries = full.num_attention_heads // full.num_key_value_heads
            layers.append(LayerSizes(groups * queries, groups, counts[index, "ffn"], full.num_experts))
        return Architecture(base.hidden_size, tuple(layers))

    for _, key, _ in ranked:
        counts[key] -= 1
        size = structure.parameters(sizes())
        if size < parameters * (1 - TOLERANCE / 2):
            counts[key] += 1  # too large a unit for what is still to go: a later, smaller one will do
        elif size <= parameters * (1 + TOLERANCE / 2):
            break
    return sizes()


def units_of(layer: LayerSizes) -> dict[Half, int]:
    return {"attention": layer.num_key_value_heads, "mlp": layer.intermediate_size}


def projection(supernet: SuperNetwork, index: int, half: Half) -> nn.Linear:
    """The linear layer out of a half-block. Raises RequestError where the family has none, or several."""
    layers = list(supernet.model.get_submodule(supernet.family.layers).children())
    try:
        module = layers[index].get_submodule(supernet.family.inputs(half)[0])
    except (LookupError, AttributeError):
        module = None
    if not isinstance(module, nn.Linear):
        raise RequestError(
            f"flap: not every half-block of {supernet.family.model_type} ends in one linear layer; leave it out of "
            "--baselines"
        )
    return module


def compensate(module: nn.Linear, mean: Tensor, removed: Tensor, units: int) -> None:
    """bias += W[:, removed] mean[removed] (FLAP, eq. 4), where the projection has a bias."""
    bias, weight = module.bias, module.weight
    if bias is None or not len(removed):
        return
    width = len(mean) // units
    channels = (removed[:, None] * width + torch.arange(width, device=removed.device)).flatten().to(weight.device)
    with torch.no_grad():
        bias.copy_(bias + weight[:, channels].double() @ mean[channels])


BASELINES = (Baseline("flap", "An et al., arXiv 2312.11983", flap),)
