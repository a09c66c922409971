"""The training loop: one for the super-network and for healing, resumable at any moment.

A step is given as a function, so samplers and losses stay out of here. Everything that a step draws is a pure
function of (seed, step) and of `memory`; the state on disk is therefore what is trained, the optimizer's moments,
`memory` and the step number, one safetensors file, renamed into place. A run that is killed goes on from the last such
file to the same weights, bit for bit on one CPU process.

Several processes split each batch and add up their gradients; the model is not wrapped, since sub-networks use
different parameters from step to step, but its layers may be sharded (`supernet.training.sharding`). Parts of a
batch, whether they are other processes' or accumulated one after the other, count by the tokens they learn from: how a
batch is cut does not change what a step does, but for rounding.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, cos, pi
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from supernet.common.files import replacing
from supernet.common.progress import bar
from supernet.training.data import Batch, Blocks
from supernet.training.inactive import Inactive, restore_inactive
from supernet.training.optimizers import OPTIMIZERS
from supernet.training.sharding import by_sharding, clip_gradients, full_tensor, shard_like

Backward = Callable[[Tensor], None]
Step = Callable[[int, Batch, Backward], float]
"""(step, part of its batch, backward) -> loss to show. Calls `backward` once for each member, so that only one member's
activations are alive at a time. Called once for each part of an accumulated batch."""


SAVING_SECONDS = 3.0
"""A state that takes longer than this to write is written less often in proportion: billions of weights and their
moments are tens of gigabytes, which would take all of the time. 3 of 60 seconds are 5 % of it."""


@dataclass(frozen=True)
class TrainSettings:
    """`tokens` read from the data in all; `batch_size` blocks of `sequence_length` tokens in a step, computed in
    `accumulation` parts. `weight_decay` is on matrices only. `move_idle` lets weight decay and momentum move slices
    that took no part in a step."""

    tokens: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    seed: int
    accumulation: int = 1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_share: float = 0.03
    tail_share: float = 0.0
    final_share: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    optimizer: str = "adamw"
    move_idle: bool = False
    gradient_checkpointing: bool = False
    checkpoint_seconds: float = 60.0

    @property
    def steps(self) -> int:
        return max(1, ceil(self.tokens / (self.batch_size * self.sequence_length)))

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then down to `final_share` of the peak by the schedule, and in the
        last `tail_share` of the steps constant there (BigNAS, arXiv 2003.11142, section 3.1: small sub-networks go on
        learning while large ones keep from over-fitting)."""
        warmup = max(1, round(self.warmup_share * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "constant":
            return self.learning_rate
        end = max(warmup + 1, round((1 - self.tail_share) * self.steps))
        progress = min(1.0, (step - warmup) / (end - warmup))
        left = 1 - progress if self.schedule == "linear" else (1 + cos(pi * progress)) / 2
        return self.learning_rate * (self.final_share + (1 - self.final_share) * left)


@dataclass
class History:
    """What a training run leaves for the report: curve points, and tokens, seconds and passes spent. A pass is a
    forward and a backward of one member over one sequence's worth of a batch, so a step of a sandwich has three."""

    curve: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    passes: int = 0


def train(
    model: Any,
    data: Blocks,
    settings: TrainSettings,
    step: Step,
    *,
    what: str,
    state: Path,
    accelerator: Accelerator,
    measure: Callable[[], dict[str, float]] | None = None,
    measurements: int = 6,
    idle: Callable[[int], Inactive] | None = None,
    memory: dict[str, Any] | None = None,
    parameters: dict[str, nn.Parameter] | None = None,
) -> History:
    """Train `model` in place. `state` is the file that makes it resumable; `measure` gives the curve's points.

    `idle` says, after a step, what took no part in it. `memory` is what a step remembers from earlier ones, JSON.
    `parameters` are what is trained, by name: all of the model's where nothing is given.
    """
    parameters = dict(model.named_parameters()) if parameters is None else parameters
    matrices = [p for p in parameters.values() if p.ndim > 1]
    others = [p for p in parameters.values() if p.ndim <= 1]
    groups: list[dict[str, Any]] = []
    for decay, decayed in ((settings.weight_decay, matrices), (0.0, others)):
        groups += [{"params": kind, "weight_decay": decay} for kind in by_sharding(decayed)]
    optimizer = OPTIMIZERS[settings.optimizer](groups, settings.learning_rate)
    memory = {} if memory is None else memory
    history = History()
    first = _restore(state, parameters, optimizer, history, memory) if state.exists() else 0
    optimizer.zero_grad(set_to_none=True)  # whatever an interrupted caller left
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    started = saved = time.monotonic()
    pause = settings.checkpoint_seconds
    before = history.seconds
    every = max(1, settings.steps // measurements)
    with bar(what, settings.steps) as progress:
        progress.advance(first)
        for number in range(first, settings.steps):
            if measure is not None and number % every == 0:
                _measure(model, measure, number, history)
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(number)
            torch.manual_seed(settings.seed * 1_000_003 + number)
            loss = _gradients(data, settings, number, step, accelerator, history)
            unused = idle(number) if idle is not None else {}
            _add_up_gradients(parameters, unused, accelerator)
            clip_gradients(parameters.values(), settings.clip)
            with restore_inactive(optimizer, parameters, {} if settings.move_idle else unused):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            history.tokens += settings.batch_size * settings.sequence_length
            history.seconds = before + time.monotonic() - started
            speed = (number + 1 - first) * settings.batch_size * settings.sequence_length
            progress.advance(note=f"loss {loss:.3f}, {speed / (time.monotonic() - started):,.0f} tokens/s")
            if _main_says(time.monotonic() - saved > pause, accelerator):
                began = time.monotonic()
                _save(state, parameters, optimizer, history, memory, number + 1, accelerator)
                saved = time.monotonic()
                pause = settings.checkpoint_seconds * max(1.0, (saved - began) / SAVING_SECONDS)
    if measure is not None:
        _measure(model, measure, settings.steps, history)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    model.eval()
    return history


def _gradients(
    data: Blocks, settings: TrainSettings, number: int, step: Step, accelerator: Accelerator, history: History
) -> float:
    """Add this process's part of the step's gradients to the parameters; returns the step's loss, all processes'."""
    batch = data.batch(number, settings.batch_size, settings.seed)
    learnt = int(batch.learnt.sum())
    mine = batch[accelerator.process_index :: accelerator.num_processes].to(accelerator.device)
    shown = torch.zeros((), device=accelerator.device)
    for part in mine.split(ceil(len(mine) / settings.accumulation)):
        share = int(part.learnt.sum()) / learnt

        def backward(loss: Tensor, share: float = share) -> None:
            history.passes += 1
            accelerator.backward(loss * share * accelerator.num_processes)  # the mean over processes is taken

        shown += share * step(number, part, backward)
    return float(accelerator.reduce(shown, reduction="sum"))


def _measure(model: nn.Module, measure: Callable[[], dict[str, float]], number: int, history: History) -> None:
    model.eval()
    with torch.no_grad():
        history.curve.append({"step": float(number), "tokens": float(history.tokens)} | measure())
    model.train()


def _add_up_gradients(parameters: dict[str, nn.Parameter], idle: Inactive, accelerator: Accelerator) -> None:
    """Sum over processes. What no member used has no gradient in any of them, and is left without. Those of sharded
    parameters have been added up where they arose."""
    if accelerator.num_processes == 1:
        return
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor) or (name in idle and idle[name] is None):
            continue
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        parameter.grad = accelerator.reduce(gradient, reduction="mean")


def _main_says(yes: bool, accelerator: Accelerator) -> bool:
    """What the main process finds: one answer for all, whatever their clocks say."""
    if accelerator.num_processes == 1:
        return yes
    return bool(broadcast(torch.tensor(yes, device=accelerator.device)))


def _save(
    path: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    history: History,
    memory: dict[str, Any],
    step: int,
    accelerator: Accelerator,
) -> None:
    """Write the state, of which the main process has all; the others give their parts of what is sharded."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for name, parameter in parameters.items():
        for key, value in {"weight": parameter.detach(), **optimizer.state.get(parameter, {})}.items():
            if not isinstance(value, Tensor):
                numbers[f"{key}|{name}"] = value
            elif accelerator.is_main_process:
                tensors[f"{key}|{name}"] = full_tensor(value)
            else:
                full_tensor(value)
    if not accelerator.is_main_process:
        return
    facts = {"step": step, "history": vars(history), "memory": memory, "numbers": numbers}
    with replacing(path) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"facts": json.dumps(facts)})


def _restore(
    path: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    history: History,
    memory: dict[str, Any],
) -> int:
    with safe_open(path, "pt") as file, torch.no_grad():
        facts = json.loads(file.metadata()["facts"])
        for key in file.keys():  # noqa: SIM118 - not a dictionary
            what, _, name = key.partition("|")
            parameter, value = parameters[name], file.get_tensor(key)
            if what == "weight":
                parameter.copy_(shard_like(value, parameter))
            elif value.shape == parameter.shape:
                optimizer.state[parameter][what] = shard_like(value, parameter)
            else:  # AdamW wants its step count on the CPU unless it is fused
                stays = what == "step" and not optimizer.defaults.get("fused")
                optimizer.state[parameter][what] = value if stays else value.to(parameter.device)
        for key, value in facts["numbers"].items():
            what, _, name = key.partition("|")
            optimizer.state[parameters[name]][what] = value
    vars(history).update(facts["history"])
    memory.clear()
    memory.update(facts["memory"])
    return facts["step"]
