"""A run is used from any folder, moved with its inputs, and worked in by one process at a time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compressor import pipeline
from compressor.cli import run
from compressor.local_paths import LocalPath, localized, remembered
from compressor.recipe_file import read_recipe
from compressor.run import Run
from supernet.common.errors import RequestError
from tests.support import ROOT, tiny

OPTIONS = ["--train-tokens", "0", "--heal-tokens", "0", "--evaluations", "6", "--limit", "8", "--max-params", "0.8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with inputs and a whole run, made with relative paths, one of them through a link."""
    folder = tmp_path_factory.mktemp("place")
    tiny.checkpoint(folder / "models" / "base")
    (folder / "link").symlink_to(folder / "models" / "base")
    tiny.data(folder / "train.jsonl")
    tiny.task(folder / "tasks")
    recipe = "searching: {population: 4, warm_start: [], objectives: [quality, parameters]}\n"
    (folder / "recipe.yaml").write_text(recipe)
    before = Path.cwd()
    os.chdir(folder)
    try:
        command = ["compress", "link", "--data", "train.jsonl", "--include-path", "tasks", "--tasks", "tiny_choice"]
        assert run([*command, "--recipe", "recipe.yaml", *OPTIONS, "--output", "run1"]) == 0
    finally:
        os.chdir(before)
    return folder


def test_a_run_of_relative_paths_is_used_from_elsewhere(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["pick"], ["export"], ["report"], ["pick", "--max-params", "0.9"]):
        assert run([command[0], str(place / "run1"), *command[1:]]) == 0
    assert "model: link" in (place / "run1" / "recipe.yaml").read_text()
    report = json.loads((place / "run1" / "report.json").read_text())
    assert report["base"]["path"] == "link" and report["base"]["hub_id"] is None


def test_a_run_moves_with_its_inputs_and_not_without(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(place, moved)
    task = moved / "tasks" / "tiny_choice.yaml"  # it names its documents by an absolute path
    task.write_text(task.read_text().replace(str(place), str(moved)))
    for name in ("models", "train.jsonl", "tasks"):
        (place / name).rename(place / f"{name}.away")
    try:
        monkeypatch.chdir(tmp_path)
        assert run(["pick", str(moved / "run1")]) == 0
        assert run(["report", str(moved / "run1")]) == 0  # written anew, since something was picked
        (moved / "link").rename(tmp_path / "link")
        capsys.readouterr()
        assert run(["report", str(moved / "run1")]) == 0  # up to date: it is shown, which needs no inputs
        assert run(["pick", str(moved / "run1")]) == 2
        message = capsys.readouterr().err
        assert "model: link lay at" in message and "hub" not in message
    finally:
        for name in ("models", "train.jsonl", "tasks"):
            (place / f"{name}.away").rename(place / name)


def test_names_of_spaces_criteria_and_methods_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("fine", "wanda", "blockwise", "m"):
        (tmp_path / name).mkdir()
    recipe = read_recipe(None, {"model": "m", "finetuning.ordering": "wanda"})
    assert set(remembered(recipe, tmp_path / "run")) == {"m"}
    here = localized(recipe, tmp_path / "run", remembered(recipe, tmp_path / "run"))
    assert (here.space, here.finetuning.ordering) == ("fine", "wanda") and here.model == str(tmp_path / "m")


def test_what_was_local_is_refused_where_it_is_gone(tmp_path: Path) -> None:
    recipe = read_recipe(None, {"model": "models/base"})
    gone = LocalPath(absolute=str(tmp_path / "models" / "base"), relative="../models/base")
    with pytest.raises(RequestError, match="model: models/base lay at"):
        localized(recipe, tmp_path / "run", {"models/base": gone})


HOLDER = """
import sys, time
from pathlib import Path
from compressor.run import Run
Run.open(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_dead_one_is_not_in_the_way(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = place / "run2"
    shutil.copytree(place / "run1", run_folder)
    command = [sys.executable, "-c", HOLDER, str(run_folder)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    for name in ("pick", "report", "export", "search"):
        assert run([name, str(run_folder)]) == 2
        assert f"process {holder.pid} on" in capsys.readouterr().err
    assert run(["compress", "--recipe", str(run_folder / "recipe.yaml"), "--output", str(run_folder)]) == 2
    holder.kill()
    holder.wait()
    assert run(["report", str(run_folder)]) == 0


def test_one_process_may_open_its_run_again(place: Path) -> None:
    shutil.copytree(place / "run1", place / "run3")
    for _ in range(2):
        assert Run.open(place / "run3").path == place / "run3"
    assert pipeline.resume(place / "run3", {}).run.path == place / "run3"
