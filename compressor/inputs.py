"""What the stages of a run read: blocks of the training text, and fingerprints of data and weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from compressor.job import Job
from export.shards import weight_files
from supernet.common.files import content_fingerprint
from supernet.training.data import Blocks, pack
from supernet.training.sources import Row, local_files

CALIBRATION_BLOCKS = 64

STATE = "training.safetensors"
"""What the training can go on from, beside what the stage fills, until all of that is there."""
HEALING = "healing.json"
"""What the training of a healed sub-network recorded, in its folder."""


def calibration_batches(job: Job, blocks: Blocks) -> list[torch.Tensor]:
    """Token ids of the first blocks, which all criteria of importance share."""
    return [batch.ids for batch in blocks[:CALIBRATION_BLOCKS].to(job.device).split(8)]


def data_fingerprint(source: str) -> str:
    """Of a local file or folder: its contents. Of a hub dataset: its name, as its revision is the hub's."""
    path = Path(source).expanduser()
    files = [path] if path.is_file() else local_files(source) or [] if path.is_dir() else []
    return content_fingerprint(files, source.encode() if not files else b"")


def training_blocks(job: Job, tokens: int, seen: Callable[[Row], None] | None = None) -> Blocks:
    """The packed training data, at most about twice what will be read, so that huge sources are not read whole."""
    assert job.recipe.data is not None
    length = min(
        job.recipe.finetuning.sequence_length,
        getattr(job.checkpoint.config, "max_position_embeddings", 10**9),
    )
    most = max(2 * tokens, 4 * CALIBRATION_BLOCKS * length)
    return pack(job.recipe.data, job.tokenizer, length, most, seen, job.recipe.text_key, job.structure.vocab_size)


def weights_fingerprint(folder: Path) -> str:
    """16 hexadecimal digits of the weight files in a folder, names and contents."""
    files = [file for file in weight_files(folder) if file.name not in ("ordering.safetensors", STATE)]
    return content_fingerprint(files, names=True)
