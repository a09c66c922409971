"""The store of measurements: what was put is there after a kill and from every thread; other files are refused."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from search.scores import Score, ScoreKey
from search.space import SearchSpace
from search.store import EvaluationStore
from supernet.architecture import Architecture
from supernet.common.errors import RequestError
from tests.support import ROOT
from tests.support.search_helpers import SMALL

ARCHITECTURES = list(SearchSpace.preset("fine", SMALL, step=64).architectures())[:60]


def record(
    store: EvaluationStore,
    architecture: Architecture,
    score: float = 0.5,
    task: str = "blimp12:acc",
    documents: str = "d",
    weights: str = "w",
    stderr: float | None = 0.01,
) -> None:
    key = ScoreKey(task, documents)
    store.put(architecture, weights, key, key.score(score, stderr, 60), seconds=1.5)


def test_what_is_put_is_there_after_opening_again(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.db"
    with EvaluationStore(path) as store:
        record(store, ARCHITECTURES[1], 0.25)
        record(store, ARCHITECTURES[0], 0.75, stderr=None)
        record(store, ARCHITECTURES[0], 0.80, task="stories:bpb")
        record(store, ARCHITECTURES[0], 0.90, weights="trained on")
    with EvaluationStore(path) as store:
        key = ScoreKey("blimp12:acc", "d", metric="acc", split="search", chance=0.5)
        score = Score(metric="acc", value=0.25, stderr=0.01, n=60, split="search", chance=0.5)
        assert store.get(ARCHITECTURES[1], "w", key) == score
        assert store.get(ARCHITECTURES[1], "w", ScoreKey("blimp12:acc", "other documents")) is None
        assert store.get(ARCHITECTURES[2], "w", key) is None
        row = store.all()[0][1]
        assert row[:8] == (ARCHITECTURES[1].key, "w", "blimp12:acc", "d", 0.25, 0.01, 60, 1.5)
        assert row.timestamp.endswith("+00:00")
        assert [(a, m.score) for a, m in store.all()] == [
            (ARCHITECTURES[1], 0.25),
            (ARCHITECTURES[0], 0.75),
            (ARCHITECTURES[0], 0.80),
            (ARCHITECTURES[0], 0.90),
        ]
        assert [m.score for _, m in store.all(task="blimp12:acc", weights="w")] == [0.25, 0.75]
        assert store.all(task="blimp12:acc")[1][1].stderr is None


def test_the_first_record_stays_and_nan_is_refused(tmp_path: Path) -> None:
    with EvaluationStore(tmp_path / "e.db") as store:
        record(store, ARCHITECTURES[0], 0.5)
        record(store, ARCHITECTURES[0], 0.6)
        assert [m.score for _, m in store.all()] == [0.5]
        with pytest.raises(ValueError, match="not a number"):
            record(store, ARCHITECTURES[1], float("nan"))
        record(store, ARCHITECTURES[1], float("inf"))
        assert store.all()[1][1].score == float("inf")


WRITER = """
import sys
from tests.support.search_helpers import SMALL
from search.scores import ScoreKey
from search.space import SearchSpace
from search.store import EvaluationStore
store = EvaluationStore(sys.argv[1])
for i, a in enumerate(SearchSpace.preset("fine", SMALL, step=64).architectures()):
    store.put(a, "w", ScoreKey("t", "d"), ScoreKey("t", "d").score(i / 7, None, 1), seconds=0.0)
    print(i, flush=True)
"""


@pytest.mark.parametrize("after", [1, 17, 40])
def test_a_kill_while_writing_loses_nothing_that_was_recorded(tmp_path: Path, after: int) -> None:
    path = tmp_path / "e.db"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) == after:
            break
    writer.kill()
    seen = after + len(writer.stdout.read().split())
    assert writer.wait() == -9
    with EvaluationStore(path) as store:
        rows = store.all()
        assert len(rows) in (seen + 1, seen + 2)
        assert all(a == ARCHITECTURES[i] and row.score == i / 7 for i, (a, row) in enumerate(rows))
        record(store, ARCHITECTURES[0], task="written after")
        assert len(store.all()) == len(rows) + 1


def test_threads_and_connections_share_it(tmp_path: Path) -> None:
    path = tmp_path / "e.db"
    with EvaluationStore(path) as one, EvaluationStore(path) as two:
        threads = [
            threading.Thread(target=lambda s, part: [record(s, a) for a in part], args=(store, ARCHITECTURES[i::4]))
            for i, store in enumerate((one, two, one, two))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {a for a, _ in one.all()} == set(ARCHITECTURES)


def test_foreign_and_damaged_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "text.db"
    text.write_text("not a database, but long enough to look like one\n" * 40)
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE evaluations (x)")
    connection.close()
    newer = tmp_path / "newer.db"
    EvaluationStore(newer).close()
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    cut = tmp_path / "cut.db"
    with EvaluationStore(cut) as store:
        for architecture in ARCHITECTURES:
            record(store, architecture)
    cut.write_bytes(cut.read_bytes()[:-6000])
    for path, message in (
        (text, "damaged or no evaluation store"),
        (foreign, "something else"),
        (newer, "version 99"),
        (cut, "damaged"),
        (tmp_path / "no folder" / "e.db", "cannot open"),
    ):
        before = path.read_bytes() if path.exists() else None
        with pytest.raises(RequestError, match=message) as error:
            EvaluationStore(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        assert (path.read_bytes() if path.exists() else None) == before


def test_a_file_that_another_process_holds_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "e.db"
    EvaluationStore(path).close()
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: connect(*args, **options | {"timeout": 0.01}))
    other = connect(path)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(RequestError, match="database is locked; nothing is lost, try again"):
        EvaluationStore(path)
    other.close()
