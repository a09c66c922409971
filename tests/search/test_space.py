"""Genomes and architectures match, spaces hold what their genes say, and samples have the sizes asked for."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from search.genes import Gene
from search.objectives import Computer, computed
from search.presets import PRESETS
from search.sampling import sample_near, sample_sizes, sample_tilted, uniform_members
from search.space import SearchSpace
from supernet.architecture import Architecture, LayerSizes, StorageFormat
from supernet.families import describe
from tests.support.search_helpers import PROSE, SMALL, llama
from tests.support.tiny_families import CONFIGS

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
    "a removable layer in one of two sets": SearchSpace.from_dict(
        {"depth": {"keep": [[0, 1], [0, 2], [0, 1, 2]]}, "kv.2": [0, 2], "ffn.2": [0, 128]}, SMALL
    ),
    "queries and hidden": SearchSpace.from_dict(
        {"heads": [1, 2], "hidden_size": [8, 16], "kv.*": [0, 1, 2], "layer.1": [0, 1]}, SMALL
    ),
    "bits": SearchSpace.from_dict(
        {"ffn.*": [0, 128], "kv.0": [0, 2], "attention_bits.*": [4, 16], "ffn_bits.1": [3, 8, 16], "layer.1": [0, 1]}
        | {"embedding_bits": [8, 16]},
        SMALL,
    ),
    "bits of all layers": SearchSpace.from_dict({"ffn.*": [0, 128], "ffn_bits": [2, 16], "kv.*": [0, 2]}, SMALL),
    "experts": SearchSpace.from_dict(
        {"ffn.*": [0, 8, 24], "experts.*": [1, 4, 6], "kv.0": [0, 3]}, describe(CONFIGS["qwen3_moe"]())
    ),
    "one layer with the lot": SearchSpace.from_dict({"kv.1": [0, 2], "ffn.1": [0, 128]}, SMALL),
}


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
    stored = StorageFormat(16, 32, by_architecture=True)
    for objective in computed(space.structure, scheme=stored if space.bits else None, context=7).values():
        assert objective.compute is not None
        expected = [objective.compute(a) for a in space.decode_all(genomes)]
        assert Computer(space, objective)(genomes).tolist() == expected, objective.name


@pytest.mark.parametrize("name", [n for n, s in SPACES.items() if s.size <= 20_000])
def test_every_architecture_is_listed_once(name: str) -> None:
    space = SPACES[name]
    brute = {space.decode(g) for g in itertools.product(*(range(u + 1) for u in space.upper))}
    listed = list(space.architectures())
    assert set(listed) == brute and len(listed) == len(brute)


@pytest.mark.parametrize("name", SPACES)
def test_a_space_is_written_as_it_is_read(name: str) -> None:
    space = SPACES[name]
    copy = SearchSpace.from_dict(space.to_dict(), space.structure)
    assert copy.genes == space.genes and copy.smallest() == space.smallest()


def test_inert_genes_do_not_make_two_architectures() -> None:
    space = SearchSpace.from_dict({"layer.*": [0, 1], "ffn.*": [32, 64, 128]}, SMALL)
    wide, narrow = list(space.upper), list(space.upper)
    wide[space.positions["layer.1"]] = narrow[space.positions["layer.1"]] = 0
    narrow[space.positions["ffn.1"]] = 0
    assert space.decode(wide) == space.decode(narrow)
    canonical = space.canonicalize(np.array([wide, narrow]))
    assert (canonical[0] == canonical[1]).all()
    assert (space.features(np.array([wide])) == space.features(np.array([narrow]))).all()
    assert [gene.name for gene, inert in zip(space.genes, space.inert(wide), strict=True) if inert] == ["ffn.1"]
    assert space.decode(wide).layers[1].removed


def test_features_are_ordinals_then_one_hot_codes_of_declared_values() -> None:
    space = SearchSpace.from_dict({"depth": {"keep": [[0, 1], [0, 1, 2]]}, "ffn.2": [32, 64, 128]}, SMALL)
    full, cut = space.features(np.array([[1, 1], [0, 1]]))
    assert full.tolist() == [1, 0.5, 0, 1, 0, 1, 0]
    assert cut.tolist() == [2 / 3, 0, 1, 0, 0, 0, 0]


def test_bits_of_what_is_removed_are_inert() -> None:
    space = SPACES["bits"]
    position = space.positions
    genome = np.array([space.upper, space.upper])
    genome[:, position["kv.0"]] = 0
    genome[1, position["attention_bits.0"]] = 0
    assert space.decode(genome[0]) == space.decode(genome[1]) and space.inert(genome[1])[position["attention_bits.0"]]
    genome[:, position["kv.0"]] = 1
    whole, rounded = map(space.decode, genome)
    assert whole == space.base and rounded.layers[0].attention_bits == 4 and rounded.without_bits() == whole
    assert Architecture.from_dict(rounded.to_dict()) == rounded and rounded.key != whole.key


@pytest.mark.parametrize(
    ("gene", "message"),
    [
        ({"ffn_bits.0": [5, 16]}, "valid are 2, 3, 4, 8, ascending, 16 last"),
        ({"attention_bits": [16, 4]}, "valid are"),
        ({"embedding_bits": [4, 8]}, "16 last"),
        ({"head_bits": [8, 16]}, "the output head is the embedding here"),
        ({"ffn_bits.9": [8, 16]}, "unknown gene"),
        ({"ffn_bits": [8, 16], "ffn_bits.0": [8, 16]}, "contradicts"),
    ],
)
def test_genes_of_bits_are_checked(gene: dict[str, list[int]], message: str) -> None:
    tied = replace(SMALL, tied=True)
    with pytest.raises(ValueError, match=message):
        SearchSpace.from_dict(gene, tied)


def test_some_layer_keeps_attention() -> None:
    space = SearchSpace.preset("fine", SMALL, step=64)
    smallest = space.smallest()
    assert [layer.num_key_value_heads for layer in smallest.layers] == [1, 0, 0]
    assert sum(layer.intermediate_size for layer in smallest.layers) == 0
    with pytest.raises(ValueError, match="does not hold"):
        space.encode(Architecture(16, (LayerSizes(0, 0, 128),) * 3))


def test_a_gene_for_all_layers_needs_equal_layers() -> None:
    layers = (LayerSizes(4, 2, 64), LayerSizes(4, 2, 128))
    uneven = replace(llama(2, 16, 128, 4, 2, 4, 50), base=Architecture(16, layers))
    with pytest.raises(ValueError, match=r"layers differ \(64, 128\); use ffn.N"):
        SearchSpace(uneven, [Gene("ffn", (32, 128))])


def test_samples_meet_sizes() -> None:
    space = SPACES["fine"]
    rng = np.random.default_rng(3)
    low, high = (PROSE.parameters(a) for a in (space.smallest(), space.base))
    sizes = [PROSE.parameters(a) for a in space.decode_all(sample_sizes(space, rng, 20))]
    share = (high - low) / 20
    assert all(abs(p - (low + (i + 0.5) * share)) < 1.5 * share for i, p in enumerate(sizes))
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
