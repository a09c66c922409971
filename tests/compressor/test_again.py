"""A run's recipe and command line say the same as the run did."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path

import pytest
import yaml

from compressor.again import command_line, recipe_text
from compressor.cli import run
from compressor.local_paths import remembered
from compressor.recipe import Recipe
from compressor.recipe_file import read_recipe
from compressor.run import Run
from tests.support import tiny

RECIPE = {
    "model": "model",
    "data": "data.jsonl",
    "tasks": ["tiny_choice", "other:acc"],
    "include_path": "tasks",
    "trust_remote_code": True,
    "space": {"ffn.*": [32, 64], "layer.1": [0, 1]},
    "targets": {"max_params": ["0.8", "67%"], "min_speedup": 1.1},
    "finetuning": {"tokens": 1600, "loss": {"ce": 0.5, "kl": 0.5}, "schedule": "linear"},
    "searching": {"evaluations": 14, "objectives": ["quality", "parameters"]},
    "repair": {"enabled": True},
    "quantizing": {"schemes": ["int8"], "iterations": 0},
}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run folder with its recipe, as `start` leaves it."""
    monkeypatch.chdir(tmp_path)
    tiny.checkpoint(tmp_path / "model")
    tiny.data(tmp_path / "data.jsonl")
    tiny.task(tmp_path / "tasks")
    recipe = Recipe.model_validate(RECIPE).resolved()
    folder = tmp_path / "run"
    return Run.create(folder, recipe, {}, remembered(recipe, folder))


def test_the_command_line_asks_for_the_same_recipe(made: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    command = importlib.import_module("compressor.cli.compress")  # the package has a function of this name
    words = shlex.split(command_line(made.recipe(), "runs/again"))
    asked: list[Recipe] = []

    def keep(file: Path | None, model: str | None, given: dict[str, object], *_: object) -> Recipe:
        asked.append(read_recipe(file, {"model": model} | given))
        raise KeyboardInterrupt  # the recipe is all that is wanted

    monkeypatch.setattr(command, "recipe_of", keep)
    assert words[0] == "compressor" and run(words[1:]) == 130
    assert asked == [made.recipe()]


def test_the_printed_recipe_is_the_runs_own_with_paths_that_lead_there(
    made: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["recipe", str(made.path)]) == 0
    text = capsys.readouterr().out
    assert text == recipe_text(made.path)
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    local = {
        "model": str(tmp_path / "model"),
        "data": str(tmp_path / "data.jsonl"),
        "include_path": str(tmp_path / "tasks"),
    }
    assert read_recipe(file, {}) == made.recipe().model_copy(update=local)
    assert "population" not in yaml.safe_load(text)["searching"]  # what says no more than the default is left out
