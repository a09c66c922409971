"""Architectures drawn from a search space: at random, of a size asked for, and the uniform ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from search.presets import POLICIES, kept_layers
from search.space import Genomes, SearchSpace
from supernet.architecture import REMOVED, Architecture, LayerSizes

TILTS = (-12.0, 12.0)
"""Exponents, of base e, between which `sample_near` looks for a size: the base's and the smallest lie well within."""
BISECTIONS = 24


def sample(space: SearchSpace, rng: np.random.Generator, n: int = 1) -> Genomes:
    """Random canonical genomes, [n, genes], each gene uniform and independent; they may repeat."""
    return space.canonicalize(rng.integers(0, space.counts, size=(n, len(space.genes))))


def sample_tilted(space: SearchSpace, rng: np.random.Generator, n: int) -> Genomes:
    """Random canonical genomes whose sizes spread widely, [n, genes]: `sample_near` without a size to meet."""
    u = rng.random((n, len(space.genes)))
    return space.canonicalize(_tilted(space, u, rng.uniform(-3, 3, size=(n, 1))))


def sample_near(
    space: SearchSpace, rng: np.random.Generator, parameters: Sequence[float] | NDArray[np.float64]
) -> Genomes:
    """For each number of parameters a random canonical genome of about that size, [n, genes].

    A uniform u for each gene picks the index floor(count * u**exp(tilt)). The index falls as the tilt grows, from the
    base to the smallest; bisection finds the tilt that meets the size. So sizes near either end, which a uniform draw
    would almost never reach, are as likely as the middle.
    """
    n = len(parameters)
    u = rng.random((n, len(space.genes)))
    low, high = np.full(n, TILTS[0]), np.full(n, TILTS[1])
    nearest, best = np.full(n, np.inf), np.zeros((n, len(space.genes)), dtype=np.int64)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        genomes = _tilted(space, u, middle[:, None])
        excess = np.array([space.structure.parameters(a) for a in space.decode_all(genomes)]) - np.asarray(parameters)
        better = np.abs(excess) < nearest
        best[better], nearest[better] = genomes[better], np.abs(excess)[better]
        low, high = np.where(excess > 0, middle, low), np.where(excess > 0, high, middle)
    return space.canonicalize(best)


def _tilted(space: SearchSpace, u: NDArray[np.float64], tilt: NDArray[np.float64]) -> Genomes:
    """The genomes that uniform numbers `u` [n, genes] stand for at each row's tilt [n, 1]: larger, smaller sizes."""
    return np.minimum((space.counts * u ** np.exp(tilt)).astype(np.int64), space.counts - 1)


def sample_sizes(
    space: SearchSpace, rng: np.random.Generator, n: int, least: float | None = None, most: float | None = None
) -> Genomes:
    """Genomes spread over the sizes from `least` (the smallest's) to `most` (the base's) parameters, one each from `n`
    equal shares of that range, [n, genes]."""
    smallest, base = (space.structure.parameters(a) for a in (space.smallest(), space.base))
    low = smallest if least is None else min(max(least, smallest), base)
    high = base if most is None else min(max(most, low), base)
    return sample_near(space, rng, low + (high - low) * (np.arange(n) + rng.random(n)) / max(n, 1))


def uniform_members(
    space: SearchSpace,
    n: int,
    largest: float | None = None,
    holds: Callable[[Architecture], bool] = lambda _: True,
) -> list[Architecture]:
    """At most `n` architectures whose kept layers are alike and whole, and that `holds` accepts, spread over all sizes
    up to `largest` parameters, the most evenly cut of each size: what the plain layout can hold."""
    members: dict[Architecture, tuple[int, float]] = {}  # to parameters, and how unevenly it is cut
    for candidate, shares in _uniform_members(space, largest):
        if holds(candidate):
            members[candidate] = (space.structure.parameters(candidate), max(shares) - min(shares))
    if not members or n < 1:
        return []
    low, high = min(p for p, _ in members.values()), max(p for p, _ in members.values())
    bins: dict[int, list[Architecture]] = {}
    for candidate, (parameters, _) in members.items():
        bins.setdefault(min(int(n * (parameters - low) / max(high - low, 1)), n - 1), []).append(candidate)
    return [min(alike, key=lambda a: (members[a][1], members[a][0], a.layers)) for _, alike in sorted(bins.items())]


def any_uniform_member(
    space: SearchSpace, largest: float | None = None, holds: Callable[[Architecture], bool] = lambda _: True
) -> Architecture | None:
    """One of what `uniform_members` chooses from; None where there is none."""
    return next((candidate for candidate, _ in _uniform_members(space, largest) if holds(candidate)), None)


def _uniform_members(space: SearchSpace, largest: float | None) -> Iterator[tuple[Architecture, list[float]]]:
    """The candidates that are of the space, alike, and of at most `largest` parameters."""
    for candidate, shares in _uniform_candidates(space):
        small = largest is None or space.structure.parameters(candidate) <= largest
        if small and candidate.is_uniform_in(space.base) and candidate in space:
            yield candidate, shares


def _uniform_candidates(space: SearchSpace) -> Iterator[tuple[Architecture, list[float]]]:
    """Combinations of a common FFN width, a common number of heads and a depth, each with the shares of the base that
    it keeps of the three."""
    # 1. Only layers that are alike can be so in a member; some may have no heads (linear attention).
    layers = len(space.base.layers)
    full = max(space.base.layers)
    has_heads = [bool(layer.num_key_value_heads) for layer in space.base.layers]
    if any(layer not in (full, replace(full, num_attention_heads=0)) for layer in space.base.layers):
        return

    # 2. Values that every layer can take.
    common: dict[str, set[int]] = {}
    for kind, whole in (("kv", full.num_key_value_heads), ("ffn", full.intermediate_size)):
        of_layer = (
            space.values_of(kind, space.values_of(f"{kind}.{i}", (whole,)))
            for i in range(layers)
            if kind != "kv" or has_heads[i]
        )
        common[kind] = set.intersection(*map(set, of_layer)) - {0}

    # 3. Sets of layers to keep: the depth gene's, those of every policy where layers can be removed, or all.
    if "depth" in space.positions:
        subsets = {tuple(np.flatnonzero(row).tolist()) for row in space.kept}
    elif space.removable.all():
        subsets = {kept_layers(policy, layers, depth) for policy in POLICIES for depth in range(1, layers + 1)}
    else:
        subsets = {tuple(range(layers))}

    # 4. All combinations.
    queries = full.num_attention_heads // max(full.num_key_value_heads, 1)
    for hidden, group, kv, ffn, kept in product(
        space.values_of("hidden_size", (space.base.hidden_size,)),
        space.values_of("heads", (queries,)),
        sorted(common["kv"]),
        sorted(common["ffn"]),
        sorted(subsets),
    ):
        sizes = LayerSizes(kv * group, kv, ffn, full.num_experts)
        present = [sizes if has_heads[i] else replace(sizes, num_attention_heads=0) for i in range(layers)]
        rows = tuple(present[i] if i in kept else REMOVED for i in range(layers))
        shares = [kv / full.num_key_value_heads, ffn / full.intermediate_size, len(kept) / layers]
        yield Architecture(hidden, rows), shares
