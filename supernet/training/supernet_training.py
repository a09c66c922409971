"""Fine-tune the super-network once, and heal a sub-network after it was cut out: steps for the training loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from supernet.activation import SuperNetwork
from supernet.architecture import Architecture
from supernet.training.adapters import Parameters
from supernet.training.data import HELD_OUT_BLOCKS, Batch, Blocks
from supernet.training.inactive import Inactive, inactive_slices
from supernet.training.loop import Backward, History, TrainSettings, train
from supernet.training.losses import Loss, held_out_loss
from supernet.training.samplers import DRAWS, SAMPLERS, Member, TrainingRange
from supernet.training.traces import HiddenStates, Recorder, trace


@dataclass(frozen=True)
class ElasticScheme:
    """Who takes part in a step and what from: the choices of one elastic fine-tuning, by name.

    `strong_teacher` is the share of the steps, from the first, in which the frozen base teaches every member; after
    them the step's largest member teaches the others.
    """

    sampler: str = "sandwich"
    draw: str = "sizes"
    random_members: int = 1
    loss: Loss = Loss({"kl": 1.0})  # noqa: RUF009 - frozen
    strong_teacher: float = 0.0

    @property
    def needs_base(self) -> bool:
        return self.strong_teacher > 0 and self.loss.taught


def finetune_supernet(
    parameters: Parameters,
    data: Blocks,
    settings: TrainSettings,
    scheme: ElasticScheme,
    range_: TrainingRange,
    *,
    state: Path,
    accelerator: Accelerator,
    watched: dict[str, Architecture] | None = None,
) -> History:
    """Train the super-network of `parameters` in place; afterwards its full network is active.

    `watched` are the sub-networks whose held-out loss makes the curve, by name.
    """
    supernet = parameters.supernet
    training, held_out = data.split()
    memory: dict[str, Any] = {}
    draw = DRAWS[scheme.draw](range_, memory)
    strong_steps = round(scheme.strong_teacher * settings.steps)
    keeps = scheme.loss.keeps()

    def recording(network: SuperNetwork) -> AbstractContextManager[Recorder | None]:
        return Recorder(network, **keeps) if any(keeps.values()) else nullcontext()

    members: list[Member] = []
    drawn_for: int | None = None

    def step(number: int, batch: Batch, backward: Backward) -> float:
        nonlocal members, drawn_for
        if drawn_for != number:  # the parts of an accumulated batch have the same members
            generator = np.random.default_rng([settings.seed, number])
            members = SAMPLERS[scheme.sampler](number, generator, range_, draw, scheme.random_members)
            drawn_for = number
        teacher: HiddenStates | None = None
        if scheme.needs_base and number < strong_steps:
            with torch.no_grad(), accelerator.autocast(), parameters.frozen() as base, recording(base) as theirs:
                teacher = trace(base.model, batch, theirs)
        shown = 0.0
        for position, member in enumerate(members):
            supernet.activate(member.architecture)
            with accelerator.autocast(), without_dropout(supernet.model, member.role != "largest"):
                student = trace(supernet.model, batch, recorder)
                value = scheme.loss(student, teacher)
            if member.role == "largest" and number >= strong_steps:
                teacher = student.detached()
            if member.role == "random":
                draw.observe(member.architecture, float(accelerator.reduce(value.detach(), reduction="mean")))
            if position == 0:
                shown = float(value.detach())
            backward(value)
        return shown

    def idle(number: int) -> Inactive:
        return inactive_slices(parameters.structure, [member.architecture for member in members])

    def measure() -> dict[str, float]:
        losses = {}
        for name, architecture in (watched or {}).items():
            with supernet.activated(architecture):
                losses[name] = _held_out(supernet.model, held_out, settings.batch_size, accelerator)
        return losses

    with parameters, recording(supernet) as recorder:
        history = train(
            supernet.model,
            training,
            settings,
            step,
            what="fine-tuning",
            state=state,
            accelerator=accelerator,
            measure=measure if watched else None,
            idle=idle,
            memory=memory,
            parameters=parameters.trained,
        )
        parameters.finish()
    supernet.activate(supernet.base)
    return history


def heal(
    model: nn.Module,
    base: nn.Module,
    data: Blocks,
    settings: TrainSettings,
    *,
    state: Path,
    accelerator: Accelerator,
    loss: Loss = Loss({"kl": 1.0}),  # noqa: B008 - frozen
) -> History:
    """Train a standalone sub-network: by default a short distillation from the frozen base by forward KL.

    Its weights become float32, as those of a super-network are, whatever they came in: a half's 8 or 11 bits are
    coarser than most steps, which would be lost. The accelerator says in which precision passes are computed.
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
            value = loss(trace(model, batch), teacher)
        backward(value)
        return float(value.detach())

    return train(
        model,
        training,
        settings,
        step,
        what="healing",
        state=state,
        accelerator=accelerator,
        measure=lambda: {"loss": _held_out(model, held_out, settings.batch_size, accelerator)},
        measurements=4,
    )


@contextmanager
def without_dropout(model: nn.Module, off: bool) -> Iterator[None]:
    """Regularise only the largest (BigNAS, section 3.1): smaller members have no capacity to over-fit with.

    Dropout is put to 0 rather than the model into evaluation mode, which would also switch gradient checkpointing off.
    """
    found = []
    if off:
        for module in model.modules():
            for name, rate in vars(module).items():
                if name.endswith("dropout") or (name == "p" and isinstance(module, nn.Dropout)):
                    found += [(module, name, rate)] if isinstance(rate, float) and rate else []
        for module, name, _ in found:
            setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in found:
            setattr(module, name, rate)


def _held_out(model: nn.Module, data: Blocks, rows: int, accelerator: Accelerator) -> float:
    """A point of the training curve: of few blocks, since every point costs several passes over them."""
    with accelerator.autocast():
        return held_out_loss(model, data.part(0, HELD_OUT_BLOCKS), rows, accelerator.device)
