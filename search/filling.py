"""Sub-networks that fill what they are allowed: widths grow, the most cut first, as far as the bounds leave room.

Weights are nested, so a sub-network that holds all of another, and more, is rarely worse; that the search picked the
smaller one is mostly the noise of its few documents.
"""

from __future__ import annotations

from collections.abc import Callable

from search.space import Genome, SearchSpace
from supernet.architecture import Architecture

GROWING = ("ffn", "kv", "experts")
"""Kinds of genes that grow. What is removed stays removed, and depth and residual width as they are: these decide how
fast a sub-network is, which may be why it is there."""


def filled(space: SearchSpace, architecture: Architecture, allowed: Callable[[Architecture], bool]) -> Architecture:
    """The architecture with its widths grown one step at a time, that gene first which has the least share of the
    base's, for as long as any result is `allowed`; itself where none is. Raises ValueError where the space does not
    hold it."""
    genome = space.encode(architecture)
    while True:
        for number in _growing(space, genome):
            grown = tuple(index + (n == number) for n, index in enumerate(genome))
            if allowed(candidate := space.decode(grown)):
                genome, architecture = grown, candidate
                break
        else:
            return architecture


def _growing(space: SearchSpace, genome: Genome) -> list[int]:
    """The genes that can grow by a step, that of the least share of the base's first."""
    inert, shares = space.inert(genome), {}
    for number, (gene, index) in enumerate(zip(space.genes, genome, strict=True)):
        share = gene.values[index] / gene.values[-1]
        if gene.kind in GROWING and 0 < share < 1 and not inert[number]:
            shares[number] = share
    return sorted(shares, key=lambda number: (shares[number], number))
