"""What is kept of how a search compares with chance: `search.control` makes it, and reports read it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Control(BaseModel):
    """A search beside a random search of as many evaluations: of each the mean of the best tenth, in the objective's
    units."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    way: Literal["predicted", "measured"]
    objective: str
    evaluations: int
    """Of each of the two, within the bounds that are computed."""
    best: int
    """How many are the best tenth."""
    found: float
    random: float
    """Of the random search; predicted, the median over many."""
    difference: float
    """How much better the search was: more is better, whatever the objective's direction."""
    low: float
    high: float
    """The central 95 % of it, by the luck of what either of them drew."""

    @property
    def text(self) -> str:
        """Both in a sentence."""
        random = f"a random search of {self.evaluations} sub-networks"
        by = " (predicted)" if self.way == "predicted" else ""
        both = f"{self.objective} of the best {self.best}: {self.found:.3g}, in {random} {self.random:.3g}{by}"
        interval = f"{self.difference:+.3g} ({self.low:+.3g} to {self.high:+.3g})"
        if self.low > 0:
            return f"{both}; better, {interval}"
        if self.high < 0:
            return f"{both}; worse, {interval}"
        return f"{both}; not told apart, {interval}"


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
