"""The training loop: one for the super-network and for healing, resumable at any moment.

A step is given as a function, so samplers and losses stay out of here. Everything that a step draws is a pure
function of (seed, step); the state on disk is therefore weights, AdamW's moments and the step number, one safetensors
file, renamed into place. A run that is killed goes on from the last such file to the same weights, bit for bit on one
CPU process.

Several processes split each batch and average their gradients; the model is not wrapped, since sub-networks use
different parameters from step to step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, cos, pi
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor.finetune.data import Blocks
from compressor.progress import bar

Backward = Callable[[Tensor], None]
Step = Callable[[int, Tensor, Tensor, Backward], float]
"""(step, ids, labels, backward) -> loss to show. Calls `backward` once for each member, so that only one member's
activations are alive at a time."""


@dataclass(frozen=True)
class TrainSettings:
    """`tokens` read from the data in all; `batch_size` blocks of `sequence_length` tokens in a step."""

    tokens: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    seed: int
    warmup_share: float = 0.03
    final_share: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    checkpoint_seconds: float = 60.0

    @property
    def steps(self) -> int:
        return max(1, ceil(self.tokens / (self.batch_size * self.sequence_length)))

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine down to `final_share` of the peak."""
        warmup = max(1, round(self.warmup_share * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * (self.final_share + (1 - self.final_share) * (1 + cos(pi * progress)) / 2)


@dataclass
class History:
    """What a training run leaves for the report: curve points, and tokens, seconds and passes spent."""

    curve: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    passes: int = 0


def train(
    model: nn.Module,
    data: Blocks,
    settings: TrainSettings,
    step: Step,
    *,
    what: str,
    state: Path,
    accelerator: Accelerator,
    measure: Callable[[], dict[str, float]] | None = None,
    measurements: int = 6,
) -> History:
    """Train `model` in place. `state` is the file that makes it resumable; `measure` gives the curve's points."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.95)
    )
    history = History()
    first = _restore(state, parameters, optimizer, history) if state.exists() else 0
    model.train()
    started = saved = time.monotonic()
    before = history.seconds
    every = max(1, settings.steps // measurements)

    def backward(loss: Tensor) -> None:
        history.passes += 1
        accelerator.backward(loss)

    with bar(what, settings.steps) as progress:
        progress.advance(first)
        for number in range(first, settings.steps):
            if measure is not None and number % every == 0:
                _measure(model, measure, number, history)
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(number)
            torch.manual_seed(settings.seed * 1_000_003 + number)
            ids, labels = data.batch(number, settings.batch_size, settings.seed)
            mine = slice(accelerator.process_index, None, accelerator.num_processes)
            ids, labels = ids[mine].to(accelerator.device), labels[mine].to(accelerator.device)
            loss = step(number, ids, labels, backward)
            _average_gradients(parameters, accelerator)
            torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            history.tokens += settings.batch_size * settings.sequence_length
            history.seconds = before + time.monotonic() - started
            speed = (number + 1 - first) * settings.batch_size * settings.sequence_length
            progress.advance(note=f"loss {loss:.3f}, {speed / (time.monotonic() - started):,.0f} tokens/s")
            if time.monotonic() - saved > settings.checkpoint_seconds and accelerator.is_main_process:
                _save(state, parameters, optimizer, history, number + 1)
                saved = time.monotonic()
    if measure is not None:
        _measure(model, measure, settings.steps, history)
    model.eval()
    return history


def _measure(model: nn.Module, measure: Callable[[], dict[str, float]], number: int, history: History) -> None:
    model.eval()
    with torch.no_grad():
        history.curve.append({"step": float(number), "tokens": float(history.tokens)} | measure())
    model.train()


def _average_gradients(parameters: dict[str, nn.Parameter], accelerator: Accelerator) -> None:
    if accelerator.num_processes == 1:
        return
    for parameter in parameters.values():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        parameter.grad = accelerator.reduce(gradient, reduction="mean")


def _save(
    path: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    history: History,
    step: int,
) -> None:
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    metadata = {"step": str(step), "history": json.dumps(vars(history))}
    temporary = path.with_name(path.name + ".tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata)
    temporary.replace(path)


def _restore(
    path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, history: History
) -> int:
    with safe_open(path, "pt") as file, torch.no_grad():
        metadata: dict[str, Any] = file.metadata()
        keys = set(file.keys())
        for name, parameter in parameters.items():
            parameter.copy_(file.get_tensor(f"weight.{name}"))
            moments = {
                key: file.get_tensor(f"{key}.{name}")
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}.{name}" in keys
            }
            if moments:
                optimizer.state[parameter] = {
                    k: v if k == "step" else v.to(parameter.device) for k, v in moments.items()
                }
    vars(history).update(json.loads(metadata["history"]))
    return int(metadata["step"])
