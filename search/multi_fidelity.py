"""Two fidelities: a first look on part of the documents, and all of them for what can still matter.

A first look is off by a bias (the part is easier or harder than the whole) and by noise. Both are learnt from the
sub-networks that have been measured both ways, so nothing has to be known about the documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from search.objectives import Constraint, Evaluation, Objective
from search.pareto import costs, violations

FEWEST_PAIRS = 8
"""Fewest sub-networks measured both ways from which the noise of a first look can be told."""
DEVIATIONS = 2.0
"""Standard deviations of that noise within which a first look rules nothing out."""

Values = Mapping[str, float]


@dataclass
class Screening:
    """What first looks and full measurements have said so far, and what they rule out."""

    objectives: Sequence[Objective]
    constraints: Sequence[Constraint]
    _pairs: list[tuple[Values, Values]] = field(default_factory=list)

    def learn(self, first: Values, full: Values) -> None:
        """Take the two measurements of one sub-network."""
        self._pairs.append((first, full))

    def corrected(self, first: Values) -> dict[str, float]:
        """The full measurement that a first look foretells: itself plus the median difference seen so far."""
        return {name: value + self._differences(name)[0] for name, value in first.items()}

    def rules_out(self, expected: Evaluation, full: Sequence[Evaluation]) -> bool:
        """Whether a sub-network can no longer matter, given what its first look foretells (`corrected`, completed
        with all that is computed): even where it turns out better by `DEVIATIONS` it misses a constraint, or is
        dominated by one of `full` that misses none.
        """
        if len(self._pairs) < FEWEST_PAIRS:
            return False
        hopeful = Evaluation(expected.architecture, dict(expected.values))
        watched = {o.name: o for o in (*self.objectives, *(c.objective for c in self.constraints))}
        for objective in watched.values():
            if objective.kind == "measured":
                slack = DEVIATIONS * self._differences(objective.name)[1]
                hopeful.values[objective.name] += slack if objective.direction == "max" else -slack  # type: ignore[index]
        if (violations([hopeful], self.constraints) > 0).any():
            return True
        feasible = ~(violations(full, self.constraints) > 0).any(axis=1)
        others, mine = costs(full, self.objectives)[feasible], costs([hopeful], self.objectives)[0]
        return bool(((others <= mine).all(axis=1) & (others < mine).any(axis=1)).any())

    def _differences(self, name: str) -> tuple[float, float]:
        """Median and standard deviation of full measurement less first look; zeros where nothing is known."""
        found = np.array([full[name] - first[name] for first, full in self._pairs])
        found = found[np.isfinite(found)]
        return (float(np.median(found)), float(found.std())) if len(found) else (0.0, 0.0)
