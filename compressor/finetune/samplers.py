"""Which sub-networks take part in a training step. One class is one strategy; `SAMPLERS` names them.

A strategy sees a `Space` (anything that can draw architectures) and answers, for a step, with the members whose
gradients are summed before the optimizer moves. Draws are a pure function of (seed, step).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from compressor.architecture import Architecture


class Space(Protocol):
    """What a sampler needs of a search space."""

    def largest(self) -> Architecture: ...

    def smallest(self) -> Architecture: ...

    def sample(self, rng: np.random.Generator) -> Architecture: ...


@dataclass(frozen=True)
class Member:
    """One sub-network of a step, and the part it plays: the largest teaches, the others are taught."""

    architecture: Architecture
    role: Literal["largest", "other"]


Sampler = Callable[[int, np.random.Generator], list[Member]]


def sandwich(space: Space, random_members: int = 1) -> Sampler:
    """BigNAS's sandwich rule (arXiv 2003.11142, section 3.1): largest, `random_members` random ones, smallest.

    BigNAS draws two random members; one is the default here, as each costs a forward and a backward pass.
    """

    def members(step: int, rng: np.random.Generator) -> list[Member]:
        drawn = [Member(space.sample(rng), "other") for _ in range(random_members)]
        return [Member(space.largest(), "largest"), *drawn, Member(space.smallest(), "other")]

    return members


def alternate(space: Space) -> Sampler:
    """LLaMA-NAS's scheme (arXiv 2405.18377): the super-network in even steps, one random sub-network in odd ones."""

    def members(step: int, rng: np.random.Generator) -> list[Member]:
        if step % 2 == 0:
            return [Member(space.largest(), "largest")]
        return [Member(space.sample(rng), "other")]

    return members


def joint(space: Space) -> Sampler:
    """InstaTune's scheme (arXiv 2308.15609): super-network and one random sub-network, summed in every step."""

    def members(step: int, rng: np.random.Generator) -> list[Member]:
        return [Member(space.largest(), "largest"), Member(space.sample(rng), "other")]

    return members


SAMPLERS: dict[str, Callable[[Space], Sampler]] = {
    "sandwich": sandwich,
    "alternate": alternate,
    "joint": joint,
}


@dataclass(frozen=True)
class SizedSpace:
    """Draws stratified by size: first a number of parameters, uniformly between `low` and `high`, then a sub-network
    of about that size from `near`. Drawing genes uniformly would train middle sizes almost only (ShiftNAS,
    arXiv 2307.08300).
    """

    base: Architecture
    least: Architecture
    low: float
    high: float
    near: Callable[[np.random.Generator, float], Architecture]

    def largest(self) -> Architecture:
        return self.base

    def smallest(self) -> Architecture:
        return self.least

    def sample(self, rng: np.random.Generator) -> Architecture:
        return self.near(rng, rng.uniform(self.low, self.high))
