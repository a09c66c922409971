"""What bits cost: each value of each gene of bits alone, in the whole network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from compressor.inputs import few_batches, few_inputs
from compressor.job import Job
from compressor.stages.repairing import rounded_variants, searched_weights
from evals.warm_starts.blockwise import degradation_in
from export.quantization.rounded_variants import Round, in_groups
from search.bit_assignment import Losses, with_gene
from search.genes import AS_STORED, Gene
from supernet.architecture import GROUP_SIZES, Structure
from supernet.common.files import kept_json
from supernet.common.progress import bar


@dataclass(frozen=True)
class RoundingMethod:
    """A way to round to bits: its name among the run's files, all that it depends on, and what it does."""

    name: str
    inputs: object
    round: Round
    block: int = GROUP_SIZES[-1]
    """Input channels that have bits together: a width that this does not divide is stored in more."""

    def as_asked(self, weight: Tensor, bits: int) -> Tensor:
        """A weight [outputs, inputs] rounded as if its widths could hold so many bits: those of a sub-network may,
        where the base's cannot."""
        outputs, inputs = weight.shape
        padded = F.pad(weight, (0, -inputs % self.block, 0, -outputs % GROUP_SIZES[-1]))
        return self.round(padded, bits)[:outputs, :inputs]


def in_groups_of(group_size: int) -> RoundingMethod:
    """As `mixed` packages of compressed-tensors are, in groups of so many input channels."""
    return RoundingMethod("bits", group_size, partial(in_groups, group_size=group_size), block=group_size)


def losses_by_bits(job: Job, genes: Sequence[Gene], rounding: RoundingMethod) -> Losses:
    """KL(whole network || with one gene of bits at another value), nats per token; from `search/NAME.json` of the
    rounding where it was measured before."""
    # Later layers first: less is new.
    asked = [(gene, bits) for gene in reversed(genes) for bits in gene.values if bits < AS_STORED]
    named = [(gene.name, gene.values) for gene in genes]

    def measure() -> dict[str, object]:
        batches, supernet = few_batches(job), job.load_supernet()
        supernet.use(rounded_variants(job, supernet, rounding.as_asked))
        degradation, measured = degradation_in(supernet, batches), list[float]()
        with bar("measuring bits", len(asked)) as progress:
            for gene, bits in asked:
                measured.append(degradation(with_gene(supernet.base, gene, bits)))
                progress.advance()
        return {"losses": measured}

    # Earlier versions measured what widths that hold no such bits are stored in.
    as_asked = [] if holds_bits(job.structure, rounding.block) else ["as asked"]
    inputs = [searched_weights(job), named, rounding.inputs, *as_asked, *few_inputs(job)]
    kept = kept_json(job.run.search / f"{rounding.name}.json", inputs, measure)
    losses: dict[Gene, dict[int, float]] = {}
    for (gene, bits), loss in zip(asked, kept["losses"], strict=True):
        losses.setdefault(gene, {})[bits] = loss
    return losses


def holds_bits(structure: Structure, block: int) -> bool:
    """Whether the base's widths can hold any bits in every linear layer inside blocks."""
    linear = [tensor for tensor in structure.tensors if tensor.role == "linear" and tensor.half]
    shapes = [shape for tensor in linear if (shape := structure.shape(tensor, structure.base)) is not None]
    return not any(outputs % GROUP_SIZES[-1] or inputs % block for outputs, inputs in shapes)
