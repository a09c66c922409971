"""FLAP: remove the units that fluctuate least around their mean, and add their mean as a bias.

An et al., Fluctuation-based Adaptive Structured Pruning, arXiv 2312.11983: the weighted fluctuation metric (WIFV),
standardised within each half-block, over all layers, with the bias compensation of eq. 4.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from evals.baselines import TOLERANCE, Baseline, Cut, PruningContext, as_batch
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, LayerSizes, Structure
from supernet.common.errors import RequestError
from supernet.families import describe
from supernet.hooks import Hooks
from supernet.ordering import Reader, Scores, Units, apply_ordering, order_by, output_projections
from supernet.slicing import extract, placed
from supernet.training.traces import trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BIASES = ("attention_bias", "mlp_bias")
"""Switches of Hugging Face configurations that give the projections out of the half-blocks a bias."""


def fluctuation(variance: Tensor, weight: Tensor) -> Tensor:
    """Var(x_j) * ||W[:, j]||^2 of each input channel: `variance` [inputs], `weight` [outputs, inputs] -> [inputs].

    The weighted fluctuation metric (WIFV) of the paper, summed over output channels.
    """
    return variance.double() * weight.double().square().sum(0)


def flap(context: PruningContext) -> Cut:
    """The base without the units of the lowest scores, standardised within each half-block, over all layers and kinds.

    A unit is a neuron or a key-value group with its query heads; the removed units' mean contribution is added to the
    bias of the projection that reads them, where the family's classes have one.
    """
    # 1. A copy with biases, and the projection out of each half-block.
    model = with_biases(context.model)
    structure = describe(model.config)
    supernet = SuperNetwork(model, structure=structure)
    projections = output_projections(supernet)
    if projections.keys() != units_of(supernet.base).keys():
        raise RequestError(
            f"flap: not every half-block of {supernet.family.model_type} ends in one linear layer; leave it out of "
            "--baselines"
        )
    # 2. Scores, and the architecture that they leave.
    means, variances = moments(supernet, projections, context.calibration)
    scores = unit_scores(units_of(supernet.base), variances, projections)
    architecture = remaining(context.parameters, structure, scores)
    # 3. Compensate for what goes, unless it is refitted, then cut it.
    order, kept = order_by(scores), units_of(architecture)
    if context.repair is not None:
        apply_ordering(supernet, order)
        return extract(supernet.model, structure, architecture, context.repair(supernet, architecture)), architecture
    for units, reader in projections.items():
        compensate(reader, means[units], order[units][kept.get(units, 0) :], len(order[units]))
    apply_ordering(supernet, order)
    return extract(supernet.model, structure, architecture), architecture


def unit_scores(
    counts: Mapping[Units, int], variances: Mapping[Units, Tensor], projections: Mapping[Units, Reader]
) -> Scores:
    """The fluctuation of every unit, summed over its channels; on the CPU, as the scores of every criterion."""
    scores: Scores = {}
    for units, count in counts.items():
        channels = fluctuation(variances[units], outgoing(projections[units]))
        scores[units] = channels.view(count, -1).sum(1).cpu()
    return scores


def units_of(architecture: Architecture) -> dict[Units, int]:
    """How many head groups and neurons there are in each layer that has some."""
    counts: dict[Units, int] = {}
    for index, layer in enumerate(architecture.layers):
        counts |= {(index, "kv"): layer.num_key_value_heads, (index, "ffn"): layer.intermediate_size}
    return {units: count for units, count in counts.items() if count}


def outgoing(reader: Reader) -> Tensor:
    """A projection's weight as [outputs, inputs], a view."""
    weight = cast(Tensor, reader.module.weight).detach()
    return weight if reader.inputs.dimension == 1 else weight.T


def with_biases(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with zero biases where the configuration can switch them on: the same function."""
    config = copy.deepcopy(model.config)
    for name in BIASES:
        if getattr(config, name, None) is False:
            setattr(config, name, True)
    parameter = next(model.parameters())
    biased = placed(AutoModelForCausalLM.from_config(config), parameter.device, parameter.dtype).eval()
    with torch.no_grad():
        for name, bias in biased.named_parameters():
            if name.endswith(".bias"):
                bias.zero_()
    biased.load_state_dict(model.state_dict(), strict=False)
    biased.generation_config = copy.deepcopy(model.generation_config)
    return biased


def moments(
    supernet: SuperNetwork, projections: Mapping[Units, Reader], batches: Iterable[Tensor]
) -> tuple[dict[Units, Tensor], dict[Units, Tensor]]:
    """Mean and variance, over all calibration tokens, of every input channel of the projections, [inputs] each."""
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
        reader.module.register_forward_pre_hook(lambda _, inputs, units=units: collect(units, inputs[0]))
        for units, reader in projections.items()
    ]
    with Hooks(hooks), torch.no_grad():
        for ids in batches:
            trace(supernet.model, as_batch(ids))
    means = {units: total / rows[units] for units, total in sums.items()}
    variances = {
        units: (square - rows[units] * means[units].square()) / max(1, rows[units] - 1)
        for units, square in squares.items()
    }
    return means, variances


def remaining(parameters: int, structure: Structure, scores: Scores) -> Architecture:
    """The architecture of so many parameters that is left when units go by rising standardised score."""
    standard = {key: (value - value.mean()) / value.std(correction=0).clamp_min(1e-12) for key, value in scores.items()}
    ranked = sorted((float(score), key, unit) for key, value in standard.items() for unit, score in enumerate(value))
    counts = {key: len(value) for key, value in scores.items()}
    base = structure.base

    def sizes() -> Architecture:
        layers = []
        for index, full in enumerate(base.layers):
            groups = counts.get((index, "kv"), 0)
            queries = full.num_attention_heads // max(1, full.num_key_value_heads)
            layers.append(LayerSizes(groups * queries, groups, counts.get((index, "ffn"), 0), full.num_experts))
        return Architecture(base.hidden_size, tuple(layers))

    for _, key, _ in ranked:
        counts[key] -= 1
        size = structure.parameters(sizes())
        if size < parameters * (1 - TOLERANCE / 2):
            counts[key] += 1  # the unit is too large for what is still to go: a later, smaller one may do
        elif size <= parameters * (1 + TOLERANCE / 2):
            break
    return sizes()


def compensate(reader: Reader, mean: Tensor, removed: Tensor, units: int) -> None:
    """bias += W[:, removed] mean[removed] (eq. 4), where the projection has a bias.

    `mean` [inputs], `removed` the indices of the removed ones of its `units`.
    """
    bias = reader.module.bias
    if not isinstance(bias, Tensor) or not len(removed):
        return
    width = len(mean) // units
    channels = (removed[:, None] * width + torch.arange(width, device=removed.device)).flatten().to(mean.device)
    with torch.no_grad():
        bias.copy_(bias + outgoing(reader)[:, channels].double() @ mean[channels])


BASELINES = (Baseline("flap", "An et al., arXiv 2312.11983", flap, True),)
