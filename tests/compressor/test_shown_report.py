"""A report is shown as it is only where nothing that it is made from changed, and nobody edited it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from compressor.recipe import Recipe
from compressor.run import Run
from compressor.shown_report import current_report
from export.report.page import write_report
from export.report.schema import validate_report
from supernet.common.errors import RequestError
from supernet.common.versions import versions
from tests.support.report_helpers import full_report


@pytest.fixture
def made(tmp_path: Path) -> Run:
    """A run with a package's record and a report of this version."""
    made = Run(tmp_path / "run")
    (made.packages / "best").mkdir(parents=True)
    made.remember(Recipe(model="m"), {}, {})
    (made.packages / "best" / "compression.json").write_text("{}")
    write_report(validate_report(full_report() | {"versions": versions(())}), made.path)
    return made


def later(file: Path, seconds: int) -> None:
    """Let a file look as if it was written so much later than now."""
    at = file.stat().st_mtime_ns + seconds * 10**9
    os.utime(file, ns=(at, at))


def test_what_is_up_to_date_is_shown(made: Run) -> None:
    report = current_report(made.path)
    assert report is not None and report.packages


@pytest.mark.parametrize("name", ["recipe.yaml", "packages/best/compression.json", "packages", "report.json"])
def test_what_changed_is_written_again(made: Run, name: str) -> None:
    later(made.path / name, 10)
    assert current_report(made.path) is None


def test_what_cannot_be_written_again_is_shown_as_it_is(
    made: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy on a medium that is only read: copying gave its files other times."""
    later(made.path / "recipe.yaml", 10)
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == made.path and mode == os.W_OK))
    assert current_report(made.path) is not None
    assert "nothing can be written to" in capsys.readouterr().err


def test_a_spoiled_report_or_that_of_another_version_is_written_again(made: Run) -> None:
    write_report(validate_report(full_report() | {"versions": {"nas-compressor": "0.0.1"}}), made.path)
    assert current_report(made.path) is None
    made.report.write_text("{")
    assert current_report(made.path) is None
    made.report.unlink()
    assert current_report(made.path) is None


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="not a run"):
        current_report(tmp_path)
