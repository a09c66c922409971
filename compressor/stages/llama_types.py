"""Types of a llama.cpp file that fit `--max-bytes`: every half-block and the embedding have one of their own.

What the bits of one half-block alone cost the whole network is measured once, with its weights rounded as the file
holds them, though with all input channels alike; embedding and head are rounded as compressed-tensors does. Of all
types whose file fits, those of the least sum are taken (`search.bit_assignment`). Where only llama.cpp files are asked
for, the size is picked together with them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from compressor.inputs import training_blocks
from compressor.job import Job
from compressor.schedule import stage
from compressor.sizing import byte_limit
from compressor.stages.bit_losses import RoundingMethod, losses_by_bits
from compressor.stages.joint_pick import (
    MEASURED,
    Bits,
    Candidate,
    JointPick,
    RoundedLosses,
    Storing,
    bit_genes,
    lowest,
    sizes_within,
)
from compressor.stages.subnet_scores import FIRST_BLOCKS, held_out_losses
from export.layouts.gguf.file import FileSize, take_stored_weights
from export.layouts.gguf.types import BY_BITS, as_stored, type_by_bits
from export.layouts.table import GGUF_MIXED, write_layout
from search.bit_assignment import best_within, fewest_bytes, with_gene
from search.genes import AS_STORED, Gene
from search.objectives import Evaluation
from search.pareto import Target
from supernet.architecture import Architecture
from supernet.common.files import temporary_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = 16
"""Blocks of training text that inputs are weighed on in the files that are compared."""
IN_LLAMA_CPP = RoundingMethod("bits-gguf", BY_BITS, as_stored)


def llama_genes(job: Job) -> list[Gene]:
    """A gene of bits for everything that may have a type of its own."""
    return bit_genes(job, sorted(bits for bits in BY_BITS if bits < AS_STORED))


@stage("quantizing")
def bits_that_fit(job: Job, architecture: Architecture, name: str) -> Architecture:
    """The sub-network with the bits of the least loss whose file of the package `name` fits in `--max-bytes`; with
    those that take the fewest bytes where none does."""
    limit = byte_limit(job)
    assert limit is not None
    bytes_of, losses = file_bytes(job, architecture, name), losses_by_bits(job, llama_genes(job), IN_LLAMA_CPP)
    found = best_within(architecture, losses, bytes_of, limit)
    return fewest_bytes(architecture, losses, bytes_of) if found is None else found[0]


def smallest_file(job: Job, architecture: Architecture) -> int:
    """Bytes of the sub-network's file in the types of the fewest bits."""
    genes = llama_genes(job)
    fewest = architecture
    for gene in genes:
        fewest = with_gene(fewest, gene, min(gene.values))
    return file_bytes(job, architecture, f"best-{GGUF_MIXED}")(fewest)


def file_bytes(job: Job, architecture: Architecture, name: str) -> Callable[[Architecture], int]:
    """What the file of a package of this name takes, by the bits of the sub-network."""
    file = FileSize(job.checkpoint.config, architecture)
    header = file.header(job.tokenizer, name)
    return lambda bits: header + file.tensors(partial(type_by_bits, bits=bits))


def pick_with_types(job: Job, evaluations: Sequence[Evaluation], target: Target, name: str) -> JointPick:
    """The sub-network of the lowest held-out loss in a file of the package `name`, in types that fit the bytes:
    of these and the whole one, the best `MEASURED` by the sum of what their size and each of their types lose are
    measured with the weights of their files.

    Raises ValueError, naming the smallest, where nothing meets the target.
    """
    assert target.max_bytes is not None
    losses = losses_by_bits(job, llama_genes(job), IN_LLAMA_CPP)
    # 1. Each size in the best types that fit.
    candidates, smallest = list[Candidate](), list[int]()
    for evaluation in sizes_within(job, evaluations, target):
        sizes = evaluation.architecture
        bytes_of = file_bytes(job, sizes, name)
        found = best_within(sizes, losses, bytes_of, target.max_bytes)
        if found is None:
            smallest.append(bytes_of(fewest_bytes(sizes, losses, bytes_of)))
            continue
        own, harm = found
        bits = Bits("gguf-mixed", mean=8 * bytes_of(own) / job.structure.parameters(sizes))
        candidates.append(Candidate(evaluation, bits, None, bytes_of(own), own, harm))
    if not candidates:
        least = f"; the smallest file has {min(smallest):,}" if smallest else ""
        raise ValueError(f"no measured architecture fits {target.max_bytes:,} bytes in types of llama.cpp{least}")
    # 2. The best by the sum of both losses, with the weights of their files.
    unrounded = held_out_losses(job, [row.sizes for row in candidates], FIRST_BLOCKS)
    order = sorted(zip(unrounded, candidates, strict=True), key=lambda pair: (pair[0] + pair[1].harm, pair[1].bytes))
    best = lowest([candidate for _, candidate in order[:MEASURED]], RoundedLosses(job, AS_IN_FILE))
    # The export finds the types again; the pick is of the size.
    return replace(best, candidate=replace(best.candidate, own_bits=None))


def take_weights_of_file(job: Job, network: PreTrainedModel, candidate: Candidate) -> None:
    """Give a network the values that a file in the candidate's types holds."""
    architecture = candidate.architecture
    scratch = temporary_name(job.run.search / "types", "gguf")  # which removes what killed processes left
    scratch.mkdir()
    try:
        folder = scratch / "file"
        write_layout(
            GGUF_MIXED,
            network,
            architecture.without_bits(),
            folder,
            tokenizer=job.tokenizer,
            dtype=job.stored_dtype,
            entry={"name": folder.name, "architecture": architecture.without_bits().to_dict()},
            bits=architecture,
            calibration=training_blocks(job, 0)[:SAMPLES].ids,
        )
        take_stored_weights(network, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


AS_IN_FILE = Storing(lambda candidate: GGUF_MIXED, take_weights_of_file)
