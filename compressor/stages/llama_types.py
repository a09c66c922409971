"""Types of a llama.cpp file that fit `--max-bytes`: every half-block and the embedding have one of their own.

What the bits of one half-block alone cost the whole network is measured once (`stages.warm_start.losses_by_bits`, as
for a pick of size and bits). Of all types whose file fits, those of the least sum are taken (`search.bit_assignment`).
The sum is of plain rounding in compressed-tensors' form: it ranks half-blocks, and llama.cpp's searched scales lose
less than it says.
"""

from __future__ import annotations

from functools import partial

from compressor.job import Job
from compressor.sizing import byte_limit
from compressor.stages.joint_pick import bit_genes, group_of
from compressor.stages.warm_start import losses_by_bits
from export.layouts.gguf.layout import FileSize
from export.layouts.gguf.types import type_by_bits
from search.bit_assignment import best_within, with_gene
from supernet.architecture import Architecture


def bits_that_fit(job: Job, architecture: Architecture, name: str) -> Architecture:
    """The sub-network with the bits of the least loss whose file of the package `name` fits in `--max-bytes`; with the
    fewest bits where none does."""
    limit = byte_limit(job)
    assert limit is not None
    file = FileSize(job.checkpoint.config, architecture)
    header = file.header(job.tokenizer, name)

    def bytes_of(bits: Architecture) -> int:
        return header + file.tensors(partial(type_by_bits, bits=bits))

    losses = losses_by_bits(job, bit_genes(job), group_of(job, job.structure.base))
    found = best_within(architecture, losses, bytes_of, limit)
    if found is not None:
        return found[0]
    fewest = architecture
    for gene, of_gene in losses.items():
        fewest = with_gene(fewest, gene, min(of_gene))
    return fewest
