"""What `compressor status` reads of a run, while somebody works in it and afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compressor.cli import run
from compressor.recipe import Recipe
from compressor.run import Run
from compressor.run_status import run_status
from compressor.schedule import Schedule


@pytest.fixture
def made(tmp_path: Path) -> Run:
    """A run that was stopped in its search, with a plan."""
    made = Run(tmp_path / "run")
    made.path.mkdir()
    made.remember(Recipe(model="m"), {}, {})
    schedule = Schedule(made.times_file)
    for name, seconds, ended in (("preparing", 4.0, True), ("ordering", 2.0, True), ("search", 10.0, False)):
        schedule.add(name, 0.0, ended=False)
        schedule.add(name, seconds, ended=ended)
    expected = {"preparing": 4.0, "ordering": 2.0, "fine-tuning": 0.0, "search": 30.0, "picking": 5.0}
    made.plan_file.write_text(json.dumps({"expected": expected}))
    return made


def states(run: Run) -> dict[str, str]:
    return {stage["name"]: stage["state"] for stage in run_status(run.path)["stages"]}


def test_an_interrupted_run(made: Run) -> None:
    made.log("error: no disk space left")
    found = run_status(made.path)
    assert states(made) == {"preparing": "done", "ordering": "done", "search": "interrupted", "picking": "to do"}
    assert found["left"] == 25.0 and found["running"] is None and not found["finished"]
    assert found["last_error"].endswith("error: no disk space left")
    assert found["bytes"] == sum(file.stat().st_size for file in made.path.iterdir())


def test_a_run_that_somebody_works_in(made: Run, capsys: pytest.CaptureFixture[str]) -> None:
    made.lock()
    assert states(made)["search"] == "running"
    found = run_status(made.path)
    assert found["running"].startswith("process ") and found["stages"][2]["began"] > 0
    times = json.loads(made.times_file.read_text())
    times["search"]["began"] -= 8.0
    made.times_file.write_text(json.dumps(times))
    later = run_status(made.path)  # what it has taken since counts
    assert later["left"] is not None and 0 < later["left"] < 18.0 and later["stages"][2]["seconds"] > 17.9
    assert run(["status", str(made.path)]) == 0
    shown = capsys.readouterr().err
    assert "3 of 4  search             running      since" in shown and "working in it: process" in shown
    assert run(["status", str(made.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "m"


def test_an_error_counts_only_until_work_goes_on(made: Run) -> None:
    made.log("error: no disk space left")
    for generation in range(3):
        made.log(f"generation {generation}: 20 measured")
    assert run_status(made.path)["last_error"] is None


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", str(tmp_path)]) == 2
    assert "not a run" in capsys.readouterr().err


def test_a_run_made_stage_by_stage_is_finished_with_its_report(made: Run) -> None:
    made.plan_file.unlink()
    Schedule(made.times_file).add("search", 3.0, ended=True)
    assert not run_status(made.path)["finished"]
    made.report.write_text('{"packages": []}')
    assert run_status(made.path)["finished"]


def test_what_was_not_exported_or_not_reported_yet_is_said(made: Run, capsys: pytest.CaptureFixture[str]) -> None:
    made.plan_file.unlink()
    for stage in ("search", "proving"):
        Schedule(made.times_file).add(stage, 3.0, ended=True)
    made.search.mkdir()
    first, second = ({"hidden_size": 16, "layers": [sizes(width)]} for width in (32, 64))
    made.picks.write_text(json.dumps([{"name": "best", "architecture": first}]))
    record = made.packages / "best" / "compression.json"
    record.parent.mkdir(parents=True)
    entry: dict[str, object] = {"name": "best", "architecture": first, "bytes": 100, "held_out_loss": 2.0}
    record.write_text(json.dumps({"entry": entry}))
    (made.packages / "base.json").write_text('{"packages": ["best"]}')

    def said() -> str:
        assert run(["status", str(made.path)]) == 0
        return capsys.readouterr().err

    assert f"exported and not reported since: compressor report {made.path}" in said()
    made.report.write_text(json.dumps({"packages": [entry]}))
    assert run_status(made.path)["finished"]
    unmeasured = {key: value for key, value in entry.items() if key != "held_out_loss"}
    record.write_text(json.dumps({"entry": unmeasured}))  # as while an export works, or where it was interrupted
    assert not run_status(made.path)["finished"] and "the command that began it goes on" in said()
    record.write_text(json.dumps({"entry": entry | {"held_out_loss": 1.9}}))  # healed by other tokens
    assert not run_status(made.path)["finished"] and "exported and not reported since" in said()
    record.write_text(json.dumps({"entry": entry}))
    made.picks.write_text(json.dumps([{"name": "best", "architecture": second}]))
    assert not run_status(made.path)["finished"]
    assert f"picked and not packaged since: compressor export {made.path}, then" in said()


def sizes(width: int) -> dict[str, int]:
    return {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": width}
