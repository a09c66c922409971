"""Types of a llama.cpp file that fit `--max-bytes`: every half-block and the embedding have one of their own.

What the bits of one half-block alone cost the whole network is measured once (`stages.warm_start.losses_by_bits`, as
for a pick of size and bits). Of all types whose file fits, those of the least sum are taken (`search.bit_assignment`).
The sum is of plain rounding in compressed-tensors' form: it ranks half-blocks, and llama.cpp's searched scales lose
less than it says. Those of 5 and 6 bits lie between those of 4 and 8.
"""

from __future__ import annotations

from functools import partial
from math import exp, log

from compressor.job import Job
from compressor.sizing import byte_limit
from compressor.stages.joint_pick import bit_genes, group_of
from compressor.stages.warm_start import losses_by_bits
from export.layouts.gguf.layout import FileSize
from export.layouts.gguf.types import type_by_bits
from search.bit_assignment import Losses, best_within, with_gene
from search.genes import OUTER, Gene
from supernet.architecture import Architecture

LEAST = 1e-9
"""Nats per token below which a loss is noise."""
BETWEEN = (5, 6)
"""Bits that llama.cpp's types have between 4 and 8, and compressed-tensors has not."""


def with_between(losses: Losses) -> Losses:
    """The losses with those of 5 and 6 bits of half-blocks, by 4 and 8: their logarithm falls evenly, since a rounding
    error, squared, falls to a quarter with every bit."""
    more: dict[Gene, dict[int, float]] = {}
    for gene, of_gene in losses.items():
        more[gene] = dict(of_gene)
        if gene.kind not in OUTER:
            at_4, at_8 = (log(max(of_gene[bits], LEAST)) for bits in (4, 8))
            more[gene] |= {bits: exp(at_4 + (bits - 4) / 4 * (at_8 - at_4)) for bits in BETWEEN}
    return more


def bits_that_fit(job: Job, architecture: Architecture, name: str) -> Architecture:
    """The sub-network with the bits of the least loss whose file of the package `name` fits in `--max-bytes`; with the
    fewest bits where none does."""
    limit = byte_limit(job)
    assert limit is not None
    file = FileSize(job.checkpoint.config, architecture)
    header = file.header(job.tokenizer, name)

    def bytes_of(bits: Architecture) -> int:
        return header + file.tensors(partial(type_by_bits, bits=bits))

    losses = with_between(losses_by_bits(job, bit_genes(job), group_of(job, job.structure.base)))
    found = best_within(architecture, losses, bytes_of, limit)
    if found is not None:
        return found[0]
    fewest = architecture
    for gene, of_gene in losses.items():
        fewest = with_gene(fewest, gene, min(of_gene))
    return fewest
