"""Spaces as recipes write them: by name, gene by gene, one over the other, and refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from search.presets import POLICIES, kept_layers, widths
from search.space import SearchSpace
from supernet.families import describe
from tests.support.search_helpers import LLAMA_2_7B, PROSE, SMALL, llama
from tests.support.tiny_families import CONFIGS


def genes_of(space: SearchSpace) -> dict[str, tuple[int, ...]]:
    return {gene.name: gene.values for gene in space.genes}


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


def test_a_step_that_is_asked_for() -> None:
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
    for policy in POLICIES:
        assert all(len(kept_layers(policy, 12, depth)) == depth for depth in range(1, 13))


@pytest.mark.parametrize("policy", POLICIES)
def test_llama_nas_is_the_published_space_under_every_policy(policy: str) -> None:
    space = SearchSpace.preset("llama-nas", LLAMA_2_7B, policy=policy)
    assert genes_of(space) == {"depth": (24, 28, 32)} | {f"ffn.{i}": (5504, 11008) for i in range(32)}
    assert space.size == 3 * 2**32
    assert LLAMA_2_7B.parameters(space.base) == 6_738_415_616
    smallest = space.smallest()
    assert smallest.kept == kept_layers(policy, 32, 24)
    assert {smallest.layers[i].intermediate_size for i in smallest.kept} == {5504}
    assert round(LLAMA_2_7B.parameters(smallest) / 1e9, 3) == 3.496


def test_presets_in_proportion() -> None:
    genes = genes_of(SearchSpace.preset("llama-nas", llama(5, 64, 172, 8, 4, 8, 512)))
    assert genes["depth"] == (3, 4, 5) and genes["ffn.0"] == (96, 172)
    fine = genes_of(SearchSpace.preset("fine", PROSE))
    assert fine["kv.7"] == (0, 1, 2, 3, 4) and fine["ffn.0"] == (0, *range(64, 769, 64))
    assert len(list(SearchSpace.preset("depth", PROSE).architectures())) == 255
    instatune = genes_of(SearchSpace.preset("instatune", LLAMA_2_7B))
    assert instatune["depth"] == tuple(range(24, 33)) and instatune["kv.0"] == (16, 21, 27, 32)
    experts = SearchSpace.preset("fine", describe(CONFIGS["qwen3_moe"]()))  # 6 experts, 3 for each token
    assert {values for name, values in genes_of(experts).items() if name.startswith("experts")} == {(3, 4, 5, 6)}


def test_an_order_of_layers_given_or_measured_serves_the_depth_gene() -> None:
    given = SearchSpace.preset("llama-nas", PROSE, order=[7, 6, 5, 4, 3, 2, 1, 0])
    assert given.smallest().kept == (2, 3, 4, 5, 6, 7)
    recipe = {"preset": "llama-nas", "policy": "importance"}
    measured = SearchSpace.from_dict(recipe, LLAMA_2_7B, measured_order=range(31, -1, -1))
    assert measured.smallest().kept == tuple(range(8, 32))


def test_a_recipe_puts_its_own_genes_over_a_preset() -> None:
    space = SearchSpace.from_dict({"preset": "fine", "step": 64, "hidden_size": [8, 16], "ffn.1": [128]}, SMALL)
    genes = genes_of(space)
    assert genes["hidden_size"] == (8, 16) and genes["ffn.1"] == (128,) and genes["ffn.0"] == (0, 64, 128)


def test_a_space_written_gene_by_gene() -> None:
    depth = {"values": [6, 8], "policy": "alternate"}
    recipe = {"ffn.*": {"step": 256, "min": 0}, "ffn.2-3": [768], "kv.0": [2, 4], "depth": depth}
    space = SearchSpace.from_dict(recipe, PROSE)
    genes = genes_of(space)
    assert genes["ffn.1"] == (0, 256, 512, 768) and genes["ffn.3"] == (768,) and genes["kv.0"] == (2, 4)
    assert space.smallest().kept == (0, 1, 3, 4, 5, 7)
    assert SearchSpace.from_dict({"layer.0": [1]}, PROSE).size == 1


UNKNOWN_POLICY = "unknown policy 'last'; valid are first, alternate, late-block, importance"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"ffn.0": [256, 1024]}, "1024 is above the original's size; valid are 0 to 768"),
        ({"ffn.*": {"step": 100}}, "step of 100 does not divide the FFN width 768; valid are its divisors .*64, .*128"),
        ({"kv.3": [1, 2, 8]}, "8 is above the original's size; valid are 0 to 4"),
        ({"heads": [1, 3]}, "3 is above the original's query heads for each key-value head; valid are 1 to 2"),
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
        ({"depth": {"values": [6, 8], "policy": "last"}}, UNKNOWN_POLICY),
        ({"depth": {"values": [6, 9]}}, "not all whole numbers from 1 to 8"),
        ({"depth": {"values": [6, 8], "order": [0, 1]}}, "each of the layers 0 to 7 once"),
        ({"depth": {"values": [6, 8], "policy": "importance"}}, "needs an order of the layers"),
        ({"depth": {"layers": 3}}, "unknown layers; valid are values, policy, order, keep"),
        ({"depth": {"keep": [[0, 9], list(range(8))]}}, "not all among 0 to 7"),
        ({"depth": {"keep": 5}}, "keep: 5 is not a list of lists of layers"),
        ({"depth": {"keep": [0, 1]}}, "not a list of lists of layers"),
        ({"depth": {"values": [6, 8], "order": 3}}, "each of the layers 0 to 7 once"),
        ({"preset": "fien"}, "unknown search space 'fien'; valid are llama-nas, instatune, depth, uniform, fine"),
        ({"preset": "llama-nas", "policy": "last"}, UNKNOWN_POLICY),
        ({"preset": "llama-nas", "order": 3}, "order: 3 is not a list of layers"),
        ({"preset": "llama-nas", "step": "a"}, "a step of a does not divide"),
        ({"preset": "fine", "policy": "first"}, "no depth gene"),
        ({"preset": "fine", "step": 100}, "valid are its divisors"),
        ({"ffn.0": {"step": "a"}}, "a step of a does not divide"),
        ({"ffn.0": {"min": "a"}}, "min: 'a' is not a whole number"),
        ({}, "no genes"),
        ([], "mapping"),
    ],
)
def test_an_impossible_space_is_refused_in_one_line_with_the_valid_values(recipe: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        SearchSpace.from_dict(recipe, PROSE)
    assert "\n" not in str(error.value)
