"""Types of a llama.cpp file that fit `--max-bytes`: every half-block and the embedding have one of their own.

What the bits of one half-block alone cost the whole network is measured once, with its weights rounded as the file
holds them, though with all input channels alike; embedding and head are rounded as compressed-tensors does. Of all
types whose file fits, those of the least sum are taken (`search.bit_assignment`).
"""

from __future__ import annotations

from functools import partial

from compressor.job import Job
from compressor.schedule import stage
from compressor.sizing import byte_limit
from compressor.stages.joint_pick import bit_genes
from compressor.stages.warm_start import Rounding, losses_by_bits
from export.layouts.gguf.layout import FileSize
from export.layouts.gguf.types import BY_BITS, as_stored, type_by_bits
from search.bit_assignment import best_within, fewest_bytes
from search.genes import AS_STORED, Gene
from supernet.architecture import Architecture

IN_LLAMA_CPP = Rounding("bits-gguf", BY_BITS, as_stored)


def llama_genes(job: Job) -> list[Gene]:
    """A gene of bits for everything that may have a type of its own."""
    return bit_genes(job, sorted(bits for bits in BY_BITS if bits < AS_STORED))


@stage("quantizing")
def bits_that_fit(job: Job, architecture: Architecture, name: str) -> Architecture:
    """The sub-network with the bits of the least loss whose file of the package `name` fits in `--max-bytes`; with
    those that take the fewest bytes where none does."""
    limit = byte_limit(job)
    assert limit is not None
    file = FileSize(job.checkpoint.config, architecture)
    header = file.header(job.tokenizer, name)

    def bytes_of(bits: Architecture) -> int:
        return header + file.tensors(partial(type_by_bits, bits=bits))

    losses = losses_by_bits(job, llama_genes(job), IN_LLAMA_CPP)
    found = best_within(architecture, losses, bytes_of, limit)
    return fewest_bytes(architecture, losses, bytes_of) if found is None else found[0]
