"""Published pruning criteria behind one interface, each from its paper's definition. One file here is one method, or
several of a kind.

A `Baseline` cuts a copy of the base down to a number of parameters. All are given the same `PruningContext`, so only
the criterion differs between them. Every file of this folder is loaded, so adding a file adds its methods.
`docs/baselines.md` names each equation, and what was left out.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from supernet.activation import SuperNetwork
from supernet.architecture import REMOVED, Architecture, LayerSizes, Structure
from supernet.common.errors import RequestError
from supernet.ordering import Scores, apply_ordering, order_by
from supernet.slicing import extract
from supernet.training.data import Batch
from supernet.variants import Variants

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 0.01
"""How far from the size asked for a method's result may be, as a share of it."""

STEPS = (128, 64, 32, 16, 8, 4, 2, 1)
"""Multiples that an FFN width may be cut to: the coarsest that comes within half the tolerance is taken."""

Cut = tuple[nn.Module, Architecture]
"""A standalone network, and its sizes."""


@dataclass(frozen=True)
class PruningContext:
    """What every method is given, and all that it may use."""

    model: PreTrainedModel
    """The base, which a method must not change."""
    structure: Structure
    calibration: tuple[Tensor, ...]
    """Batches of token ids, [rows, length] each."""
    parameters: int
    """The number to reach."""
    repair: Callable[[SuperNetwork, Architecture], Variants] | None = None
    """Refits what `ordered_cut` cuts, given the super-network in its order; None cuts plainly."""

    def supernet(self) -> SuperNetwork:
        """A copy of the base, free to be permuted and cut."""
        return SuperNetwork(copy.deepcopy(self.model), structure=self.structure)


@dataclass(frozen=True)
class Baseline:
    """A method by its name on the command line, and the paper that defines it."""

    name: str
    paper: str
    cut: Callable[[PruningContext], Cut]
    """Cuts the base to the size. Raises RequestError where the method cannot reach it, or does not suit the family."""
    repairable: bool = False
    """Whether it makes its network by `ordered_cut` and keeps the residual width, so that a repair can refit it."""


@cache
def baselines() -> dict[str, Baseline]:
    """All published methods by name, in the order of the files."""
    modules = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return {baseline.name: baseline for module in modules for baseline in module.BASELINES}


def as_batch(ids: Tensor) -> Batch:
    """Token ids [rows, length] as a batch in which each row is one document and every token a target."""
    return Batch(ids, ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids))


def ordered_cut(context: PruningContext, scores: Scores, architecture: Architecture) -> Cut:
    """The sub-network of the base of this architecture that keeps the units of the highest scores; refitted where the
    context says how."""
    supernet = context.supernet()
    apply_ordering(supernet, order_by(scores))
    variants = None if context.repair is None else context.repair(supernet, architecture)
    return extract(supernet.model, context.structure, architecture, variants), architecture


def without(architecture: Architecture, layers: Collection[int]) -> Architecture:
    """`architecture` with these layers removed."""
    kept = (REMOVED if index in layers else sizes for index, sizes in enumerate(architecture.layers))
    return replace(architecture, layers=tuple(kept))


def removal(context: PruningContext, removals: Iterable[Collection[int]]) -> Architecture:
    """The base without as many layers as the size asks for, its remaining layers narrowed to meet it exactly.

    `removals` are sets of layers, each larger than the one before; the last that keeps at least the parameters is
    taken.
    """
    chosen = context.structure.base
    for removed in removals:
        smaller = without(context.structure.base, removed)
        if context.structure.parameters(smaller) < context.parameters * (1 - TOLERANCE / 2):
            break
        chosen = smaller
    return narrowed(context, chosen)


def removable(context: PruningContext) -> int:
    """How many whole layers can be removed at the most without falling below the size asked for."""
    structure, base = context.structure, context.structure.base
    whole = structure.parameters(base)
    saved = sorted(whole - structure.parameters(without(base, {layer})) for layer in range(len(base.layers)))
    left = (whole - total for total in accumulate(saved[:-1]))  # one layer always stays
    return sum(parameters >= context.parameters * (1 - TOLERANCE / 2) for parameters in left)


def narrowed(context: PruningContext, architecture: Architecture) -> Architecture:
    """`architecture` with the FFN of every remaining layer at the same width, so that the size is met. Raises
    RequestError where no width meets it."""
    if context.structure.parameters(architecture) <= context.parameters * (1 + TOLERANCE / 2):
        return architecture
    return closest(
        context, lambda width: with_ffn(architecture, width), "narrowing the FFN of the layers that are left"
    )


def uniform_width(context: PruningContext) -> Architecture:
    """The architecture of the size asked for whose layers all keep the same share of their neurons and, as nearly as
    whole groups allow, the same share of their key-value groups. Raises RequestError where there is none."""
    base = context.structure.base
    most = max(layer.num_key_value_heads for layer in base.layers)
    full = max(layer.intermediate_size for layer in base.layers)
    candidates = []
    for groups in range(1, most + 1):
        try:
            candidate = closest(context, partial(with_ffn, with_groups(base, groups)), "uniform width")
        except RequestError:
            continue
        width = max(layer.intermediate_size for layer in candidate.layers)
        candidates.append((abs(groups / most - width / full), -groups, candidate))
    if not candidates:
        raise RequestError(f"{context.parameters:,} parameters cannot be reached by uniform width")
    return min(candidates, key=lambda candidate: candidate[:2])[2]


def with_ffn(architecture: Architecture, width: int) -> Architecture:
    """`architecture` with every MLP at most `width` neurons wide."""
    layers = (replace(layer, intermediate_size=min(width, layer.intermediate_size)) for layer in architecture.layers)
    return replace(architecture, layers=tuple(layers))


def with_groups(architecture: Architecture, groups: int) -> Architecture:
    """`architecture` with at most `groups` key-value heads in every layer, each with as many query heads as before."""

    def cut(layer: LayerSizes) -> LayerSizes:
        if layer.num_key_value_heads <= groups:
            return layer
        queries = layer.num_attention_heads // layer.num_key_value_heads
        return replace(layer, num_attention_heads=groups * queries, num_key_value_heads=groups)

    return replace(architecture, layers=tuple(map(cut, architecture.layers)))


def closest(context: PruningContext, sized: Callable[[int], Architecture], what: str) -> Architecture:
    """The architecture closest to the size, of those that `sized` gives for FFN widths at the coarsest step that comes
    close enough. Raises RequestError, naming `what`, where none is within the tolerance."""
    full = max(layer.intermediate_size for layer in context.structure.base.layers)
    best = None
    least = max(context.structure.step(layer) for layer in context.structure.base.layers)
    for step in (step for step in STEPS if step >= least):
        widths = list(range(step, full + 1, step)) or [full]
        miss, best = min(
            (abs(context.structure.parameters(a) / context.parameters - 1), i, a)
            for i, a in enumerate(map(sized, widths))
        )[::2]
        if miss <= TOLERANCE / 2:
            return best
    assert best is not None
    if miss <= TOLERANCE:
        return best
    raise RequestError(f"{context.parameters:,} parameters cannot be reached within {TOLERANCE:.0%} by {what}")
