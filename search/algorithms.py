"""Search algorithms: `ask` names architectures worth measuring, `tell` brings the measurements back.

No algorithm asks for an architecture twice. All randomness comes from one seeded generator, and nothing
depends on time or on the order in which measurements arrive, so telling the same results again reproduces the
same asks: a search is resumed by replaying it.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pymoo.algorithms.base.genetic import GeneticAlgorithm
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.algorithms.moo.unsga3 import UNSGA3, comp_by_rank_and_ref_line_dist
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

from compressor.architecture import Architecture
from search.objectives import Computer, Constraint, Objective, check
from search.pareto import Costs, non_dominated, ranks, spread
from search.predictors import JUDGED, Predictor, Report
from search.space import ENUMERABLE, Genome, Genomes, SearchSpace

Result = tuple[Architecture, Mapping[str, float]]


class Algorithm(ABC):
    """A search over `space` for the front of `objectives` within `constraints`.

    `initial` is asked for first, whatever the algorithm. `population` is the usual number of architectures in
    one generation, `evaluations` how many will be measured in all. ValueError for objectives that cannot be
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
        self.report: dict[str, Any] = {}
        """What the last `ask` and `tell` have to say for the generation's record; plain JSON types."""

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
        """Take measurements in the order in which they were asked for; what is computed may be missing. What was never
        asked for, being known from elsewhere, will not be asked for either.
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
        """`values` and all that is computed, by name. ValueError where something measured is missing."""
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
        found: dict[Genome, float] = {}
        for _ in range(50):
            if sum(not missed for missed in found.values()) >= n:
                break
            rows = self.space.sample(self.rng, 2 * n)
            if self.constraints:
                # Uniform genomes have middling sizes; bounds may lie anywhere.
                rows = np.vstack([rows, self.space.sample_tilted(self.rng, 2 * n)])
            found |= self._missing(g for g in map(tuple, rows.tolist()) if g not in taken)
        if len(found) < n and self.space.size <= ENUMERABLE:
            left = [g for g in (self.space.encode(a) for a in self.space.architectures()) if g not in taken]
            found |= self._missing(left[i] for i in self.rng.permutation(len(left)))
        return sorted(found, key=lambda genome: found[genome])[:n]

    def _missing(self, genomes: Iterable[Genome]) -> dict[Genome, float]:
        """By how much each genome misses the constraints that need no measurement."""
        rows = list(genomes)
        return dict(zip(rows, self._exact_violation(np.array(rows)).tolist(), strict=True)) if rows else {}

    def _exact_violation(self, genomes: Genomes) -> NDArray[np.float64]:
        """The sum of what each row violates of the constraints that are computed, [n]."""
        total = np.zeros(len(genomes))
        for constraint in self.constraints:
            if constraint.objective.name in self._computers:
                total += constraint.violation(self._computers[constraint.objective.name](genomes))
        return total

    def _costs(self) -> tuple[Costs, Costs]:
        """Objectives, less is better, [n, objectives], and violations, [n, constraints + 1], of all measured.

        The last violation marks measurements that are not finite; their objectives stand at the worst seen.
        """
        return self._arrange({name: np.array([v[name] for v in self.values]) for name in self.values[0]})

    def _arrange(self, columns: Mapping[str, NDArray[np.float64]]) -> tuple[Costs, Costs]:
        costs = np.column_stack([o.cost(columns[o.name]) for o in self.objectives]).astype(float)
        missed = [c.violation(columns[c.objective.name]) for c in self.constraints]
        failed = ~np.isfinite(np.column_stack([*columns.values()])).all(axis=1)
        for column in costs.T:
            finite = column[np.isfinite(column)]
            column[~np.isfinite(column)] = finite.max() if len(finite) else 0.0
        violations = np.nan_to_num(np.column_stack([*missed, failed.astype(float)]), nan=1.0, posinf=1e9)
        return costs, violations


class RandomSearch(Algorithm):
    """Uniform random genomes without repetition: the baseline that any other has to beat."""

    name = "random"

    def _propose(self, n: int) -> list[Genome]:
        return self._fresh(n)


# -- evolution through pymoo --


class StepMutation(Mutation):
    """Each gene, with probability 1 / genes, moves one step or is drawn anew, with even chances.

    Polynomial mutation with rounding, as in DyNAS-T, never flips a gene of two values: at its usual eta of 20
    a move of more than half the range has a probability of 1e-6.
    """

    def _do(
        self, problem: Problem, X: Genomes, *args: Any, random_state: np.random.Generator, **kwargs: Any
    ) -> Genomes:
        X = np.array(X, dtype=np.int64)
        chosen = random_state.random(X.shape) < 1 / X.shape[1]
        steps = X + np.where(random_state.random(X.shape) < 0.5, -1, 1)
        drawn = random_state.integers(0, problem.xu.astype(np.int64) + 1, size=X.shape)
        moved = np.where(random_state.random(X.shape) < 0.5, steps, drawn)
        return np.clip(np.where(chosen, moved, X), 0, problem.xu.astype(np.int64))


class _Canonical(Repair):
    """Rounds to genomes and canonicalises them, so that equal architectures have equal rows."""

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.space = space

    def _do(self, problem: Problem, X: NDArray[Any], **kwargs: Any) -> Genomes:
        return self.space.canonicalize(np.around(X).astype(np.int64))


class _Unwanted(DuplicateElimination):
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


def _problem(space: SearchSpace, objectives: int, constraints: int) -> Problem:
    upper = space.upper
    return Problem(n_var=len(upper), n_obj=objectives, n_ieq_constr=constraints, xl=np.zeros(len(upper)), xu=upper)


def _evaluated(problem: Problem, genomes: Genomes, costs: Costs, violations: Costs) -> Population:
    population = Population.new("X", genomes)
    Evaluator().eval(StaticProblem(problem, F=costs, G=violations), population)
    return population


class _Evolution(Algorithm):
    """A genetic algorithm of pymoo, started from everything that was measured before its first generation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._genetic: GeneticAlgorithm | None = None
        self._problem = _problem(self.space, len(self.objectives), len(self.constraints) + 1)

    @abstractmethod
    def _build(self, operators: dict[str, Any]) -> GeneticAlgorithm:
        """The pymoo algorithm, with our operators."""

    def _propose(self, n: int) -> list[Genome]:
        if not self.genomes:
            return self._fresh(n)
        if self._genetic is None:
            self._genetic = self._build(_operators(self.space, _Unwanted(self._asked, self._exact_violation)))
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
        assert self._genetic is not None
        costs, violations = self._costs()
        rows = np.array(self.genomes[-new:])
        self._genetic.tell(infills=_evaluated(self._problem, rows, costs[-new:], violations[-new:]))


def _operators(space: SearchSpace, unwanted: DuplicateElimination | bool) -> dict[str, Any]:
    return {
        "crossover": SBX(prob=0.9, eta=15),
        "mutation": StepMutation(),
        "repair": _Canonical(space),
        "eliminate_duplicates": unwanted,
    }


class NSGA2Search(_Evolution):
    """NSGA-II (Deb et al. 2002)."""

    name = "nsga2"

    def _build(self, operators: dict[str, Any]) -> GeneticAlgorithm:
        return NSGA2(pop_size=self.population, **operators)


def _by_niche(
    pop: Population, P: NDArray[np.intp], random_state: np.random.Generator, **kwargs: Any
) -> NDArray[np.intp]:
    """U-NSGA-III's tournament, seeded throughout: pymoo draws between equally infeasible ones unseeded."""
    winners = comp_by_rank_and_ref_line_dist(pop, P, random_state=random_state)
    for i, (a, b) in enumerate(P):
        if pop[a].CV[0] == pop[b].CV[0] > 0:
            winners[i] = random_state.choice([a, b])
    return winners


class UNSGA3Search(_Evolution):
    """U-NSGA-III (Seada and Deb 2016), with at most `population` Das-Dennis reference directions."""

    name = "unsga3"

    def _build(self, operators: dict[str, Any]) -> GeneticAlgorithm:
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


class AGEMOEASearch(_Evolution):
    """AGE-MOEA (Panichella 2019). pymoo's needs numba."""

    name = "age-moea"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if importlib.util.find_spec("numba") is None:
            raise ValueError("age-moea needs numba; install it with: pip install 'nas-compressor[age-moea]'")
        super().__init__(*args, **kwargs)

    def _build(self, operators: dict[str, Any]) -> GeneticAlgorithm:
        from pymoo.algorithms.moo.age import AGEMOEA  # imports numba, which is optional

        return AGEMOEA(pop_size=self.population, **operators)


# -- LINAS --


class _Predicted(Problem):
    """Predicted and computed objectives of genomes; remembers all that it was asked for."""

    def __init__(self, search: LINAS) -> None:
        upper = search.space.upper
        super().__init__(
            n_var=len(upper),
            n_obj=len(search.objectives),
            n_ieq_constr=len(search.constraints),
            xl=np.zeros(len(upper)),
            xu=upper,
        )
        self.search = search
        self.seen: dict[Genome, tuple[list[float], list[float]]] = {}

    def _evaluate(self, X: Genomes, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        rows = X.astype(np.int64)
        costs, violations = self.search._predict(rows)
        out["F"], out["G"] = costs, violations
        self.seen.update(
            zip(map(tuple, rows.tolist()), zip(costs.tolist(), violations.tolist(), strict=True), strict=True)
        )


class LINAS(Algorithm):
    """LINAS (Cummings et al., arXiv 2205.10358): measure a generation, train predictors on all measurements,
    search with NSGA-II on predictions, and take the next generation from what that search saw.

    Differences from the published algorithm: sizes and speed are computed, not predicted; the next generation
    is the non-dominated *unmeasured* candidates, spread over what the measured front leaves open; and while a
    measured objective has no predictor that ranks better than chance, generations are NSGA-II's offspring of
    the measured.
    """

    name = "linas"
    inner_population = 100
    inner_generations = 25
    listed = 10_000
    """Spaces of at most so many genomes are predicted whole: one matrix is quicker than generations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ordinals = len(self.space.genes)
        self.predictors = {o.name: Predictor(ordinals, seed=self.seed) for o in self.measured}
        self._set_aside: dict[str, list[str]] = {o.name: [] for o in self.measured}
        self._newest: dict[str, dict[str, Report]] = {}

    def _learn(self, new: int) -> None:
        """Judge all predictors on the newest measurements, before anything is trained on them."""
        self._newest = {}
        features = self.space.features(np.array(self.genomes[-new:]))
        for name, predictor in self.predictors.items():
            target = np.array([v[name] for v in self.values[-new:]])
            usable = np.isfinite(target)
            self._newest[name] = predictor.newest(features[usable], target[usable]) if usable.any() else {}
            for kind, found in self._newest[name].items():
                aside = self._set_aside[name]
                if found.useful and kind in aside and found.n >= JUDGED:
                    aside.remove(kind)
                elif not found.useful and kind not in aside:
                    aside.append(kind)
        self.report["predictors"] = {
            name: {
                "used": self.predictors[name].chosen,
                "newest": {kind: asdict(found) for kind, found in newest.items()},
                "set_aside": list(self._set_aside[name]),
            }
            for name, newest in self._newest.items()
        }

    def _propose(self, n: int) -> list[Genome]:
        if not self.genomes:
            return self._fresh(n)
        features = self.space.features(np.array(self.genomes))
        for name, predictor in self.predictors.items():
            target = np.array([v[name] for v in self.values])
            usable = np.isfinite(target)
            predictor.fit(features[usable], target[usable], self._set_aside[name])
        self.report["chosen"] = {
            name: {
                "chosen": predictor.chosen,
                "cross_validation": {kind: asdict(found) for kind, found in predictor.scores.items()},
            }
            for name, predictor in self.predictors.items()
        }
        if any(predictor.chosen is None for predictor in self.predictors.values()):
            self.report["mode"] = "evolved"
            return self._offspring(n)
        self.report["mode"] = "predicted"
        chosen = self._select(n, self._inner_search())
        return chosen + self._fresh(n - len(chosen), chosen)

    def _predict(self, rows: Genomes) -> tuple[Costs, Costs]:
        features = self.space.features(rows)
        columns = {name: predictor.predict(features) for name, predictor in self.predictors.items()}
        columns |= {name: computer(rows) for name, computer in self._computers.items()}
        costs, violations = self._arrange(columns)
        return costs, violations[:, :-1]  # predictions are always finite

    def _inner_search(self) -> dict[Genome, tuple[list[float], list[float]]]:
        """Candidates with their predicted costs and violations: all that an NSGA-II on predictions came
        across, or the whole of a small space.
        """
        problem = _Predicted(self)
        if self.space.size <= self.listed:
            problem.evaluate(self.space.all_genomes(), return_values_of=["F"])
            return problem.seen
        best = [self.genomes[i] for i in self._ranked()[: self.inner_population // 2]]
        start = np.vstack([np.array(best), self.space.sample_tilted(self.rng, self.inner_population - len(best))])
        genetic = NSGA2(
            pop_size=self.inner_population, sampling=np.unique(start, axis=0), **_operators(self.space, True)
        )
        genetic.mating.n_max_iterations = 3  # a predicted generation need not be full
        genetic.setup(problem, seed=int(self.rng.integers(2**31)), termination=NoTermination(), verbose=False)
        for _ in range(self.inner_generations):
            genetic.next()
        return problem.seen

    def _ranked(self) -> list[int]:
        """Measured architectures, feasible first, then by non-dominated front."""
        costs, violations = self._costs()
        missed = violations.sum(axis=1)
        feasible, rest = np.flatnonzero(missed <= 0), np.flatnonzero(missed > 0)
        order = [int(feasible[i]) for front in ranks(costs[feasible]) for i in front]
        return order + [int(rest[i]) for i in np.argsort(missed[rest], kind="stable")]

    def _select(self, n: int, seen: Mapping[Genome, tuple[list[float], list[float]]]) -> list[Genome]:
        """The next generation: unmeasured candidates front by front, the last front thinned to what is far
        apart and far from the measured front; where too few are feasible, the least infeasible ones.
        """
        candidates = [g for g in seen if g not in self._asked]
        if not candidates:
            return []
        costs = np.array([seen[g][0] for g in candidates])
        missed = np.array([sum(v for v in seen[g][1] if v > 0) for g in candidates])
        measured, violations = self._costs()
        measured = measured[(violations <= 0).all(axis=1)]
        measured = measured[non_dominated(measured)]
        feasible = np.flatnonzero(missed <= 0)
        chosen: list[int] = []
        for front in ranks(costs[feasible]):
            rows = feasible[front]
            occupied = np.vstack([measured, costs[chosen]]) if chosen else measured
            chosen += [int(rows[i]) for i in spread(costs[rows], n - len(chosen), occupied)]
            if len(chosen) >= n:
                break
        infeasible = np.flatnonzero(missed > 0)
        chosen += [int(i) for i in infeasible[np.argsort(missed[infeasible], kind="stable")][: n - len(chosen)]]
        return [candidates[i] for i in chosen]

    def _offspring(self, n: int) -> list[Genome]:
        """One generation of NSGA-II on measurements alone."""
        problem = _problem(self.space, len(self.objectives), len(self.constraints) + 1)
        costs, violations = self._costs()
        genetic = NSGA2(
            pop_size=self.population, **_operators(self.space, _Unwanted(self._asked, self._exact_violation))
        )
        genetic.setup(problem, seed=int(self.rng.integers(2**31)), termination=NoTermination(), verbose=False)
        genetic.tell(infills=_evaluated(problem, np.array(self.genomes), costs, violations))
        genetic.n_offsprings = n
        offspring = genetic.ask()
        chosen = [] if offspring is None else list(map(tuple, offspring.get("X").astype(int).tolist()))
        return chosen + self._fresh(n - len(chosen), chosen)


# -- greedy --


class Greedy(Algorithm):
    """Perturbation-based selection (DARTS-PT, arXiv 2108.04392, turned to cutting): measure every single cut
    of the current architecture, make the least harmful, and go on until the target is met.

    A cut lowers one gene by one value. Harm is lost quality (the first measured objective) for each unit of
    the first computed objective saved. The target is the upper bound of the first constraint on a computed
    objective, or else the smallest architecture. Where the budget is too small for a round per cut, a round
    makes several of its cuts.
    """

    name = "greedy"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        bounded = [c for c in self.constraints if c.objective.kind == "computed" and c.maximum is not None]
        sized = [o for o in self.objectives if o.kind == "computed" and o.direction == "min"]
        if not (bounded or sized):
            raise ValueError("greedy needs a size among the objectives or constraints, such as parameters")
        self._size = Computer(self.space, bounded[0].objective if bounded else sized[0])
        self._target = bounded[0].maximum if bounded else None
        self._harmed = self.measured[0]
        self._current = self.space.encode(self.space.base)
        self._waiting: list[Genome] = []

    def _propose(self, n: int) -> list[Genome]:
        while True:
            known = {g: v[self._harmed.name] for g, v in zip(self.genomes, self.values, strict=True)}
            if not self._waiting:
                if self._current not in known:
                    self._waiting = [self._current]
                elif self._met() or not (cuts := self._cuts()):
                    return []
                else:
                    self._waiting = [g for g in cuts if g not in self._asked]
                    if not self._waiting:
                        self._commit(known, cuts)
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
        cuts = [
            g for g in dict.fromkeys(map(tuple, self.space.canonicalize(np.array(rows)).tolist())) if g != self._current
        ]
        sizes = self._size(np.array([self._current, *cuts]))
        return [g for g, size in zip(cuts, sizes[1:], strict=True) if size < sizes[0]]

    def _commit(self, known: Mapping[Genome, float], cuts: list[Genome]) -> None:
        """Make the least harmful cuts; as many as bring the target within reach of the budget."""
        sizes = self._size(np.array([self._current, *cuts]))
        now = self._harmed.cost(known[self._current])
        harm = [
            (self._harmed.cost(known[g]) - now) / (sizes[0] - size) for g, size in zip(cuts, sizes[1:], strict=True)
        ]
        order = np.argsort(np.nan_to_num(harm, nan=np.inf), kind="stable")
        rounds = max(1, (self.evaluations - len(self.genomes)) // (len(cuts) + 1))
        target = self._target
        if target is None:
            target = float(self._size(np.zeros((1, len(self._current)), dtype=np.int64))[0])
        saved = max((sizes[0] - target) / rounds, 1e-9)
        lowered = np.array(self._current)
        for i in order:
            lowered = np.minimum(lowered, cuts[i])
            reached = self.space.canonicalize(lowered[None])
            if sizes[0] - float(self._size(reached)[0]) >= saved:
                break
        self._current = tuple(self.space.canonicalize(lowered[None])[0].tolist())


ALGORITHMS: dict[str, type[Algorithm]] = {
    a.name: a for a in (LINAS, NSGA2Search, AGEMOEASearch, UNSGA3Search, RandomSearch, Greedy)
}


def algorithm(name: str) -> type[Algorithm]:
    """An algorithm by name. ValueError, with the known names, for any other."""
    if name not in ALGORITHMS:
        raise ValueError(f"unknown search algorithm '{name}'; valid are {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]
