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
