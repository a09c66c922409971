"""A score of a network on some documents: one frozen model from the harness to the report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

Split = Literal["search", "report", "all"]
"""Which documents: those of the search, the others, or (evaluated outside a run) all."""


class Score(BaseModel):
    """The score of one network on one task, or on held-out text."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    metric: str
    """lm-eval's name of the metric, such as `acc_norm`."""
    value: float
    """The score in the metric's own unit; an accuracy lies between 0 and 1."""
    stderr: float | None = None
    """One standard error over documents; None where lm-eval knows none."""
    n: int
    """Number of documents scored."""
    split: Split
    higher_is_better: bool = True
    chance: float | None = None
    """What guessing scores, in the metric's unit; None where that has no meaning."""

    @property
    def stamp(self) -> str:
        """`near chance` where the score is within two standard errors of chance, `below chance` where it is worse."""
        if self.chance is None:
            return ""
        above = (self.value - self.chance) * (1 if self.higher_is_better else -1)
        margin = 2 * (self.stderr or 0.0) + 1e-9
        return "near chance" if abs(above) <= margin else "below chance" if above < 0 else ""

    @property
    def above_chance(self) -> bool:
        """Whether the score is better than guessing by more than two standard errors (`uncertainty`, where few
        documents give none), or chance has no meaning."""
        if self.chance is None:
            return True
        return (self.value - self.chance) * (1 if self.higher_is_better else -1) > 2 * self.uncertainty + 1e-9

    @property
    def near_chance(self) -> bool:
        """Whether the score is within two known standard errors of chance, and so cannot be told from guessing."""
        return self.stderr is not None and self.stamp == "near chance"

    @property
    def text(self) -> str:
        """The score with its standard error: `0.810 ± 0.005`."""
        decimals = 3 if abs(self.value) < 10 else 2 if abs(self.value) < 100 else 1
        error = "" if self.stderr is None else f" ± {self.stderr:.{decimals}f}"
        return f"{self.value:.{decimals}f}{error}"

    @property
    def uncertainty(self) -> float:
        """The standard error over documents, estimated where lm-eval gives none.

        lm-eval gives none for one document in each part of a group, and 0 where all documents agree. That is too few
        documents and not certainty: a score between 0 and 1 then has the error of a share, with one more document that
        succeeded and one that failed (Laplace). Nothing is known of other scores: 0.
        """
        if self.stderr or not 0 <= self.value <= 1 or not self.n:
            return self.stderr or 0.0
        share = (self.value * self.n + 1) / (self.n + 2)
        return math.sqrt(share * (1 - share) / (self.n + 2))

    def or_worst(self) -> Score:
        """The score, or the worst there is for one that is not a number (a network whose numbers overflowed)."""
        if not math.isnan(self.value):
            return self
        return self.model_copy(update={"value": 0.0 if self.higher_is_better else math.inf})


@dataclass(frozen=True)
class ScoreKey:
    """Where the store keeps a score, and all that is known of it before it is measured.

    `name` is the store's name of the task with its metric; `documents` is a fingerprint of what is scored.
    """

    name: str
    documents: str
    metric: str = ""
    split: Split = "search"
    higher_is_better: bool = True
    chance: float | None = None

    @property
    def place(self) -> tuple[str, str]:
        """The two columns by which the store finds the score."""
        return self.name, self.documents

    def score(self, value: float, stderr: float | None, n: int) -> Score:
        """The score of this key with the numbers that were measured."""
        return Score(
            metric=self.metric,
            value=value,
            stderr=stderr,
            n=n,
            split=self.split,
            higher_is_better=self.higher_is_better,
            chance=self.chance,
        )
