"""Block-wise proposals: replace every block alone, assemble the best combinations, and measure around them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from evals.warm_starts import WarmStart
from search.knapsack import Path, Variants, assemble, options, options_around, with_layer
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture
from supernet.common.progress import bar
from supernet.training.data import Batch
from supernet.training.losses import divergence
from supernet.training.traces import LayerCache

ROUNDS = 2
"""How often at most `refined` measures around an architecture."""


def blockwise(supernet: SuperNetwork, variants: Variants, batches: Sequence[Batch]) -> Path:
    """The best architecture of every size, from how far the predictions move when one block at a time is replaced
    (Puzzle, arXiv 2411.19146, section 4.2; the block library of BossNAS, arXiv 2103.12424, with the pre-trained network
    as teacher).

    The degradation of a variant is KL(whole network || network with the one block replaced), in nats per token on
    `batches`. One pass over the batches for each variant.
    """
    degradation, degradations = degradation_in(supernet, batches), {}
    with bar("measuring every block", len(variants)) as progress:
        for layer, sizes in sorted(variants, key=lambda variant: -variant[0]):  # the last first, for `LayerCache`
            degradations[layer, sizes] = degradation(with_layer(supernet.base, layer, sizes))
            progress.advance()
    return assemble(supernet.structure, options(supernet.structure, degradations))


def refined(
    supernet: SuperNetwork, variants: Variants, batches: Sequence[Batch], path: Path, sizes: Sequence[int]
) -> Path:
    """For each of `sizes`, the last of `path` within it, improved by measuring around it.

    Degradations of single blocks do not add up where many are cut. So each block of that architecture is exchanged
    alone, for a smaller or a larger one, and the best of the size is assembled from the differences; at most twice, and
    only as long as KL(whole || architecture) falls. One pass over the batches for each variant and round.
    """
    structure = supernet.structure
    improved = []
    degradation = degradation_in(supernet, batches)
    starts = [(size, within[-1]) for size in sizes if (within := [a for p, a in path if p <= size])]
    with bar("measuring around them", ROUNDS * len(starts) * len(supernet.base.layers)) as progress:
        for size, best in starts:
            least = degradation(best)
            for _ in range(ROUNDS):
                around = options_around(structure, best, variants, degradation, least, progress.advance)
                better = [a for parameters, a in assemble(structure, around) if parameters <= size]
                if not better or (now := degradation(better[-1])) >= least:
                    break
                best, least = better[-1], now
            improved.append((structure.parameters(best), best))
    return improved


def degradation_in(supernet: SuperNetwork, batches: Sequence[Batch]) -> Callable[[Architecture], float]:
    """KL(whole network || architecture) on `batches`, nats per token, as a function of the architecture.

    It is quick for an architecture that has leading layers in common with the one before it.
    """
    passes = LayerCache(supernet)
    with torch.no_grad():
        whole = [passes.trace(number, batch) for number, batch in enumerate(batches)]

    @torch.no_grad()
    def degradation(architecture: Architecture) -> float:
        with supernet.activated(architecture):
            students = [passes.trace(number, batch) for number, batch in enumerate(batches)]
            return sum(float(divergence(*pair)) for pair in zip(students, whole, strict=True)) / len(batches)

    return degradation


WARM_STARTS = (WarmStart("blockwise", blockwise),)
