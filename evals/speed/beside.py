"""Times of networks as ratios to a reference network that is timed beside them, pass by pass: what a `SpeedTable` is
measured with. A machine's speed drifts within a second by more than the differences that are to be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evals.speed.passes import Passes, called, clock_of, prepared, random_ids

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

READS, STEPS = 3, 16
"""Readings of the prompt, and decoding steps, in one round of timing."""


class Times(NamedTuple):
    """Seconds to read the prompt, and of one decoding step."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one network's passes, as shares of the whole pass of a reference network beside them: of each layer,
    and of all else (embedding, head), in reading the prompt and in one decoding step; and the reference's seconds."""

    prefill_layers: list[float]
    prefill_rest: float
    decode_layers: list[float]
    decode_rest: float
    reference: Times


class Reference:
    """A network that others are timed beside: reading `prompt` tokens, and one more token half-way through generating
    `new`, in `rounds` rounds. Its CUDA graphs are captured once for all of them."""

    def __init__(self, model: PreTrainedModel, *, batch: int, prompt: int, new: int, rounds: int) -> None:
        steps = max(1, min(STEPS * rounds, new - 2))
        self._readings, self._steps = 1 + READS * rounds, steps + 1
        self._ids = random_ids(model, batch, prompt), random_ids(model, batch, prompt + (new - steps) // 2)
        self._eager = [called(*work) for work in self._works(model)]
        self._graphs: list[Passes] | None = None
        self._model, self._capturable = model, True

    def _works(self, model: nn.Module) -> list[tuple[nn.Module, torch.Tensor, int]]:
        """What is timed of a network: reading alone, and generating behind a longer prompt."""
        return [(model, self._ids[0], 0), (model, self._ids[1], self._steps)]

    def beside(self, model: PreTrainedModel) -> tuple[Times, Times]:
        """Times of `model` and of the reference.

        They take turns pass by pass, and `model`'s time is its median ratio to the pass beside it, times the
        reference's seconds: a machine's speed drifts within a second by more than the differences that are to be
        measured.
        """
        import torch

        with torch.inference_mode():
            if self._capturable and self._graphs is None:  # its graphs first: what it cannot have, nobody has
                ready, self._capturable = prepared(self._works(self._model))
                self._graphs = ready if self._capturable else None
            own, of_reference = [called(*work) for work in self._works(model)], self._eager
            if self._graphs is not None:
                ready, graphs = prepared(self._works(model))
                own, of_reference = (ready, self._graphs) if graphs else (own, of_reference)
            reads = [_in_turns(own[0], of_reference[0], 0)[0] for _ in range(self._readings)][1:]
            decode = _in_turns(own[1], of_reference[1], self._steps)[2:]
        ratios, seconds = zip(*(_ratio_and_seconds(pairs) for pairs in (reads, decode)), strict=True)
        return Times(ratios[0] * seconds[0], ratios[1] * seconds[1]), Times(*seconds)


def layer_times_beside(
    model: PreTrainedModel, reference: PreTrainedModel, *, batch: int, prompt: int, new: int, rounds: int
) -> LayerTimes:
    """As `Reference.beside`, on a CPU, of each layer of `model`: a pass of a network whose layers differ times all."""
    import torch

    steps = max(1, min(STEPS * rounds, new - 2))
    before = prompt + (new - steps) // 2
    with torch.inference_mode(), _LayerClock(model) as clock:
        ids = random_ids(reference, batch, prompt), random_ids(reference, batch, before)
        own, beside = (
            [called(network, ids[0], 0), called(network, ids[1], steps + 1)] for network in (model, reference)
        )
        reads = [clock.shares(_in_turns(own[0], beside[0], 0)) for _ in range(1 + READS * rounds)][1:]
        prefill = np.concatenate(reads)
        decode = clock.shares(_in_turns(own[1], beside[1], steps + 1))[2:]
    layers, rest, seconds = zip(*(_medians(passes) for passes in (prefill, decode)), strict=True)
    return LayerTimes(layers[0], rest[0], layers[1], rest[1], Times(*seconds))


def _medians(passes: NDArray[np.float64]) -> tuple[list[float], float, float]:
    """Of passes as `_LayerClock.shares` gives them: the median shares of layers, of the rest, and the lower quartile of
    the reference's seconds."""
    *layers, rest = np.median(passes[:, :-1], axis=0).tolist()
    return layers, rest, float(np.percentile(passes[:, -1], 25))


class _LayerClock:
    """Notes when each decoder layer of a standalone network begins, and when the last one ends. A context manager: its
    hooks are removed at the end."""

    def __init__(self, model: PreTrainedModel) -> None:
        from supernet.hooks import Hooks
        from supernet.uneven import family_of_standalone

        self._now = clock_of(next(model.parameters()).device)
        self._marks: list[float] = []
        layers = list(model.get_submodule(family_of_standalone(model.config).layers).children())
        handles = [layer.register_forward_pre_hook(self._mark) for layer in layers]
        self._hooks = Hooks([*handles, layers[-1].register_forward_hook(self._mark)])
        self._each = len(layers) + 1

    def __enter__(self) -> _LayerClock:
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.remove()

    def _mark(self, *_: object) -> None:
        self._marks.append(self._now())

    def shares(self, pairs: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
        """Of the passes since the last call, of the network and of the reference: the shares of its layers and of the
        rest in the reference's seconds, and these seconds, [passes, layers + 2]."""
        marks, self._marks = np.array(self._marks).reshape(len(pairs), self._each), []
        seconds = np.array(pairs)
        layers = np.diff(marks, axis=1)
        rest = seconds[:, :1] - layers.sum(1, keepdims=True)
        return np.hstack([np.hstack([layers, rest]) / seconds[:, 1:], seconds[:, 1:]])


def _in_turns(model: Passes, reference: Passes, steps: int) -> list[tuple[float, float]]:
    """Seconds of each pass of `model` and of `reference`, one beside the other, each going first in turn."""
    passes = model(), reference()
    pairs = []
    for number in range(1 + steps):
        if number % 2:
            of_reference = next(passes[1])
            of_model = next(passes[0])
        else:
            of_model, of_reference = next(passes[0]), next(passes[1])
        pairs.append((of_model, of_reference))
    return pairs


def _ratio_and_seconds(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The median ratio of the first to the second, and the second's lower quartile, since other work on the machine
    only ever adds time."""
    timed = np.array(pairs)
    return float(np.median(timed[:, 0] / timed[:, 1])), float(np.percentile(timed[:, 1], 25))
