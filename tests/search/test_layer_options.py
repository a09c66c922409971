"""Options of a layer around a cut network, from an imagined degradation that is a sum over half-blocks."""

from __future__ import annotations

import pytest

from search.layer_options import half_sizes, options_around, with_layer
from supernet.architecture import REMOVED, Architecture, LayerSizes
from supernet.families import describe
from tests.support.tiny_families import CONFIGS

STRUCTURE = describe(CONFIGS["llama"]())
FULL = STRUCTURE.base.layers[1]
NARROW = LayerSizes(FULL.num_attention_heads, FULL.num_key_value_heads, FULL.intermediate_size // 2)
FEW = LayerSizes(FULL.num_attention_heads // FULL.num_key_value_heads, 1, FULL.intermediate_size, FULL.num_experts)


def harm(sizes: LayerSizes) -> float:
    heads = 1 - sizes.num_attention_heads / FULL.num_attention_heads
    return 3.0 * heads + 2.0 * (1 - sizes.intermediate_size / FULL.intermediate_size)


def degradation(architecture: Architecture) -> float:
    return sum(harm(sizes) for sizes in architecture.layers)


@pytest.mark.parametrize("halves_too", [True, False])
@pytest.mark.parametrize("removed", [True, False])
def test_a_layer_that_only_goes_as_a_whole_has_all_its_options(halves_too: bool, removed: bool) -> None:
    """Its half-blocks have no size 0; around a network without the layer, all of its sizes are known, itself too."""
    variants = [(1, REMOVED), *([(1, NARROW), (1, FEW)] if halves_too else [])]
    moved = {(1, "mlp", NARROW): 1.0, (1, "attention", FEW): 2.0}
    halves = half_sizes(STRUCTURE, variants, moved)
    at = with_layer(STRUCTURE.base, 1, REMOVED if removed else FULL)
    layers, _ = options_around(STRUCTURE, at, variants, halves, degradation, lambda: None)
    before = degradation(at)
    found = {option.sizes: option.degradation for option in layers[1]}
    assert {FULL, REMOVED} <= found.keys() and len(found) == (5 if halves_too else 2)
    for sizes, more in found.items():
        assert more == pytest.approx(degradation(with_layer(at, 1, sizes)) - before)
