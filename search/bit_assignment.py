"""Bits for an architecture: those that lose least at every number of bytes, from what each loses alone.

What bits cost hardly depends on the sizes (`docs/results.md`), so it is measured once, on the whole network. For one
architecture, every gene of bits then takes the value of the least loss + price * bytes; a higher price makes a smaller
package. These are the points of the convex hull of losses and bytes (Everett, doi 10.1287/opre.11.3.399). For one
number of bytes, `best_within` finds the least loss that fits: a knapsack with one choice for each gene.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from search.genes import AS_STORED, OUTER, Gene
from supernet.architecture import Architecture

Losses = Mapping[Gene, Mapping[int, float]]
"""What the whole network loses where one gene of bits has another value than that of what is as stored."""


def with_gene(architecture: Architecture, gene: Gene, bits: int) -> Architecture:
    """The architecture with another value of a gene of bits."""
    value: dict[str, Any] = {gene.kind: bits % AS_STORED}
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
    architecture: Architecture,
    losses: Losses,
    bytes_of: Callable[[Architecture], float],
    limit: float,
    steps: int = 2**14,
) -> tuple[Architecture, float] | None:
    """The architecture in the bits of the least sum of losses that fit in `limit` bytes, and that sum; None where the
    fewest bits do not fit.

    By dynamic programming over the bytes that are left beside the fewest bits, in so many steps. Each choice's bytes
    are rounded up to whole steps, so what is found fits; better sums that only just fit may be missed.
    """
    # 1. Each gene's choices, with the bytes that they take beyond the gene's fewest.
    plain = architecture.without_bits()
    choices = choices_of(plain, losses, bytes_of)
    most_saved = {gene: max(saved for _, _, saved in rows) for gene, rows in choices.items()}
    room = limit - (bytes_of(plain) - sum(most_saved.values()))
    if room < 0:
        return None
    unit = room / steps or 1.0
    # 2. The least sum of losses for every number of steps, gene by gene, and which choice gave it.
    least, taken = np.zeros(steps + 1), []
    for gene, rows in choices.items():
        tables = np.full((len(rows), steps + 1), np.inf)
        widths = [math.ceil((most_saved[gene] - saved) / unit - 1e-9) for _, _, saved in rows]
        for number, ((_, loss, _), width) in enumerate(zip(rows, widths, strict=True)):
            if width <= steps:
                tables[number, width:] = least[: steps + 1 - width] + loss
        taken.append((gene, rows, widths, tables.argmin(0)))
        least = tables.min(0)
    # 3. Back from all steps to each gene's choice.
    left, chosen = steps, plain
    for gene, rows, widths, best in reversed(taken):
        number = int(best[left])
        chosen, left = with_gene(chosen, gene, rows[number][0]), left - widths[number]
    return chosen, float(least[-1])


def choices_of(
    plain: Architecture, losses: Losses, bytes_of: Callable[[Architecture], float]
) -> dict[Gene, list[tuple[int, float, float]]]:
    """By gene: (bits, what they lose, the bytes that they save) of every value, from most bits to fewest. A loss that
    falls where there are fewer bits is noise, and counts as that of more bits."""
    full = bytes_of(plain)
    choices: dict[Gene, list[tuple[int, float, float]]] = {}
    for gene, of_gene in losses.items():
        rows, worst = [(AS_STORED, 0.0, 0.0)], 0.0
        for bits, loss in sorted(of_gene.items(), reverse=True):
            worst = max(worst, loss)
            rows.append((bits, worst, full - bytes_of(with_gene(plain, gene, bits))))
        choices[gene] = rows
    return choices


def spread_by_bytes(
    architectures: Sequence[Architecture], bytes_of: Callable[[Architecture], float], count: int
) -> list[Architecture]:
    """So many of them, in even steps of their order by bytes."""
    ordered = sorted(dict.fromkeys(architectures), key=lambda a: (bytes_of(a), a.key))
    steps = np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int)
    return [ordered[step] for step in dict.fromkeys(steps.tolist())]
