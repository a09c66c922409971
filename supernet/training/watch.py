"""Held-out losses on the way of a training: when they are measured, and what follows from them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from supernet.common.errors import RequestError
from supernet.common.metrics import record
from supernet.common.progress import say
from supernet.training.best_state import BestState
from supernet.training.history import History, Losses
from supernet.training.settings import TrainSettings

EARLY = (1 / 32, 1 / 16)
"""Shares of the steps after which held-out losses are measured, before they are at every eighth, since a rate that is
too high shows within a few steps."""
BETWEEN = 2
"""Steps between two such points at least: a point costs about as much as one and a half steps."""


def points_of(steps: int) -> list[int]:
    """The steps before which held-out losses are measured; the last one is after all of them."""
    parts = 8 if steps >= 32 else 4  # of few steps, measuring would take a third of the time
    points = [0]
    for share in (*EARLY, 1 / 8, *(part / parts for part in range(1, parts))):
        point = round(share * steps)
        if points[-1] + BETWEEN <= point <= steps - BETWEEN:
            points.append(point)
    return [*points, steps]


@dataclass
class Watch:
    """Held-out losses on the way of a training, and what follows from them. Every process does the same."""

    what: str
    model: nn.Module
    settings: TrainSettings
    losses: Callable[[], Losses]
    history: History
    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    best: BestState | None
    """None: the last state is kept, and nothing is slowed."""

    def measure(self, step: int) -> None:
        """Add a point to the curve, before `step`. Keep the state where it is the best, or go back where it is lost."""
        began = time.monotonic()
        # 1. The losses, those of the main process for all.
        self.model.eval()
        with torch.no_grad():
            losses = _main_losses(self.losses(), self.accelerator)
        self.model.train()
        self.history.add(step, losses)
        lost = [name for name, loss in losses.items() if not isfinite(loss)]
        if step == 0 and lost:
            raise RequestError(
                f"{self.what}: held-out {lost[0]} is {losses[lost[0]]} before the first step: numbers overflow in "
                "what is computed in; try another dtype"
            )
        record(f"{self.what} held out", step, **losses)
        shown = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        say(f"{self.what}: after {step} of {self.settings.steps} steps held-out {shown}")
        # 2. The best state, which needs no file where nothing can follow that is worse.
        if self.best is not None:
            left = 1 - step / self.settings.steps
            if self.best.is_better(losses):
                self.best.keep(step, write=left > 0)
            elif left > 0 and not self.best.rule.holds(losses, self.history.start, left):
                self.go_back(step, "more than the steps left can regain")
        self.history.measuring += time.monotonic() - began

    def go_back(self, step: int, why: str) -> None:
        """Go on from the best state, with half the rate, without the moments that led away from it."""
        if self.best is None or self.history.kept is None:
            return
        self.best.load()
        self.optimizer.state.clear()
        self.history.halved.append(step)
        say(
            f"{self.what}: {why}: back to the state after {self.history.kept} steps, with half the rate from here on "
            f"(a peak of {self.settings.learning_rate * 0.5 ** len(self.history.halved):.2g})"
        )

    def finish(self) -> None:
        """End with the best state, and say so."""
        if self.best is None or self.history.best is None:
            return
        if self.history.kept != self.settings.steps:
            self.best.load()
        say(f"{self.what}: {self.history.outcome}")


def _main_losses(losses: Losses, accelerator: Accelerator) -> Losses:
    """The main process's losses in every process, which decide the same by them."""
    if accelerator.num_processes == 1:
        return losses
    values = broadcast(torch.tensor(list(losses.values()), dtype=torch.float64, device=accelerator.device))
    return dict(zip(losses, values.tolist(), strict=True))
