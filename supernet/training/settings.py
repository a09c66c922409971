"""How a network is trained: sizes of a step, the learning rate over the steps, and the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, cos, pi
from typing import Literal


@dataclass(frozen=True)
class TrainSettings:
    """How a network is trained."""

    tokens: int
    """Tokens that are read from the data in all."""
    batch_size: int
    """Blocks in a step."""
    sequence_length: int
    """Tokens in a block."""
    learning_rate: float
    """The peak learning rate."""
    seed: int
    accumulation: int = 1
    """Parts in which a batch is computed, one after the other."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_share: float = 0.03
    """Share of the steps, from the first, in which the learning rate rises."""
    tail_share: float = 0.0
    """Share of the steps, to the last, in which the learning rate stays at its final value."""
    final_share: float = 0.1
    """The final learning rate as a share of the peak."""
    weight_decay: float = 0.0
    """Weight decay of matrices; vectors have none."""
    clip: float = 1.0
    """The largest norm of the gradient."""
    optimizer: str = "adamw"
    move_idle: bool = False
    """Whether weight decay and momentum move slices that no member of a step used."""
    gradient_checkpointing: bool = False
    checkpoint_seconds: float = 60.0
    """Seconds between two writings of the state."""

    @property
    def steps(self) -> int:
        return max(1, ceil(self.tokens / (self.batch_size * self.sequence_length)))

    @property
    def warmup(self) -> int:
        """Steps in which the learning rate rises."""
        return max(1, round(self.warmup_share * self.steps))

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then down to `final_share` of the peak by the schedule, and constant
        in the last `tail_share` of the steps (BigNAS, arXiv 2003.11142, section 3.1: small sub-networks go on learning
        while large ones do not over-fit)."""
        warmup = self.warmup
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "constant":
            return self.learning_rate
        end = max(warmup + 1, round((1 - self.tail_share) * self.steps))
        progress = min(1.0, (step - warmup) / (end - warmup))
        left = 1 - progress if self.schedule == "linear" else (1 + cos(pi * progress)) / 2
        return self.learning_rate * (self.final_share + (1 - self.final_share) * left)

    def slowed_rate(self, step: int, halved: list[int]) -> float:
        """`rate`, halved for each of these steps and warmed up again after the last of them."""
        rate = self.rate(step) * 0.5 ** len(halved)
        return rate * min(1.0, (step - halved[-1] + 1) / self.warmup) if halved else rate
