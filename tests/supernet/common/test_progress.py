"""The one line that a terminal shows, and what a log without one gets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from supernet.common import progress
from supernet.common.progress import Bar, bar, counting_down, keep_lines, line, say, working
from tests.support import ROOT


@pytest.mark.parametrize("width", [36, 40, 60, 80, 120])
def test_the_time_left_is_the_last_thing_that_is_cut(width: int) -> None:
    running = Bar("measuring around a proposal", 12, 5, "best quality 0.912 at 0.67 of the parameters")
    with counting_down(lambda: 4000.0):
        shown = line(running, width)
    assert len(shown) <= width and shown.endswith("about 1 h 6 min left of the run")
    if width >= 60:
        assert "about 1 h 6 min left of the run" in shown and "5/12" in shown
    if width >= 80:
        assert "━" in shown


def test_a_task_of_its_own_says_what_is_left_of_it() -> None:
    running = Bar("searching", 10, 5)
    running.began -= 20
    assert line(running, 80).endswith("20 s left")
    assert "left" not in line(Bar("proving"), 80)


def test_what_an_interrupted_run_did_says_nothing_of_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with bar("healing", 32, 4) as running:
        assert "4/32" in line(running, 80) and "left" not in line(running, 80)
        running.began -= 30
        running.advance()
        monkeypatch.setattr(progress.time, "monotonic", lambda: running.began + 30)
        assert line(running, 80).endswith("13 min 30 s left")  # 27 steps of 30 seconds


def test_work_goes_on_where_its_reader_has_gone(tmp_path: Path) -> None:
    script = (
        "import sys, time; from supernet.common.progress import bar, keep_lines, say\n"
        "log = open(sys.argv[1], 'a'); keep_lines(lambda line: print(line, file=log, flush=True))\n"
        "with bar('working', 200) as b:\n    for n in range(200): say(f'line {n}'); b.advance(); time.sleep(0.002)\n"
        "say('done')"
    )
    work = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "log")], stderr=subprocess.PIPE, cwd=ROOT)
    assert work.stderr is not None and work.stderr.readline()
    work.stderr.close()
    assert work.wait(timeout=60) == 0 and (tmp_path / "log").read_text().endswith("done\n")


def test_a_finished_bar_says_so_and_lines_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    keep_lines(lines.append)
    try:
        with working("search"), bar("searching", 3) as running, bar("quantizing best[a] [/x]", 1) as other:
            other.advance()
            for _ in range(3):
                running.advance(note="quality 0.9")
        say("picked")
    finally:
        keep_lines()
    shown = capsys.readouterr().err.splitlines()
    assert shown[:2] == ["searching ...", "quantizing best[a] [/x] ..."]  # names are no markup
    assert shown[3].startswith("searching: 3 of 3 in ") and "quality 0.9" in shown[3]
    assert lines == ["picked"]


def test_silence_is_broken_by_what_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SILENCE", 0.0)
    with working("proving") as running:
        while "proving" not in capsys.readouterr().err:  # said by a thread, within a second or so
            assert running.seconds < 60
