"""The search loop: ask an algorithm, have its architectures measured wherever that is, tell it, report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from search.algorithms import algorithm as algorithm_named
from search.algorithms.greedy import Greedy
from search.multi_fidelity import Screening
from search.objectives import Constraint, Evaluation, Objective, check, number
from search.pareto import Costs, costs, front, hypervolume, violations
from search.space import SearchSpace
from supernet.architecture import Architecture

Measure = Callable[[list[Architecture]], Iterable[tuple[Architecture, Mapping[str, float]]]]
"""Measures architectures, in any order, each yielded as soon as it is known, with its values by name.

One that was measured before comes from the store, at once; so does all of an interrupted search, when it is
run again.
"""


@dataclass
class SearchResult:
    """All that a search measured, and how it went: one record of plain JSON types for each generation."""

    space: SearchSpace
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]
    algorithm: str
    seed: int
    evaluations: list[Evaluation] = field(default_factory=list)
    generations: list[dict[str, Any]] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)

    @property
    def front(self) -> list[Evaluation]:
        """The measured Pareto front within the constraints, by the first objective, best first."""
        return front(self.evaluations, self.objectives, self.constraints)

    def gene_counts(self) -> dict[str, dict[int, int]]:
        """How often each gene takes each value on the front; inert genes are not counted."""
        counts: dict[str, Counter[int]] = {gene.name: Counter() for gene in self.space.genes}
        for evaluation in self.front:
            genome = self.space.encode(evaluation.architecture)
            for gene, index, inert in zip(self.space.genes, genome, self.space.inert(genome), strict=True):
                if not inert:
                    counts[gene.name][gene.values[index]] += 1
        return {name: dict(sorted(counter.items())) for name, counter in counts.items()}

    def to_dict(self) -> dict[str, Any]:
        return {
            "algorithm": self.algorithm,
            "seed": self.seed,
            "space": {"name": self.space.name, "size": self.space.size, "genes": self.space.to_dict()},
            "objectives": [{"name": o.name, "direction": o.direction, "kind": o.kind} for o in self.objectives],
            "constraints": [str(c) for c in self.constraints],
            "reference": self.reference,
            "evaluations": [e.to_dict() for e in self.evaluations],
            "front": [e.architecture.key for e in self.front],
            "gene_counts": self.gene_counts(),
            "generations": self.generations,
        }


def search(
    space: SearchSpace,
    objectives: Sequence[Objective],
    measure: Measure,
    *,
    algorithm: str = "linas",
    evaluations: int = 250,
    population: int = 50,
    seed: int = 0,
    constraints: Sequence[Constraint] = (),
    include: Iterable[Architecture] = (),
    warm_start: Iterable[Architecture] = (),
    known: Iterable[Evaluation] = (),
    first_look: Measure | None = None,
    share: float = 0.25,
    reference: Sequence[float] | None = None,
    on_evaluation: Callable[[Evaluation], None] | None = None,
    on_generation: Callable[[dict[str, Any]], None] | None = None,
) -> SearchResult:
    """Search `space` with a budget of `evaluations` measured architectures.

    The first generation is the base, the smallest, `include` (such as `space.uniform_members(8)`),
    `warm_start`, and random architectures spread over all sizes within the constraints, `population` in all;
    then `algorithm` decides. `known` are evaluations of an earlier phase of the same search: they count towards
    the budget and the front, and are not asked for again. `on_evaluation` is called the moment each full
    measurement arrives, `on_generation` with each generation's record.

    `first_look` measures on a `share` of the documents. After the first generation it goes first, and only what can
    still matter is measured in full (see `FirstLooks`); the rest is told to the algorithm as foretold, and is never on
    the front. The budget is then counted in documents: a first look costs `share` of an evaluation.

    The same arguments and measurements give the same search; so an interrupted one is resumed by running it
    again with a `measure` that knows what was measured. `reference` is the hypervolume's reference point, in
    the objectives' own units; by default the worst of each objective in the first generation. Hypervolumes
    are in units of the box between the reference and the best of each objective in the first generation, and
    can exceed 1.

    ValueError for a request that cannot be met; what `measure` raises passes through.
    """
    check(objectives)
    check_constraints(space, constraints)
    if evaluations < 2 or population < 2:
        raise ValueError("a search needs a budget of at least two evaluations and a population of at least two")
    rng = np.random.default_rng(seed)
    initial = first_generation(space, min(population, evaluations), rng, [*include, *warm_start], constraints)
    result = SearchResult(space, tuple(objectives), tuple(constraints), algorithm, seed, list(known))
    searcher = algorithm_named(algorithm)(
        space,
        objectives,
        population=population,
        evaluations=evaluations,
        seed=int(rng.integers(2**31)),
        constraints=constraints,
        initial=initial[:evaluations],
    )
    searcher.tell([(e.architecture, e.values) for e in result.evaluations])
    looks = Screening(objectives, constraints)
    spent = float(len(result.evaluations))
    scale: tuple[Costs, Costs] | None = None
    began = time.perf_counter()
    while True:
        generation = len(result.generations)
        looking = first_look if generation else None  # the first generation teaches what a first look is worth
        room = int((evaluations - spent) / (1 + share if looking else 1))
        asked = searcher.ask(min(population if generation else len(initial), room)) if room else []
        if not asked:
            break
        asking = dict(searcher.report)
        measuring = time.perf_counter()
        places = {architecture: index for index, architecture in enumerate(asked, len(result.evaluations))}
        foretold: dict[Architecture, Evaluation] = {}
        firsts: dict[Architecture, Mapping[str, float]] = {}
        if looking is not None:
            firsts = dict(looking(asked))
            for architecture in asked:
                values = searcher.complete(architecture, looks.corrected(firsts[architecture]))
                expected = Evaluation(architecture, values, generation, places[architecture], full=False)
                if looks.rules_out(expected, [e for e in result.evaluations if e.full]):
                    foretold[architecture] = expected
        wanted = [a for a in asked if a not in foretold]
        found = _measured(wanted, measure, searcher.complete, generation, places, on_evaluation)
        if first_look is not None:
            firsts = firsts or dict(first_look(wanted))
            for architecture in wanted:
                looks.learn(firsts[architecture], found[architecture].values)
        measured = time.perf_counter()
        spent += len(wanted) + (share * len(asked) if looking else 0)
        fresh = [(found | foretold)[architecture] for architecture in asked]
        result.evaluations += fresh
        searcher.report = {}
        searcher.tell([(e.architecture, e.values) for e in fresh])
        if scale is None:
            scale = _scale(result, reference)
            result.reference = [float(o.cost(v)) for o, v in zip(objectives, scale[1], strict=True)]
        record = {
            "generation": generation,
            "evaluations": len(result.evaluations),
            "new": len(fresh),
            "full": len(wanted),
            "hypervolume": _hypervolume(result, *scale),
            "front": len(result.front),
            **asking,
            **searcher.report,
            "seconds": {"evaluation": measured - measuring, "overhead": 0.0},
        }
        record["seconds"]["overhead"] = time.perf_counter() - began - (measured - measuring)
        began = time.perf_counter()
        result.generations.append(record)
        if on_generation is not None:
            on_generation(record)
    return result


def greedy_path(
    space: SearchSpace,
    objectives: Sequence[Objective],
    measure: Measure,
    *,
    evaluations: int,
    population: int = 50,
    seed: int = 0,
    constraints: Sequence[Constraint] = (),
    on_evaluation: Callable[[Evaluation], None] | None = None,
) -> list[Evaluation]:
    """Up to `evaluations` of greedy perturbation alone, from the base down: a warm start for `search` (`known`)."""
    searcher = Greedy(
        space, objectives, population=population, evaluations=evaluations, seed=seed, constraints=constraints
    )
    found: list[Evaluation] = []
    while len(found) < evaluations and (asked := searcher.ask(min(population, evaluations - len(found)))):
        places = {architecture: index for index, architecture in enumerate(asked, len(found))}
        fresh = _measured(asked, measure, searcher.complete, 0, places, on_evaluation)
        found += [fresh[architecture] for architecture in asked]
        searcher.tell([(e.architecture, e.values) for e in found[-len(asked) :]])
    return found


def first_generation(
    space: SearchSpace,
    n: int,
    rng: np.random.Generator,
    include: Iterable[Architecture] = (),
    constraints: Sequence[Constraint] = (),
) -> list[Architecture]:
    """The base, the smallest, all of `include`, and architectures spread over the sizes that constraints on
    `parameters` leave, up to `n` in all; more only where `include` needs it.

    ValueError where `include` holds something that the space does not.
    """
    included = list(include)
    chosen = dict.fromkeys([space.base, space.smallest(), *included])
    for architecture in chosen:
        space.encode(architecture)
    sized = [c for c in constraints if c.objective.name == "parameters"]
    least = max((c.minimum for c in sized if c.minimum is not None), default=None)
    most = min((c.maximum for c in sized if c.maximum is not None), default=None)
    for _ in range(20):
        missing = n - len(chosen)
        if missing <= 0:
            break
        chosen |= dict.fromkeys(space.decode_all(space.sample_sizes(rng, missing, least, most)))
    return list(chosen)


def check_constraints(space: SearchSpace, constraints: Sequence[Constraint]) -> None:
    """ValueError, naming what is within reach, for a computed bound that neither end of the space meets."""
    for constraint in constraints:
        objective = constraint.objective
        if objective.compute is None:
            continue
        small, base = float(objective.compute(space.smallest())), float(objective.compute(space.base))
        low, high = min(small, base), max(small, base)
        if constraint.maximum is not None and low > constraint.maximum:
            raise ValueError(f"{constraint} is out of reach: the search space goes down to {number(low)}")
        if constraint.minimum is not None and high < constraint.minimum:
            raise ValueError(f"{constraint} is out of reach: the search space goes up to {number(high)}")


def _measured(
    asked: list[Architecture],
    measure: Measure,
    complete: Callable[[Architecture, Mapping[str, float]], dict[str, float]],
    generation: int,
    places: Mapping[Architecture, int],
    on_evaluation: Callable[[Evaluation], None] | None,
) -> dict[Architecture, Evaluation]:
    """A full evaluation of everything asked for, whatever the order in which they arrive."""
    found: dict[Architecture, Evaluation] = {}
    for architecture, values in measure(asked):
        if architecture not in asked or architecture in found:
            raise ValueError(f"architecture {architecture.key} was measured but not asked for")
        found[architecture] = Evaluation(architecture, complete(architecture, values), generation, places[architecture])
        if on_evaluation is not None:
            on_evaluation(found[architecture])
    if len(found) < len(asked):
        raise RuntimeError(f"{len(asked) - len(found)} of {len(asked)} architectures came back without a measurement")
    return found


def _scale(result: SearchResult, reference: Sequence[float] | None) -> tuple[Costs, Costs]:
    """Best and worst of each objective in the first generation, less is better; the worst may be given."""
    values = costs(result.evaluations, result.objectives)
    values = values[np.isfinite(values).all(axis=1)]
    if not len(values):
        raise ValueError("no architecture of the first generation has a finite score")
    worst = values.max(axis=0)
    if reference is not None:
        worst = np.array([float(o.cost(r)) for o, r in zip(result.objectives, reference, strict=True)])
    return values.min(axis=0), worst


def _hypervolume(result: SearchResult, best: Costs, worst: Costs) -> float:
    full = [e for e in result.evaluations if e.full]
    values = costs(full, result.objectives)
    feasible = ~(violations(full, result.constraints) > 0).any(axis=1)
    values = values[np.isfinite(values).all(axis=1) & feasible]
    box = np.where(worst > best, worst - best, 1.0)
    return hypervolume((values - best) / box, (worst - best) / box)
