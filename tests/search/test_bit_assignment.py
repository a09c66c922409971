"""Bits for an architecture: nothing within reach is better at as few bytes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from search.bit_assignment import best_within, choices_of, fewest_bytes, spread_by_bytes, with_bits, with_gene
from search.genes import AS_STORED, Gene
from search.knapsack import knapsacks
from supernet.architecture import Architecture, LayerSizes, StorageFormat
from tests.support.search_helpers import PROSE

GENES = [
    Gene("attention_bits.0", (4, 16)),
    Gene("ffn_bits.0", (2, 4, 16)),
    Gene("ffn_bits.1", (2, 4, 16)),
    Gene("embedding_bits", (8, 16)),
]
STORED = StorageFormat(16, 32, by_architecture=True)


def bytes_of(architecture: Architecture) -> int:
    return PROSE.bytes(architecture, STORED)


def random_losses(seed: int) -> dict[Gene, dict[int, float]]:
    """More where there are fewer bits."""
    rng = np.random.default_rng(seed)
    return {
        gene: dict(zip(gene.values[:-1], sorted(rng.random(len(gene.values) - 1), reverse=True), strict=True))
        for gene in GENES
    }


@pytest.mark.parametrize("seed", range(4))
def test_no_combination_is_better_at_as_few_bytes_on_the_hull(seed: int) -> None:
    losses = random_losses(seed)
    found = with_bits(PROSE.base, losses, bytes_of, prices=200)
    assert found[0] == PROSE.base and len(found) > 3
    assert [bytes_of(one) for one in found] == sorted(map(bytes_of, found), reverse=True)

    everything = {}
    for values in itertools.product(*(gene.values for gene in GENES)):
        architecture, lost = PROSE.base, 0.0
        for gene, bits in zip(GENES, values, strict=True):
            architecture = with_gene(architecture, gene, bits)
            lost += losses[gene].get(bits, 0.0)
        everything[architecture] = (bytes_of(architecture), lost)
    for one in found:
        stored, lost = everything[one]
        assert not any(other[0] <= stored and other[1] < lost - 1e-12 for other in everything.values())
    smallest = min(everything, key=lambda a: everything[a])
    assert found[-1] == smallest


@pytest.mark.parametrize("seed", range(4))
def test_nothing_that_fits_loses_less(seed: int) -> None:
    losses = random_losses(seed)
    everything = {}
    for values in itertools.product(*(gene.values for gene in GENES)):
        architecture = PROSE.base
        for gene, bits in zip(GENES, values, strict=True):
            architecture = with_gene(architecture, gene, bits)
        lost = sum(losses[gene].get(bits, 0.0) for gene, bits in zip(GENES, values, strict=True))
        everything[architecture] = (bytes_of(architecture), lost)
    stored = sorted({of_bytes for of_bytes, _ in everything.values()})
    for limit in [*stored, stored[-1] * 2]:
        found = best_within(PROSE.base, losses, bytes_of, limit)
        assert found is not None
        architecture, lost = found
        assert everything[architecture] == (bytes_of(architecture), pytest.approx(lost))
        assert bytes_of(architecture) <= limit
        best = min(other for of_bytes, other in everything.values() if of_bytes <= limit)
        assert lost == pytest.approx(best)
    assert best_within(PROSE.base, losses, bytes_of, stored[0] - 1) is None
    assert best_within(PROSE.base, losses, bytes_of, stored[-1]) == (PROSE.base, 0.0)


def test_of_sizes_that_are_rounded_to_one_the_least_loss_is_kept_and_others_are_told_apart() -> None:
    """100 and 101 of a million are less than a 4096th of it apart; of 1000 every whole size is told apart."""
    assert [filled.degradation for filled in knapsacks([[(100, 10.0), (101, 0.0)]], 10**6)] == [0.0]
    every = [[(size, 1000.0 - size) for size in range(1001)]]
    assert [(filled.size, filled.taken) for filled in knapsacks(every, 1000)] == [(n, [n]) for n in range(1001)]


def test_fewer_bits_that_seem_to_lose_less_lose_as_much() -> None:
    gene = GENES[1]
    (*_, last) = with_bits(PROSE.base, {gene: {4: 0.5, 2: 0.1}}, bytes_of)
    assert last.layers[0].ffn_bits == 2  # at 0.5, as 4 bits, and with fewer bytes
    assert all(one.layers[0].ffn_bits in (0, 2) for one in with_bits(PROSE.base, {gene: {4: 0.5, 2: 0.1}}, bytes_of))


def test_what_is_removed_gets_no_bits() -> None:
    removed = LayerSizes(4, 2, 0)
    architecture = Architecture(PROSE.base.hidden_size, (removed, *PROSE.base.layers[1:]))
    rounded = with_bits(architecture, {gene: dict.fromkeys(gene.values[:-1], 0.1) for gene in GENES}, bytes_of)
    assert all(one.without_bits() == architecture and one.layers[0].ffn_bits == 0 for one in rounded)
    assert with_gene(architecture, Gene("ffn_bits", (4, 16)), AS_STORED) == architecture


def test_they_are_spread_over_bytes() -> None:
    losses = {gene: {bits: 1 / bits for bits in gene.values[:-1]} for gene in GENES}
    found = with_bits(PROSE.base, losses, bytes_of, prices=200)
    few = spread_by_bytes([*found, found[0]], bytes_of, 3)
    assert len(few) == 3 and few[0] == found[-1] and few[-1] == found[0]


def test_a_value_that_saves_nothing_is_no_choice_and_what_was_asked_for_is_kept() -> None:
    base = Architecture(64, (LayerSizes(4, 2, 128),))
    inner, outer = Gene("ffn_bits.0", (2, 3, 4, 16)), Gene("embedding_bits", (8,))
    losses = {inner: {4: 0.1, 3: 0.2, 2: 0.3}, outer: {8: 0.05}}

    def bytes_of(bits: Architecture) -> int:
        """3 and 2 bits take what 4 take, as where a format's blocks do not divide the rows."""
        return 1000 - 500 * (bits.layers[0].ffn_bits > 0) - 100 * (bits.embedding_bits == 8)

    assert [row[0] for row in choices_of(base, losses, bytes_of)[inner]] == [16, 4]
    fewest = fewest_bytes(base, losses, bytes_of)
    assert (fewest.layers[0].ffn_bits, fewest.embedding_bits) == (4, 8)
    found = best_within(base, losses, bytes_of, 10_000)
    assert found is not None
    assert (found[0].layers[0].ffn_bits, found[0].embedding_bits) == (0, 8) and found[1] == 0.05
