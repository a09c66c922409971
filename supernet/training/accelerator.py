"""Processes, device and precision of training, through accelerate. Settings that it would ignore are refused.

Several processes are started with torchrun (on a CPU with ACCELERATE_USE_CPU=true). Each has the whole network, or
its part of every layer (`supernet.training.sharding`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from supernet.common.errors import RequestError
from supernet.device import prepare

if TYPE_CHECKING:
    from accelerate import Accelerator


def processes() -> int:
    """The number of processes that train together, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes to disk."""
    return os.environ.get("RANK", "0") == "0"


def check_device(device: str) -> None:
    """Raises `RequestError` for a GPU that is not there."""
    import torch  # here, since it takes a second to import, and is needed for nothing else in this file

    if device == "cuda" and not torch.cuda.is_available():
        raise RequestError("--device cuda: torch sees no GPU here; use --device cpu or install a GPU build of torch")


def make_accelerator(device: str, dtype: str, trackers: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """The accelerator for a recipe's `device` and `dtype`, which can start trackers by name that write to `folder`.

    Raises `RequestError` for settings that would be ignored.
    """
    import torch
    from accelerate import Accelerator

    check_device(device)
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if _is_set("ACCELERATE_USE_FSDP") or _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise RequestError(
            "ACCELERATE_USE_FSDP or ACCELERATE_USE_DEEPSPEED is set: accelerate ignores them on a CPU, and elsewhere "
            "they take apart the weights that sub-networks are views of; unset it and say finetuning.shard in a recipe"
        )
    precision = "no"
    if dtype == "bfloat16" or (dtype != "float32" and not on_cpu):
        precision = "bf16"
    elif dtype == "float16":
        raise RequestError("--dtype float16: not on a CPU; use float32 or bfloat16")
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", precision).lower()
    if asked != precision:
        raise RequestError(f"ACCELERATE_MIXED_PRECISION={asked} would be ignored; say --dtype (bfloat16 or float32)")
    if on_cpu and processes() > 1 and not _is_set("ACCELERATE_USE_CPU"):
        raise RequestError("several processes on a CPU need ACCELERATE_USE_CPU=true in the environment")
    accelerator = Accelerator(
        cpu=on_cpu, mixed_precision=precision, log_with=list(trackers) or None, project_dir=folder if trackers else None
    )
    prepare(accelerator.device)
    if accelerator.num_processes != processes():
        raise RequestError(
            f"{processes()} processes were started but accelerate sees {accelerator.num_processes}; start them with "
            "torchrun --nproc_per_node"
        )
    return accelerator


def _is_set(name: str) -> bool:
    """Whether an environment variable is true."""
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")
