"""The recipe: sizes as people write them, defaults by effort, one line for a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.demo import MODEL, RECIPE, TASK_NAMES
from compressor.recipe import BUDGETS, former_names
from compressor.recipe_file import read_recipe, write_recipe
from compressor.recipe_reference import reference
from compressor.sizing import size_label
from compressor.training_defaults import learning_rate_for
from supernet.common.errors import RequestError
from supernet.common.files import load_yaml
from supernet.common.formatting import parse_bytes, parse_parameters
from tests.support import ROOT

RECIPES = ROOT / "recipes"


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ("0.67", 670),
        (".5", 500),
        ("67%", 670),
        ("450M", 450_000_000),
        ("1.5b", 1_500_000_000),
        ("450", 450),
        ("2k", 2000),
        ("4.5e8", 450_000_000),
    ],
)
def test_sizes(text: str, parameters: int) -> None:
    assert parse_parameters(text, 1000) == parameters


@pytest.mark.parametrize("text", ["", "two", "1.5", "0%", "120%", "-3", "5MiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a"):
        parse_parameters(text, 1000)


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GiB", 2 * 2**30), ("500MB", 500_000_000), ("1500", 1500), ("3 kib", 3072), ("2e9", 2_000_000_000)],
)
def test_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


def test_effort_fills_in_what_was_not_said() -> None:
    recipe = read_recipe(None, {"model": "m", "effort": "quick", "searching.evaluations": 99}).resolved()
    assert recipe.searching.evaluations == 99
    assert recipe.finetuning.tokens == BUDGETS["quick"].train_tokens
    assert recipe.targets.max_drop == 0.01  # the default target


def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: m\nseed: 3\ntargets: {max_params: [0.8, 50%]}\nquantizing: {schemes: 'int8, int4'}\n")
    recipe = read_recipe(file, {"seed": 4, "dtype": None})
    assert recipe.seed == 4 and recipe.dtype == "auto"
    assert recipe.targets.max_params == ["0.8", "50%"]
    assert recipe.quantizing.schemes == ["int8", "int4"]


def test_written_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = read_recipe(None, {"model": "m", "targets.max_drop": "2%"}).resolved()
    write_recipe(recipe, tmp_path / "recipe.yaml", {"versions": {"torch": "x"}})
    assert read_recipe(tmp_path / "recipe.yaml", {}) == recipe


@pytest.mark.parametrize("text", ["model: m\ntargets:\n", "model: m\ntargets: {max_params: }\n"])
def test_a_key_without_a_value_says_nothing(tmp_path: Path, text: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    assert read_recipe(file, {}).targets.empty
    assert read_recipe(file, {"targets.max_params": "0.8"}).targets.max_params == ["0.8"]


def test_an_option_into_what_is_no_section_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: m\ntargets: 0.8\n")
    with pytest.raises(RequestError, match=r"'targets': expected keys and values \(got 0.8\)"):
        read_recipe(file, {"targets.max_params": "0.8"})


def test_a_file_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\xff\xfe\x00\x89PNG")
    with pytest.raises(RequestError, match="not text in UTF-8"):
        read_recipe(file, {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: m\nseed: 1\nseed: 2\n", ["'seed' stands there twice"]),
        ("model: m\ntargets: {max_params: 0.7}\ntargets: {max_drop: 1%}\n", ["'targets' stands there twice"]),
        ("model: m\nseed: 010\n", ["010 begins with 0"]),
        ("model: m\ntime: 1:30\n", ["'time'", "got '1:30'"]),
        ("model: m\ntime: 1:30.5\n", ["'time'", "got '1:30.5'"]),
    ],
)
def test_what_yaml_takes_in_silence_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RequestError) as refused:
        read_recipe(tmp_path / "r.yaml", {})
    assert all(word in str(refused.value) for word in words)


def test_anchors_of_yaml_may_be_merged_and_overridden(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "model: m\nfinetuning: &a {tokens: 7, batch_size: 2}\nhealing: {<<: *a, tokens: 9}\n"
    )
    with pytest.raises(RequestError, match=r"unknown key 'healing\.batch_size'"):  # merged, and looked at
        read_recipe(tmp_path / "r.yaml", {})
    (tmp_path / "r.yaml").write_text("model: m\nfinetuning: &a {tokens: 7}\nhealing: {<<: *a, tokens: 9}\nseed: 0\n")
    recipe = read_recipe(tmp_path / "r.yaml", {})
    assert (recipe.finetuning.tokens, recipe.healing.tokens, recipe.seed) == (7, 9, 0)
    # One that something is merged into is merged elsewhere before its own turn comes.
    nested = "base: &b {tokens: 1}\nx: {y: &a {<<: *b, tokens: 7}}\nhealing: {<<: *a, tokens: 9}\n"
    assert load_yaml(nested)["healing"] == {"tokens": 9} and load_yaml("{1: a, '1': b}") == {1: "a", "1": "b"}


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_recipes_that_come_with_the_project_are_valid(file: Path) -> None:
    assert read_recipe(file, {"model": "m"}).resolved().model == "m"


def test_the_demos_recipe_names_the_bundled_checkpoint_and_tasks() -> None:
    recipe = read_recipe(RECIPE, {})
    assert ROOT / recipe.model == MODEL and recipe.tasks == TASK_NAMES


def test_the_reference_page_is_fresh_and_names_every_key() -> None:
    assert (ROOT / "docs" / "recipe.md").read_text() == reference()


def test_keys_are_read_under_their_former_names_and_fingerprinted_as_then() -> None:
    recipe = read_recipe(None, {"model": "m", "searching.first_look": 0.25, "finetuning.move_idle": True})
    assert recipe.searching.screening == 0.25 and recipe.finetuning.move_inactive
    assert former_names(recipe.searching.model_dump())["first_look"] == 0.25


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: m\nsearhcing: {}\n", ["searhcing", "searching"]),
        ("model: m\ntargets: {max_parms: 1}\n", ["targets.max_parms", "max_params"]),
        ("model: m\nseed: none\n", ["seed", "whole number"]),
        ("seed: 1\n", ["model", "missing"]),
        ("- a\n", ["keys and values"]),
        ("a: [\n", ["YAML"]),
        ("model: m\nquantizing: {schemes: [int5]}\n", ["int5", "int4"]),
        ("model: m\ntargets: {max_bytes: lots}\n", ["lots", "2GiB"]),
        ("model: m\ntargets: {max_params: true}\n", ["max_params", "True"]),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RequestError) as caught:
        read_recipe(file, {})
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("key", ["searching.evaluations", "finetuning.tokens", "finetuning.weight_decay", "seed"])
def test_true_is_no_number(tmp_path: Path, key: str) -> None:
    file = tmp_path / "r.yaml"
    section, _, name = key.rpartition(".")
    file.write_text(f"model: m\n{section}: {{{name}: yes}}\n" if section else f"model: m\n{name}: on\n")
    with pytest.raises(RequestError, match=rf"--recipe .*: '{key}': true or false is no value of it \(got True\)"):
        read_recipe(file, {})
    file.write_text("model: m\nfinetuning: {shard: yes}\n")
    assert read_recipe(file, {}).finetuning.shard


def test_a_search_of_one_is_none() -> None:
    with pytest.raises(RequestError, match=r"'searching.evaluations': .*2"):
        read_recipe(None, {"model": "m", "searching.evaluations": 1})


def test_the_default_rate_moves_no_weight_by_more_than_a_hundredth_of_its_size() -> None:
    assert learning_rate_for("fine-tuning", 64) == learning_rate_for("fine-tuning", 64, 0.2) == 0.1 / 64
    assert learning_rate_for("fine-tuning", 64, 0.02) == pytest.approx(0.0002)
    assert learning_rate_for("healing", 64, 0.02) == pytest.approx(0.0004)
    assert learning_rate_for("healing after repair", 64, 0.02) == pytest.approx(0.0002)
    assert learning_rate_for("adapters", 64, 0.02) == pytest.approx(0.0006)
    assert learning_rate_for("fine-tuning", 64, 0.0) == 0.1 / 64  # nothing is known of such weights


def test_a_percentage_in_a_name_is_a_share() -> None:
    assert [size_label(text) for text in ("0.67", "67%", "2.5 M", "1e6")] == ["0.67", "0.67", "2.5M", "1e6"]
