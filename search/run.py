"""The search loop: an algorithm asks for architectures, they are measured and told to it, generation by generation."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np

from search.algorithms import Algorithm, AlgorithmReport
from search.algorithms import algorithm as algorithm_named
from search.algorithms.greedy import Greedy
from search.multi_fidelity import ScreeningFilter
from search.objectives import Constraint, Evaluation, EvaluationRecord, Objective, check, number
from search.pareto import Costs, costs, front, hypervolume_in, violations
from search.sampling import sample_sizes
from search.space import SearchSpace
from supernet.architecture import Architecture

Measure = Callable[[list[Architecture]], Iterable[tuple[Architecture, Mapping[str, float]]]]
"""Measures architectures, in any order, each yielded as soon as it is known, with its values by name.

One that was measured before comes from the store, at once; so does all of an interrupted search, when it is run again.
"""
OnEvaluation = Callable[[Evaluation], None]


class Seconds(TypedDict):
    """Seconds of a generation: measuring, and everything else."""

    evaluation: float
    overhead: float


class GenerationRecord(AlgorithmReport):
    """How one generation went, as front.json holds it."""

    generation: int
    evaluations: int
    """So far, screened ones too."""
    new: int
    full: int
    """Of the new ones, those measured on all documents."""
    hypervolume: float
    """Of everything measured in full so far; `search` says in which unit."""
    front: int
    """Architectures on the front so far."""
    seconds: Seconds


class SearchRecord(TypedDict):
    """A whole search as front.json holds it."""

    algorithm: str
    seed: int
    space: dict[str, object]
    objectives: list[dict[str, str]]
    constraints: list[str]
    reference: list[float]
    evaluations: list[EvaluationRecord]
    front: list[str]
    gene_counts: dict[str, dict[int, int]]
    generations: list[GenerationRecord]


@dataclass
class SearchResult:
    """All that a search measured, and how it went."""

    space: SearchSpace
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]
    """What the front lies within."""
    algorithm: str
    seed: int
    evaluations: list[Evaluation] = field(default_factory=list)
    generations: list[GenerationRecord] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    """The hypervolume's reference point, in the objectives' units."""

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

    def to_dict(self) -> SearchRecord:
        """The search in plain JSON types."""
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
    generations: Iterable[GenerationRecord] = (),
    within: Sequence[Constraint] | None = None,
    screening: Measure | None = None,
    share: float = 0.25,
    reference: Sequence[float] | None = None,
    on_evaluation: OnEvaluation | None = None,
    on_generation: Callable[[GenerationRecord], None] | None = None,
) -> SearchResult:
    """Search `space` with a budget of `evaluations` measured architectures.

    The first generation is the base, the smallest, `include` (such as `uniform_members(space, 8)`), `warm_start`, and
    random architectures spread over all sizes within the constraints, `population` in all; then `algorithm` decides.
    `known` are evaluations of an earlier phase of the same search: they count towards the budget and the front, and
    are not asked for again. Where `generations` has the records of an earlier search that measured them, this one goes
    on from it: its first generation is what is new of the base, the smallest, `include` and `warm_start`, and nothing
    at random. `within` bounds the front and the hypervolume where that is not what steers the search (`constraints`).
    `on_evaluation` is called the moment each full measurement arrives, `on_generation` with
    each generation's record.

    `screening` measures on a `share` of the documents. After the first generation it goes first, and only what can
    still matter is measured in full (see `ScreeningFilter`); for the rest the algorithm is told the prediction, which
    is never on the front. The budget is then counted in documents: a screening costs `share` of an evaluation.

    The same arguments and measurements give the same search; so an interrupted one is resumed by running it again with
    a `measure` that knows what was measured. `reference` is the hypervolume's reference point, in the objectives'
    units; by default the worst of each objective in the first generation. Hypervolumes are in units of the box between
    the reference and the best of each objective in the first generation, and can exceed 1.

    Raises ValueError for a request that cannot be met; what `measure` raises passes through.
    """
    check(objectives)
    check_constraints(space, constraints)
    if evaluations < 2 or population < 2:
        raise ValueError("a search needs a budget of at least two evaluations and a population of at least two")
    rng = np.random.default_rng(seed)
    earlier = list(generations)
    least = 0 if earlier else min(population, evaluations)
    initial = first_generation(space, least, rng, [*include, *warm_start], constraints)
    searcher = algorithm_named(algorithm)(
        space,
        objectives,
        population=population,
        evaluations=evaluations,
        seed=int(rng.integers(2**31)),
        constraints=constraints,
        initial=initial[:evaluations],
    )
    bounds = tuple(constraints if within is None else within)
    result = SearchResult(space, tuple(objectives), bounds, algorithm, seed, list(known), earlier)
    searcher.tell([(e.architecture, e.values) for e in result.evaluations])
    running = _Generations(result, searcher, measure, screening, share, reference, on_evaluation)
    while asked := running.ask(max(population, len(initial)) if running.first else population):
        record = running.run(asked)
        if on_generation is not None:
            on_generation(record)
    return result


@dataclass
class _Generations:
    """Runs one generation after another of a search, and adds them to its result."""

    result: SearchResult
    searcher: Algorithm
    measure: Measure
    screening: Measure | None
    share: float
    reference: Sequence[float] | None
    on_evaluation: OnEvaluation | None

    def __post_init__(self) -> None:
        self.filter = ScreeningFilter(self.result.objectives, self.searcher.constraints)
        self.spent = float(len(self.result.evaluations))
        self.earlier = len(self.result.generations)
        self.box: tuple[Costs, Costs] | None = None
        self.began = time.perf_counter()

    @property
    def first(self) -> bool:
        """Whether the coming generation is the first of this search."""
        return len(self.result.generations) == self.earlier

    @property
    def screens(self) -> bool:
        """Whether the coming generation is screened: not the first, which teaches what a screening is worth."""
        return self.screening is not None and not self.first

    def ask(self, n: int) -> list[Architecture]:
        """The next generation: up to `n` architectures, as many as the budget still pays for."""
        affordable = int((self.searcher.evaluations - self.spent) / (1 + self.share if self.screens else 1))
        return self.searcher.ask(min(n, affordable)) if affordable else []

    def run(self, asked: list[Architecture]) -> GenerationRecord:
        """Measure a generation, tell the algorithm, and record it."""
        result, searcher = self.result, self.searcher
        ask_report = searcher.report
        measuring = time.perf_counter()
        new = self._evaluate(asked)
        seconds = time.perf_counter() - measuring
        result.evaluations += new
        searcher.report = {}
        searcher.tell([(e.architecture, e.values) for e in new])
        if self.box is None:
            self.box = _box(result, self.reference)
            result.reference = [float(o.cost(v)) for o, v in zip(result.objectives, self.box[1], strict=True)]
        record: GenerationRecord = {
            "generation": len(result.generations),
            "evaluations": len(result.evaluations),
            "new": len(new),
            "full": sum(e.full for e in new),
            "hypervolume": _hypervolume(result, *self.box),
            "front": len(result.front),
            **ask_report,
            **searcher.report,
            "seconds": {"evaluation": seconds, "overhead": 0.0},
        }
        record["seconds"]["overhead"] = time.perf_counter() - self.began - seconds
        self.began = time.perf_counter()
        result.generations.append(record)
        return record

    def _evaluate(self, asked: list[Architecture]) -> list[Evaluation]:
        """An evaluation of each architecture asked for: measured in full, or predicted where the screening rules it
        out."""
        generation = len(self.result.generations)
        places = {architecture: index for index, architecture in enumerate(asked, len(self.result.evaluations))}
        screens = self.screens
        # 1. Screen all of them.
        screened: dict[Architecture, Mapping[str, float]] = {}
        predicted: dict[Architecture, Evaluation] = {}
        if self.screening is not None and screens:
            screened = dict(self.screening(asked))
            in_full = [e for e in self.result.evaluations if e.full]
            for architecture in asked:
                values = self.searcher.complete(architecture, self.filter.corrected(screened[architecture]))
                expected = Evaluation(architecture, values, generation, places[architecture], full=False)
                if self.filter.rules_out(expected, in_full):
                    predicted[architecture] = expected
        # 2. Measure in full what can still matter.
        remaining = [a for a in asked if a not in predicted]
        measured = _measured(remaining, self.measure, self.searcher.complete, generation, places, self.on_evaluation)
        # 3. Learn by how much screenings are off.
        if self.screening is not None:
            screened = screened or dict(self.screening(remaining))
            for architecture in remaining:
                self.filter.learn(screened[architecture], measured[architecture].values)
        self.spent += len(remaining) + (self.share * len(asked) if screens else 0)
        return [(measured | predicted)[architecture] for architecture in asked]


def greedy_path(
    space: SearchSpace,
    objectives: Sequence[Objective],
    measure: Measure,
    *,
    evaluations: int,
    population: int = 50,
    seed: int = 0,
    constraints: Sequence[Constraint] = (),
    on_evaluation: OnEvaluation | None = None,
) -> list[Evaluation]:
    """Up to `evaluations` of greedy perturbation alone, from the base down: a warm start for `search` (`known`)."""
    searcher = Greedy(
        space, objectives, population=population, evaluations=evaluations, seed=seed, constraints=constraints
    )
    path: list[Evaluation] = []
    while len(path) < evaluations and (asked := searcher.ask(min(population, evaluations - len(path)))):
        places = {architecture: index for index, architecture in enumerate(asked, len(path))}
        measured = _measured(asked, measure, searcher.complete, 0, places, on_evaluation)
        path += [measured[architecture] for architecture in asked]
        searcher.tell([(e.architecture, e.values) for e in path[-len(asked) :]])
    return path


def first_generation(
    space: SearchSpace,
    n: int,
    rng: np.random.Generator,
    include: Iterable[Architecture] = (),
    constraints: Sequence[Constraint] = (),
) -> list[Architecture]:
    """The base, the smallest, all of `include`, and architectures spread over the sizes that constraints on
    `parameters` leave, up to `n` in all; more only where `include` needs it.

    Raises ValueError where `include` holds something that the space does not.
    """
    chosen = dict.fromkeys([space.base, space.smallest(), *include])
    for architecture in chosen:
        space.encode(architecture)
    sized = [c for c in constraints if c.objective.name == "parameters"]
    least = max((c.minimum for c in sized if c.minimum is not None), default=None)
    most = min((c.maximum for c in sized if c.maximum is not None), default=None)
    for _ in range(20):
        missing = n - len(chosen)
        if missing <= 0:
            break
        chosen |= dict.fromkeys(space.decode_all(sample_sizes(space, rng, missing, least, most)))
    return list(chosen)


def check_constraints(space: SearchSpace, constraints: Sequence[Constraint]) -> None:
    """Raises ValueError, naming what is within reach, for a computed bound that neither end of the space meets."""
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
    on_evaluation: OnEvaluation | None,
) -> dict[Architecture, Evaluation]:
    """A full evaluation of everything asked for, in the order in which they arrive."""
    evaluations: dict[Architecture, Evaluation] = {}
    for architecture, values in measure(asked):
        if architecture not in asked or architecture in evaluations:
            raise ValueError(f"architecture {architecture.key} was measured but not asked for")
        evaluation = Evaluation(architecture, complete(architecture, values), generation, places[architecture])
        evaluations[architecture] = evaluation
        if on_evaluation is not None:
            on_evaluation(evaluation)
    missing = len(asked) - len(evaluations)
    if missing:
        raise RuntimeError(f"{missing} of {len(asked)} architectures came back without a measurement")
    return evaluations


def _box(result: SearchResult, reference: Sequence[float] | None) -> tuple[Costs, Costs]:
    """Best and worst of each objective in the first generation, less is better; the worst may be given."""
    values = costs([e for e in result.evaluations if e.generation == 0], result.objectives)
    values = values[np.isfinite(values).all(axis=1)]
    if not len(values):
        raise ValueError("no architecture of the first generation has a finite score")
    worst = values.max(axis=0)
    if reference is not None:
        worst = np.array([float(o.cost(r)) for o, r in zip(result.objectives, reference, strict=True)])
    return values.min(axis=0), worst


def _hypervolume(result: SearchResult, best: Costs, worst: Costs) -> float:
    """Hypervolume of what was measured in full and is feasible, in units of the box from `best` to `worst`."""
    full = [e for e in result.evaluations if e.full]
    values = costs(full, result.objectives)
    feasible = ~(violations(full, result.constraints) > 0).any(axis=1)
    values = values[np.isfinite(values).all(axis=1) & feasible]
    return hypervolume_in(values, best, worst)
