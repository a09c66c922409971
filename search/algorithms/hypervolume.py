"""LINAS that takes the next generation by the hypervolume that it is expected to add."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from search.algorithms.linas import LINAS
from search.pareto import Costs, non_dominated, ranks
from search.space import Genome

Matrix = NDArray[np.float64]

POINTS = 2048
"""Points that stand for the volume of the objectives' box; a power of two."""
CANDIDATES = 400
"""The predicted best, of which a generation is taken."""
BATCH = 2
"""Measured at a time, before predictors are trained anew."""


class ExpectedHypervolume(LINAS):
    """LINAS whose generations are small, and taken one by one by their expected hypervolume improvement (Emmerich,
    Giannakoglou and Naujoks 2006, doi 10.1109/TEVC.2005.859463; batches as in Daulton, Balandat and Bakshy, arXiv
    2006.05078): the volume that the measured front leaves open, each point of it weighted with the probability that
    the candidate dominates it, and that nothing that was taken before does.

    The inner search, the predictors and what happens without one are LINAS's.
    """

    name = "ehvi"

    def _propose(self, n: int) -> list[Genome]:
        return super()._propose(min(n, BATCH) if self.genomes else n)

    def _select(self, n: int, seen: Mapping[Genome, tuple[list[float], list[float]]]) -> list[Genome]:
        candidates = [g for g in seen if g not in self._asked and all(v <= 0 for v in seen[g][1])]
        measured, violations = self._costs()
        measured = measured[(violations <= 0).all(axis=1)]
        if len(candidates) <= n or not len(measured):
            return super()._select(n, seen)
        # 1. The predicted best, front by front.
        costs = np.array([seen[g][0] for g in candidates])
        nearest = np.concatenate(ranks(costs))[:CANDIDATES]
        # 2. Points of the volume that the measured front leaves open.
        points, _ = open_points(measured, costs.min(0), self.seed)
        # 3. How likely each candidate dominates each of them.
        rows = np.array([candidates[i] for i in nearest])
        features = self.space.features(rows)
        dominates = np.ones((len(rows), len(points)))
        for objective, cost, bounds in zip(self.objectives, costs[nearest].T, points.T, strict=True):
            predictor = self.predictors.get(objective.name)
            dominates *= predictor.probability(features, bounds) if predictor else cost[:, None] <= bounds
        return [candidates[nearest[i]] for i in most_improving(dominates, n)]


def open_points(measured: Costs, best: Matrix, seed: int) -> tuple[Matrix, float]:
    """Points that fill evenly what `measured` [n, objectives] does not dominate, [points, objectives], and the volume
    that each stands for. The box reaches a twentieth beyond the worst of each objective, and as far beyond the `best`
    that is predicted, of which no more than a quarter of the range is believed."""
    high, least = measured.max(0), measured.min(0)
    low = np.clip(best, least - (high - least) / 4, least)
    sides = 1.1 * (high - low)
    points = low - sides / 22 + qmc.Sobol(len(sides), seed=seed).random(POINTS) * sides
    front = measured[non_dominated(measured)]
    return points[~(front[:, None] <= points).all(axis=2).any(axis=0)], float(sides.prod()) / POINTS


def most_improving(dominates: Matrix, n: int) -> list[int]:
    """`n` candidates, each the one that adds the most to those before it: by the probability that each dominates each
    point, [candidates, points]."""
    left = np.ones(dominates.shape[1])
    chosen: list[int] = []
    while len(chosen) < min(n, len(dominates)):
        gains = dominates @ left
        gains[chosen] = -1.0
        chosen.append(int(np.argmax(gains)))
        left *= 1 - dominates[chosen[-1]]
    return chosen


ALGORITHMS = (ExpectedHypervolume,)
