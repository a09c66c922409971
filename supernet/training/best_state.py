"""The best state of a training, on disk. The training ends with it, and goes back to it where it got worse.

Of a super-network trained with too high a rate, the full network is lost within a few steps and most of it never comes
back. Held-out losses show that early. They are the same in all processes, so all decide alike.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from supernet.common.files import replacing
from supernet.training.history import History, Losses, Rule
from supernet.training.sharding import full_tensor, shard_like


@dataclass
class BestState:
    """What was trained, as it was after the step `history.kept`.

    A file for each such step lies beside the state of the run, and holds only what is trained, without its moments. One
    is removed once no state on disk refers to it, so that a killed run finds the one that it had.
    """

    rule: Rule
    state: Path
    """The file that a killed run continues from."""
    parameters: dict[str, nn.Parameter]
    history: History
    accelerator: Accelerator
    stored: int | None = None
    """The best step that the state on disk refers to."""

    def file(self, step: int | None) -> Path:
        return self.state.with_name(f"{self.state.name}.best-{step}")

    def is_better(self, losses: Losses) -> bool:
        """Whether a state with these losses is better than the best so far."""
        best = self.history.best
        so_far = inf if best is None else self.rule.score(best, self.history.start)
        return self.rule.score(losses, self.history.start) < so_far

    def keep(self, step: int, write: bool = True) -> None:
        """The trained parameters are the best so far: written unless they stay as they are. Every process must call it:
        each holds a part of what is sharded."""
        tensors = {}
        for name, parameter in self.parameters.items() if write else ():
            value = full_tensor(parameter.detach())
            if self.accelerator.is_main_process:
                tensors[name] = value.cpu().contiguous()  # one after another, where a GPU could not hold them all
        if tensors:
            with replacing(self.file(step)) as temporary:
                save_file(tensors, temporary)
        self.history.kept = step
        self.remove_others()

    def state_saved(self) -> None:
        """The state on disk refers to the best so far, and to none before."""
        self.stored = self.history.kept
        self.remove_others()

    def remove_others(self) -> None:
        """Remove what neither this run nor the state on disk refers to."""
        if self.accelerator.is_main_process:
            needed = {self.file(self.stored), self.file(self.history.kept)}
            for file in self.state.parent.glob(f"{glob.escape(self.state.name)}.best-*"):
                if file not in needed:
                    file.unlink(missing_ok=True)

    def load(self) -> None:
        """Give the parameters the values of the best state."""
        self.accelerator.wait_for_everyone()  # until it is written
        with safe_open(self.file(self.history.kept), "pt") as file, torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(shard_like(file.get_tensor(name), parameter))
        self.accelerator.wait_for_everyone()  # until it is read, before another one takes its place
