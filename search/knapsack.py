"""The best architecture of every size, from the degradation that each choice for a layer should cause. No torch.

Degradations of single layers are added up, and `assemble` finds the least total for every size by dynamic programming.
They do not add up exactly where many layers are cut, so the result is where a search starts, not where it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from supernet.architecture import Architecture, Half, LayerSizes, Structure

GRID = 4096
"""Sizes that `assemble` tells apart, as parts of the base: rounding to them keeps deep networks quick."""

Variants = Sequence[tuple[int, LayerSizes]]
"""(layer, its sizes): a base in which just this layer, and just one half-block of it or the whole, is cut."""
Degradations = Mapping[tuple[int, LayerSizes], float]
"""{variant: how much worse the network is with it}."""
Path = list[tuple[int, Architecture]]
"""(parameters, architecture), ascending."""


@dataclass(frozen=True)
class Option:
    """One way to size a layer: its parameters, and the degradation that it is expected to cause."""

    sizes: LayerSizes
    parameters: int
    degradation: float


def options(structure: Structure, degradations: Degradations) -> list[list[Option]]:
    """Every layer's options: all pairs of an attention and an MLP variant, their degradations added, and the layer's
    removal where its degradation is given."""
    layers = []
    for index, full in enumerate(structure.base.layers):
        of_layer = {sizes: degradation for (layer, sizes), degradation in degradations.items() if layer == index}
        attention = {full: 0.0} | {s: d for s, d in of_layer.items() if half_of(s, full) == "attention"}
        mlp = {full: 0.0} | {s: d for s, d in of_layer.items() if half_of(s, full) == "mlp"}
        both = {s: d for s, d in of_layer.items() if s.removed}
        layers.append(_paired(structure, index, attention, mlp, both))
    return layers


def options_around(
    structure: Structure,
    at: Architecture,
    variants: Variants,
    degradation: Callable[[Architecture], float],
    before: float,
    on_layer: Callable[[], None],
) -> list[list[Option]]:
    """As `options`, with the degradation of exchanging one half-block, or the layer, of `at` rather than of the base;
    `before` is the degradation of `at` itself. The last layer comes first, so that a cache of leading layers serves
    (`supernet.training.traces.LayerCache`); `on_layer` is called when a layer is done."""

    def more(index: int, sizes: LayerSizes) -> float:
        return 0.0 if sizes == at.layers[index] else degradation(with_layer(at, index, sizes)) - before

    layers = []
    for index, full in reversed(list(enumerate(structure.base.layers))):
        now = at.layers[index]
        attention, mlp, both = dict[LayerSizes, float](), dict[LayerSizes, float](), dict[LayerSizes, float]()
        for sizes in [full, now, *(sizes for layer, sizes in variants if layer == index)]:
            half = None if sizes.removed else half_of(sizes, full)
            if half == "attention" or sizes in (full, now):
                attention[sizes] = more(index, joined(sizes, now))
            if half == "mlp" or sizes in (full, now):
                mlp[sizes] = more(index, joined(now, sizes))
            if half is None and sizes != now:
                both[sizes] = more(index, sizes)
        layers.append(_paired(structure, index, attention, mlp, both))
        on_layer()
    return layers[::-1]


def _paired(
    structure: Structure,
    index: int,
    attention: Mapping[LayerSizes, float],
    mlp: Mapping[LayerSizes, float],
    both: Mapping[LayerSizes, float],
) -> list[Option]:
    """A layer's options from the degradation of each size of its halves, and of both at once where that is given."""
    empty = structure.base.without_layers()
    outer = structure.parameters(empty)
    rows = {joined(a, m): attention[a] + mlp[m] for a, m in product(attention, mlp)} | dict(both)
    return [
        Option(sizes, structure.parameters(with_layer(empty, index, sizes)) - outer, degradation)
        for sizes, degradation in rows.items()
    ]


def with_layer(architecture: Architecture, index: int, sizes: LayerSizes) -> Architecture:
    """`architecture` with one layer sized differently."""
    layers = architecture.layers
    return Architecture(architecture.hidden_size, (*layers[:index], sizes, *layers[index + 1 :]))


def half_of(sizes: LayerSizes, full: LayerSizes) -> Half | None:
    """The one half-block that a variant cuts, or None where it cuts both."""
    if sizes.intermediate_size == full.intermediate_size and sizes.num_experts == full.num_experts:
        return "attention"
    if sizes.num_key_value_heads == full.num_key_value_heads:
        return "mlp"
    return None


def joined(attention: LayerSizes, mlp: LayerSizes) -> LayerSizes:
    """The attention of one variant with the MLP of another."""
    return LayerSizes(
        attention.num_attention_heads, attention.num_key_value_heads, mlp.intermediate_size, mlp.num_experts
    )


def assemble(structure: Structure, layers: Sequence[Sequence[Option]]) -> Path:
    """For every size, the architecture of least total degradation.

    A knapsack with one option from each layer, solved layer by layer (dynamic programming) over sizes rounded to 1/4096
    of the base's, keeping what no other dominates.
    """
    whole = structure.parameters(structure.base)
    outer = structure.parameters(structure.base.without_layers())
    # 1. Add layer after layer. A state is a size with its least total degradation; `steps` has, for every layer and
    #    state, the state before it and the option taken.
    sizes, totals = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for row in layers:
        grown = (sizes[:, None] + np.array([o.parameters for o in row])).ravel()
        totals_grown = (totals[:, None] + np.array([o.degradation for o in row])).ravel()
        order = np.lexsort((grown, totals_grown, grown * GRID // whole))
        cells = (grown * GRID // whole)[order]
        best = order[np.r_[True, cells[1:] != cells[:-1]]]  # the least degradation of each rounded size
        best = best[np.r_[True, totals_grown[best][1:] < np.minimum.accumulate(totals_grown[best])[:-1]]]
        sizes, totals = grown[best], totals_grown[best]
        steps.append((best // len(row), best % len(row)))
    # 2. Walk back from every last state.
    path = []
    for state in range(len(sizes)):
        chosen, at = [], state
        for row, (before, taken) in zip(reversed(layers), reversed(steps), strict=True):
            chosen.append(row[taken[at]].sizes)
            at = int(before[at])
        if any(sizes.num_key_value_heads for sizes in chosen):  # a network keeps attention somewhere
            architecture = Architecture(structure.base.hidden_size, tuple(reversed(chosen)))
            path.append((outer + int(sizes[state]), architecture))
    return path
