"""Quality: a network's scores on all tasks over the base's, as one number with its error."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from search.scores import Score
from supernet.common.errors import RequestError

Values = Mapping[str, NDArray[np.float64]]
"""{task: its scores}."""


def mean_ratio(higher_is_better: Mapping[str, bool], scores: Values, base: Values) -> NDArray[np.float64]:
    """Mean over tasks of score / base's score, inverted where lower is better; not finite where the base scores 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = [
            scores[name] / base[name] if higher else base[name] / scores[name]
            for name, higher in higher_is_better.items()
        ]
    return sum(ratios[1:], ratios[0]) / len(ratios)


def relative_quality(scores: Mapping[str, Score], base: Mapping[str, Score]) -> float:
    """Mean over the base's tasks of score / base's score, inverted where lower is better: the base is 1.0.

    Raises `RequestError` where the base itself scores nothing.
    """
    for name, score in base.items():
        check_base(name, score)
    values, base_values = ({name: np.asarray(row[name].value) for name in base} for row in (scores, base))
    return float(mean_ratio({name: score.higher_is_better for name, score in base.items()}, values, base_values))


def quality_stderr(scores: Mapping[str, Score], base: Mapping[str, Score]) -> float:
    """Standard error of `relative_quality` over the choice of documents, the base's scores taken as exact."""
    squares = 0.0
    for name, base_score in base.items():
        score = scores[name]
        if score.higher_is_better:
            squares += (score.uncertainty / base_score.value) ** 2
        elif score.value:
            squares += (score.uncertainty * base_score.value / score.value**2) ** 2
    return math.sqrt(squares) / len(base)


def check_base(task: str, score: Score) -> None:
    """Raises `RequestError` for a score of the base that no share can be taken of."""
    if not 0 < score.value < math.inf:
        raise RequestError(
            f"task {task}: the base scores {score.value:g}, so nothing can be measured against it; choose another"
        )
