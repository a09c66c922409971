"""The training loop of the super-network and of healing, which can be killed and resumed at any moment.

A step is given as a function, so the loop knows neither samplers nor losses. Everything random in a step is a pure
function of (seed, step) and of `memory`. So the state on disk is the trained parameters, the optimizer's moments,
`memory` and the step number, in one safetensors file. A killed run that is started again continues from the last such
file and ends at the same weights, bit for bit on one CPU process.

Held-out losses are measured on the way, and a rule says which state is the best. The training ends with that one, the
untrained one included; where it got worse it goes back to it and halves its rate (`supernet.training.best_state`).

Several processes split each batch and sum their gradients. The model is not wrapped, since sub-networks use different
parameters in every step, but its layers may be sharded (`supernet.training.sharding`). Parts of a batch, of other
processes or accumulated, are weighted by the tokens that they learn from, so the split changes a step only by rounding.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, cos, isfinite, pi
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from supernet.common.errors import RequestError
from supernet.common.files import replacing
from supernet.common.metrics import record
from supernet.common.progress import bar, say
from supernet.training.best_state import BestState
from supernet.training.data import Batch, Blocks
from supernet.training.history import History, Losses, Rule
from supernet.training.inactive import Inactive, restore_inactive
from supernet.training.muon import is_matrix
from supernet.training.optimizers import OPTIMIZERS, Groups
from supernet.training.sharding import by_sharding, clip_gradients, full_tensor, shard_like

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Backward = Callable[[Tensor], None]
Step = Callable[[int, Batch, Backward], float]
"""(step, part of its batch, backward) -> loss to show. Calls `backward` once for each member, so that only one member's
activations are in memory at a time. Called once for each part of an accumulated batch."""

EARLY = (1 / 32, 1 / 16)
"""Shares of the steps after which held-out losses are measured, before they are at every eighth, since a rate that is
too high shows within a few steps."""
BETWEEN = 2
"""Steps between two such points at least: a point costs about as much as one and a half steps."""
SAVING_SECONDS = 3.0
"""A state that takes longer than this to write is written less often in proportion, so that writing takes at most 5 %
of the time (3 of 60 seconds): billions of weights and their moments are tens of gigabytes."""


def points_of(steps: int) -> list[int]:
    """The steps before which held-out losses are measured; the last one is after all of them."""
    parts = 8 if steps >= 32 else 4  # of few steps, measuring would take a third of the time
    points = [0]
    for share in (*EARLY, 1 / 8, *(part / parts for part in range(1, parts))):
        point = round(share * steps)
        if points[-1] + BETWEEN <= point <= steps - BETWEEN:
            points.append(point)
    return [*points, steps]


@dataclass(frozen=True)
class TrainSettings:
    """How a network is trained."""

    tokens: int
    """Tokens that are read from the data in all."""
    batch_size: int
    """Blocks in a step."""
    sequence_length: int
    """Tokens in a block."""
    learning_rate: float
    """The peak learning rate."""
    seed: int
    accumulation: int = 1
    """Parts in which a batch is computed, one after the other."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_share: float = 0.03
    """Share of the steps, from the first, in which the learning rate rises."""
    tail_share: float = 0.0
    """Share of the steps, to the last, in which the learning rate stays at its final value."""
    final_share: float = 0.1
    """The final learning rate as a share of the peak."""
    weight_decay: float = 0.0
    """Weight decay of matrices; vectors have none."""
    clip: float = 1.0
    """The largest norm of the gradient."""
    optimizer: str = "adamw"
    move_idle: bool = False
    """Whether weight decay and momentum move slices that no member of a step used."""
    gradient_checkpointing: bool = False
    checkpoint_seconds: float = 60.0
    """Seconds between two writings of the state."""

    @property
    def steps(self) -> int:
        return max(1, ceil(self.tokens / (self.batch_size * self.sequence_length)))

    @property
    def warmup(self) -> int:
        """Steps in which the learning rate rises."""
        return max(1, round(self.warmup_share * self.steps))

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then down to `final_share` of the peak by the schedule, and constant
        in the last `tail_share` of the steps (BigNAS, arXiv 2003.11142, section 3.1: small sub-networks go on learning
        while large ones do not over-fit)."""
        warmup = self.warmup
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "constant":
            return self.learning_rate
        end = max(warmup + 1, round((1 - self.tail_share) * self.steps))
        progress = min(1.0, (step - warmup) / (end - warmup))
        left = 1 - progress if self.schedule == "linear" else (1 + cos(pi * progress)) / 2
        return self.learning_rate * (self.final_share + (1 - self.final_share) * left)

    def slowed_rate(self, step: int, halved: list[int]) -> float:
        """`rate`, halved for each of these steps and warmed up again after the last of them."""
        rate = self.rate(step) * 0.5 ** len(halved)
        return rate * min(1.0, (step - halved[-1] + 1) / self.warmup) if halved else rate


@dataclass
class TrainingState:
    """What is trained, and what else a resumed run needs; `path` is its file."""

    path: Path
    parameters: dict[str, nn.Parameter]
    name: str
    """Name of the optimizer."""
    optimizer: torch.optim.Optimizer
    history: History
    memory: dict[str, list[float]]

    def save(self, step: int, accelerator: Accelerator) -> None:
        """Write the state after `step` steps. Every process must call this: each holds a part of what is sharded."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, float] = {}
        for name, parameter in self.parameters.items():
            for key, value in {"weight": parameter.detach(), **self.optimizer.state.get(parameter, {})}.items():
                if not isinstance(value, Tensor):
                    numbers[f"{key}|{name}"] = value
                elif accelerator.is_main_process:
                    tensors[f"{key}|{name}"] = full_tensor(value).cpu()  # one GPU has no room for all of it
                else:
                    full_tensor(value)
        if not accelerator.is_main_process:
            return
        facts = {"step": step, "history": vars(self.history), "memory": self.memory, "numbers": numbers}
        facts["optimizer"] = self.name
        with replacing(self.path) as temporary:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"facts": json.dumps(facts)})

    def restore(self) -> int:
        """Read the state in place. Returns the number of steps that were done; 0 where there is no file. Raises
        `RequestError` where another optimizer wrote it."""
        if not self.path.exists():
            return 0
        optimizer = self.optimizer
        with safe_open(self.path, "pt") as file, torch.no_grad():
            facts = json.loads(file.metadata()["facts"])
            if (other := facts.get("optimizer", "adamw")) != self.name:
                raise RequestError(f"{self.path}: a training by {other} wrote it, not by {self.name}; remove it")
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                key, _, parameter_name = name.partition("|")
                parameter, value = self.parameters[parameter_name], file.get_tensor(name)
                if key == "weight":
                    parameter.copy_(shard_like(value, parameter))
                elif value.shape == parameter.shape:
                    optimizer.state[parameter][key] = shard_like(value, parameter)
                else:  # AdamW needs its step count on the CPU unless it is fused
                    on_cpu = key == "step" and not optimizer.defaults.get("fused")
                    optimizer.state[parameter][key] = value if on_cpu else value.to(parameter.device)
            for name, number in facts["numbers"].items():
                key, _, parameter_name = name.partition("|")
                optimizer.state[self.parameters[parameter_name]][key] = number
        vars(self.history).update(facts["history"])
        self.memory.clear()
        self.memory.update(facts["memory"])
        return facts["step"]


def train(
    model: PreTrainedModel,
    data: Blocks,
    settings: TrainSettings,
    step: Step,
    *,
    what: str,
    state: Path,
    accelerator: Accelerator,
    measure: Callable[[], Losses] | None = None,
    rule: Rule | None = None,
    ended: Callable[[], Inactive] | None = None,
    memory: dict[str, list[float]] | None = None,
    parameters: dict[str, nn.Parameter] | None = None,
) -> History:
    """Train `model` in place. Returns what the run records.

    `what` names the work on the progress bar. `state` is the file that a killed run continues from. `measure` gives the
    held-out losses of a point of the curve, and `rule` says by them which state is kept; without it, the last one is.
    `ended` is called after a step, and says what no member of it used. `memory` is what a step remembers from earlier
    ones. `parameters` are what is trained, by name: without it, all of the model.
    """
    # 1. The optimizer, and the state of an interrupted run where there is one.
    parameters = dict(model.named_parameters()) if parameters is None else parameters
    optimizer = OPTIMIZERS[settings.optimizer](parameter_groups(model, parameters, settings), settings.learning_rate)
    history = History(learning_rate=settings.learning_rate)
    training = TrainingState(
        state, parameters, settings.optimizer, optimizer, history, {} if memory is None else memory
    )
    first = training.restore()
    best = watch = None
    if measure is not None:
        best = None if rule is None else BestState(rule, state, parameters, history, accelerator, history.kept)
        watch = Watch(what, model, settings, measure, history, accelerator, optimizer, best)
    optimizer.zero_grad(set_to_none=True)  # gradients that an interrupted caller left
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    started, seconds_before = time.monotonic(), history.seconds
    saving = Saving(training, settings.checkpoint_seconds, accelerator, best)
    tokens_of_step, points = settings.batch_size * settings.sequence_length, points_of(settings.steps)
    with bar(what, settings.steps, first) as progress:
        for number in range(first, settings.steps):
            if watch is not None and number in points:
                watch.measure(number)
            # 2. One step: gradients of all members, then the optimizer.
            for group in optimizer.param_groups:
                group["lr"] = settings.slowed_rate(number, history.halved)
            torch.manual_seed(settings.seed * 1_000_003 + number)
            loss = _gradients(data, settings, number, step, accelerator, history)
            unused = ended() if ended is not None else {}
            _sum_gradients(parameters, unused, accelerator)
            clip_gradients(parameters.values(), settings.clip)
            if isfinite(loss) or watch is None:
                with restore_inactive(optimizer, parameters, {} if settings.move_idle else unused):
                    optimizer.step()
            else:
                watch.go_back(number + 1, f"loss {loss}")
            optimizer.zero_grad(set_to_none=True)
            # 3. Records, progress, and now and then the state.
            history.tokens += tokens_of_step
            history.seconds = seconds_before + time.monotonic() - started
            speed = (number + 1 - first) * tokens_of_step
            record(what, number + 1, loss=loss, learning_rate=optimizer.param_groups[0]["lr"], tokens=history.tokens)
            progress.advance(note=f"loss {loss:.3f}, {speed / (time.monotonic() - started):,.0f} tokens/s")
            saving.after(number + 1)
        # 4. The last point of the curve, the best state, and evaluation mode.
        if watch is not None:
            watch.measure(settings.steps)
            watch.finish()
    history.seconds = seconds_before + time.monotonic() - started
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    model.eval()
    return history


class Saving:
    """Writes the state of a training now and then: `seconds` apart, or more where writing takes long."""

    def __init__(
        self, training: TrainingState, seconds: float, accelerator: Accelerator, best: BestState | None
    ) -> None:
        self.training, self.seconds, self.accelerator, self.best = training, seconds, accelerator, best
        self.saved, self.pause = time.monotonic(), seconds

    def after(self, step: int) -> None:
        """Write the state after so many steps, where it is time to."""
        if not _main_decides(time.monotonic() - self.saved > self.pause, self.accelerator):
            return
        began = time.monotonic()
        self.training.save(step, self.accelerator)
        if self.best is not None:
            self.best.state_saved()
        self.saved = time.monotonic()
        self.pause = self.seconds * max(1.0, (self.saved - began) / SAVING_SECONDS)


@dataclass
class Watch:
    """Held-out losses on the way of a training, and what follows from them. Every process does the same."""

    what: str
    model: nn.Module
    settings: TrainSettings
    losses: Callable[[], Losses]
    history: History
    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    best: BestState | None
    """None: the last state is kept, and nothing is slowed."""

    def measure(self, step: int) -> None:
        """Add a point to the curve, before `step`. Keep the state where it is the best, or go back where it is lost."""
        began = time.monotonic()
        # 1. The losses, those of the main process for all.
        self.model.eval()
        with torch.no_grad():
            losses = _main_losses(self.losses(), self.accelerator)
        self.model.train()
        self.history.add(step, losses)
        lost = [name for name, loss in losses.items() if not isfinite(loss)]
        if step == 0 and lost:
            raise RequestError(
                f"{self.what}: held-out {lost[0]} is {losses[lost[0]]} before the first step: numbers overflow in "
                "what is computed in; try another dtype"
            )
        record(f"{self.what} held out", step, **losses)
        shown = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        say(f"{self.what}: after {step} of {self.settings.steps} steps held-out {shown}")
        # 2. The best state, which needs no file where nothing can follow that is worse.
        if self.best is not None:
            left = 1 - step / self.settings.steps
            if self.best.is_better(losses):
                self.best.keep(step, write=left > 0)
            elif left > 0 and not self.best.rule.holds(losses, self.history.start, left):
                self.go_back(step, "more than the steps left can regain")
        self.history.measuring += time.monotonic() - began

    def go_back(self, step: int, why: str) -> None:
        """Go on from the best state, with half the rate, without the moments that led away from it."""
        if self.best is None or self.history.kept is None:
            return
        self.best.load()
        self.optimizer.state.clear()
        self.history.halved.append(step)
        say(
            f"{self.what}: {why}: back to the state after {self.history.kept} steps, with half the rate from here on "
            f"(a peak of {self.settings.learning_rate * 0.5 ** len(self.history.halved):.2g})"
        )

    def finish(self) -> None:
        """End with the best state, and say so."""
        if self.best is None or self.history.best is None:
            return
        if self.history.kept != self.settings.steps:
            self.best.load()
        say(f"{self.what}: {self.history.outcome}")


def parameter_groups(model: PreTrainedModel, parameters: dict[str, nn.Parameter], settings: TrainSettings) -> Groups:
    """The optimizer's groups: matrices, embeddings and head, which are decayed, and vectors, each as whole and sharded
    ones."""
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    # Not `module.weight`, which is a view where a narrower sub-network is active.
    tables = {id(module._parameters.get("weight")) for module in (*modules, model.get_output_embeddings()) if module}
    by_kind: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in parameters.values():
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        matrix = is_matrix(tuple(parameter.shape)) and id(parameter) not in tables
        by_kind.setdefault((matrix, decay), []).append(parameter)
    return [
        {"params": kind, "weight_decay": decay, "matrices": matrices}
        for (matrices, decay), members in by_kind.items()
        for kind in by_sharding(members)
    ]


def _gradients(
    data: Blocks, settings: TrainSettings, number: int, step: Step, accelerator: Accelerator, history: History
) -> float:
    """Add this process's part of the step's gradients to the parameters. Returns the loss over all processes."""
    batch = data.batch(number, settings.batch_size, settings.seed)
    learnt = int(batch.learnt.sum())
    rows = batch[accelerator.process_index :: accelerator.num_processes].to(accelerator.device)
    total = torch.zeros((), device=accelerator.device)
    for part in rows.split(ceil(len(rows) / settings.accumulation)):
        share = int(part.learnt.sum()) / learnt

        def backward(loss: Tensor, share: float = share) -> None:
            history.passes += 1
            accelerator.backward(loss * share * accelerator.num_processes)  # the mean over processes is taken

        total += share * step(number, part, backward)
    return float(accelerator.reduce(total, reduction="sum"))


def _sum_gradients(parameters: dict[str, nn.Parameter], inactive: Inactive, accelerator: Accelerator) -> None:
    """Sum the gradients over processes. A parameter that no member used has none in any process and gets none.
    Gradients of sharded parameters were summed by the backward pass."""
    if accelerator.num_processes == 1:
        return
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor) or (name in inactive and inactive[name] is None):
            continue
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        parameter.grad = accelerator.reduce(gradient, reduction="mean")


def _main_losses(losses: Losses, accelerator: Accelerator) -> Losses:
    """The main process's losses in every process, which decide the same by them."""
    if accelerator.num_processes == 1:
        return losses
    values = broadcast(torch.tensor(list(losses.values()), dtype=torch.float64, device=accelerator.device))
    return dict(zip(losses, values.tolist(), strict=True))


def _main_decides(decision: bool, accelerator: Accelerator) -> bool:
    """The main process's decision in every process, since their clocks differ."""
    if accelerator.num_processes == 1:
        return decision
    return bool(broadcast(torch.tensor(decision, device=accelerator.device)))
