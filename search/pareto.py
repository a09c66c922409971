"""The Pareto front of what was measured, its hypervolume, and what to pick from it. Less is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pymoo.indicators.hv import HV
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from search.objectives import Constraint, Evaluation, Objective, number

Costs = NDArray[np.float64]
"""Objectives turned so that less is better, [n, objectives]."""


def costs(evaluations: Sequence[Evaluation], objectives: Sequence[Objective]) -> Costs:
    """The objectives of evaluations, less is better, [n, objectives]."""
    rows = [[objective.cost(e.values[objective.name]) for objective in objectives] for e in evaluations]
    return np.array(rows, dtype=float).reshape(len(rows), len(objectives))


def violations(evaluations: Sequence[Evaluation], constraints: Sequence[Constraint]) -> Costs:
    """By how much each evaluation misses each constraint, [n, constraints]; 0 where it holds."""
    if not constraints or not evaluations:
        return np.zeros((len(evaluations), len(constraints)))
    columns = [c.violation(np.array([float(e.values[c.objective.name]) for e in evaluations])) for c in constraints]
    return np.column_stack(columns)


def ranks(values: Costs) -> list[NDArray[np.intp]]:
    """Indices of the first, second, … non-dominated front. Equal rows are on the same front."""
    return list(NonDominatedSorting().do(values)) if len(values) else []


def non_dominated(values: Costs) -> NDArray[np.intp]:
    """Indices, ascending, of the rows that no other row dominates. Equal rows all stay."""
    return np.sort(ranks(values)[0]) if len(values) else np.zeros(0, dtype=np.intp)


def hypervolume(values: Costs, reference: Sequence[float] | Costs) -> float:
    """Volume that the rows dominate within the reference point (Zitzler and Thiele 1999)."""
    inside = values[(values < np.asarray(reference)).all(axis=1)] if len(values) else values
    return float(HV(ref_point=np.asarray(reference, dtype=float))(inside)) if len(inside) else 0.0


def hypervolume_in(values: Costs, best: Costs, worst: Costs) -> float:
    """The same, in units of the box from `best` to `worst`. An objective in which the box has no extent is left out."""
    wide = worst > best
    size = (worst - best)[wide]
    return hypervolume((values[:, wide] - best[wide]) / size, np.ones(len(size))) if wide.any() else 0.0


def spread(values: Costs, n: int, occupied: Costs | None = None) -> list[int]:
    """Indices of `n` rows, or of all, each the farthest from those chosen before it and from `occupied`, distances in
    units of the columns' ranges. Where nothing is occupied, the row of the least first objective comes first."""
    if len(values) <= n:
        return list(range(len(values)))
    everything = values if occupied is None else np.vstack([values, occupied])
    low, high = everything.min(0), everything.max(0)
    scaled = (values - low) / np.where(high > low, high - low, 1.0)
    chosen: list[int] = []
    if occupied is None or not len(occupied):
        chosen = [int(np.argmin(scaled[:, 0]))]
        distance = np.linalg.norm(scaled - scaled[chosen[0]], axis=1)
    else:
        taken = (occupied - low) / np.where(high > low, high - low, 1.0)
        distance = np.linalg.norm(scaled[:, None] - taken[None], axis=2).min(1)
    while len(chosen) < n:
        distance[chosen] = -1.0
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.linalg.norm(scaled - scaled[chosen[-1]], axis=1))
    return chosen


def knee(values: Costs) -> int:
    """The index of the row of the least sum of objectives, each scaled to the range of the rows given."""
    low, high = values.min(0), values.max(0)
    return int(np.argmin(((values - low) / np.where(high > low, high - low, 1.0)).sum(1)))


def front(
    evaluations: Iterable[Evaluation], objectives: Sequence[Objective], constraints: Sequence[Constraint] = ()
) -> list[Evaluation]:
    """The fully measured evaluations that meet the constraints and that none other dominates, by the first objective,
    best first."""
    full = [e for e in evaluations if e.full]
    feasible = ~(violations(full, constraints) > 0).any(axis=1)
    values = costs(full, objectives)
    usable = np.flatnonzero(feasible & np.isfinite(values).all(axis=1))
    best = usable[non_dominated(values[usable])]
    order = sorted(best.tolist(), key=lambda i: (tuple(values[i]), full[i].architecture.key))
    return [full[i] for i in order]


@dataclass(frozen=True)
class Target:
    """What the user asked for. Sizes are absolute (the caller resolves shares); the speed-up is over the base."""

    max_params: int | None = None
    max_bytes: int | None = None
    min_speedup: float | None = None
    max_drop: float | None = None

    def bounds(self) -> list[tuple[str, float, bool]]:
        """The bounds asked for: name in `Evaluation.values`, bound, and whether the value must be at most the bound."""
        wanted = [
            ("parameters", self.max_params, True),
            ("bytes", self.max_bytes, True),
            ("speedup", self.min_speedup, False),
        ]
        return [(name, float(bound), upper) for name, bound, upper in wanted if bound is not None]

    def misses(self, evaluation: Evaluation) -> float:
        """By how much an evaluation misses, as a sum of shares of the bounds; 0 where the target is met, infinite where
        a value is no number."""
        missed = []
        for name, bound, upper in self.bounds():
            value = evaluation.values[name]
            missed.append((value - bound if upper else bound - value) / abs(bound or 1.0))
        if self.max_drop is not None:
            missed.append(1 - self.max_drop - evaluation.values["quality"])
        return math.inf if any(map(math.isnan, missed)) else sum(max(0.0, share) for share in missed)

    def __str__(self) -> str:
        parts = [f"{name} {'at most' if upper else 'at least'} {number(bound)}" for name, bound, upper in self.bounds()]
        if self.max_drop is not None:
            parts.append(f"quality at least {1 - self.max_drop:.6g}")
        return " and ".join(parts)


def meeting(evaluations: Iterable[Evaluation], target: Target) -> list[Evaluation]:
    """The measured architectures that meet a target: the best quality first or, with `max_drop`, the fewest parameters.

    Values need `quality`, `parameters`, and `bytes` or `speedup` (decode speed over the base's) where the target names
    them. Raises ValueError, naming the nearest, where none meets it.
    """
    candidates = [e for e in evaluations if e.full]
    if not candidates:
        raise ValueError("there is no measured architecture to pick from")
    if not target.bounds() and target.max_drop is None:
        raise ValueError("a target needs at least one of max_params, max_bytes, min_speedup and max_drop")

    found = [e for e in candidates if target.misses(e) == 0.0]
    if not found:
        nearest = min(candidates, key=lambda e: (target.misses(e), e.architecture.key))
        names = ["quality", "parameters", *(name for name, _, _ in target.bounds() if name != "parameters")]
        values = ", ".join(f"{name} {number(nearest.values[name])}" for name in names)
        raise ValueError(f"no measured architecture has {target}; the nearest has {values}")
    if target.max_drop is not None:
        return sorted(found, key=lambda e: (e.values["parameters"], -e.values["quality"], e.architecture.key))
    return sorted(found, key=lambda e: (-e.values["quality"], e.values["parameters"], e.architecture.key))


def contenders(evaluations: Iterable[Evaluation], target: Target) -> list[Evaluation]:
    """The measured architectures that a target asks for, as far as their measurements tell them apart, best first.

    With `max_drop` the one of fewest parameters whose quality is at least 1 - max_drop. Otherwise, of those that meet
    the sizes asked for, all whose quality is within two standard errors (`quality_stderr`) of the best: the idea of the
    one-standard-error rule (Breiman et al. 1984, section 3.4.3), with one more because the best of many noisy values
    owes some of its lead to luck. Raises ValueError as `meeting` does.
    """
    found = meeting(evaluations, target)
    if target.max_drop is not None:
        return found[:1]
    least = found[0].values["quality"] - 2 * found[0].values.get("quality_stderr", 0.0)
    return [e for e in found if e.values["quality"] >= least]
