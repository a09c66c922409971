"""What a recipe can put over a named space, and what it is told where that is impossible."""

from __future__ import annotations

from typing import Any

import pytest

from search.presets import POLICIES, kept_layers
from search.space import SearchSpace
from supernet.families import describe
from tests.support.search_helpers import LLAMA_2_7B, SMALL
from tests.support.tiny_families import CONFIGS


def test_fine_counts_experts_from_those_that_a_token_needs() -> None:
    space = SearchSpace.preset("fine", describe(CONFIGS["qwen3_moe"]()))  # 6 experts, 3 for each token
    assert {gene.values for gene in space.genes if gene.kind == "experts"} == {(3, 4, 5, 6)}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_recipe_names_the_policy_of_a_preset(policy: str) -> None:
    space = SearchSpace.from_dict({"preset": "llama-nas", "policy": policy}, LLAMA_2_7B)
    genes = {gene.name: gene.values for gene in space.genes}
    assert genes == {"depth": (24, 28, 32)} | {f"ffn.{i}": (5504, 11008) for i in range(32)}
    assert space.smallest().kept == kept_layers(policy, 32, 24)


def test_the_policy_importance_takes_the_order_that_was_measured() -> None:
    order = [*range(31, -1, -1)]
    space = SearchSpace.from_dict({"preset": "llama-nas", "policy": "importance"}, LLAMA_2_7B, order)
    assert space.smallest().kept == tuple(range(8, 32))


def test_a_recipe_puts_its_own_genes_over_a_preset() -> None:
    space = SearchSpace.from_dict({"preset": "fine", "step": 64, "hidden_size": [8, 16], "ffn.1": [128]}, SMALL)
    genes = {gene.name: gene.values for gene in space.genes}
    assert genes["hidden_size"] == (8, 16) and genes["ffn.1"] == (128,) and genes["ffn.0"] == (0, 64, 128)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"preset": "fien"}, "unknown search space 'fien'; valid are llama-nas, instatune, depth, uniform, fine"),
        ({"preset": "llama-nas", "policy": "last"}, "valid are first, alternate, late-block"),
        ({"preset": "fine", "policy": "first"}, "no depth gene"),
        ({"preset": "fine", "step": 48}, "valid are its divisors"),
    ],
)
def test_an_impossible_preset_is_told_the_valid_values(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SearchSpace.from_dict(data, SMALL)
