"""Does a search beat chance, and can it learn anything? (Adam and Lorraine, Understanding Neural Architecture Search
Techniques, arXiv 1904.00438: a search that does not condition on what it measured finds what random draws find.)

- A control: a random search of as many evaluations, within the same bounds. Predicted from what was measured, or
  measured too where that is asked for.
- Whether networks of like genomes have like scores, beyond what their sizes say: the distance correlation of the two
  (Székely, Rizzo and Bakirov 2007, arXiv 0803.4101, definitions 3 and 4). Where they have not, there is nothing to
  learn from, and the documents are too few or too easy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from search.algorithms import algorithm
from search.objectives import Computer, Constraint, Evaluation, Objective
from search.pareto import violations
from search.predictors import FEWEST, Predictor
from search.space import Genomes, SearchSpace

Vector = NDArray[np.float64]

POOL = 1000
"""Random genomes that predicted searches draw from, or a few more."""
RESAMPLES = 1000
MOST = 400
"""Measured networks at most whose distances are compared: the newest, evenly, since time goes with their square."""
PERMUTATIONS = 400


class Control(BaseModel):
    """The best of a search beside the best of a random search of as many evaluations, in the objective's units."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    way: Literal["predicted", "measured"]
    objective: str
    evaluations: int
    """Of each of the two, within the bounds."""
    found: float
    random: float
    """The best of the random search; predicted, the median over many."""
    difference: float
    """How much better the search was, so that more is better whatever the objective's direction."""
    low: float
    high: float
    """The central 95 % of it, by the luck of the random draws."""

    @property
    def text(self) -> str:
        """Both in a sentence."""
        how = "would have found" if self.way == "predicted" else "found"
        by = " (predicted from what was measured)" if self.way == "predicted" else ""
        beside = f"a random search of {self.evaluations} sub-networks {how} {self.objective} {self.random:.3f}{by}"
        interval = f"({self.low:+.3g} to {self.high:+.3g})"
        if self.low > 0:
            return f"{beside}: this one is better by {self.difference:.3g} {interval}"
        if self.high < 0:
            return f"{beside}: this one is worse by {-self.difference:.3g} {interval}"
        return f"{beside}: this one's {self.found:.3f} is not told apart from it {interval}"


class Likeness(BaseModel):
    """Whether measured networks of like genomes have like values of an objective, beyond their sizes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    correlation: float
    """Distance correlation, from 0 (none) to 1."""
    chance: float
    """Share of random orders of the values that correlate as much."""
    networks: int

    @property
    def learnable(self) -> bool:
        return self.chance < 0.05

    @property
    def text(self) -> str:
        """The same in a sentence."""
        numbers = f"distance correlation {self.correlation:.2f} over {self.networks}, chance {self.chance:.3f}"
        if self.learnable:
            return f"sub-networks of like sizes of layers have like scores ({numbers})"
        return (
            f"sub-networks of like sizes of layers have no more alike scores than others ({numbers}): the search had "
            "nothing to learn from; more documents (--limit) may tell them apart"
        )


def within_bounds(evaluations: Sequence[Evaluation], constraints: Sequence[Constraint]) -> list[Evaluation]:
    """The fully measured ones that meet the constraints."""
    full = [e for e in evaluations if e.full]
    missed = violations(full, constraints).sum(1) if constraints and full else np.zeros(len(full))
    return [e for e, by in zip(full, missed, strict=True) if not by]


def predicted_control(
    space: SearchSpace,
    evaluations: Sequence[Evaluation],
    objective: Objective,
    constraints: Sequence[Constraint] = (),
    *,
    seed: int = 0,
) -> Control | None:
    """What random searches of as many evaluations would have found, by a predictor that was trained on all that was
    measured. Measurements scatter around predictions, so each draw scatters as the predictor's errors do. None where
    too little was measured to train on.
    """
    own = within_bounds(evaluations, constraints)
    known = [e for e in evaluations if e.full and np.isfinite(e.values[objective.name])]
    predictor = Predictor(len(space.genes), seed)
    if len(known) >= FEWEST:
        predictor.fit(features_of(space, known), costs_of(known, objective))
    if predictor.chosen is None or not own:
        return None
    # Several random searches of this length: a longer one, which never repeats itself, has to go elsewhere.
    searches = max(2, -(-POOL // len(own)))
    drawn = np.vstack([random_genomes(space, constraints, len(own), seed + number) for number in range(searches)])
    means = predictor.predict(space.features(drawn))
    scatter = predictor.scores[predictor.chosen].mae * np.sqrt(np.pi / 2)  # a normal one of this mean error
    rng = np.random.default_rng(seed)
    best = np.empty(RESAMPLES)
    for row in range(RESAMPLES):
        chosen = rng.choice(len(means), min(len(own), len(means)), replace=False)
        best[row] = (means[chosen] + scatter * rng.standard_normal(len(chosen))).min()
    return _control("predicted", objective, own, best, float(np.median(best)))


def measured_control(
    evaluations: Sequence[Evaluation],
    random: Sequence[Evaluation],
    objective: Objective,
    constraints: Sequence[Constraint] = (),
    *,
    seed: int = 0,
) -> Control | None:
    """The same beside a random search that was measured; its luck is that of drawing its networks again."""
    own, others = within_bounds(evaluations, constraints), within_bounds(random, constraints)
    if not own or not others:
        return None
    values, rng = costs_of(others, objective), np.random.default_rng(seed)
    best = np.array([rng.choice(values, len(values)).min() for _ in range(RESAMPLES)])
    best[0] = values.min()
    return _control("measured", objective, own, best, float(values.min()))


def _control(
    way: Literal["predicted", "measured"],
    objective: Objective,
    own: Sequence[Evaluation],
    best: Vector,
    middle: float,
) -> Control:
    """From the costs of the random search's best, one for each resample, and of the one to state."""
    found = float(costs_of(own, objective).min())
    low, high = np.quantile(best - found, [0.025, 0.975])
    sign = float(objective.cost(1.0))
    return Control(
        way=way,
        objective=objective.name,
        evaluations=len(own),
        found=sign * found,
        random=sign * middle,
        difference=middle - found,
        low=float(low),
        high=float(high),
    )


def likeness(space: SearchSpace, evaluations: Sequence[Evaluation], objective: Objective) -> Likeness | None:
    """None where too little was measured, or all of it is equal."""
    known = [e for e in evaluations if e.full and np.isfinite(e.values[objective.name])]
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
    of_genomes = np.sqrt(np.maximum(((genomes[:, None] - genomes[None]) ** 2).sum(-1), 0.0))
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
    """Up to `count` genomes as a random search within the constraints draws them, [n, genes]."""
    computed = [constraint for constraint in constraints if constraint.objective.kind == "computed"]
    objectives = [Objective("one", "max"), Objective("two", "max")]  # a random search looks at neither
    searcher = algorithm("random")(space, objectives, constraints=computed, seed=seed)
    drawn = np.array([space.encode(architecture) for architecture in searcher.ask(count)])
    missed = sum((c.violation(Computer(space, c.objective)(drawn)) for c in computed), np.zeros(len(drawn)))
    return drawn[missed == 0] if (missed == 0).any() else drawn


def features_of(space: SearchSpace, evaluations: Sequence[Evaluation]) -> NDArray[np.float64]:
    return space.features(np.array([space.encode(e.architecture) for e in evaluations]))


def costs_of(evaluations: Sequence[Evaluation], objective: Objective) -> Vector:
    """Values of an objective, less being better, [n]."""
    return np.array([objective.cost(e.values[objective.name]) for e in evaluations], float)
