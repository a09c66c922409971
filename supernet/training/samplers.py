"""Which sub-networks take part in a training step, and where random ones are drawn.

A sampler answers, for a step, with the members whose gradients are summed before the optimizer moves; `SAMPLERS` names
them. A draw answers with one random architecture; `DRAWS` names them. Both are pure functions of the random generator
that they are given and, for the draw that shifts, of what it remembers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from supernet.architecture import Architecture, Structure


@dataclass(frozen=True)
class TrainingRange:
    """The sub-networks that are trained: the ends, what counts as the size of one, and how to draw one.

    `uniform` draws every gene uniformly, `near` a sub-network of about that many parameters; `cut` is the uniform cut
    (all layers alike) nearest to a number of parameters.
    """

    structure: Structure
    least: Architecture
    uniform: Callable[[np.random.Generator], Architecture]
    near: Callable[[np.random.Generator, float], Architecture]
    cut: Callable[[float], Architecture]

    @property
    def largest(self) -> Architecture:
        return self.structure.base

    @property
    def sizes(self) -> tuple[float, float]:
        """Parameters of the smallest and of the largest that are drawn: just under the base, which is not random."""
        return self.structure.parameters(self.least), 0.98 * self.structure.parameters(self.largest)


class Draw(Protocol):
    """A distribution over sub-networks that may learn from how those drawn do."""

    def __call__(self, rng: np.random.Generator) -> Architecture: ...

    def observe(self, architecture: Architecture, gap: float) -> None:
        """Be told a drawn member's loss in a step (to its teacher or, where it has none, to the data)."""


@dataclass
class UniformGenes:
    """Every gene uniformly, as most supernets are trained: sizes pile up in the middle of the range."""

    range: TrainingRange
    memory: dict[str, Any] = field(default_factory=dict)

    def __call__(self, rng: np.random.Generator) -> Architecture:
        return self.range.uniform(rng)

    def observe(self, architecture: Architecture, gap: float) -> None:
        pass


@dataclass
class EvenSizes:
    """A number of parameters uniformly, then a sub-network of about that size: no size is trained more than another."""

    range: TrainingRange
    memory: dict[str, Any] = field(default_factory=dict)

    def __call__(self, rng: np.random.Generator) -> Architecture:
        return self.range.near(rng, rng.uniform(*self.range.sizes))

    def observe(self, architecture: Architecture, gap: float) -> None:
        pass


@dataclass
class SizesAndCuts(EvenSizes):
    """Sizes evenly too, but every second sub-network is a uniform cut instead of a random one: few architectures that
    are trained often, which most good ones of their size are not far from."""

    def __call__(self, rng: np.random.Generator) -> Architecture:
        size = rng.uniform(*self.range.sizes)
        return self.range.cut(size) if rng.random() < 0.5 else self.range.near(rng, size)


@dataclass
class ShiftedSizes:
    """Sizes that still learn fast are drawn more often (ShiftNAS, arXiv 2307.08300).

    The paper keeps a distribution over bins of cost and shifts it to where the gradient is still large. Here the sign
    of an under-trained bin is that its loss still falls: a slow moving average of it lies above a fast one. Bins are
    drawn in proportion to that fall, a third of the time evenly; a bin not seen often enough counts as the average.
    `memory` is JSON: it is stored with the training state.
    """

    range: TrainingRange
    memory: dict[str, Any] = field(default_factory=dict)

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
        known = np.array(self.memory["seen"]) >= self.ENOUGH
        fall[~known] = fall[known].mean() if known.any() else 1.0
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
            # The first observations are averaged evenly, so that the start does not count as zero.
            average[at] += max(weight, 1 / self.memory["seen"][at]) * (gap - average[at])


DRAWS: dict[str, Callable[[TrainingRange, dict[str, Any]], Draw]] = {
    "sizes": EvenSizes,
    "genes": UniformGenes,
    "cuts": SizesAndCuts,
    "shift": ShiftedSizes,
}


@dataclass(frozen=True)
class Member:
    """One sub-network of a step, and the part it plays: the largest teaches, the others are taught."""

    architecture: Architecture
    role: Literal["largest", "random", "smallest"]


Sampler = Callable[[int, np.random.Generator, TrainingRange, Draw, int], list[Member]]
"""(step, generator, range, draw, random members) -> members, teacher first."""


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
