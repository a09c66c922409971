"""What `compressor list` shows, and the recipes that come with the program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.recipes import MARK, SIZES
from compressor import names
from compressor.cli import run
from compressor.early_checks import check_names
from compressor.recipe_file import read_recipe
from supernet.families import families
from tests.support import tiny


@pytest.mark.parametrize(
    ("what", "known"),
    [
        ("spaces", names.SPACES),
        ("families", families()),
        ("baselines", names.BASELINES),
        ("recipes", SIZES),
        ("algorithms", names.ALGORITHMS),
        ("formats", names.FORMATS),
    ],
)
def test_lists(what: str, known: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", what]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == set(known)
    assert run(["list", what, "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == set(known)


def test_tasks_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "tasks", "--include-path", str(tiny.task(tmp_path / "tasks"))]) == 0
    assert capsys.readouterr().out == "tiny_choice\n"
    assert run(["list", "tasks", "--include-path", str(tmp_path / "nowhere")]) == 2
    assert run(["list"]) == 2 and "recipes" in capsys.readouterr().err
    assert run(["lits"]) == 2 and "Did you mean 'list'?" in capsys.readouterr().err
    assert run(["list", "task"]) == 2
    assert "did you mean tasks?" in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("nas-compressor ")


@pytest.mark.parametrize("name", SIZES)
def test_a_recipe_of_the_program_is_valid_and_says_what_it_takes(name: str) -> None:
    recipe = read_recipe(Path(name), {})
    check_names(recipe.model_copy(update={"formats": ["uneven"]}))  # llama.cpp need not be installed
    assert recipe.tasks and not recipe.targets.empty
    told = [line for line in names.recipes()[name].read_text().splitlines() if line.startswith(MARK)]
    assert len(told) == 1 and "GPU memory" in told[0]
