"""What the stages of a run read: blocks of the training text, and fingerprints of data and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from compressor.generated import generated_fingerprint, generated_rows
from compressor.job import Job
from compressor.recipe import Finetuning
from export.shards import weight_files
from supernet.common.files import content_fingerprint, fingerprint
from supernet.training.data import Batch, Blocks, pack, pack_rows
from supernet.training.sources import Row, is_generated, local_files, read_rows

CALIBRATION_BLOCKS = 64
"""Blocks of the training text that importance is measured on; half as many for networks of over `LARGE` parameters.
Losses of sub-networks ordered on 32 blocks differ by a twentieth of what another 64 blocks change (docs/results.md)."""
LARGE = 30_000_000
"""Parameters from which on fewer blocks are read for what only has to be put in order, since each costs more."""

FEW_BLOCKS = 8
"""Blocks of the training text that single changes to the whole network are measured on. Of networks of over `LARGE`
parameters fewer, down to 2: what is measured on 2 is ordered as differently from 8 as what is measured on 8 others."""
FEW_AT_ONCE = 4
"""How many of them in a batch."""

STATE = "training.safetensors"
"""What the training can go on from, beside what the stage fills, until all of that is there."""
HEALING = "healing.json"
"""What the training of a healed sub-network recorded, in its folder."""


def calibration_blocks(job: Job) -> int:
    """Number of blocks that importance is measured on."""
    large = job.structure.parameters(job.structure.base) > LARGE
    return CALIBRATION_BLOCKS // 2 if large else CALIBRATION_BLOCKS


def calibration_batches(job: Job, blocks: Blocks) -> list[torch.Tensor]:
    """Token ids of the first blocks that are trained on, which all criteria of importance share."""
    return [batch.ids for batch in blocks.split()[0][: calibration_blocks(job)].to(job.device).split(8)]


def few_blocks(job: Job) -> int:
    """How many blocks of the training text single changes are measured on."""
    parameters = job.structure.parameters(job.structure.base)
    return min(FEW_BLOCKS, max(2, round(FEW_BLOCKS * LARGE / parameters)))


def few_batches(job: Job) -> list[Batch]:
    """These blocks."""
    return training_blocks(job, 0)[: few_blocks(job)].to(job.device).split(FEW_AT_ONCE)


def few_inputs(job: Job) -> list[object]:
    """What the inputs of a kept file say of them: of the length of blocks nothing where it is the default, as in
    earlier versions."""
    length = job.recipe.finetuning.sequence_length
    return [rows_fingerprint(job, 0), *([] if length == Finetuning().sequence_length else [length])]


def text_fingerprint(job: Job, tokens: int) -> str:
    """Fingerprint of the text that a training of so many tokens reads."""
    source = job.recipe.data or ""
    return generated_fingerprint(job, tokens) if is_generated(source) else data_fingerprint(source)


def rows_fingerprint(job: Job, tokens: int) -> str:
    """The same, and of the column of it that is read."""
    text, key = text_fingerprint(job, tokens), job.recipe.text_key
    return text if key is None else fingerprint([text, key])


def data_fingerprint(source: str) -> str:
    """Fingerprint of a local file or folder by contents; of a hub dataset by name, as its revision is the hub's."""
    path = Path(source).expanduser()
    files = [path] if path.is_file() else local_files(source) or [] if path.is_dir() else []
    return content_fingerprint(files, source.encode() if not files else b"")


def training_blocks(job: Job, tokens: int, seen: Callable[[Row], None] | None = None) -> Blocks:
    """The packed training data, at most about twice what will be read, so that huge sources are not read whole. What
    the base is to write is written first."""
    source, length, vocabulary = job.recipe.data, job.length, job.structure.vocab_size
    assert source is not None
    if is_generated(source):
        return pack_rows(source, generated_rows(job, tokens), job.tokenizer, length, None, seen, vocabulary)
    most = max(2 * tokens, 4 * CALIBRATION_BLOCKS * length)
    return pack(source, job.tokenizer, length, most, seen, job.recipe.text_key, vocabulary)


def training_rows(job: Job) -> Iterator[Row]:
    """The documents of the training text, in order."""
    source = job.recipe.data
    assert source is not None
    return generated_rows(job, 0) if is_generated(source) else read_rows(source, job.recipe.text_key)


def weights_fingerprint(folder: Path) -> str:
    """16 hexadecimal digits of the weight files in a folder, names and contents."""
    files = [file for file in weight_files(folder) if file.name not in ("ordering.safetensors", STATE)]
    return content_fingerprint(files, names=True)
