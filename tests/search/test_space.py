"""Spaces hold what they say, genomes and architectures match, and an impossible space is refused in one line."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from search.genes import Gene
from search.objectives import Computer, computed
from search.presets import PRESETS, kept_layers, widths
from search.sampling import sample_near, sample_sizes, sample_tilted, uniform_members
from search.space import SearchSpace
from supernet.architecture import Architecture, LayerSizes
from supernet.families import describe
from tests.support.search_helpers import LLAMA_2_7B, SMALL, llama
from tests.support.tiny_families import CONFIGS

PROSE = llama(8, 256, 768, 8, 4, 32, 4096)

SPACES = {
    **{name: SearchSpace.preset(name, PROSE) for name in PRESETS},
    "small fine": SearchSpace.preset("fine", SMALL, step=64),
    "layers and widths": SearchSpace.from_dict({"layer.*": [0, 1], "ffn.*": [0, 64, 128], "kv.*": [0, 2]}, SMALL),
    "depth over removable halves": SearchSpace.from_dict(
        {"depth": {"values": [1, 2, 3], "order": [2, 0, 1]}, "kv.*": [0, 1, 2], "ffn.*": [0, 128]}, SMALL
    ),
    "any one removed": SearchSpace.from_dict(
        {"depth": {"keep": [[1, 2], [0, 2], [0, 1], [0, 1, 2]]}, "ffn.*": [32, 64, 128]}, SMALL
    ),
    "queries and hidden": SearchSpace.from_dict(
        {"heads": [1, 2], "hidden_size": [8, 16], "kv.*": [0, 1, 2], "layer.1": [0, 1]}, SMALL
    ),
    "one layer with the lot": SearchSpace.from_dict({"kv.1": [0, 2], "ffn.1": [0, 128]}, SMALL),
}


def test_llama_nas_is_the_published_space() -> None:
    space = SearchSpace.preset("llama-nas", LLAMA_2_7B)
    genes = {gene.name: gene.values for gene in space.genes}
    assert genes == {"depth": (24, 28, 32)} | {f"ffn.{i}": (5504, 11008) for i in range(32)}
    assert space.size == 3 * 2**32
    assert LLAMA_2_7B.parameters(space.base) == 6_738_415_616
    smallest = space.smallest()
    assert len(smallest.kept) == 24 and {smallest.layers[i].intermediate_size for i in smallest.kept} == {5504}
    assert round(LLAMA_2_7B.parameters(smallest) / 1e9, 3) == 3.496


@pytest.mark.parametrize("name", SPACES)
def test_genomes_and_architectures_match(name: str) -> None:
    space = SPACES[name]
    rng = np.random.default_rng(1)
    genomes = rng.integers(0, space.upper + 1, size=(300, len(space.genes)))
    genomes = np.vstack([genomes, 0 * space.upper, space.upper, sample_tilted(space, rng, 100)])
    canonical = space.canonicalize(genomes)
    architectures = space.decode_all(genomes)
    assert space.decode_all(canonical) == architectures
    assert (space.canonicalize(canonical) == canonical).all()
    assert [space.encode(a) for a in architectures] == list(map(tuple, canonical.tolist()))
    assert all(any(layer.num_key_value_heads for layer in a.layers) and a.fits(space.base) for a in architectures)
    rows = {a: row.tobytes() for a, row in zip(architectures, space.features(genomes), strict=True)}
    assert rows == {a: row.tobytes() for a, row in zip(architectures, space.features(canonical), strict=True)}
    assert len(set(rows.values())) == len(set(architectures)), "different architectures need different features"
    assert space.decode(tuple(space.upper)) == space.base


@pytest.mark.parametrize("name", SPACES)
def test_tables_add_up_to_the_exact_sizes(name: str) -> None:
    space = SPACES[name]
    genomes = sample_tilted(space, np.random.default_rng(2), 60)
    for objective in computed(space.structure, context=7).values():
        assert objective.compute is not None
        expected = [objective.compute(a) for a in space.decode_all(genomes)]
        assert Computer(space, objective)(genomes).tolist() == expected, objective.name


@pytest.mark.parametrize("name", [n for n, s in SPACES.items() if s.size <= 20_000])
def test_every_architecture_is_listed_once(name):
    space = SPACES[name]
    brute = {space.decode(g) for g in itertools.product(*(range(u + 1) for u in space.upper))}
    listed = list(space.architectures())
    assert set(listed) == brute and len(listed) == len(brute)


def test_inert_genes_do_not_make_two_architectures() -> None:
    space = SearchSpace.from_dict({"layer.*": [0, 1], "ffn.*": [32, 64, 128]}, SMALL)
    names = [gene.name for gene in space.genes]
    wide, narrow = list(space.upper), list(space.upper)
    wide[names.index("layer.1")] = narrow[names.index("layer.1")] = 0
    narrow[names.index("ffn.1")] = 0
    assert space.decode(wide) == space.decode(narrow)
    assert space.canonical(wide) == space.canonical(narrow)
    assert (space.features(np.array([wide])) == space.features(np.array([narrow]))).all()
    assert [n for n, inert in zip(names, space.inert(wide), strict=True) if inert] == ["ffn.1"]
    assert space.decode(wide).layers[1].removed


def test_features_are_ordinals_then_one_hot_codes_of_declared_values() -> None:
    space = SearchSpace.from_dict({"depth": {"keep": [[0, 1], [0, 1, 2]]}, "ffn.2": [32, 64, 128]}, SMALL)
    full, cut = space.features(np.array([[1, 1], [0, 1]]))
    assert full.tolist() == [1, 0.5, 0, 1, 0, 1, 0]
    assert cut.tolist() == [2 / 3, 0, 1, 0, 0, 0, 0]


def test_some_layer_keeps_attention() -> None:
    space = SearchSpace.preset("fine", SMALL, step=64)
    smallest = space.smallest()
    assert [layer.num_key_value_heads for layer in smallest.layers] == [1, 0, 0]
    assert sum(layer.intermediate_size for layer in smallest.layers) == 0
    with pytest.raises(ValueError, match="does not hold"):
        space.encode(Architecture(16, (LayerSizes(0, 0, 128),) * 3))


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (768, tuple(range(64, 769, 64))),
        (172, (32, 64, 96, 128, 172)),
        (11008, (*range(1024, 10241, 1024), 11008)),
        (352, tuple(range(32, 353, 32))),
        (8192, tuple(range(1024, 8193, 1024))),
        (16, tuple(range(2, 17, 2))),
    ],
)
def test_width_steps(base: int, expected: tuple[int, ...]) -> None:
    assert widths(base) == expected


def test_a_step_of_ones_own() -> None:
    assert widths(768, 256) == (256, 512, 768)
    assert widths(172, 64) == (64, 128, 172)
    assert widths(172, 43) == (43, 86, 129, 172)
    for step in (100, 0, -32, 800):
        with pytest.raises(ValueError, match="divisors"):
            widths(768, step)


def test_layers_that_policies_keep() -> None:
    assert kept_layers("first", 8, 6) == (0, 1, 2, 3, 4, 5)
    assert kept_layers("alternate", 8, 4) == (0, 2, 4, 6)
    assert kept_layers("alternate", 9, 6) == (0, 2, 3, 5, 6, 8)
    assert kept_layers("late-block", 8, 6) == (0, 1, 2, 3, 4, 7)
    assert kept_layers("late-block", 32, 24) == (*range(22), 30, 31)
    assert kept_layers("late-block", 4, 1) == (3,)
    assert kept_layers("importance", 5, 2, [3, 0, 1, 2, 4]) == (0, 3)
    for policy in ("first", "alternate", "late-block"):
        assert all(len(kept_layers(policy, 12, depth)) == depth for depth in range(1, 13))


def test_presets_in_proportion() -> None:
    genes = {gene.name: gene.values for gene in SearchSpace.preset("llama-nas", llama(5, 64, 172, 8, 4, 8, 512)).genes}
    assert genes["depth"] == (3, 4, 5) and genes["ffn.0"] == (96, 172)
    fine = {gene.name: gene.values for gene in SPACES["fine"].genes}
    assert fine["kv.7"] == (0, 1, 2, 3, 4) and fine["ffn.0"] == (0, *range(64, 769, 64))
    assert len(list(SPACES["depth"].architectures())) == 255
    instatune = {gene.name: gene.values for gene in SearchSpace.preset("instatune", LLAMA_2_7B).genes}
    assert instatune["depth"] == tuple(range(24, 33)) and instatune["kv.0"] == (16, 21, 27, 32)
    ordered = SearchSpace.preset("llama-nas", PROSE, order=[7, 6, 5, 4, 3, 2, 1, 0])
    assert ordered.smallest().kept == (2, 3, 4, 5, 6, 7)


def test_a_written_space() -> None:
    space = SearchSpace.from_dict(
        {
            "ffn.*": {"step": 256, "min": 0},
            "ffn.2-3": [768],
            "kv.0": [2, 4],
            "depth": {"values": [6, 8], "policy": "alternate"},
        },
        PROSE,
    )
    genes = {gene.name: gene.values for gene in space.genes}
    assert genes["ffn.1"] == (0, 256, 512, 768) and genes["ffn.3"] == (768,) and genes["kv.0"] == (2, 4)
    again = SearchSpace.from_dict(space.to_dict(), PROSE)
    assert again.genes == space.genes and again.smallest() == space.smallest()
    assert space.smallest().kept == (0, 1, 3, 4, 5, 7)
    for name in SPACES:
        copy = SearchSpace.from_dict(SPACES[name].to_dict(), SPACES[name].structure)
        assert copy.genes == SPACES[name].genes and copy.smallest() == SPACES[name].smallest()


def test_a_gene_of_one_value_makes_a_space_of_one() -> None:
    assert SearchSpace.from_dict({"layer.0": [1]}, PROSE).size == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"ffn.0": [256, 1024]}, "1024 is above the original's size; valid are 0 to 768"),
        (
            {"ffn.*": {"step": 100}},
            "step of 100 does not divide the FFN width 768; valid are its divisors .*64, .*128",
        ),
        ({"kv.3": [1, 2, 8]}, "8 is above the original's size; valid are 0 to 4"),
        (
            {"heads": [1, 3]},
            "3 is above the original's query heads for each key-value head; valid are 1 to 2",
        ),
        ({"heads": [0, 2]}, "0 is too small"),
        ({"ffn.0": [256, 512]}, "leaves out the original; .*768 last"),
        ({"ffn.0": [512, 256, 768]}, "does not ascend"),
        ({"ffn.0": ["wide"]}, "not all whole numbers"),
        ({"ffn.0": 768}, "not a list"),
        ({"kv.0": {"step": 1}}, "only an FFN width"),
        ({"ffn.8": [256, 768]}, "unknown gene 'ffn.8'.*layers 0 to 7"),
        ({"width": [256, 768]}, "unknown gene 'width'; valid are kv"),
        ({"ffn": [256, 768], "ffn.3": [256, 768]}, "contradicts 'ffn'"),
        ({"experts.0": [1, 2]}, "of the original has no experts"),
        ({"hidden_size": [100, 256]}, "100 is not a multiple of the 8 query heads"),
        (
            {"depth": {"values": [6, 8], "policy": "random"}},
            "unknown policy 'random'; valid are first, alternate, late-block, importance",
        ),
        ({"depth": {"values": [6, 9]}}, "not all whole numbers from 1 to 8"),
        ({"depth": {"values": [6, 8], "order": [0, 1]}}, "each of the layers 0 to 7 once"),
        ({"depth": {"values": [6, 8], "policy": "importance"}}, "needs an order of the layers"),
        ({"depth": {"layers": 3}}, "unknown layers; valid are values, policy, order, keep"),
        ({"depth": {"keep": [[0, 9], list(range(8))]}}, "not all among 0 to 7"),
        ({"depth": {"keep": 5}}, "keep: 5 is not a list of lists of layers"),
        ({"depth": {"keep": [0, 1]}}, "not a list of lists of layers"),
        ({"depth": {"values": [6, 8], "order": 3}}, "each of the layers 0 to 7 once"),
        ({"preset": "llama-nas", "order": 3}, "order: 3 is not a list of layers"),
        ({"preset": "llama-nas", "step": "a"}, "a step of a does not divide"),
        ({"ffn.0": {"step": "a"}}, "a step of a does not divide"),
        ({"ffn.0": {"min": "a"}}, "min: 'a' is not a whole number"),
        ({}, "no genes"),
        ([], "mapping"),
    ],
)
def test_impossible_spaces_are_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        SearchSpace.from_dict(data, PROSE)
    assert "\n" not in str(error.value)


def test_a_gene_for_all_layers_needs_equal_layers() -> None:
    layers = (LayerSizes(4, 2, 64), LayerSizes(4, 2, 128))
    uneven = replace(llama(2, 16, 128, 4, 2, 4, 50), base=Architecture(16, layers))
    with pytest.raises(ValueError, match=r"layers differ \(64, 128\); use ffn.N"):
        SearchSpace(uneven, [Gene("ffn", (32, 128))])


def test_samples_meet_sizes() -> None:
    space = SPACES["fine"]
    rng = np.random.default_rng(3)
    low, high = (PROSE.parameters(a) for a in (space.smallest(), space.base))
    found = [PROSE.parameters(a) for a in space.decode_all(sample_sizes(space, rng, 20))]
    share = (high - low) / 20
    assert all(abs(p - (low + (i + 0.5) * share)) < 1.5 * share for i, p in enumerate(found))
    near = space.decode_all(sample_near(space, rng, np.full(5, 0.9 * high)))
    assert all(abs(PROSE.parameters(a) / high - 0.9) < 0.03 for a in near) and len(set(near)) == 5
    bounded = [PROSE.parameters(a) for a in space.decode_all(sample_sizes(space, rng, 5, 0.5 * high, 0.6 * high))]
    assert all(0.47 * high < p < 0.63 * high for p in bounded)


@pytest.mark.parametrize("name", ["fine", "llama-nas", "uniform", "depth", "instatune"])
def test_uniform_members(name: str) -> None:
    space = SPACES[name]
    members = uniform_members(space, 6)
    assert 3 <= len(members) <= 6 and len(set(members)) == len(members)
    assert all(m.is_uniform_in(space.base) and m in space for m in members)
    sizes = [PROSE.parameters(m) for m in members]
    assert sizes == sorted(sizes)
    assert all(PROSE.parameters(m) <= 6_000_000 for m in uniform_members(space, 6, 6_000_000))


def test_genomes_are_checked() -> None:
    space = SPACES["small fine"]
    for genome in ([0], [99] * len(space.genes), [-1] * len(space.genes)):
        with pytest.raises(ValueError, match="a genome of this space has 6 indices"):
            space.decode(genome)
    with pytest.raises(ValueError, match="5 layers, not 3"):
        space.encode(Architecture(16, (LayerSizes(4, 2, 128),) * 5))


def test_widths_of_stacked_experts_are_rows_of_16_bytes() -> None:
    structure = describe(CONFIGS["mixtral"]())
    least = 16 // structure.dtype_bytes
    for name in PRESETS:
        space = SearchSpace.preset(name, structure)
        widths = [value for gene in space.genes if gene.kind == "ffn" for value in gene.values]
        assert not any(width % least for width in widths)
    with pytest.raises(ValueError, match=f"ffn.0: 7 is not a multiple of {least}"):
        SearchSpace.from_dict({"ffn.0": [7, structure.base.layers[0].intermediate_size]}, structure)
