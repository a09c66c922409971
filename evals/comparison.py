"""Whether one network is better than another on these documents, or by chance: a paired bootstrap over documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np
from lm_eval.api.metrics import mean
from numpy.typing import NDArray

from evals.quality import Resampled
from evals.scoring.scorer import DocumentValues
from evals.scoring.tasks import ScoredTask

RESAMPLES = 1000


def resampled(
    tasks: Mapping[str, ScoredTask], documents: DocumentValues, *, resamples: int = RESAMPLES, seed: int = 0
) -> Resampled:
    """Every task's score in each resample: documents are drawn with replacement, within each subtask.

    The draws depend on the seed and the subtask alone, so that resample i of two networks rests on the same documents,
    and two tasks' draws are independent.
    """
    scores: dict[str, NDArray[np.float64]] = {}
    for name, values in documents.items():
        task = tasks[name]
        columns = []
        for subtask, items in zip(task.subtasks, values, strict=True):
            rng = np.random.default_rng([seed, crc32(subtask.name.encode()), len(items)])
            aggregation = subtask.task.aggregation().get(task.metric, mean)
            columns.append(_aggregates(aggregation, items, rng, resamples))
        sizes = [len(items) for items in values]
        none = [None] * len(sizes)
        scores[name] = np.array([task.aggregate(list(row), none, sizes)[0] for row in zip(*columns, strict=True)])
    return scores


def _aggregates(
    aggregation: Callable[[Sequence[Any]], float], items: Sequence[Any], rng: np.random.Generator, resamples: int
) -> NDArray[np.float64]:
    """The aggregate of the items of each resample, [resamples]; not a number where there are none."""
    if not items:
        return np.full(resamples, np.nan)
    draws = (rng.integers(0, len(items), len(items)) for _ in range(resamples))
    if aggregation is mean:
        values = np.array(items, dtype=float)
        return np.array([values[draw].mean() for draw in draws])
    return np.array([float(aggregation([items[i] for i in draw])) for draw in draws])


def score_intervals(
    tasks: Mapping[str, ScoredTask], ours: Resampled, theirs: Resampled
) -> dict[str, tuple[float, float] | None]:
    """For each task that both have, `paired_interval` of the difference of scores, positive where ours is better."""
    signs = {name: 1 if tasks[name].higher_is_better else -1 for name in ours if name in theirs}
    return {name: paired_interval([sign * ours[name]], [sign * theirs[name]]) for name, sign in signs.items()}


def text_qualities(losses: Sequence[float], base: Sequence[float]) -> NDArray[np.float64]:
    """Quality in each resample where no task counts, from the losses of both on each block of held-out text: blocks are
    drawn with replacement, the same ones for everybody."""
    draws = np.random.default_rng([0, len(base)]).integers(0, len(base), (RESAMPLES, len(base)))
    return np.exp((np.asarray(base) - np.asarray(losses))[draws].mean(1))


def paired_interval(
    ours: Sequence[NDArray[np.float64]], theirs: Sequence[NDArray[np.float64]]
) -> tuple[float, float] | None:
    """Central 95 % of the difference of mean quality or score, ours less theirs, from each side's numbers in all
    resamples, for every seed.

    Where a side has several seeds they are drawn with replacement too, so that chance in training counts as chance.
    None where no resample gives both a number.
    """
    rng = np.random.default_rng(0)

    def drawn(rows: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """The mean over seeds drawn anew in each resample; what is drawn spreads too little by n / (n - 1)."""
        stacked, n = np.stack(rows), len(rows)
        means = np.take_along_axis(stacked, rng.integers(0, n, stacked.shape), axis=0).mean(0)
        if n == 1:
            return means
        return stacked.mean(0) + (means - stacked.mean(0)) * np.sqrt(n / (n - 1))

    differences = drawn(ours) - drawn(theirs)
    differences = differences[np.isfinite(differences)]
    if not len(differences):
        return None
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)
