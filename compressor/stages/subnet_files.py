"""Sub-networks in `subnets/`: what each was made from, whether it is whole, and how it is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compressor.job import Job
from compressor.stages.repairing import pick_variants, repair_inputs
from export.package_record import RECORD, check_files, read_record
from supernet.architecture import Architecture
from supernet.common.errors import RequestError, VerificationError
from supernet.common.files import fingerprint
from supernet.common.progress import say
from supernet.streaming import StreamedNetwork

Inputs = dict[str, object]
"""All that something depends on."""


def cut_inputs(job: Job, architecture: str) -> Inputs:
    """Of a sub-network as it is cut out; `architecture` is its key."""
    return {"weights": job.run.supernet_weights, "architecture": architecture} | repair_inputs(job)


def is_made_from(folder: Path, inputs: Inputs) -> bool:
    """Whether this package is there, whole as its record says, and was made from the same inputs."""
    if not (folder / RECORD).is_file():
        return False
    try:
        return check_files(folder).lineage.inputs == fingerprint(inputs)
    except (RequestError, VerificationError) as error:
        say(f"warning: {error}; it is made again")
        return False


def is_good(folder: Path, inputs: Inputs) -> bool:
    """Whether a package is there, made from these. An unquantized one that was refused is made again: a second proof
    would compare it with less."""
    if not is_made_from(folder, inputs):
        return False
    entry = read_record(folder).entry
    return entry.refused is None or entry.quantization is not None


def cut_network(job: Job, architecture: Architecture) -> StreamedNetwork:
    """A sub-network as it is cut out of the super-network's files, repaired where the run does so."""
    variants = pick_variants(job, architecture)
    folder = job.supernet_folder(architecture)
    return StreamedNetwork(folder, job.checkpoint.config, job.structure, architecture, variants)


def load_healed(cut: StreamedNetwork, folder: Path, dtype: torch.dtype) -> Any:
    """The network of the same shape as `cut` whose weights an earlier export left in `folder`.

    Loaded as the class that it was written from, since transformers knows that class's names in memory from those in
    the files. Raises ValueError where a weight is missing or left over.
    """
    model: Any
    model, info = type(cut.model).from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if wrong := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise ValueError(f"{folder}: {wrong[0]} does not fit the network")
    return model.eval()


def held_dtype(job: Job) -> torch.dtype:
    """What a network that ships is held in: what networks are computed in, unless weights as stored need more."""
    return torch.promote_types(job.stored_dtype, job.compute_dtype)
