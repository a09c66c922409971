"""Random search."""

from __future__ import annotations

from search.algorithms import Algorithm
from search.space import Genome


class RandomSearch(Algorithm):
    """Uniform random genomes without repetition: the baseline that any other has to beat."""

    name = "random"

    def _propose(self, n: int) -> list[Genome]:
        return self._fresh(n)


ALGORITHMS = (RandomSearch,)
