"""Published pruning criteria behind one interface, each from its paper's definition. One file here is one method.

A `Baseline` cuts a copy of the base down to a number of parameters. All are given the same `PruningContext`, so what
differs between them is the criterion alone; files are found by themselves. `docs/baselines.md` has the equations, and
what was left out of each.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from supernet.activation import SuperNetwork
from supernet.architecture import REMOVED, Architecture, LayerSizes, Structure
from supernet.common.errors import RequestError
from supernet.ordering import Scores, apply_ordering, order_by
from supernet.slicing import extract
from supernet.training.data import Batch

TOLERANCE = 0.01
"""How far from the size asked for a method may land, as a share of it."""

STEPS = (128, 64, 32, 16, 8, 4, 2, 1)
"""Multiples that an FFN width may be cut to: the coarsest that lands within half the tolerance is taken."""

Cut = tuple[nn.Module, Architecture]
"""A standalone network, and its sizes."""


@dataclass(frozen=True)
class PruningContext:
    """What every method is given, and all that it may use: the base (which it must not change), calibration token ids
    [batch, length], and the number of parameters to reach."""

    model: nn.Module
    structure: Structure
    calibration: tuple[Tensor, ...]
    parameters: int

    def supernet(self) -> SuperNetwork:
        """A copy of the base, free to be permuted and cut."""
        return SuperNetwork(copy.deepcopy(self.model), structure=self.structure)


@dataclass(frozen=True)
class Baseline:
    """A method by its name on the command line, the paper that defines it, and what it does.

    `cut` raises RequestError where the method cannot reach the size, or does not suit the family.
    """

    name: str
    paper: str
    cut: Callable[[PruningContext], Cut]


@cache
def baselines() -> dict[str, Baseline]:
    """All published methods by name, in the order of the files."""
    found: dict[str, Baseline] = {}
    for module in pkgutil.iter_modules(__path__):
        for baseline in importlib.import_module(f"{__name__}.{module.name}").BASELINES:
            found[baseline.name] = baseline
    return found


def alone(ids: Tensor) -> Batch:
    """Token ids [rows, length] as a batch whose rows are a document each, learnt from whole."""
    return Batch(ids, ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids))


def ordered_cut(context: PruningContext, scores: Scores, architecture: Architecture) -> Cut:
    """The sub-network of the base that keeps the units of the highest scores."""
    supernet = context.supernet()
    apply_ordering(supernet, order_by(scores))
    return extract(supernet.model, context.structure, architecture), architecture


def without(architecture: Architecture, layers: Collection[int]) -> Architecture:
    kept = (REMOVED if index in layers else sizes for index, sizes in enumerate(architecture.layers))
    return replace(architecture, layers=tuple(kept))


def removal(context: PruningContext, removals: Iterable[Collection[int]]) -> Architecture:
    """The last of `removals` (sets of layers, each larger than the one before) that keeps at least the parameters asked
    for; what whole layers are too coarse for is then taken from the FFN width of the others."""
    chosen = context.structure.base
    for removed in removals:
        smaller = without(context.structure.base, removed)
        if context.structure.parameters(smaller) < context.parameters * (1 - TOLERANCE / 2):
            break
        chosen = smaller
    return narrowed(context, chosen)


def narrowed(context: PruningContext, architecture: Architecture) -> Architecture:
    """`architecture` with the FFN of every layer that is left at the same width, so that the size is met."""
    if context.structure.parameters(architecture) <= context.parameters * (1 + TOLERANCE / 2):
        return architecture
    return closest(
        context, lambda width: with_ffn(architecture, width), "narrowing the FFN of the layers that are left"
    )


def uniform_width(context: PruningContext) -> Architecture:
    """The architecture of the size asked for whose layers all keep the same share of their neurons and, as nearly as
    whole groups allow, the same share of their key-value groups."""
    base = context.structure.base
    found = []
    most = max(layer.num_key_value_heads for layer in base.layers)
    for groups in range(1, most + 1):
        try:
            one = closest(context, partial(_uniform, base, groups), "uniform width")
        except RequestError:
            continue
        full = max(layer.intermediate_size for layer in base.layers)
        width = max(layer.intermediate_size for layer in one.layers)
        found.append((abs(groups / most - width / full), -groups, one))
    if not found:
        raise RequestError(f"{context.parameters:,} parameters cannot be reached by uniform width")
    return min(found, key=lambda item: item[:2])[2]


def _uniform(base: Architecture, groups: int, width: int) -> Architecture:
    return with_groups(with_ffn(base, width), groups)


def with_ffn(architecture: Architecture, width: int) -> Architecture:
    """Every MLP at most `width` neurons wide."""
    layers = (replace(layer, intermediate_size=min(width, layer.intermediate_size)) for layer in architecture.layers)
    return replace(architecture, layers=tuple(layers))


def with_groups(architecture: Architecture, groups: int) -> Architecture:
    """Every attention block with at most `groups` key-value heads, each with as many query heads as it had."""

    def cut(layer: LayerSizes) -> LayerSizes:
        if layer.num_key_value_heads <= groups:
            return layer
        queries = layer.num_attention_heads // layer.num_key_value_heads
        return replace(layer, num_attention_heads=groups * queries, num_key_value_heads=groups)

    return replace(architecture, layers=tuple(map(cut, architecture.layers)))


def closest(context: PruningContext, sized: Callable[[int], Architecture], what: str) -> Architecture:
    """The FFN width, at the coarsest step that lands close enough, whose network comes closest to the size."""
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
