"""What the published depth and width baselines would cut: their shapes, cut out of the super-network's own order.

The search then measures them, so its front holds no less than they do, as far as the space has their shapes. The
criteria are those of `evals.baselines`, in fewer passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from evals.baselines import with_groups, without
from evals.baselines.depth import least_turning, loss_in
from evals.warm_starts import Shapes
from search.space import SearchSpace
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture
from supernet.common.progress import bar
from supernet.importance import block_influence
from supernet.training.data import Batch

TRIED = 3
"""Layers whose removal SLEB's path measures at each step: those that hurt least when they were last measured."""
CLOSE = 0.95
"""Share of a size from which on whole layers alone, without narrowing what is left, are proposed too."""


def passes(layers: int) -> float:
    """Passes over the text: influence and residuals, each layer alone, and half of the layers by SLEB's path."""
    return 2 + layers + TRIED * layers / 2


def published(
    supernet: SuperNetwork, space: SearchSpace, batches: Sequence[Batch], sizes: Sequence[int]
) -> list[Architecture]:
    """For each of `sizes` (parameters) what the baselines would cut, as far as it is in the space and within the size:
    ShortGPT, late block, SLEB and Minitron's depth, whose remaining layers are narrowed to meet the size; all layers at
    one width and one number of heads; and one residual and FFN width. Those of the first size come first."""
    cuts = list(dict.fromkeys(tuple(removed) for removed in removals(supernet, space, batches, min(sizes, default=0))))
    shapes = []
    for size in sizes:
        shapes += [shape for path in cuts for shape in narrowed(space, path, size)]
        shapes += [shape for shape in (uniform_width(space, size), residual_width(space, size)) if shape is not None]
    return [shape for shape in dict.fromkeys(shapes) if shape in space and shape != space.base]


def removals(
    supernet: SuperNetwork, space: SearchSpace, batches: Sequence[Batch], smallest: int
) -> Iterable[list[frozenset[int]]]:
    """For each depth baseline the sets of layers that it removes, each larger than the one before, down to the
    `smallest` size; none where the space removes no layer."""
    depth = len(space.base.layers)
    if depth < 2 or not any(without(space.base, {layer}) in space for layer in range(depth)):
        return []

    def enough(removed: Iterable[int]) -> bool:
        return space.structure.parameters(without(space.base, frozenset(removed))) < smallest

    def path(sets: Iterable[Iterable[int]]) -> list[frozenset[int]]:
        """The sets down to the first that is smaller than the smallest size."""
        kept: list[frozenset[int]] = []
        for removed in sets:
            kept.append(frozenset(removed))
            if enough(removed):
                break
        return kept

    with bar("measuring layers", depth) as progress:
        # 1. ShortGPT, and the block that turns the last token least.
        ids = [batch.ids for batch in batches]
        influence = block_influence(supernet, ids)
        by_influence = sorted(range(depth), key=influence.__getitem__)
        late = least_turning(supernet, ids)
        # 2. Each layer alone: Minitron.
        loss = loss_in(supernet, batches)
        alone = []
        for layer in range(depth):
            alone.append(loss(without(space.base, {layer})))
            progress.advance()
        one_shot = sorted(range(depth), key=alone.__getitem__)
        # 3. One after another: SLEB.
        greedy = greedily(loss, space.base, alone, enough)
    steps = range(1, depth)
    return [
        path(by_influence[:n] for n in steps),
        path(late(n) for n in steps),
        path(greedy),
        path(one_shot[:n] for n in steps),
    ]


def greedily(
    loss: Callable[[Architecture], float],
    base: Architecture,
    alone: Sequence[float],
    enough: Callable[[Iterable[int]], bool],
) -> list[frozenset[int]]:
    """Sets of removed layers, always without the one more whose removal leaves the least loss.

    Of every step only `TRIED` are measured, those that hurt least when they were last measured: each layer hurts more
    the more others are gone, and their order changes little from one step to the next.
    """
    known, removed, sets = dict(enumerate(alone)), frozenset[int](), []
    while len(removed) < len(base.layers) - 1 and not enough(removed):
        left = sorted((layer for layer in known if layer not in removed), key=known.__getitem__)[:TRIED]
        if removed:  # alone they were measured already
            known |= {layer: loss(without(base, removed | {layer})) for layer in left}
        removed |= {min(left, key=known.__getitem__)}
        sets.append(removed)
    return sets


def narrowed(space: SearchSpace, path: Sequence[frozenset[int]], size: int) -> list[Architecture]:
    """The base without the last layers of a path that leave at least `size` parameters, all others as narrow as meets
    it; and without the next too, where that is close to the size."""
    structure, chosen = space.structure, space.base
    shapes = []
    for removed in path:
        smaller = without(space.base, removed)
        parameters = structure.parameters(smaller)
        if parameters <= size:
            shapes += [smaller] if parameters >= CLOSE * size else []
            break
        chosen = smaller
    fitting = at_most(space, size, partial(with_widths, space, chosen))
    return ([fitting] if fitting is not None else []) + shapes


def uniform_width(space: SearchSpace, size: int) -> Architecture | None:
    """All layers of one width and one number of head groups, at about the same share of both; None where the space has
    none within the size."""
    most = max(layer.num_key_value_heads for layer in space.base.layers)
    return evenest(space, size, ((groups / most, with_groups(space.base, groups)) for groups in range(1, most + 1)))


def residual_width(space: SearchSpace, size: int) -> Architecture | None:
    """All heads and layers, the residual and the FFN at about the same share; None where the residual width cannot be
    cut."""
    full = space.base.hidden_size
    narrower = [hidden for hidden in space.values_of("hidden_size") if hidden < full]
    return evenest(space, size, ((hidden / full, replace(space.base, hidden_size=hidden)) for hidden in narrower))


def evenest(space: SearchSpace, size: int, cuts: Iterable[tuple[float, Architecture]]) -> Architecture | None:
    """Of cuts, each with the share of its units that it keeps, narrowed to the size: the one whose FFN keeps the share
    nearest to that, the larger share among equals; None where the space has none within the size."""
    full = max(layer.intermediate_size for layer in space.base.layers)
    shapes = []
    for share, cut in cuts:
        shape = at_most(space, size, partial(with_widths, space, cut))
        if shape is not None and shape in space:
            width = max(layer.intermediate_size for layer in shape.layers)
            shapes.append((abs(share - width / full), -share, shape))
    return min(shapes, key=lambda row: row[:2], default=(0.0, 0.0, None))[2]


def at_most(space: SearchSpace, size: int, sized: Callable[[int], Architecture]) -> Architecture | None:
    """The largest within `size` of what `sized` makes of every FFN width that the space has; None where none is."""
    full = max(layer.intermediate_size for layer in space.base.layers)
    widths = {full} | {w for gene in space.genes if gene.kind == "ffn" for w in gene.values if w}
    shapes = [shape for width in widths if space.structure.parameters(shape := sized(width)) <= size]
    return max(shapes, key=lambda shape: (space.structure.parameters(shape), shape.layers), default=None)


def with_widths(space: SearchSpace, architecture: Architecture, width: int) -> Architecture:
    """`architecture` with the FFN of every layer at the largest width that the space has there and that is at most
    `width`; the smallest where none is."""
    common = space.values_of("ffn")
    layers = []
    for index, layer in enumerate(architecture.layers):
        values = [w for w in space.values_of(f"ffn.{index}", common or (layer.intermediate_size,)) if w]
        own = max((w for w in values if w <= width), default=min(values, default=0))
        layers.append(replace(layer, intermediate_size=min(own, layer.intermediate_size)))
    return replace(architecture, layers=tuple(layers))


WARM_STARTS = (Shapes("published", published, passes),)
