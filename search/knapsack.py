"""The knapsack problem: one option of each row, of the least total degradation for every size. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

GRID = 4096
"""Sizes that `knapsacks` tells apart, as parts of the whole: rounding to them keeps deep networks quick."""


@dataclass(frozen=True)
class Knapsack:
    """One option of each row: the sums of their sizes and degradations, and the options' numbers."""

    size: int
    degradation: float
    taken: list[int]


def knapsacks(rows: Sequence[Sequence[tuple[int, float]]], whole: int) -> list[Knapsack]:
    """For every size up to `whole`, one option of each row, (size, degradation), of the least sum of degradations; by
    ascending size.

    Solved row by row (dynamic programming) over sizes rounded to 1/4096 of `whole`, keeping what no other dominates: a
    sum that is less by less than that may be missed.
    """
    # 1. Add row after row. A state is a size with its least sum; `steps` has, for every row and state, the state before
    #    it and the option taken.
    sizes, totals = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for row in rows:
        grown = (sizes[:, None] + np.array([size for size, _ in row])).ravel()
        totals_grown = (totals[:, None] + np.array([degradation for _, degradation in row])).ravel()
        cells = grown * GRID // (whole + 1)  # the last ends with the whole
        order = np.lexsort((grown, totals_grown, cells))
        order = order[grown[order] <= whole]
        cells = cells[order]
        best = order[np.r_[True, cells[1:] != cells[:-1]]]  # the least degradation of each rounded size
        best = best[np.r_[True, totals_grown[best][1:] < np.minimum.accumulate(totals_grown[best])[:-1]]]
        sizes, totals = grown[best], totals_grown[best]
        steps.append((best // len(row), best % len(row)))
    # 2. Walk back from every last state.
    filled = []
    for state in range(len(sizes)):
        taken, at = [], state
        for before, options_taken in reversed(steps):
            taken.append(int(options_taken[at]))
            at = int(before[at])
        filled.append(Knapsack(int(sizes[state]), float(totals[state]), taken[::-1]))
    return filled
