"""Two fidelities: screening on part of the documents, and all of them for what can still matter.

A screening is off by a bias (the part is easier or harder than the whole) and by noise. Both are learnt from the
sub-networks that have been measured both ways, so nothing has to be known about the documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from search.objectives import Constraint, Evaluation, Objective
from search.pareto import costs, violations

FEWEST_PAIRS = 8
"""Fewest sub-networks measured both ways from which the noise of a screening can be told."""
DEVIATIONS = 2.0
"""Standard deviations of that noise within which a screening rules nothing out."""

Values = Mapping[str, float]


@dataclass
class ScreeningFilter:
    """What screenings and full measurements have shown so far, and what they rule out."""

    objectives: Sequence[Objective]
    constraints: Sequence[Constraint]
    _pairs: list[tuple[Values, Values]] = field(default_factory=list)

    def learn(self, screened: Values, full: Values) -> None:
        """Take the two measurements of one sub-network."""
        self._pairs.append((screened, full))

    def corrected(self, screened: Values) -> dict[str, float]:
        """The full measurement that a screening predicts: itself plus the median difference seen so far."""
        return {name: value + self._difference(name)[0] for name, value in screened.items()}

    def rules_out(self, predicted: Evaluation, full: Sequence[Evaluation]) -> bool:
        """Whether a sub-network can no longer matter, given what its screening predicts (`corrected`, completed with
        all that is computed): even where it turns out better by `DEVIATIONS` it misses a constraint, or is dominated
        by one of `full` that misses none.
        """
        if len(self._pairs) < FEWEST_PAIRS:
            return False
        values = dict(predicted.values)
        watched = {o.name: o for o in (*self.objectives, *(c.objective for c in self.constraints))}
        for objective in watched.values():
            if objective.kind == "measured":
                slack = DEVIATIONS * self._difference(objective.name)[1]
                values[objective.name] += slack if objective.direction == "max" else -slack
        hopeful = Evaluation(predicted.architecture, values)
        if (violations([hopeful], self.constraints) > 0).any():
            return True
        feasible = ~(violations(full, self.constraints) > 0).any(axis=1)
        others, candidate = costs(full, self.objectives)[feasible], costs([hopeful], self.objectives)[0]
        return bool(((others <= candidate).all(axis=1) & (others < candidate).any(axis=1)).any())

    def _difference(self, name: str) -> tuple[float, float]:
        """Median and standard deviation of full measurement less screening; zeros where nothing is known."""
        differences = np.array([full[name] - screened[name] for screened, full in self._pairs])
        differences = differences[np.isfinite(differences)]
        return (float(np.median(differences)), float(differences.std())) if len(differences) else (0.0, 0.0)
