"""Settings of a short fine-tuning of `tiny.checkpoint`, and sub-networks to draw in it."""

from __future__ import annotations

from typing import Any

import numpy as np

from supernet.architecture import Architecture, LayerSizes
from supernet.training.samplers import TrainingRange
from supernet.training.settings import TrainSettings

SMALL = Architecture(32, (LayerSizes(2, 1, 32), LayerSizes(0, 0, 32), LayerSizes(2, 1, 32)))
CUT = Architecture(32, (LayerSizes(2, 1, 48),) * 3)


def settings(tokens: int, **more: Any) -> TrainSettings:
    return TrainSettings(
        **({"tokens": tokens, "batch_size": 2, "sequence_length": 16, "learning_rate": 1e-2, "seed": 3} | more)
    )


def widths_near(rng: np.random.Generator, parameters: float) -> Architecture:
    return Architecture(32, tuple(LayerSizes(4, 2, int(w)) for w in rng.integers(16, 64, size=3)))


def range_of(structure: Any) -> TrainingRange:
    sizes = structure.parameters(SMALL), 0.98 * structure.parameters(structure.base)
    return TrainingRange(
        structure, SMALL, structure.base, sizes, lambda rng: widths_near(rng, 0), widths_near, lambda parameters: CUT
    )
