"""What is measured: jobs in a temporary folder, super-networks ordered by importance, held-out losses."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor import demo
from compressor.job import Job
from compressor.recipe import Recipe
from compressor.run import Run
from evals.speed.measured import Speed
from export.layouts.gguf import runtime as llama_cpp
from export.layouts.table import write_layout
from export.package_record import read_record
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture
from supernet.importance import IMPORTANCES
from supernet.ordering import apply_ordering, order_by
from supernet.training.data import Blocks
from supernet.training.losses import held_out_loss


@contextmanager
def temporary_job(checkpoint: str, data: str | None = None, documents: int = 6000, **recipe: Any) -> Iterator[Job]:
    """A job, on the CPU unless said otherwise, in a folder that is removed afterwards; without `data`, on so many
    generated documents. `recipe` are further keys of the recipe."""
    with tempfile.TemporaryDirectory() as name:
        text = Path(name, "text.jsonl")
        if data is None:
            demo.training_text(text, documents, seed=1)
        keys = {"model": checkpoint, "data": data or str(text), "device": "cpu"} | recipe
        yield Job(Run(Path(name)), Recipe(**keys).resolved())


def ordered_supernet(job: Job, calibration: Sequence[Tensor], criterion: str = "wanda") -> SuperNetwork:
    """The base in float32 as a super-network, its units ordered by a criterion on token ids, [batch, length] each."""
    supernet = job.supernet_of(job.load_base(torch.float32))
    apply_ordering(supernet, order_by(IMPORTANCES[criterion](supernet, calibration)))
    return supernet


@torch.no_grad()
def subnet_loss(supernet: SuperNetwork, architecture: Architecture, held_out: Blocks) -> float:
    """Held-out cross-entropy of a sub-network, in nats per token."""
    with supernet.activated(architecture) as network:
        return held_out_loss(network.eval(), held_out, 8, network.device)


def write_llama_cpp(
    job: Job,
    network: Any,
    architecture: Architecture,
    folder: Path,
    layout: str = "gguf",
    calibration: Tensor | None = None,
) -> None:
    """A file of llama.cpp with the base's tokenizer, in a new folder, its scales chosen on `calibration` [sequences,
    length] where that is given. Raises `RequestError` where it cannot be one."""
    entry = {"name": layout, "architecture": architecture.to_dict()}
    options = {
        "tokenizer": job.untouched_tokenizer,
        "dtype": job.stored_dtype,
        "lineage": {},
        "calibration": calibration,
    }
    write_layout(layout, network, architecture, folder, entry=entry, **options)


def speeds_in_llama_cpp(
    job: Job, networks: Sequence[tuple[Any, Architecture, str]], turns: int = 1, **work: int
) -> list[list[Speed]]:
    """Speeds of networks, each with its architecture and its layout of llama.cpp, timed in turn: for each turn, one for
    each network. `work` is for `llama_cpp.measure_speed`. Raises `RequestError` where llama.cpp does not hold one."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, str(number)) for number in range(len(networks))]
        for folder, (network, architecture, layout) in zip(folders, networks, strict=True):
            write_llama_cpp(job, network, architecture, folder, layout)
        return [[llama_cpp.measure_speed(read_record(folder), **work) for folder in folders] for _ in range(turns)]
