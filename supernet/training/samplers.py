"""Which sub-networks take part in a training step, and how random ones are drawn.

A sampler gives the members of a step, whose gradients are summed before the optimizer steps; `SAMPLERS` names them. A
draw gives one random architecture; `DRAWS` names them. Both are pure functions of the random generator and, for
`ShiftedSizes`, of its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from supernet.architecture import Architecture, Structure

Memory = dict[str, list[float]]
"""What a draw remembers from earlier steps; JSON, since it is stored with the training state."""


@dataclass(frozen=True)
class TrainingRange:
    """The sub-networks that are trained: the smallest and the largest one, the `sizes` in parameters between which
    others are drawn, and how to draw them.

    `uniform` draws every gene uniformly, `near` a sub-network of about that many parameters. `cut` is the uniform cut
    (all layers alike) nearest to a number of parameters.
    """

    structure: Structure
    least: Architecture
    largest: Architecture
    sizes: tuple[float, float]
    uniform: Callable[[np.random.Generator], Architecture]
    near: Callable[[np.random.Generator, float], Architecture]
    cut: Callable[[float], Architecture]


class Draw(Protocol):
    """A distribution over sub-networks, which may change with the losses of those drawn."""

    def __call__(self, rng: np.random.Generator) -> Architecture: ...

    def observe(self, architecture: Architecture, gap: float) -> None:
        """Take note of a drawn member's loss in a step: to its teacher or, where it has none, to the data."""


@dataclass
class UniformGenes:
    """Every gene uniformly, as most super-networks are trained: most sizes are in the middle of the range."""

    range: TrainingRange
    memory: Memory = field(default_factory=dict)

    def __call__(self, rng: np.random.Generator) -> Architecture:
        return self.range.uniform(rng)

    def observe(self, architecture: Architecture, gap: float) -> None:
        pass


@dataclass
class EvenSizes:
    """A number of parameters uniformly, then a sub-network of about that size: all sizes are trained equally."""

    range: TrainingRange
    memory: Memory = field(default_factory=dict)

    def __call__(self, rng: np.random.Generator) -> Architecture:
        return self.range.near(rng, rng.uniform(*self.range.sizes))

    def observe(self, architecture: Architecture, gap: float) -> None:
        pass


@dataclass
class SizesAndCuts(EvenSizes):
    """As `EvenSizes`, but half of the sub-networks are uniform cuts. These are few architectures, so each is trained
    often, and most good architectures are near the cut of their size."""

    def __call__(self, rng: np.random.Generator) -> Architecture:
        size = rng.uniform(*self.range.sizes)
        return self.range.cut(size) if rng.random() < 0.5 else self.range.near(rng, size)


@dataclass
class ShiftedSizes:
    """Sizes that still learn fast are drawn more often (ShiftNAS, arXiv 2307.08300).

    The paper keeps a distribution over bins of cost and shifts it to where the gradient is still large. Here a bin is
    under-trained where its loss still falls: a slow moving average of it is above a fast one. Bins are drawn in
    proportion to that difference, a third of the time evenly; a bin that was seen too seldom counts as the average.
    """

    range: TrainingRange
    memory: Memory = field(default_factory=dict)

    BINS, FAST, SLOW, EVEN, ENOUGH = 8, 0.3, 0.05, 1 / 3, 5

    def __post_init__(self) -> None:
        if not self.memory:
            self.memory |= {"fast": [0.0] * self.BINS, "slow": [0.0] * self.BINS, "seen": [0] * self.BINS}

    def __call__(self, rng: np.random.Generator) -> Architecture:
        low, high = self.range.sizes
        at = rng.choice(self.BINS, p=self.shares()) + rng.random()
        return self.range.near(rng, low + (high - low) * at / self.BINS)

    def shares(self) -> np.ndarray:
        """Probability of each bin, smallest sizes first."""
        fall = np.maximum(np.array(self.memory["slow"]) - np.array(self.memory["fast"]), 0.0)
        seen = np.array(self.memory["seen"]) >= self.ENOUGH
        fall[~seen] = fall[seen].mean() if seen.any() else 1.0
        if not fall.any():
            return np.full(self.BINS, 1 / self.BINS)
        return self.EVEN / self.BINS + (1 - self.EVEN) * fall / fall.sum()

    def observe(self, architecture: Architecture, gap: float) -> None:
        low, high = self.range.sizes
        share = (self.range.structure.parameters(architecture) - low) / (high - low)
        at = min(max(int(share * self.BINS), 0), self.BINS - 1)
        self.memory["seen"][at] += 1
        for name, weight in (("fast", self.FAST), ("slow", self.SLOW)):
            average = self.memory[name]
            # The first observations are averaged evenly, so that the initial zero has no weight.
            average[at] += max(weight, 1 / self.memory["seen"][at]) * (gap - average[at])


DRAWS: dict[str, Callable[[TrainingRange, Memory], Draw]] = {
    "sizes": EvenSizes,
    "genes": UniformGenes,
    "cuts": SizesAndCuts,
    "shift": ShiftedSizes,
}


@dataclass(frozen=True)
class Member:
    """One sub-network of a step, and its role: the largest teaches, the others are taught."""

    architecture: Architecture
    role: Literal["largest", "random", "smallest"]


Sampler = Callable[[int, np.random.Generator, TrainingRange, Draw, int], list[Member]]
"""(step, generator, range, draw, number of random members) -> members, the teacher first."""


def sandwich(step: int, rng: np.random.Generator, range_: TrainingRange, draw: Draw, random: int) -> list[Member]:
    """BigNAS's sandwich rule (arXiv 2003.11142, section 3.1): largest, random ones, smallest."""
    drawn = [Member(draw(rng), "random") for _ in range(random)]
    return [Member(range_.largest, "largest"), *drawn, Member(range_.least, "smallest")]


def alternate(step: int, rng: np.random.Generator, range_: TrainingRange, draw: Draw, random: int) -> list[Member]:
    """LLaMA-NAS's scheme (arXiv 2405.18377): the super-network in even steps, random sub-networks in odd ones."""
    if step % 2 == 0:
        return [Member(range_.largest, "largest")]
    return [Member(draw(rng), "random") for _ in range(random)]


def joint(step: int, rng: np.random.Generator, range_: TrainingRange, draw: Draw, random: int) -> list[Member]:
    """InstaTune's scheme (arXiv 2308.15609): super-network and random sub-networks, summed in every step."""
    return [Member(range_.largest, "largest"), *(Member(draw(rng), "random") for _ in range(random))]


SAMPLERS: dict[str, Sampler] = {"sandwich": sandwich, "alternate": alternate, "joint": joint}
