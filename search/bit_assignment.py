"""Bits for an architecture: those that lose least at every number of bytes, from what each loses alone.

What bits cost hardly depends on the sizes (`docs/results.md`), so it is measured once, on the whole network. For one
architecture, every gene of bits then takes the value of the least loss + price * bytes; a higher price makes a smaller
package. These are the points of the convex hull of losses and bytes (Everett, doi 10.1287/opre.11.3.399). For one
number of bytes, `best_within` finds the least loss that fits: a knapsack with one choice of each gene.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from search.genes import AS_STORED, OUTER, Gene
from search.knapsack import knapsacks
from supernet.architecture import Architecture

Losses = Mapping[Gene, Mapping[int, float]]
"""What the whole network loses where one gene of bits has another value than that of what is as stored."""


def with_gene(architecture: Architecture, gene: Gene, bits: int) -> Architecture:
    """The architecture with another value of a gene of bits."""
    value: dict[str, Any] = {gene.kind: 0 if bits == AS_STORED else bits}
    if gene.kind in OUTER:
        return replace(architecture, **value)
    layers = enumerate(architecture.layers)
    changed = (replace(layer, **value) if gene.layer in (None, index) else layer for index, layer in layers)
    return replace(architecture, layers=tuple(changed))


def with_bits(
    architecture: Architecture, losses: Losses, bytes_of: Callable[[Architecture], float], prices: int = 24
) -> list[Architecture]:
    """The architecture in bits, from most bytes to least: what is best at so many prices, each once."""
    # 1. Every gene's choices.
    plain = architecture.without_bits()
    choices = choices_of(plain, losses, bytes_of)
    # 2. The prices, from one at which next to nothing is saved to one at which all is.
    pairs = (pair for rows in choices.values() for pair in combinations(rows, 2))
    steps = [(less[1] - more[1], less[2] - more[2]) for more, less in pairs]
    rates = [loss / saved for loss, saved in steps if saved > 0 and loss > 0]
    found = []
    for price in np.geomspace(min(rates, default=1.0) / 2, max(rates, default=1.0) * 2, prices):
        chosen = plain
        for gene, rows in choices.items():
            bits, _, _ = min(rows, key=lambda row: row[1] - price * row[2])
            chosen = with_gene(chosen, gene, bits)
        found.append(chosen)
    return list(dict.fromkeys(found))


def best_within(
    architecture: Architecture, losses: Losses, bytes_of: Callable[[Architecture], int], limit: int
) -> tuple[Architecture, float] | None:
    """The architecture in the bits of the least sum of losses that fit in `limit` bytes, and that sum; None where the
    fewest bits do not fit."""
    plain = architecture.without_bits()
    choices = choices_of(plain, losses, bytes_of)
    # Each choice's bytes beyond those of the gene's fewest, which are always there.
    most = {gene: max(saved for _, _, saved in rows) for gene, rows in choices.items()}
    rows = [[(round(most[gene] - saved), loss) for _, loss, saved in of_gene] for gene, of_gene in choices.items()]
    least = bytes_of(plain) - round(sum(most.values()))
    if limit < least:
        return None
    best = min(knapsacks(rows, limit - least), key=lambda filled: filled.degradation)
    chosen = plain
    for (gene, of_gene), number in zip(choices.items(), best.taken, strict=True):
        chosen = with_gene(chosen, gene, of_gene[number][0])
    return chosen, best.degradation


def fewest_bytes(architecture: Architecture, losses: Losses, bytes_of: Callable[[Architecture], float]) -> Architecture:
    """The architecture in the bits that take the fewest bytes; the most of those that take as few."""
    fewest = architecture.without_bits()
    for gene, of_gene in choices_of(fewest, losses, bytes_of).items():
        fewest = with_gene(fewest, gene, of_gene[-1][0])  # every choice saves more than the one before it
    return fewest


def choices_of(
    plain: Architecture, losses: Losses, bytes_of: Callable[[Architecture], float]
) -> dict[Gene, list[tuple[int, float, float]]]:
    """By gene: (bits, what they lose, the bytes that they save) of every value that saves more than the one before it,
    from most bits to fewest. A loss that falls where there are fewer bits is noise, and counts as that of more bits."""
    full = bytes_of(plain)
    choices: dict[Gene, list[tuple[int, float, float]]] = {}
    for gene, of_gene in losses.items():
        rows, worst = [(AS_STORED, 0.0, 0.0)] if AS_STORED in gene.values else [], 0.0
        for bits, loss in sorted(of_gene.items(), reverse=True):
            worst = max(worst, loss)
            saved = full - bytes_of(with_gene(plain, gene, bits))
            if not rows or saved > rows[-1][2]:  # a format may hold no fewer bits than it does
                rows.append((bits, worst, saved))
        choices[gene] = rows
    return choices


def spread_by_bytes(
    architectures: Sequence[Architecture], bytes_of: Callable[[Architecture], float], count: int
) -> list[Architecture]:
    """So many of them, in even steps of their order by bytes."""
    ordered = sorted(dict.fromkeys(architectures), key=lambda a: (bytes_of(a), a.key))
    steps = np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int)
    return [ordered[step] for step in dict.fromkeys(steps.tolist())]
