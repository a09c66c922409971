"""The training loop of the super-network and of healing, which can be killed and resumed at any moment.

A step is given as a function, so the loop knows neither samplers nor losses. Everything random in a step is a pure
function of (seed, step) and of `memory`. So the state on disk is the trained parameters, the optimizer's moments,
`memory` and the step number, in one safetensors file. A killed run that is started again continues from the last such
file and ends at the same weights, bit for bit on one CPU process.

Held-out losses are measured on the way, and a rule says which state is the best. The training ends with that one, the
untrained one included; where it got worse it goes back to it and halves its rate (`watch`, `best_state`).

Several processes split each batch and sum their gradients. The model is not wrapped, since sub-networks use different
parameters in every step, but its layers may be sharded (`supernet.training.sharding`). Parts of a batch, of other
processes or accumulated, are weighted by the tokens that they learn from, so the split changes a step only by rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import ceil, isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from supernet.common.metrics import record
from supernet.common.progress import bar
from supernet.training.best_state import BestState
from supernet.training.data import Batch, Blocks
from supernet.training.history import History, Losses, Rule
from supernet.training.inactive import Inactive, restore_inactive
from supernet.training.muon import is_matrix
from supernet.training.optimizers import OPTIMIZERS, Groups
from supernet.training.settings import TrainSettings
from supernet.training.sharding import by_sharding, clip_gradients
from supernet.training.state import Saving, TrainingState
from supernet.training.watch import Watch, points_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Backward = Callable[[Tensor], None]
Step = Callable[[int, Batch, Backward], float]
"""(step, part of its batch, backward) -> loss to show. Calls `backward` once for each member, so that only one member's
activations are in memory at a time. Called once for each part of an accumulated batch."""


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
