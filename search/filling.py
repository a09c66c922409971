"""Sub-networks that fill what they are allowed: widths grow, the most cut first, as far as the bounds leave room.

Weights are nested, so a sub-network that holds all of another, and more, is rarely worse; that the search picked the
smaller one is mostly the noise of its few documents.
"""

from __future__ import annotations

from collections.abc import Callable

from search.space import SearchSpace
from supernet.architecture import Architecture

GROWING = ("ffn", "kv", "experts")
"""Kinds of genes that grow. What is removed stays removed, and depth and residual width as they are: these decide how
fast a sub-network is, which may be why it is there."""


def filled(space: SearchSpace, architecture: Architecture, allowed: Callable[[Architecture], bool]) -> Architecture:
    """The architecture with its widths grown one step at a time, that gene first which has the least share of the
    base's, for as long as any result is `allowed`; itself where none is. Raises ValueError where the space does not
    hold it."""
    growing = {number for number, gene in enumerate(space.genes) if gene.kind in GROWING}

    def share(number: int) -> float:
        values = space.genes[number].values
        return values[genome[number]] / values[-1]

    genome = list(space.encode(architecture))
    while True:
        inert = space.inert(genome)
        able = [n for n in growing if 0 < share(n) < 1 and not inert[n]]
        for number in sorted(able, key=lambda n: (share(n), n)):
            grown = [value + (n == number) for n, value in enumerate(genome)]
            if allowed(candidate := space.decode(grown)):
                genome, architecture = grown, candidate
                break
        else:
            return architecture
