"""LINAS: measure a generation, train predictors on it, take the next one from a search on predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.problem import Problem
from pymoo.core.termination import NoTermination

from search.algorithms import Algorithm
from search.algorithms.evolution import Unwanted, evaluated, operators, problem_of
from search.pareto import Costs, non_dominated, ranks, spread
from search.predictors import JUDGED, KINDS, Judgement, Predictor, Vector, judge
from search.sampling import sample_tilted
from search.space import Genome, Genomes


class _Predicted(Problem):
    """Predicted and computed objectives of genomes. `seen`: costs and violations of every genome asked for."""

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

    def _evaluate(self, X: Genomes, out: dict[str, Costs], *args: object, **kwargs: object) -> None:
        rows = X.astype(np.int64)
        costs, violations = self.search._predict(rows)
        out["F"], out["G"] = costs, violations
        self.seen.update(
            zip(map(tuple, rows.tolist()), zip(costs.tolist(), violations.tolist(), strict=True), strict=True)
        )


class LINAS(Algorithm):
    """LINAS (Cummings et al., arXiv 2205.10358): measure a generation, train predictors on all measurements, search
    with NSGA-II on predictions, and take the next generation from what that search saw.

    Differences from the published algorithm: sizes and speed are computed, not predicted; the next generation is the
    non-dominated *unmeasured* candidates, spread over what the measured front leaves open; and while a measured
    objective has no predictor that ranks better than chance, generations are NSGA-II's offspring of the measured.
    """

    name = "linas"
    inner_population = 100
    inner_generations = 25
    listed = 10_000
    """Spaces of at most so many genomes are predicted whole: one matrix is quicker than generations."""

    def _prepare(self) -> None:
        ordinals = len(self.space.genes)
        self.predictors = {o.name: Predictor(ordinals, seed=self.seed) for o in self.measured}
        self._set_aside: dict[str, list[str]] = {o.name: [] for o in self.measured}
        self._newest: dict[str, dict[str, Judgement]] = {}
        self._unjudged: dict[str, list[tuple[Vector, dict[str, Vector]]]] = {o.name: [] for o in self.measured}

    def _learn(self, new: int) -> None:
        """Judge all predictors on the newest measurements, before anything is trained on them: once there are `JUDGED`,
        which small generations reach together."""
        self._newest = {o.name: {} for o in self.measured}
        features = self.space.features(np.array(self.genomes[-new:]))
        for objective in self.measured:
            name, predictor = objective.name, self.predictors[objective.name]
            target = objective.cost(np.array([v[name] for v in self.values[-new:]]))
            usable = np.isfinite(target)
            if usable.any() and predictor.models:
                self._unjudged[name].append((target[usable], predictor.predictions(features[usable])))
            waiting = self._unjudged[name]
            if sum(len(costs) for costs, _ in waiting) < JUDGED:
                continue
            costs = np.concatenate([costs for costs, _ in waiting])
            self._newest[name] = {
                kind: judge(costs, np.concatenate([predictions[kind] for _, predictions in waiting])) for kind in KINDS
            }
            self._unjudged[name] = []
            for kind, judged in self._newest[name].items():
                aside = self._set_aside[name]
                if judged.useful and kind in aside:
                    aside.remove(kind)
                elif not judged.useful and kind not in aside:
                    aside.append(kind)
        self.report["predictors"] = {
            name: {
                "used": self.predictors[name].chosen,
                "newest": {kind: asdict(judgement) for kind, judgement in newest.items()},
                "set_aside": list(self._set_aside[name]),
            }
            for name, newest in self._newest.items()
        }

    def _propose(self, n: int) -> list[Genome]:
        if not self.genomes:
            return self._fresh(n)
        features = self.space.features(np.array(self.genomes))
        for objective in self.measured:
            target = objective.cost(np.array([v[objective.name] for v in self.values]))
            usable = np.isfinite(target)
            self.predictors[objective.name].fit(features[usable], target[usable], self._set_aside[objective.name])
        self.report["chosen"] = {
            name: {
                "chosen": predictor.chosen,
                "cross_validation": {kind: asdict(judgement) for kind, judgement in predictor.scores.items()},
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
        """Costs and violations of genomes, predicted where they are measured, computed where they are computed."""
        features = self.space.features(rows)
        columns = {o.name: o.cost(self.predictors[o.name].predict(features)) for o in self.measured}
        columns |= {name: computer(rows) for name, computer in self._computers.items()}
        costs, violations = self._arrange(columns)
        return costs, violations[:, :-1]  # predictions are always finite

    def _inner_search(self) -> dict[Genome, tuple[list[float], list[float]]]:
        """Candidates with their predicted costs and violations: all that an NSGA-II on predictions came across, or the
        whole of a small space."""
        problem = _Predicted(self)
        if self.space.size <= self.listed:
            problem.evaluate(self.space.all_genomes(), return_values_of=["F"])
            return problem.seen
        best = [self.genomes[i] for i in self._ranked()[: self.inner_population // 2]]
        start = np.vstack([np.array(best), sample_tilted(self.space, self.rng, self.inner_population - len(best))])
        genetic = NSGA2(
            pop_size=self.inner_population, sampling=np.unique(start, axis=0), **operators(self.space, True)
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
        """The next generation: unmeasured candidates front by front, the last front thinned to what is far apart and
        far from the measured front; where too few are feasible, the least infeasible ones."""
        candidates = [g for g in seen if g not in self._asked]
        if not candidates:
            return []
        # 1. Candidates as predicted, and the measured front.
        costs = np.array([seen[g][0] for g in candidates])
        missed = np.array([sum(v for v in seen[g][1] if v > 0) for g in candidates])
        measured, violations = self._costs()
        measured = measured[(violations <= 0).all(axis=1)]
        measured = measured[non_dominated(measured)]
        # 2. Feasible candidates, front by front.
        feasible = np.flatnonzero(missed <= 0)
        chosen: list[int] = []
        for front in ranks(costs[feasible]):
            rows = feasible[front]
            occupied = np.vstack([measured, costs[chosen]]) if chosen else measured
            chosen += [int(rows[i]) for i in spread(costs[rows], n - len(chosen), occupied)]
            if len(chosen) >= n:
                break
        # 3. What misses the constraints least, for what is left.
        infeasible = np.flatnonzero(missed > 0)
        chosen += [int(i) for i in infeasible[np.argsort(missed[infeasible], kind="stable")][: n - len(chosen)]]
        return [candidates[i] for i in chosen]

    def _offspring(self, n: int) -> list[Genome]:
        """One generation of NSGA-II on measurements alone."""
        problem = problem_of(self.space, len(self.objectives), len(self.constraints) + 1)
        costs, violations = self._costs()
        genetic = NSGA2(pop_size=self.population, **operators(self.space, Unwanted(self._asked, self._exact_violation)))
        genetic.setup(problem, seed=int(self.rng.integers(2**31)), termination=NoTermination(), verbose=False)
        genetic.tell(infills=evaluated(problem, np.array(self.genomes), costs, violations))
        genetic.n_offsprings = n
        offspring = genetic.ask()
        chosen = [] if offspring is None else list(map(tuple, offspring.get("X").astype(int).tolist()))
        return chosen + self._fresh(n - len(chosen), chosen)


ALGORITHMS = (LINAS,)
