"""Greedy perturbation: the cut that degrades least, again and again."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from search.algorithms import Algorithm
from search.objectives import Computer
from search.space import Genome


class Greedy(Algorithm):
    """Perturbation-based selection (DARTS-PT, arXiv 2108.04392, applied to cutting): measure every single cut of the
    current architecture, make the one that degrades least, and go on until the target is met.

    A cut lowers one gene by one value. Degradation is what is lost of the first measured objective for each unit of
    the first computed objective that is saved. The target is the upper bound of the first constraint on a computed
    objective, or else the smallest architecture. Where the budget is too small for a round per cut, a round makes
    several of its cuts.
    """

    name = "greedy"

    def _prepare(self) -> None:
        bounded = [c for c in self.constraints if c.objective.kind == "computed" and c.maximum is not None]
        sized = [o for o in self.objectives if o.kind == "computed" and o.direction == "min"]
        if not (bounded or sized):
            raise ValueError("greedy needs a size among the objectives or constraints, such as parameters")
        self._size = Computer(self.space, bounded[0].objective if bounded else sized[0])
        self._target = bounded[0].maximum if bounded else None
        self._quality = self.measured[0]
        self._current = self.space.encode(self.space.base)
        self._waiting: list[Genome] = []

    def _propose(self, n: int) -> list[Genome]:
        while True:
            scores = {g: v[self._quality.name] for g, v in zip(self.genomes, self.values, strict=True)}
            if not self._waiting:
                if self._current not in scores:
                    self._waiting = [self._current]
                elif self._met() or not (cuts := self._cuts()):
                    return []
                else:
                    self._waiting = [g for g in cuts if g not in self._asked]
                    if not self._waiting:
                        self._commit(scores, cuts)
                        continue
            asking = [g for g in self._waiting if g not in self._asked][:n]
            self._waiting = [g for g in self._waiting if g not in asking and g not in self._asked]
            if asking:
                return asking

    def _met(self) -> bool:
        return self._target is not None and float(self._size(np.array([self._current]))[0]) <= self._target

    def _cuts(self) -> list[Genome]:
        """Smaller architectures, each with one gene of the current one a value lower."""
        rows = [
            [*self._current[:i], value - 1, *self._current[i + 1 :]] for i, value in enumerate(self._current) if value
        ]
        if not rows:
            return []
        canonical = dict.fromkeys(map(tuple, self.space.canonicalize(np.array(rows)).tolist()))
        cuts = [g for g in canonical if g != self._current]
        sizes = self._size(np.array([self._current, *cuts]))
        return [g for g, size in zip(cuts, sizes[1:], strict=True) if size < sizes[0]]

    def _commit(self, scores: Mapping[Genome, float], cuts: list[Genome]) -> None:
        """Make the cuts that degrade least; as many as bring the target within reach of the budget."""
        # 1. The cuts by what they degrade for each unit saved.
        sizes = self._size(np.array([self._current, *cuts]))
        now = self._quality.cost(scores[self._current])
        degradation = [
            (self._quality.cost(scores[g]) - now) / (sizes[0] - size) for g, size in zip(cuts, sizes[1:], strict=True)
        ]
        order = np.argsort(np.nan_to_num(degradation, nan=np.inf), kind="stable")
        # 2. How much this round has to save, so that the target is met within the budget.
        rounds = max(1, (self.evaluations - len(self.genomes)) // (len(cuts) + 1))
        target = self._target
        if target is None:
            target = float(self._size(np.zeros((1, len(self._current)), dtype=np.int64))[0])
        saved = max((sizes[0] - target) / rounds, 1e-9)
        # 3. Cut until that is saved.
        lowered = np.array(self._current)
        for i in order:
            lowered = np.minimum(lowered, cuts[i])
            reached = self.space.canonicalize(lowered[None])
            if sizes[0] - float(self._size(reached)[0]) >= saved:
                break
        self._current = tuple(self.space.canonicalize(lowered[None])[0].tolist())


ALGORITHMS = (Greedy,)
