"""Quality: a network's scores on all tasks beside the base's, as one number with its error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from supernet.common.errors import RequestError

if TYPE_CHECKING:
    from evals.scoring.tasks import ScoredTask
    from search.store import Measurement

Tasks = Mapping[str, "ScoredTask"]
Values = Mapping[str, float]
"""{task: its score}."""


def mean_ratio(
    tasks: Tasks, scores: Mapping[str, NDArray[np.float64]], base: Mapping[str, NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Mean over tasks of score / base's score, inverted where lower is better; not finite where the base scores 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = [
            scores[name] / base[name] if task.higher_is_better else base[name] / scores[name]
            for name, task in tasks.items()
        ]
    return sum(ratios[1:], ratios[0]) / len(ratios)


def relative_quality(tasks: Tasks, values: Values, base: Values) -> float:
    """Mean over tasks of score / base's score, inverted where lower is better: the base is 1.0.

    Raises `RequestError` where the base itself scores nothing.
    """
    for name in tasks:
        check_base(name, base[name])
    own, of_base = ({name: np.asarray(row[name], dtype=float) for name in tasks} for row in (values, base))
    return float(mean_ratio(tasks, own, of_base))


def standard_error(row: Measurement) -> float:
    """A measured score's standard error over documents.

    Where lm-eval knows none (one document in each part of a group) or 0 (all documents said the same), that is want of
    documents and not certainty: a score between 0 and 1 then has that of a share, with one document more that succeeded
    and one that failed (Laplace). Nothing is known of other scores: 0.
    """
    if row.stderr or not 0 <= row.score <= 1 or not row.n:
        return row.stderr or 0.0
    share = (row.score * row.n + 1) / (row.n + 2)
    return math.sqrt(share * (1 - share) / (row.n + 2))


def quality_stderr(tasks: Tasks, values: Values, errors: Values, base: Values) -> float:
    """Standard error of `relative_quality` over the choice of documents, the base's scores taken as given."""
    squares = 0.0
    for name, task in tasks.items():
        if task.higher_is_better:
            squares += (errors[name] / base[name]) ** 2
        elif values[name]:
            squares += (errors[name] * base[name] / values[name] ** 2) ** 2
    return math.sqrt(squares) / len(tasks)


def check_base(task: str, score: float) -> None:
    """Raises `RequestError` for a score of the base that no share can be taken of."""
    if not 0 < score < math.inf:
        raise RequestError(
            f"task {task}: the base scores {score:g}, so nothing can be measured against it; choose another"
        )
