"""Search algorithms: `ask` names architectures to measure, `tell` takes their measurements.

No algorithm asks for an architecture twice. All randomness comes from one seeded generator, and nothing
depends on time or on the order in which measurements arrive, so telling the same results again reproduces the
same asks: a search is resumed by replaying it.

One file defines one kind of algorithm and lists it in `ALGORITHMS`; adding a file adds its algorithms.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import ClassVar, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from search.objectives import Computer, Constraint, Objective, check
from search.pareto import Costs
from search.sampling import sample, sample_tilted
from search.space import ENUMERABLE, Genome, Genomes, SearchSpace
from supernet.architecture import Architecture

Result = tuple[Architecture, Mapping[str, float]]
"""A measured architecture and its values by name."""


class ChosenPredictor(TypedDict):
    """Which kind predicts an objective, and how cross-validation judged each kind (`predictors.Judgement`)."""

    chosen: str | None
    cross_validation: dict[str, dict[str, float]]


class JudgedPredictor(TypedDict):
    """How the kinds of predictors of an objective ranked the newest measurements before they were trained on them."""

    used: str | None
    newest: dict[str, dict[str, float]]
    set_aside: list[str]


class AlgorithmReport(TypedDict, total=False):
    """What an algorithm adds to a generation's record; `chosen` and `predictors` are by objective."""

    mode: Literal["predicted", "evolved"]
    chosen: dict[str, ChosenPredictor]
    predictors: dict[str, JudgedPredictor]


class Algorithm(ABC):
    """A search over `space` for the front of `objectives` within `constraints`.

    `initial` is asked for first by every algorithm. `population` is the usual number of architectures in one
    generation, `evaluations` how many will be measured in all. Raises ValueError for objectives that cannot be
    searched.
    """

    name: ClassVar[str]

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        *,
        population: int = 50,
        evaluations: int = 250,
        seed: int = 0,
        constraints: Sequence[Constraint] = (),
        initial: Iterable[Architecture] = (),
    ) -> None:
        check(objectives)
        self.space = space
        self.objectives = tuple(objectives)
        self.constraints = tuple(constraints)
        self.population = population
        self.evaluations = evaluations
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        watched = {o.name: o for o in (*objectives, *(c.objective for c in constraints))}
        self.measured = tuple(o for o in watched.values() if o.kind == "measured")
        self._computers = {o.name: Computer(space, o) for o in watched.values() if o.kind == "computed"}
        self._asked: set[Genome] = set()
        self._queue: deque[Genome] = deque(dict.fromkeys(space.encode(a) for a in initial))
        self.genomes: list[Genome] = []
        self.values: list[dict[str, float]] = []
        self.report: AlgorithmReport = {}
        """What the last `ask` and `tell` add to the generation's record."""
        self._prepare()

    def _prepare(self) -> None:  # noqa: B027 - most algorithms need nothing
        """Called once, when everything that the search was asked for is set. Raises ValueError for what the algorithm
        cannot do."""

    def ask(self, n: int) -> list[Architecture]:
        """Up to `n` architectures that were never asked for; none if there are no more."""
        self.report = {}
        self._queue = deque(genome for genome in self._queue if genome not in self._asked)
        chosen = [self._queue.popleft() for _ in range(min(n, len(self._queue)))] or self._propose(n)
        if len(set(chosen)) < len(chosen) or not self._asked.isdisjoint(chosen):
            raise RuntimeError(f"{self.name} asked for an architecture twice")
        self._asked.update(chosen)
        return self.space.decode_all(np.array(chosen)) if chosen else []

    def tell(self, results: Sequence[Result]) -> None:
        """Take measurements in the order in which they were asked for; what is computed may be missing. Architectures
        that were never asked for, being known from before, will not be asked for either.
        """
        watched = [o.name for o in self.measured] + list(self._computers)
        for architecture, values in results:
            row = values if all(name in values for name in watched) else self.complete(architecture, values)
            self.genomes.append(self.space.encode(architecture))
            self.values.append({name: row[name] for name in watched})
        self._asked.update(self.genomes[len(self.genomes) - len(results) :])
        if results:
            self._learn(len(results))

    def complete(self, architecture: Architecture, values: Mapping[str, float]) -> dict[str, float]:
        """`values` and all that is computed, by name. Raises ValueError where something measured is missing."""
        missing = [o.name for o in self.measured if o.name not in values]
        if missing:
            raise ValueError(
                f"the measurement of {architecture.key} lacks {', '.join(missing)}; "
                f"it has {', '.join(values) or 'nothing'}"
            )
        genome = np.array([self.space.encode(architecture)])
        return {k: float(v) for k, v in values.items()} | {k: float(c(genome)[0]) for k, c in self._computers.items()}

    @abstractmethod
    def _propose(self, n: int) -> list[Genome]:
        """Up to `n` canonical genomes that were not asked for before."""

    def _learn(self, new: int) -> None:  # noqa: B027 - most algorithms learn nothing between generations
        """Called when the last `new` measurements have arrived."""

    def _fresh(self, n: int, avoid: Iterable[Genome] = ()) -> list[Genome]:
        """Up to `n` random canonical genomes that were not asked for; all that are left where that is fewer.

        Those that meet the constraints that need no measurement come first.
        """
        taken = self._asked | set(avoid)
        candidates: dict[Genome, float] = {}
        for _ in range(50):
            if sum(not violation for violation in candidates.values()) >= n:
                break
            rows = sample(self.space, self.rng, 2 * n)
            if self.constraints:
                # Uniform genomes have middling sizes; bounds may lie anywhere.
                rows = np.vstack([rows, sample_tilted(self.space, self.rng, 2 * n)])
            candidates |= self._violations(g for g in map(tuple, rows.tolist()) if g not in taken)
        if len(candidates) < n and self.space.size <= ENUMERABLE:
            left = [g for g in (self.space.encode(a) for a in self.space.architectures()) if g not in taken]
            candidates |= self._violations(left[i] for i in self.rng.permutation(len(left)))
        return sorted(candidates, key=lambda genome: candidates[genome])[:n]

    def _violations(self, genomes: Iterable[Genome]) -> dict[Genome, float]:
        """By how much each genome misses the constraints that need no measurement."""
        rows = list(genomes)
        return dict(zip(rows, self._exact_violation(np.array(rows)).tolist(), strict=True)) if rows else {}

    def _exact_violation(self, genomes: Genomes) -> NDArray[np.float64]:
        """By how much each row misses the constraints that are computed, summed, [n]."""
        total = np.zeros(len(genomes))
        for constraint in self.constraints:
            if constraint.objective.name in self._computers:
                total += constraint.violation(self._computers[constraint.objective.name](genomes))
        return total

    def _costs(self) -> tuple[Costs, Costs]:
        """Objectives (less is better), [n, objectives], and violations, [n, constraints + 1], of all measured.

        The last violation marks measurements that are not finite; their objectives are set to the worst seen.
        """
        return self._arrange({name: np.array([v[name] for v in self.values]) for name in self.values[0]})

    def _arrange(self, columns: Mapping[str, NDArray[np.float64]]) -> tuple[Costs, Costs]:
        """As `_costs`, of values [n] by name."""
        costs = np.column_stack([o.cost(columns[o.name]) for o in self.objectives]).astype(float)
        missed = [c.violation(columns[c.objective.name]) for c in self.constraints]
        failed = ~np.isfinite(np.column_stack([*columns.values()])).all(axis=1)
        for column in costs.T:
            finite = column[np.isfinite(column)]
            column[~np.isfinite(column)] = finite.max() if len(finite) else 0.0
        violations = np.nan_to_num(np.column_stack([*missed, failed.astype(float)]), nan=1.0, posinf=1e9)
        return costs, violations


@cache
def algorithms() -> dict[str, type[Algorithm]]:
    """All algorithms by name, in the order of the files."""
    modules = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return {kind.name: kind for module in modules for kind in module.ALGORITHMS}


def algorithm(name: str) -> type[Algorithm]:
    """An algorithm by name. Raises ValueError, with the valid names, for any other."""
    known = algorithms()
    if name not in known:
        raise ValueError(f"unknown search algorithm '{name}'; valid are {', '.join(known)}")
    return known[name]
