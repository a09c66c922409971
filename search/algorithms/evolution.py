"""Genetic algorithms of pymoo, on genomes: NSGA-II, U-NSGA-III and AGE-MOEA."""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from pymoo.algorithms.base.genetic import GeneticAlgorithm
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.algorithms.moo.unsga3 import UNSGA3, comp_by_rank_and_ref_line_dist
from pymoo.core.crossover import Crossover
from pymoo.core.duplicate import DuplicateElimination
from pymoo.core.evaluator import Evaluator
from pymoo.core.mutation import Mutation
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.repair import Repair
from pymoo.core.termination import NoTermination
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.selection.tournament import TournamentSelection
from pymoo.problems.static import StaticProblem
from pymoo.util.ref_dirs import get_reference_directions

from search.algorithms import Algorithm
from search.pareto import Costs
from search.space import Genome, Genomes, SearchSpace

Operators = dict[str, Crossover | Mutation | Repair | DuplicateElimination | bool]
"""pymoo's operators by the names of its arguments."""


class StepMutation(Mutation):
    """Each gene, with probability 1 / genes, moves one step or is drawn anew, with even chances.

    Polynomial mutation with rounding, as in DyNAS-T, never flips a gene of two values: at its usual eta of 20 a move of
    more than half the range has a probability of 1e-6.
    """

    def _do(
        self, problem: Problem, X: Genomes, *args: object, random_state: np.random.Generator, **kwargs: object
    ) -> Genomes:
        X = np.array(X, dtype=np.int64)
        chosen = random_state.random(X.shape) < 1 / X.shape[1]
        steps = X + np.where(random_state.random(X.shape) < 0.5, -1, 1)
        drawn = random_state.integers(0, problem.xu.astype(np.int64) + 1, size=X.shape)
        moved = np.where(random_state.random(X.shape) < 0.5, steps, drawn)
        return np.clip(np.where(chosen, moved, X), 0, problem.xu.astype(np.int64))


class Canonical(Repair):
    """Rounds to genomes and canonicalises them, so that equal architectures have equal rows."""

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.space = space

    def _do(self, problem: Problem, X: NDArray[np.float64], **kwargs: object) -> Genomes:
        return self.space.canonicalize(np.around(X).astype(np.int64))


class Unwanted(DuplicateElimination):
    """Drops rows that repeat another, were asked for, or violate a constraint that is computed."""

    def __init__(self, asked: set[Genome], violation: Callable[[Genomes], NDArray[np.float64]]) -> None:
        super().__init__()
        self.asked = asked
        self.violation = violation

    def _do(self, pop: Population, other: Population | None, is_duplicate: NDArray[np.bool_]) -> NDArray[np.bool_]:
        taken = set(self.asked) if other is None else set(map(tuple, other.get("X").tolist()))
        for i, row in enumerate(map(tuple, pop.get("X").tolist())):
            is_duplicate[i] |= row in taken
            if other is None:
                taken.add(row)
        if other is None:
            is_duplicate |= self.violation(pop.get("X").astype(np.int64)) > 0
        return is_duplicate


def problem_of(space: SearchSpace, objectives: int, constraints: int) -> Problem:
    """pymoo's problem over the genomes of a space, with so many objectives and constraints."""
    upper = space.upper
    return Problem(n_var=len(upper), n_obj=objectives, n_ieq_constr=constraints, xl=np.zeros(len(upper)), xu=upper)


def evaluated(problem: Problem, genomes: Genomes, costs: Costs, violations: Costs) -> Population:
    """pymoo's population of measured genomes."""
    population = Population.new("X", genomes)
    Evaluator().eval(StaticProblem(problem, F=costs, G=violations), population)
    return population


class Evolution(Algorithm):
    """A genetic algorithm of pymoo, started from everything that was measured before its first generation."""

    def _prepare(self) -> None:
        self._genetic: GeneticAlgorithm | None = None
        self._problem = problem_of(self.space, len(self.objectives), len(self.constraints) + 1)

    @abstractmethod
    def _build(self, operators: Operators) -> GeneticAlgorithm:
        """The pymoo algorithm, with our operators."""

    def _propose(self, n: int) -> list[Genome]:
        if not self.genomes:
            return self._fresh(n)
        if self._genetic is None:
            self._genetic = self._build(operators(self.space, Unwanted(self._asked, self._exact_violation)))
            self._genetic.setup(
                self._problem, seed=int(self.rng.integers(2**31)), termination=NoTermination(), verbose=False
            )
            self._advance(len(self.genomes))
        self._genetic.n_offsprings = n
        offspring = self._genetic.ask()
        chosen = [] if offspring is None else list(map(tuple, offspring.get("X").astype(int).tolist()))
        return chosen + self._fresh(n - len(chosen), chosen)

    def _learn(self, new: int) -> None:
        if self._genetic is not None:
            self._advance(new)

    def _advance(self, new: int) -> None:
        """Give the genetic algorithm the last `new` measurements as its generation."""
        assert self._genetic is not None
        costs, violations = self._costs()
        rows = np.array(self.genomes[-new:])
        self._genetic.tell(infills=evaluated(self._problem, rows, costs[-new:], violations[-new:]))


def operators(space: SearchSpace, unwanted: DuplicateElimination | bool) -> Operators:
    """Crossover, mutation, repair and removal of `unwanted` rows, as pymoo's algorithms take them."""
    return {
        "crossover": SBX(prob=0.9, eta=15),
        "mutation": StepMutation(),
        "repair": Canonical(space),
        "eliminate_duplicates": unwanted,
    }


class NSGA2Search(Evolution):
    """NSGA-II (Deb et al. 2002)."""

    name = "nsga2"

    def _build(self, operators: Operators) -> GeneticAlgorithm:
        return NSGA2(pop_size=self.population, **operators)


def _by_niche(
    pop: Population, P: NDArray[np.intp], random_state: np.random.Generator, **kwargs: object
) -> NDArray[np.intp]:
    """U-NSGA-III's tournament, seeded throughout: pymoo 0.6 draws between equally infeasible ones unseeded."""
    winners = comp_by_rank_and_ref_line_dist(pop, P, random_state=random_state)
    for i, (a, b) in enumerate(P):
        if pop[a].CV[0] == pop[b].CV[0] > 0:
            winners[i] = random_state.choice([a, b])
    return winners


class UNSGA3Search(Evolution):
    """U-NSGA-III (Seada and Deb 2016), with at most `population` Das-Dennis reference directions."""

    name = "unsga3"

    def _build(self, operators: Operators) -> GeneticAlgorithm:
        count, partitions = len(self.objectives), 1
        directions = get_reference_directions("das-dennis", count, n_partitions=partitions)
        while len(directions) < self.population:
            partitions += 1
            more = get_reference_directions("das-dennis", count, n_partitions=partitions)
            if len(more) > self.population:
                break
            directions = more
        size = max(self.population, len(directions))
        return UNSGA3(directions, pop_size=size, selection=TournamentSelection(func_comp=_by_niche), **operators)


class AGEMOEASearch(Evolution):
    """AGE-MOEA (Panichella 2019). pymoo 0.6's needs numba."""

    name = "age-moea"

    def _prepare(self) -> None:
        if importlib.util.find_spec("numba") is None:
            raise ValueError("age-moea needs numba; install it with: pip install 'nas-compressor[age-moea]'")
        super()._prepare()

    def _build(self, operators: Operators) -> GeneticAlgorithm:
        from pymoo.algorithms.moo.age import AGEMOEA  # imports numba, which is optional

        return AGEMOEA(pop_size=self.population, **operators)


ALGORITHMS = (NSGA2Search, UNSGA3Search, AGEMOEASearch)
