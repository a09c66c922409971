"""The state of a training on disk, from which a killed run goes on: written now and then, read at its start."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from supernet.common.errors import RequestError
from supernet.common.files import replacing
from supernet.training.best_state import BestState
from supernet.training.history import History
from supernet.training.sharding import full_tensor, shard_like

SAVING_SECONDS = 3.0
"""A state that takes longer than this to write is written less often in proportion, so that writing takes at most 5 %
of the time (3 of 60 seconds): billions of weights and their moments are tens of gigabytes."""


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


def _main_decides(decision: bool, accelerator: Accelerator) -> bool:
    """The main process's decision in every process, since their clocks differ."""
    if accelerator.num_processes == 1:
        return decision
    return bool(broadcast(torch.tensor(decision, device=accelerator.device)))
