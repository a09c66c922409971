"""Does a search beat chance, and can it learn anything? (Adam and Lorraine, Understanding Neural Architecture Search
Techniques, arXiv 1904.00438: a search that does not condition on what it measured finds what random draws find.)

- A control: a random search of as many evaluations, within the same computed bounds. Predicted from what was measured,
  or measured too where that is asked for. Compared are the means of the best tenth: single bests are mostly luck.
- Whether networks of like genomes have like scores, beyond what their sizes say: the distance correlation of the two
  (Székely, Rizzo and Bakirov 2007, arXiv 0803.4101, section 2: of doubly centred matrices of distances). If not,
  the search has nothing to learn from: score more documents, or harder ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from search.algorithms import algorithm
from search.control_records import Control, Likeness
from search.objectives import Computer, Constraint, Evaluation, Objective
from search.predictors import FEWEST, Predictor
from search.space import Genomes, SearchSpace

Vector = NDArray[np.float64]

POOL, SEARCHES = 1000, 20
"""Random genomes that predicted searches draw from, of at most so many random searches."""
RESAMPLES = 1000
MOST = 400
"""Measured networks at most whose distances are compared: the newest, evenly, since time goes with their square."""
PERMUTATIONS = 400


def within_bounds(
    space: SearchSpace, evaluations: Sequence[Evaluation], objective: Objective, constraints: Sequence[Constraint]
) -> list[Evaluation]:
    """Those that were fully measured, to a finite value, and meet the constraints that are computed, without the base:
    a search does not have to find it."""
    bounds = computed_bounds(constraints)
    return [
        evaluation
        for evaluation in measured_fully(evaluations, objective)
        if evaluation.architecture != space.base and all(_meets(evaluation, bound) for bound in bounds)
    ]


def computed_bounds(constraints: Sequence[Constraint]) -> list[Constraint]:
    """The constraints that a random search can keep, too: not those on what has to be measured."""
    return [constraint for constraint in constraints if constraint.objective.compute is not None]


def measured_fully(evaluations: Sequence[Evaluation], objective: Objective) -> list[Evaluation]:
    """Those with a finite value of the objective, on all documents."""

    def known(evaluation: Evaluation) -> bool:
        value: float | None = evaluation.values.get(objective.name)
        return evaluation.full and value is not None and math.isfinite(value)

    return list(filter(known, evaluations))


def _meets(evaluation: Evaluation, bound: Constraint) -> bool:
    assert bound.objective.compute is not None
    value = bound.objective.compute(evaluation.architecture)
    return not bound.violation(np.array([value], float))[0]


def predicted_control(
    space: SearchSpace,
    evaluations: Sequence[Evaluation],
    objective: Objective,
    constraints: Sequence[Constraint],
    *,
    seed: int = 0,
) -> Control | None:
    """What random searches of as many evaluations would have found, by a predictor that was trained on all that was
    measured. Measurements scatter around predictions, so each draw scatters as the predictor's errors do. None where
    too little was measured, where nothing that is computed is bounded (then the whole base is the best, and no
    finding), and where what is predicted lies beyond all that was measured within the bounds: networks outside them
    are better, and pull predictions their way.
    """
    own, known = within_bounds(space, evaluations, objective, constraints), measured_fully(evaluations, objective)
    predictor = Predictor(len(space.genes), seed)
    if len(known) >= FEWEST:
        predictor.fit(features_of(space, known), costs_of(known, objective))
    if predictor.chosen is None or not own or not computed_bounds(constraints):
        return None
    # Several random searches of this length: a longer one, which never repeats itself, has to go elsewhere.
    searches = min(SEARCHES, max(2, -(-POOL // len(own))))
    drawn = [random_genomes(space, constraints, len(own), seed + number) for number in range(searches)]
    means = predictor.predict(space.features(np.vstack(drawn))) if sum(map(len, drawn)) else np.array([])
    if len(means) < len(own):
        return None
    scatter = predictor.scores[predictor.chosen].mae * np.sqrt(np.pi / 2)  # a normal one of this mean error
    if np.quantile(means, 0.1) < costs_of(own, objective).min() - scatter:
        return None

    def random(rng: np.random.Generator) -> Vector:
        chosen = rng.choice(means, len(own), replace=False)
        return chosen + scatter * rng.standard_normal(len(own))

    return _control("predicted", objective, costs_of(own, objective), random, seed)


def measured_control(
    space: SearchSpace,
    evaluations: Sequence[Evaluation],
    random: Sequence[Evaluation],
    objective: Objective,
    constraints: Sequence[Constraint] = (),
    *,
    seed: int = 0,
) -> Control | None:
    """The same beside a random search that was measured; its luck is that of drawing its networks again. None where one
    of the two has nothing within the bounds."""
    own = within_bounds(space, evaluations, objective, constraints)
    others = within_bounds(space, random, objective, constraints)
    if not own or not others:
        return None
    values = costs_of(others, objective)
    return _control(
        "measured",
        objective,
        costs_of(own, objective),
        lambda rng: rng.choice(values, len(values)),
        seed,
        of_random=values,
    )


def _control(
    way: Literal["predicted", "measured"],
    objective: Objective,
    own: Vector,
    random: Callable[[np.random.Generator], Vector],
    seed: int,
    of_random: Vector | None = None,
) -> Control:
    """From the costs of a search, and a function that draws those of a random one; `of_random` where they are known."""
    rng, best = np.random.default_rng(seed), min(len(own), max(3, len(own) // 10))

    def tenth(costs: Vector) -> float:
        return float(np.sort(costs)[:best].mean())

    theirs = np.array([tenth(random(rng)) for _ in range(RESAMPLES)])
    ours = np.array([tenth(rng.choice(own, len(own))) for _ in range(RESAMPLES)])
    found, middle = tenth(own), float(np.median(theirs)) if of_random is None else tenth(of_random)
    low, high = np.quantile(theirs - ours, [0.025, 0.975])
    sign = float(objective.cost(1.0))
    return Control(
        way=way,
        objective=objective.name,
        evaluations=len(own),
        best=best,
        found=sign * found,
        random=sign * middle,
        difference=middle - found,
        low=float(low),
        high=float(high),
    )


def likeness(space: SearchSpace, evaluations: Sequence[Evaluation], objective: Objective) -> Likeness | None:
    """None where too little was measured, or all of it is equal."""
    known = measured_fully(evaluations, objective)
    known = [known[i] for i in np.unique(np.linspace(0, len(known) - 1, min(len(known), MOST)).astype(int))]
    if len(known) < FEWEST:
        return None
    scores = costs_of(known, objective)
    values = scores
    sizes = np.array([space.structure.parameters(e.architecture) for e in known], float)
    if np.ptp(sizes):  # what size alone explains is no likeness of genomes
        scaled = (sizes - sizes.mean()) / sizes.std()
        values = scores - np.polyval(np.polyfit(scaled, scores, 2), scaled)
    if np.ptp(values) <= 1e-9 * np.abs(scores).max():
        return None
    genomes = features_of(space, known)[:, : len(space.genes)]
    products = genomes @ genomes.T
    squares = np.diag(products)
    of_genomes = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * products, 0.0))
    of_values = np.abs(values[:, None] - values[None])
    correlation = distance_correlation(of_genomes, of_values)
    rng = np.random.default_rng(0)
    orders = (rng.permutation(len(known)) for _ in range(PERMUTATIONS))
    as_much = sum(distance_correlation(of_genomes, of_values[order][:, order]) >= correlation for order in orders)
    chance = (1 + as_much) / (1 + PERMUTATIONS)
    return Likeness(correlation=correlation, chance=chance, networks=len(known))


def distance_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Of two matrices of distances between the same points, [n, n] each; 0 where one is constant."""
    a, b = (m - m.mean(0) - m.mean(1)[:, None] + m.mean() for m in (a, b))
    product = float((a * a).mean() * (b * b).mean())
    return float(np.sqrt(max(float((a * b).mean()), 0.0) / np.sqrt(product))) if product else 0.0


def random_genomes(space: SearchSpace, constraints: Sequence[Constraint], count: int, seed: int) -> Genomes:
    """Up to `count` genomes as a random search draws them, [n, genes]: those within the computed constraints."""
    computed = computed_bounds(constraints)
    objectives = [Objective("one", "max"), Objective("two", "max")]  # a random search looks at neither
    searcher = algorithm("random")(space, objectives, constraints=computed, seed=seed)
    architectures = searcher.ask(count) if count else []
    drawn = np.array([space.encode(architecture) for architecture in architectures], dtype=np.int64)
    drawn = drawn.reshape(len(architectures), len(space.genes))
    for constraint in computed:
        if len(drawn):
            drawn = drawn[constraint.violation(Computer(space, constraint.objective)(drawn)) == 0]
    return drawn


def features_of(space: SearchSpace, evaluations: Sequence[Evaluation]) -> NDArray[np.float64]:
    """What predictors see of them, [n, features]; the first are the genes' values as shares of the base's."""
    return space.features(np.array([space.encode(e.architecture) for e in evaluations]))


def costs_of(evaluations: Sequence[Evaluation], objective: Objective) -> Vector:
    """Values of an objective, less being better, [n]."""
    return np.array([objective.cost(e.values[objective.name]) for e in evaluations], float)
