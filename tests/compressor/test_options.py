"""Options say what they take and what holds without them; `--set` reaches every key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from compressor.cli import run
from compressor.cli.options import BY_EFFORT, RECIPE_OPTIONS
from compressor.names import FORMATS
from compressor.recipe import Recipe
from compressor.recipe_file import keys, read_recipe
from tests.support import ROOT, tiny


def value_of(recipe: Recipe, key: str) -> Any:
    section, _, name = key.rpartition(".")
    return getattr(getattr(recipe, section) if section else recipe, name)


def test_the_defaults_in_the_help_are_the_recipes() -> None:
    recipe = Recipe(model="m")
    for option in RECIPE_OPTIONS.values():
        value = value_of(recipe, option.key)
        if option.default == BY_EFFORT:
            assert value is None and value_of(recipe.resolved(), option.key) is not None, option.key
        elif isinstance(value, bool):
            assert option.default == ("on" if value else "off") or not value, option.key
        elif isinstance(value, list) and value:
            assert option.default == ",".join(map(str, value)), option.key
        elif isinstance(value, str | int):
            assert option.default == str(value), option.key


def test_the_values_in_the_help_are_the_recipes() -> None:
    for option in RECIPE_OPTIONS.values():
        section, _, name = option.key.rpartition(".")
        model = Recipe.model_fields[section].annotation if section else Recipe
        values = get_args(getattr(model, "model_fields")[name].annotation)  # noqa: B009 - its type is not known
        for value in [*values, *(FORMATS if name == "formats" else ())]:
            if isinstance(value, str):
                assert value in option.help, option.key


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e6", 1_000_000), ("0.5M", 500_000), ("2k", 2000), ("10_000", 10_000), ("12345678901234567", 12345678901234567)],
)
def test_whole_numbers_as_people_write_them(text: str, number: int, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: m\nfinetuning: {{tokens: {text}}}\n")
    assert read_recipe(file, {}).finetuning.tokens == number
    assert read_recipe(None, {"model": "m", "healing.tokens": text}).healing.tokens == number


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "tokens=3"], ["unknown key 'tokens'", "finetuning.tokens", "healing.tokens"]),
        (["--set", "healing.tokns=3"], ["healing.tokns", "did you mean tokens"]),
        (["--set", "finetunning.tokens=3"], ["did you mean finetuning"]),
        (["--set", "seed"], ["--set seed", "KEY=VALUE"]),
        (["--train-tokens", "half"], ["finetuning.tokens", "1e6"]),
        (["--format", "gguv"], ["did you mean gguf?"]),
        (["--recipe", "llama-8c"], ["no such file", "llama-8b"]),
        (["--report-to", "tensorbord"], ["did you mean tensorboard?"]),
        (["--evalutions", "3"], ["--evaluations"]),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_nearest(
    options: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compress", "m", "--data", "d.jsonl", "--output", str(tmp_path / "run"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words)


def test_set_reaches_every_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = {"finetuning.loss": {"ce": 1.0}, "searching.objectives": ["quality", "macs"], "healing.tokens": 2_000_000}
    assert given.keys() <= set(keys())
    recipe = read_recipe(None, {"model": "m"} | given)
    assert all(value_of(recipe, key) == value for key, value in given.items())
    command = ["inspect", str(tiny.checkpoint(tmp_path / "model")), "--set", "healing.tokens=0.2M", "--json"]
    code = f"from compressor.cli import run; run({command})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert '"heal_tokens": 200000' in done.stdout
