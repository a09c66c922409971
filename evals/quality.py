"""Quality: what a network keeps of the base's scores on all tasks, as one number with its error.

The one definition; search, pick, report, comparison and cards use it. It is the mean over the tasks that count of

    (score - chance) / (base's score - chance)    where it is known what guessing scores,
    score / base's score                          elsewhere, inverted where lower is better,

and never below 0. The base is 1.0; a network that guesses is 0 on tasks of the first kind. A task on which the base
itself is not above chance by two standard errors does not count. Where none counts, quality is the base's perplexity
over the network's, on text that was not trained on.

What a search is led by is capped: no task is worth more than the base's own score there. A sub-network above it was
lucky with few documents, or guesses in a way that suits the task (of two sentences a wrecked network finds the one of
frequent words likelier, which may be right more often than the base is), and that must not make up for what it lost
elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from search.scores import Score
from supernet.common.errors import RequestError

DEFINITION = 3
"""Number of this definition in files that hold a search's qualities. 2: not capped. 1: score / base's score."""

Resampled = Mapping[str, NDArray[np.float64]]
"""{task: its score in each resample}."""


@dataclass(frozen=True)
class QualityScale:
    """What qualities on some documents are measured against. Raises `RequestError` where a base score is not finite,
    or is not above zero in a task whose chance is not known."""

    base: Mapping[str, Score]
    """The base's score on every task."""
    base_loss: float | None = None
    """The base's held-out loss, nats per token; needed where no task counts."""

    def __post_init__(self) -> None:
        for name, score in self.base.items():
            if not math.isfinite(score.value) or (score.chance is None and score.value <= 0):
                raise RequestError(
                    f"task {name}: the base scores {score.value:g}, so nothing can be measured against it; choose "
                    "another"
                )

    @cached_property
    def counted(self) -> list[str]:
        """Names of the tasks that count: the base's score is above chance there, or chance has no meaning."""
        return [name for name, score in self.base.items() if score.above_chance]

    @property
    def left_out(self) -> list[str]:
        """Names of the others."""
        return [name for name in self.base if name not in self.counted]

    @property
    def by_text(self) -> bool:
        """Whether no task counts, so that the loss on held-out text stands in."""
        return not self.counted

    @property
    def remark(self) -> str:
        """One sentence on the tasks that do not count, and on what stands in where none does; empty where all do."""
        if not self.left_out:
            return ""
        names = ", ".join(self.left_out)
        why = "the base is not above chance there by two standard errors"
        if not self.by_text:
            return f"Quality does not count {names}: {why}."
        return f"No task counts ({names}): {why}. Quality is the base's perplexity over the network's on held-out text."

    def quality(self, scores: Mapping[str, Score], loss: float | None = None, *, capped: bool = False) -> float:
        """Quality of a network with these scores, at least 0; `capped`: no task is worth more than 1. `loss` is its
        held-out loss, nats per token, on the same text as the base's; it is read where no task counts. Raises
        ValueError where it is missing then."""
        if self.by_text:
            return self.kept_of_text(loss)
        most = 1.0 if capped else math.inf
        shares = (min(most, float(self._share(name, scores[name].value))) for name in self.counted)
        return max(0.0, math.fsum(shares) / len(self.counted))

    def kept_of_text(self, loss: float | None) -> float:
        """The base's perplexity over that of a network with this loss. Raises ValueError where one is missing."""
        if loss is None or self.base_loss is None:
            raise ValueError("no task counts, and the held-out loss that stands in for them is missing")
        return math.exp(self.base_loss - loss)

    def stderr(self, scores: Mapping[str, Score], loss: float | None = None, loss_stderr: float | None = None) -> float:
        """Standard error of `quality` over the choice of documents, the base's scores taken as exact."""
        if self.by_text:
            return self.kept_of_text(loss) * (loss_stderr or 0.0)
        squares = 0.0
        for name in self.counted:
            if name not in scores:  # one that is not finite is worth nothing, for certain
                continue
            base, score = self.base[name], scores[name]
            if base.chance is not None:
                squares += (score.uncertainty / (base.value - base.chance)) ** 2
            elif base.higher_is_better:
                squares += (score.uncertainty / base.value) ** 2
            elif score.value:
                squares += (score.uncertainty * base.value / score.value**2) ** 2
        return math.sqrt(squares) / len(self.counted)

    def resampled(self, scores: Resampled) -> NDArray[np.float64]:
        """Quality by tasks in each resample, the base's scores taken as exact: a difference of two networks' rests on
        the documents drawn alone. Not a number where it is not finite. Raises ValueError where no task counts."""
        if self.by_text:
            raise ValueError("no task counts, so documents say nothing about quality")
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = [self._share(name, scores[name]) for name in self.counted]
        quality = np.maximum(0.0, np.sum(shares, axis=0) / len(shares))
        return np.where(np.isfinite(quality), quality, np.nan)

    def _share(self, name: str, value: float | NDArray[np.float64]) -> NDArray[np.float64]:
        """What scores keep of the base's."""
        base, values = self.base[name], np.asarray(value, dtype=float)
        if base.chance is not None:
            return (values - base.chance) / (base.value - base.chance)
        with np.errstate(divide="ignore"):
            return values / base.value if base.higher_is_better else base.value / values
