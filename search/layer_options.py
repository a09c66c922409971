"""The best architecture of every size, from the degradation that each choice for a layer should cause. No torch.

A layer's options come from what was measured of single half-blocks. Degradations of single layers are added up, and
`search.knapsack` finds the least total for every size. They do not add up exactly where many layers are cut, so the
result is where a search starts, not where it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np

from search.knapsack import knapsacks
from supernet.architecture import HALVES, Architecture, Half, LayerSizes, Structure

LEAST = 1e-12
"""The least degradation that is told from none."""

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


@dataclass(frozen=True)
class HalfSizes:
    """The sizes of one half-block of a layer, the base's first, and a scale, ascending from 0, on which each size's
    degradation lies: how far its output moves (mean square) or, once that is known, how much the base degrades. None
    where nothing is known."""

    sizes: list[LayerSizes]
    scale: list[float] | None

    @property
    def anchors(self) -> list[int]:
        """Numbers of the sizes that are measured: the whole, the least and, of many, two between them, else one."""
        last = len(self.sizes) - 1
        inner = (1 / 3, 2 / 3) if last >= 6 else (1 / 3,)
        return sorted({0, last, *(min(last, max(1, round(share * last))) for share in inner)})

    def to_measure(self, at: int) -> list[int]:
        """Numbers of the sizes whose degradation is measured where the half-block now has size `at`: all others where
        nothing is known of them, all anchors around the whole, else one a sixth of the sizes larger, one as much
        smaller, and the next anchor below."""
        last = len(self.sizes) - 1
        if self.scale is None:
            return [i for i in range(last + 1) if i != at]
        if at == 0:
            return self.anchors[1:]
        step = max(1, last // 6)
        below = [i for i in self.anchors if i > at + step][:1]
        return sorted({max(0, at - step), min(last, at + step), *below} - {at})

    def degradations(self, at: int, measured: Mapping[int, float]) -> list[float]:
        """Of every size, from those of a few by their numbers: straight lines on the scale, which beyond the last ones
        go on as they are."""
        if self.scale is None:
            return [0.0 if i == at else measured[i] for i in range(len(self.sizes))]
        x: np.ndarray = np.array(self.scale)
        known = {at: 0.0, **measured}
        numbers = [i for n, i in enumerate(sorted(known)) if n == 0 or x[i] > x[sorted(known)[n - 1]]]
        if len(numbers) == 1:
            return [known.get(i, 0.0) for i in range(len(self.sizes))]
        points, values = x[numbers], np.array([known[i] for i in numbers])
        slopes = np.diff(values) / np.diff(points)
        estimates = np.interp(x, points, values)
        estimates = np.where(x < points[0], values[0] + slopes[0] * (x - points[0]), estimates)
        estimates = np.where(x > points[-1], values[-1] + slopes[-1] * (x - points[-1]), estimates)
        return [float(known.get(i, estimate)) for i, estimate in enumerate(estimates)]

    def rescaled(self, degradations: Mapping[int, float]) -> HalfSizes:
        """The same with the base's degradations as its scale, from those of the anchors: a power of the old scale
        between two of them, and in proportion to it below the first and above the last."""
        if self.scale is None:
            given = [0.0, *(degradations[i] for i in range(1, len(self.sizes)))]
            order = sorted(range(len(given)), key=lambda i: (i > 0, given[i]))
            return HalfSizes([self.sizes[i] for i in order], np.maximum.accumulate([given[i] for i in order]).tolist())
        numbers = sorted(degradations)
        x = np.log(np.maximum(self.scale, LEAST))
        points = x[numbers]
        values = np.maximum.accumulate(np.log([max(degradations[i], LEAST) for i in numbers]))
        estimates = np.interp(x, points, values) + np.minimum(x - points[0], 0) + np.maximum(x - points[-1], 0)
        return HalfSizes(self.sizes, [0.0, *np.exp(np.maximum.accumulate(estimates[1:])).tolist()])


def half_sizes(
    structure: Structure, variants: Variants, moved: Mapping[tuple[int, Half, LayerSizes], float]
) -> dict[tuple[int, Half], HalfSizes]:
    """The sizes of every half-block that `variants` cut, by (layer, half-block), from how far they move its output."""
    by_half: dict[tuple[int, Half], list[LayerSizes]] = {}
    for layer, sizes in variants:
        half = None if sizes.removed else half_of(sizes, structure.base.layers[layer])
        if half is not None:
            by_half.setdefault((layer, half), []).append(sizes)
    halves = {}
    for (layer, half), cut in by_half.items():
        full = structure.base.layers[layer]
        if all((layer, half, sizes) in moved for sizes in cut):
            rows = sorted((half in sizes.skip, moved[layer, half, sizes], sizes) for sizes in cut)
            far = np.maximum.accumulate([0.0, *(row[1] for row in rows)]).tolist()
            halves[layer, half] = HalfSizes([full, *(row[2] for row in rows)], far)
        else:
            halves[layer, half] = HalfSizes([full, *cut], None)
    return halves


def options_around(
    structure: Structure,
    at: Architecture,
    variants: Variants,
    halves: Mapping[tuple[int, Half], HalfSizes],
    degradation: Callable[[Architecture], float],
    on_layer: Callable[[], None],
) -> tuple[list[list[Option]], dict[tuple[int, Half], HalfSizes]]:
    """As `options`, with the degradation of exchanging one half-block, or the layer, of `at` rather than of the base,
    measured for a few sizes of each half-block and estimated for the others (`HalfSizes`). The last layer comes first,
    so that a cache of leading layers serves (`supernet.training.traces.LayerCache`); `on_layer` is called when a layer
    is done. Around the base, half-blocks come back with what was measured as their scale, else as they were."""
    before = degradation(at)
    after, layers = dict(halves), []

    def more(index: int, sizes: LayerSizes) -> float:
        return degradation(with_layer(at, index, sizes)) - before

    for index in reversed(range(len(structure.base.layers))):
        options_of_layer, rescaled = _options_of_layer(structure, at, index, variants, halves, partial(more, index))
        layers.append(options_of_layer)
        after |= rescaled
        on_layer()
    return layers[::-1], after


def _options_of_layer(
    structure: Structure,
    at: Architecture,
    index: int,
    variants: Variants,
    halves: Mapping[tuple[int, Half], HalfSizes],
    more: Callable[[LayerSizes], float],
) -> tuple[list[Option], dict[tuple[int, Half], HalfSizes]]:
    """One layer's part of `options_around`; `more` says how much worse `at` is with other sizes of this layer."""
    full, now = structure.base.layers[index], at.layers[index]
    of_half = {half: halves.get((index, half), HalfSizes([full], None)) for half in HALVES}
    # 1. What half-blocks are exchanged in: the layer as it is. Where a layer goes as a whole only, its half-blocks have
    #    no size 0 to be exchanged for another, so they are in the whole layer.
    around, shift = now, 0.0
    if now.removed and any(all(half not in sizes.skip for sizes in own.sizes) for half, own in of_half.items()):
        around, shift = full, more(full)
    # 2. Every size of each half-block: a few are measured, the others estimated.
    rows: dict[Half, dict[LayerSizes, float]] = {}
    rescaled: dict[tuple[int, Half], HalfSizes] = {}
    for half, own in of_half.items():
        units = _units_of(around, half)
        number = next(i for i, sizes in enumerate(own.sizes) if _units_of(sizes, half) == units)
        measured = {i: more(_exchanged(around, half, own.sizes[i])) - shift for i in own.to_measure(number)}
        if at == structure.base and (index, half) in halves:
            own = rescaled[index, half] = own.rescaled(measured)
            assert own.scale is not None
            rows[half] = dict(zip(own.sizes, own.scale, strict=True))
        else:
            rows[half] = dict(zip(own.sizes, own.degradations(number, measured), strict=True))
    # 3. The layer's removal, which changes nothing where it is removed.
    both = {} if around == now else {now: 0.0}
    for layer, sizes in variants:
        if layer == index and sizes.removed and sizes not in (around, now):
            both[sizes] = more(sizes)
    attention = {sizes: shift + worse for sizes, worse in rows["attention"].items()}
    return _paired(structure, index, attention, rows["mlp"], both), rescaled


def _exchanged(sizes: LayerSizes, half: Half, given: LayerSizes) -> LayerSizes:
    """A layer's sizes with one half-block as in others."""
    return joined(given, sizes) if half == "attention" else joined(sizes, given)


def _units_of(sizes: LayerSizes, half: Half) -> tuple[int, int]:
    """What a half-block keeps, which tells its sizes apart."""
    if half == "attention":
        return sizes.num_attention_heads, sizes.num_key_value_heads
    return sizes.intermediate_size, sizes.num_experts


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
    """For every size, the architecture of least total degradation: a knapsack with one option from each layer."""
    outer = structure.parameters(structure.base.without_layers())
    rows = [[(option.parameters, option.degradation) for option in row] for row in layers]
    path = []
    for filled in knapsacks(rows, structure.parameters(structure.base)):
        chosen = [row[number].sizes for row, number in zip(layers, filled.taken, strict=True)]
        if any(sizes.num_key_value_heads for sizes in chosen):  # a network keeps attention somewhere
            path.append((outer + filled.size, Architecture(structure.base.hidden_size, tuple(chosen))))
    return path
