"""Fine-tune the super-network once, and heal a sub-network after it was cut out: steps for the training loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from compressor.architecture import Architecture
from compressor.elastic.supernet import SuperNetwork
from compressor.finetune.data import Blocks
from compressor.finetune.loop import Backward, History, TrainSettings, train
from compressor.finetune.losses import MemberLoss, forward_kl, held_out_loss
from compressor.finetune.samplers import Sampler

HELD_OUT_BLOCKS = 16
"""Blocks behind each point of the training curve: few, since every point costs several passes over them."""


def finetune_supernet(
    supernet: SuperNetwork,
    data: Blocks,
    settings: TrainSettings,
    sampler: Sampler,
    loss: MemberLoss,
    *,
    state: Path,
    accelerator: Accelerator,
    base: nn.Module | None = None,
    watched: dict[str, Architecture] | None = None,
) -> History:
    """Train the super-network in place; afterwards its full network is active.

    `base` is the frozen teacher where the loss needs one. `watched` are the sub-networks whose held-out loss makes
    the curve, by name.
    """
    training, held_out = data.split()

    def step(number: int, ids: Tensor, labels: Tensor, backward: Backward) -> float:
        members = sampler(number, np.random.default_rng([settings.seed, number]))
        base_logits = None
        if base is not None:
            with torch.no_grad():
                base_logits = base(input_ids=ids, use_cache=False).logits
        largest: Tensor | None = None
        shown = 0.0
        for position, member in enumerate(members):
            supernet.activate(member.architecture)
            with accelerator.autocast():
                logits = supernet.model(input_ids=ids, use_cache=False).logits
                value = loss(logits, labels, largest, base_logits)
            if member.role == "largest":
                largest = logits.detach()
            if position == 0:
                shown = float(value.detach())
            backward(value)
        return shown

    def measure() -> dict[str, float]:
        losses = {}
        for name, architecture in (watched or {}).items():
            with supernet.activated(architecture):
                losses[name] = _held_out(supernet.model, held_out, settings.batch_size, accelerator)
        return losses

    history = train(
        supernet.model,
        training,
        settings,
        step,
        what="fine-tuning",
        state=state,
        accelerator=accelerator,
        measure=measure if watched else None,
    )
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
) -> History:
    """A short distillation of a standalone sub-network from the frozen base: forward KL on its logits."""
    training, held_out = data.split()

    def step(number: int, ids: Tensor, labels: Tensor, backward: Backward) -> float:
        with torch.no_grad():
            teacher = base(input_ids=ids, use_cache=False).logits
        with accelerator.autocast():
            loss = forward_kl(model(input_ids=ids, use_cache=False).logits, teacher, labels)
        backward(loss)
        return float(loss.detach())

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


def _held_out(model: nn.Module, data: Blocks, batch: int, accelerator: Accelerator) -> float:
    def forward(ids: Tensor) -> Tensor:
        return model(input_ids=ids.to(accelerator.device), use_cache=False).logits.cpu()

    return held_out_loss(forward, data.ids[:HELD_OUT_BLOCKS], data.labels[:HELD_OUT_BLOCKS], batch)
