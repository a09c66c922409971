"""What the report says of losses and of quality, also of a run that an earlier version made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from compressor.cli import run
from tests.support import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a task that the base solves, and one on which it guesses."""
    folder = tmp_path_factory.mktemp("reporting")
    recipe = "searching: {population: 4, warm_start: [], objectives: [quality, parameters]}\n"
    (folder / "recipe.yaml").write_text(recipe)
    tiny.task(folder / "tasks", documents=40, solved=True)
    tiny.task(folder / "tasks", "guessed", documents=40)
    command = [
        "compress", str(tiny.checkpoint(folder / "model")), "--recipe", str(folder / "recipe.yaml"),
        "--data", str(tiny.data(folder / "data.jsonl", 300)), "--tasks", "tiny_choice,guessed",
        "--include-path", str(folder / "tasks"), "--output", str(folder / "run"), "--repair", "off",
        "--train-tokens", "0", "--heal-tokens", "0", "--evaluations", "6", "--limit", "12", "--max-params", "0.8",
    ]  # fmt: skip
    assert run(command) == 0
    return folder / "run"


def report_of(folder: Path) -> dict[str, Any]:
    assert run(["report", str(folder)]) == 0
    return json.loads((folder / "report.json").read_text())


def test_a_task_on_which_the_base_guesses_is_left_out_and_named(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(made)
    assert report["quality"]["counted"] == ["tiny_choice"] and report["quality"]["left_out"] == ["guessed"]
    base, best = (row["tasks"]["tiny_choice"] for row in (report["base"], report["packages"][0]))
    kept = (best["value"] - best["chance"]) / (base["value"] - base["chance"])
    assert report["packages"][0]["quality"] == pytest.approx(max(0.0, kept))
    remark = "Quality does not count guessed: the base is not above chance there by two standard errors."
    assert remark in capsys.readouterr().err
    assert remark in (made / "packages" / "best" / "README.md").read_text()
    change = report["packages"][0]["change"]
    assert set(change["tasks"]) == {"tiny_choice", "guessed"}
    for task, one in change["tasks"].items():
        scores = [row["tasks"][task]["value"] for row in (report["packages"][0], report["base"])]
        assert one["value"] == pytest.approx(scores[0] - scores[1])
        assert one["low"] <= one["value"] + 1e-9 and one["value"] <= one["high"] + 1e-9


def test_a_run_of_an_earlier_version_is_reported_anew(made: Path, tmp_path: Path) -> None:
    expected = report_of(made)
    earlier = tmp_path / "run"
    shutil.copytree(made, earlier)
    shutil.rmtree(earlier / "search" / "documents")
    front = json.loads((earlier / "search" / "front.json").read_text())
    del front["quality"]
    record = json.loads((earlier / "packages" / "best" / "compression.json").read_text())
    record["entry"]["quality"] = 0.987  # of another definition
    for row in front["evaluations"]:
        row["values"]["quality"] = 0.987
    (earlier / "search" / "front.json").write_text(json.dumps(front))
    (earlier / "packages" / "best" / "compression.json").write_text(json.dumps(record))
    (earlier / "report.json").write_text(json.dumps(expected | {"schema": 1}))
    again = report_of(earlier)
    assert again["schema"] == 2 and again["quality"] == expected["quality"]
    assert again["packages"][0]["quality"] == expected["packages"][0]["quality"]
    assert [point["quality"] for point in again["search"]["points"]] == [
        point["quality"] for point in expected["search"]["points"]
    ]
    assert again["packages"][0]["change"] is None
    record = json.loads((earlier / "packages" / "best" / "compression.json").read_text())
    assert record["entry"]["quality"] == expected["packages"][0]["quality"]
    # Exported anew, each document is scored once more, and losses are told over the same documents.
    assert run(["export", str(earlier)]) == 0
    assert report_of(earlier)["packages"][0]["change"] == expected["packages"][0]["change"]
