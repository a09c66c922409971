"""What fills a size: it holds all of what it grew from, meets the bound, and has no room for another step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from search.filling import GROWING, filled
from search.sampling import sample
from search.space import SearchSpace
from supernet.architecture import Architecture
from tests.support.search_helpers import PROSE


def at_most(share: float) -> Callable[[Architecture], bool]:
    most = share * PROSE.parameters(PROSE.base)
    return lambda architecture: PROSE.parameters(architecture) <= most


@pytest.mark.parametrize("name", ["fine", "uniform", "llama-nas"])
def test_what_grew_holds_what_it_grew_from(name: str) -> None:
    space = SearchSpace.preset(name, PROSE)
    allowed, grew = at_most(0.8), 0
    for small in space.decode_all(sample(space, np.random.default_rng(0), 40)):
        large = filled(space, small, allowed)
        if not allowed(small):
            continue
        grew += large != small
        assert allowed(large) and small.fits(large) and large in space
        assert [layer.skip for layer in large.layers] == [layer.skip for layer in small.layers]
        # One step more of any width that is there would be too much.
        genome = space.encode(large)
        for number, gene in enumerate(space.genes):
            more = list(genome)
            more[number] += 1
            value = gene.values[genome[number]]
            if gene.kind in GROWING and 0 < value < gene.values[-1] and not space.inert(genome)[number]:
                assert not allowed(space.decode(more))
    assert grew > 5


def test_the_most_cut_grows_first() -> None:
    space = SearchSpace.from_dict({"ffn.0": [256, 512, 768], "ffn.1": [512, 768], "kv.2": [0, 2, 4]}, PROSE)
    small = space.decode([0, 0, 0])
    steps = [small]
    for _ in range(3):
        room = PROSE.parameters(steps[-1]) + 256 * 768
        steps.append(filled(space, steps[-1], lambda a, room=room: PROSE.parameters(a) <= room))  # type: ignore[misc]
    widths = [tuple(layer.intermediate_size for layer in a.layers[:2]) for a in steps]
    assert widths == [(256, 512), (512, 512), (768, 512), (768, 768)]
    assert all(a.layers[2].num_key_value_heads == 0 for a in steps)  # what is removed stays removed
    assert filled(space, steps[-1], lambda _: True) == steps[-1]
