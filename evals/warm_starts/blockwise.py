"""Block-wise proposals: replace every block alone, assemble the best combinations, and measure around them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from evals.warm_starts import Halves, Proposals, WarmStart
from search.layer_options import HalfSizes, Option, Path, Variants, assemble, half_sizes, options_around
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, Half, LayerSizes
from supernet.common.progress import bar
from supernet.slice_errors import slice_errors
from supernet.training.data import Batch
from supernet.training.traces import LayerCache

ROUNDS = 3
"""How often at most `refined` measures around an architecture."""
WORTH = 0.02
"""Share of the divergence that measuring around an architecture must gain to be worth doing again."""
CAUTION = (1, 2, 4)
"""Factors on what is lost against what is gained, in which `refined` assembles from one measurement: losses add up to
more than their sum, gains to less, and how much so differs from network to network."""
LOGITS = 2**23
"""Logits, tokens times vocabulary, that a degradation is measured on at most: 170 tokens of SmolLM2's vocabulary."""


MEASURED = 5.0
"""Passes that measuring around an architecture takes for each layer: two or three sizes of each half-block."""


def passes_around(layers: int) -> float:
    """Passes over the text that measuring around an architecture takes. What sharing leading layers saves, the head
    takes (45 seconds on prose-7m, where 42 are predicted so)."""
    return 1 + MEASURED * layers


def blockwise(supernet: SuperNetwork, variants: Variants, batches: Sequence[Batch]) -> Proposals:
    """The best architecture of every size, from how far the predictions move when one block at a time is replaced
    (Puzzle, arXiv 2411.19146, section 4.2; the block library of BossNAS, arXiv 2103.12424, with the pre-trained network
    as teacher).

    The degradation of a variant is KL(whole network || network with the one block replaced), in nats per token on
    `batches`. It is measured for two or three sizes of each half-block, one pass over the batches each, and estimated
    for the others from the closed-form errors of their outputs (`supernet.slice_errors`, `HalfSizes.rescaled`).
    """
    halves = halves_of(supernet, variants, batches)
    options, measured = _measured_around(supernet, supernet.base, variants, halves, batches)
    return Proposals(assemble(supernet.structure, options), measured)


def refined(
    supernet: SuperNetwork,
    variants: Variants,
    batches: Sequence[Batch],
    path: Path,
    sizes: Sequence[int],
    halves: Halves | None = None,
    rounds: int = ROUNDS,
) -> Path:
    """For each of `sizes`, the last of `path` within it, improved by measuring around it.

    Degradations of single blocks do not add up where many are cut. So each block of that architecture is exchanged
    alone, for a smaller or a larger one, and the best of the size is assembled from the differences, with each of
    `CAUTION`; at most `rounds` times, and only as long as KL(whole || architecture) falls by `WORTH` each time.
    `halves`: of `blockwise`; without them the closed-form errors alone tell one size from another.
    """
    structure, improved = supernet.structure, []
    starts = [(size, within[-1]) for size in sizes if (within := [a for p, a in path if p <= size])]
    if starts and halves is None:
        halves = halves_of(supernet, variants, batches)
    for size, best in starts:
        assert halves is not None
        degradation = degradation_in(supernet, batches)
        least = degradation(best)
        for _ in range(rounds):
            around, _ = _measured_around(supernet, best, variants, halves, batches)
            paths = [assemble(structure, _cautious(around, factor)) for factor in CAUTION]
            found = {within[-1] for path in paths if (within := [a for p, a in path if p <= size])}
            tried = [(degradation(a), a) for a in sorted(found, key=lambda a: a.layers)]
            now, better = min(tried, key=lambda pair: pair[0], default=(least, best))
            before = least
            if now < before:
                best, least = better, now
            if now > (1 - WORTH) * before:
                break
        improved.append((structure.parameters(best), best))
    return improved


def _measured_around(
    supernet: SuperNetwork, at: Architecture, variants: Variants, halves: Halves, batches: Sequence[Batch]
) -> tuple[list[list[Option]], Halves]:
    """Every layer's options, as measured around `at`, and half-blocks as `options_around` gives them."""
    what = "measuring every block" if at == supernet.base else "measuring around a proposal"
    with bar(what, len(supernet.base.layers)) as progress:
        degradation = degradation_in(supernet, batches)
        return options_around(supernet.structure, at, variants, halves, degradation, progress.advance)


def _cautious(layers: Sequence[Sequence[Option]], factor: float) -> list[list[Option]]:
    """Options in which losses count so many times."""
    return [
        [replace(o, degradation=o.degradation * (factor if o.degradation > 0 else 1)) for o in row] for row in layers
    ]


def halves_of(
    supernet: SuperNetwork, variants: Variants, batches: Sequence[Batch]
) -> dict[tuple[int, Half], HalfSizes]:
    """The sizes of every half-block, with the closed-form errors of their outputs."""
    cuts: dict[tuple[int, Half], list[LayerSizes]] = {}
    for (layer, half), own in half_sizes(supernet.structure, variants, {}).items():
        cuts[layer, half] = own.sizes[1:]
    errors = slice_errors(supernet, cuts, [batch.ids for batch in batches])
    return half_sizes(supernet.structure, variants, errors)


def degradation_in(supernet: SuperNetwork, batches: Sequence[Batch]) -> Callable[[Architecture], float]:
    """KL(whole network || architecture) on `batches`, nats per token, as a function of the architecture; on tokens in
    even steps where there are more than `LOGITS` allow.

    It is quick for an architecture that has leading layers in common with the one before it.
    """
    passes = LayerCache(supernet)
    learnt = sum(int(batch.learnt.sum()) for batch in batches)
    step = max(1, -(-learnt * supernet.model.config.vocab_size // LOGITS))

    def logits(number: int) -> Tensor:
        states = passes.trace(number, batches[number])
        return states.head(states.hidden[::step]).float()

    # What is fixed of the divergence is computed once: the whole network's probabilities and their entropies.
    with torch.no_grad(), supernet.activated(supernet.base):
        whole = [logits(number).log_softmax(-1) for number in range(len(batches))]
        shares = [row.exp() for row in whole]
        entropies = [-(share * row).sum(-1) for share, row in zip(shares, whole, strict=True)]
        del whole

    @torch.no_grad()
    def degradation(architecture: Architecture) -> float:
        total, count = 0.0, 0
        with supernet.activated(architecture):
            for number, (share, entropy) in enumerate(zip(shares, entropies, strict=True)):
                crossed = -(share * logits(number).log_softmax(-1)).sum(-1)
                total += float((crossed - entropy).double().sum())
                count += len(entropy)
        return total / max(1, count)

    return degradation


WARM_STARTS = (WarmStart("blockwise", blockwise, passes_around),)
