"""Fine-tune the super-network once, and heal a sub-network after it was cut out: the steps of the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from math import isfinite, nan
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from supernet.activation import SuperNetwork
from supernet.architecture import Architecture
from supernet.training.adapters import Parameters
from supernet.training.data import HELD_OUT_BLOCKS, Batch, Blocks
from supernet.training.history import History, Losses, Rule
from supernet.training.inactive import Inactive
from supernet.training.loop import Backward, train
from supernet.training.losses import Loss, held_out_loss
from supernet.training.samplers import DRAWS, SAMPLERS, Draw, Member, Memory, TrainingRange
from supernet.training.settings import TrainSettings
from supernet.training.traces import HiddenStates, Recorder, trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 0.1
"""Rise of the full network's held-out loss that a super-network may end with, as a share. Where a network has no
capacity to spare, what small sub-networks gain is taken from the full one (`docs/results.md`)."""

Watched = Mapping[str, Sequence[Architecture]]
"""Sub-networks by the name under which their mean held-out loss is a point of the curve."""


@dataclass(frozen=True)
class ElasticScheme:
    """The choices of one elastic fine-tuning, by name."""

    sampler: str = "sandwich"
    """Which members take part in a step (`SAMPLERS`)."""
    draw: str = "sizes"
    """How a random member is drawn (`DRAWS`)."""
    random_members: int = 1
    """Random members of a step."""
    loss: Loss = Loss({"kl": 1.0})  # noqa: RUF009 - frozen
    strong_teacher: float = 0.0
    """Share of the steps, from the first, in which the frozen base teaches every member. After them the step's largest
    member teaches the others."""

    @property
    def needs_base(self) -> bool:
        return self.strong_teacher > 0 and self.loss.taught


@dataclass
class ElasticStep:
    """One step of elastic fine-tuning, as the training loop calls it."""

    parameters: Parameters
    scheme: ElasticScheme
    range: TrainingRange
    draw: Draw
    settings: TrainSettings
    accelerator: Accelerator
    recorder: Recorder | None
    """Keeps the super-network's states where the loss needs them."""
    members: list[Member] = field(default_factory=list)
    """The members of the step `number`."""
    number: int = -1
    seen: dict[Architecture, list[tuple[int, float]]] = field(default_factory=dict)
    """Tokens learnt from and loss, of each random member in each part of the step's batch."""

    @property
    def strong_steps(self) -> int:
        """The number of first steps in which the frozen base teaches."""
        return round(self.scheme.strong_teacher * self.settings.steps)

    def __call__(self, number: int, batch: Batch, backward: Backward) -> float:
        """Forward and backward of every member over a part of the batch. Returns the first member's loss, or NaN where
        another member's is not finite."""
        # 1. The members, the same for all parts of an accumulated batch.
        if self.number != number:
            generator = np.random.default_rng([self.settings.seed, number])
            sampler = SAMPLERS[self.scheme.sampler]
            self.members = sampler(number, generator, self.range, self.draw, self.scheme.random_members)
            self.number = number
        # 2. The frozen base's states, where it teaches.
        teacher: HiddenStates | None = None
        if self.scheme.needs_base and number < self.strong_steps:
            with (
                torch.no_grad(),
                self.accelerator.autocast(),
                self.parameters.frozen() as base,
                recording(base, self.scheme.loss) as recorder,
            ):
                teacher = trace(base.model, batch, recorder)
        # 3. One member after another; the largest comes first and teaches the others where the base does not.
        supernet = self.parameters.supernet
        losses = []
        for member in self.members:
            supernet.activate(member.architecture)
            with without_dropout(supernet.model, member.role != "largest"):
                with self.accelerator.autocast():
                    student = trace(supernet.model, batch, self.recorder)
                    loss = self.scheme.loss(student, teacher)
                if member.role == "largest" and number >= self.strong_steps:
                    teacher = student.detached()
                if member.role == "random":
                    mean = self.accelerator.reduce(loss.detach(), reduction="mean")
                    learnt = self.accelerator.reduce(batch.learnt.sum(), reduction="sum")  # alike in all processes
                    self.seen.setdefault(member.architecture, []).append((int(learnt), float(mean)))
                losses.append(float(loss.detach()))
                backward(loss)  # within, as gradient checkpointing computes the layers again
        return losses[0] if all(map(isfinite, losses)) else nan

    def ended(self) -> Inactive:
        """The step is over: the draw learns what the random members lost, whatever parts the batch was computed in.
        Returns the slices that no member used."""
        for architecture, parts in self.seen.items():
            loss = sum(n * loss for n, loss in parts) / max(1, sum(n for n, _ in parts))
            if isfinite(loss):
                self.draw.observe(architecture, loss)
        self.seen.clear()
        return self.parameters.inactive([member.architecture for member in self.members])


def finetune_supernet(
    parameters: Parameters,
    data: Blocks,
    settings: TrainSettings,
    scheme: ElasticScheme,
    range_: TrainingRange,
    *,
    state: Path,
    accelerator: Accelerator,
    watched: Watched | None = None,
) -> History:
    """Train the super-network of `parameters` in place; afterwards its full network is active.

    The best state is kept, the untrained one included, where sub-networks are `watched`: that in which those `asked`
    for (where none are, the `middle` and the `smallest`) have the lowest mean held-out loss, and the `largest` is not
    above its start by more than `TOLERANCE`.
    """
    supernet = parameters.supernet
    training, held_out = data.split()
    memory: Memory = {}
    draw = DRAWS[scheme.draw](range_, memory)

    def measure() -> Losses:
        losses: dict[Architecture, float] = {}
        for architecture in dict.fromkeys(one for several in (watched or {}).values() for one in several):
            with supernet.activated(architecture):
                losses[architecture] = _held_out(supernet.model, held_out, settings.batch_size, accelerator)
        return {name: mean(losses[one] for one in several) for name, several in (watched or {}).items()}

    with parameters, recording(supernet, scheme.loss) as recorder:
        step = ElasticStep(parameters, scheme, range_, draw, settings, accelerator, recorder)
        history = train(
            supernet.model,
            training,
            settings,
            step,
            what="fine-tuning",
            state=state,
            accelerator=accelerator,
            measure=measure if watched else None,
            rule=Rule(("asked",) if "asked" in (watched or {}) else ("middle", "smallest"), "largest", TOLERANCE),
            ended=step.ended,
            memory=memory,
            parameters=parameters.trained,
        )
        parameters.finish()
    supernet.activate(supernet.base)
    return history


def recording(supernet: SuperNetwork, loss: Loss) -> AbstractContextManager[Recorder | None]:
    """A recorder of the states that a loss compares; None within where it compares none."""
    keeps = loss.keeps()
    return Recorder(supernet, **keeps) if any(keeps.values()) else nullcontext()


def heal(
    model: PreTrainedModel,
    base: PreTrainedModel,
    data: Blocks,
    settings: TrainSettings,
    *,
    state: Path,
    accelerator: Accelerator,
    loss: Loss = Loss({"kl": 1.0}),  # noqa: B008 - frozen
) -> History:
    """Train a standalone sub-network in place, by default by a short distillation from the frozen base by forward KL.
    It ends as it was when its held-out loss was lowest, which may be before any step.

    Its weights are converted to float32 first, as those of a super-network are: most steps are smaller than the 8 or 11
    bits of half precision and would be lost. The accelerator sets the precision of the passes.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    training, held_out = data.split()

    def step(number: int, batch: Batch, backward: Backward) -> float:
        teacher = None
        if loss.taught:
            with torch.no_grad(), accelerator.autocast():
                teacher = trace(base, batch)
        with accelerator.autocast():
            step_loss = loss(trace(model, batch), teacher)
        backward(step_loss)
        return float(step_loss.detach())

    return train(
        model,
        training,
        settings,
        step,
        what="healing",
        state=state,
        accelerator=accelerator,
        measure=lambda: {"loss": _held_out(model, held_out, settings.batch_size, accelerator)},
        rule=Rule(("loss",), "loss"),
    )


@contextmanager
def without_dropout(model: nn.Module, off: bool) -> Iterator[None]:
    """Within, dropout is off where `off` says so. Only the largest member is regularised (BigNAS, arXiv 2003.11142,
    section 3.1): smaller ones have no capacity to over-fit with.

    Dropout rates are set to 0 instead of evaluation mode, which would also switch gradient checkpointing off.
    """
    rates = []
    if off:
        for module in model.modules():
            for name, rate in vars(module).items():
                if name.endswith("dropout") or (name == "p" and isinstance(module, nn.Dropout)):
                    rates += [(module, name, rate)] if isinstance(rate, float) and rate else []
        for module, name, _ in rates:
            setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)


def _held_out(model: PreTrainedModel, data: Blocks, rows: int, accelerator: Accelerator) -> float:
    """The held-out loss of few blocks, for the training curve: every point of it needs several passes."""
    with accelerator.autocast():
        return held_out_loss(model, data.part(0, HELD_OUT_BLOCKS), rows, accelerator.device)
