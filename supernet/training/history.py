"""What a training records: held-out losses on its way, which of its states is kept, where it was slowed, its cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import inf, isfinite
from statistics import mean
from typing import Any

Losses = dict[str, float]
"""Held-out losses by the name of a member, nats per token."""

REGAINED = 0.05
"""How much of a loss at the start a whole training is taken to regain while its rate falls, as a share; less of it in
proportion where fewer steps are left (`docs/finetuning.md` has what was measured)."""


@dataclass(frozen=True)
class Rule:
    """Which of the states of one training is the best, by their held-out losses."""

    scored: tuple[str, ...]
    """The members whose mean loss is to be as low as it can."""
    guarded: str
    """The member that must not become worse by more than `tolerance`."""
    tolerance: float = 0.0
    """A rise of the guarded member's loss that is allowed, as a share of its loss at the start."""

    def score(self, losses: Losses, start: Losses) -> float:
        """What the best state has least of: the mean loss of the scored members; infinite where the guarded one rose
        by more than the tolerance, or something is not finite."""
        if not self.holds(losses, start, 0.0):
            return inf
        return mean(losses[name] for name in self.scored)

    def holds(self, losses: Losses, start: Losses, left: float) -> bool:
        """Whether neither the guarded member nor the scored ones have risen by more than what is allowed and what the
        share `left` of the steps can regain."""
        limit = 1 + self.tolerance + REGAINED * left
        return all(
            mean(losses.get(name, inf) for name in names) <= limit * mean(start[name] for name in names)
            for names in ((self.guarded,), self.scored)
        )


@dataclass
class History:
    """What a training run records for the report. A pass is one member's forward and backward over one part of a batch,
    so a step of the sandwich rule has at least three."""

    curve: list[Losses] = field(default_factory=list)
    """Points: `step` and `tokens` before them, and held-out losses by name; what is not finite is left out."""
    learning_rate: float | None = None
    """The peak, as it was before it was halved; None where an earlier version did not say."""
    tokens: int = 0
    seconds: float = 0.0
    """Seconds of training, measuring among them."""
    measuring: float = 0.0
    """Seconds of them that held-out losses and keeping the best state took."""
    passes: int = 0
    kept: int | None = None
    """The step whose state is the best so far; 0: the untrained one. None: nothing was measured."""
    halved: list[int] = field(default_factory=list)
    """Steps after which the training went back to the best state and halved its rate."""

    def add(self, step: int, losses: Losses) -> None:
        """Add a point to the curve."""
        finite = {name: loss for name, loss in losses.items() if isfinite(loss)}
        self.curve.append({"step": float(step), "tokens": float(self.tokens)} | finite)

    @property
    def start(self) -> Losses:
        """The first point of the curve."""
        return self.curve[0]

    @property
    def best(self) -> Losses | None:
        """The point of the state that is kept."""
        return next((point for point in self.curve if point["step"] == self.kept), None)

    @property
    def outcome(self) -> str:
        """Which state is kept, held-out losses at the start and of that state, and the share of the time that measuring
        took, for people; empty where no state is known to be the best. After the last point."""
        best, steps = self.best, int(self.curve[-1]["step"]) if self.curve else 0
        if best is None:
            return ""
        kept = f"kept is the state after {self.kept} of {steps} steps"
        if self.kept == 0:
            kept = "no state was better than the untrained one, which is kept"
        elif self.kept == steps:
            kept = "kept is the last state"
        losses = [
            f"{name} {self.start[name]:.3f} → {loss:.3f}"
            for name, loss in best.items()
            if name not in ("step", "tokens") and name in self.start
        ]
        times = {1: "once", 2: "twice"}.get(len(self.halved), f"{len(self.halved)} times")
        slowed = f"the rate was halved {times}; " if self.halved else ""
        share = self.measuring / max(self.seconds, 1e-9)
        return f"{kept}; held-out {', '.join(losses)}; {slowed}measuring took {share:.0%} of the time"

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> History:
        """From `vars` of one, perhaps of an earlier version, or with other keys beside them."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})
