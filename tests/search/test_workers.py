"""Workers of both kinds that die: one try of one item is lost, and an item that kills every worker is named."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from search.workers import TRIES, Processes, RayWorkers, WorkersLost
from tests.support import ROOT

KINDS = [
    Processes,
    pytest.param(RayWorkers, marks=pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs ray")),
]


def square(log: Path, dies: dict[int, int], item: int) -> int:
    """The square of an item; the process dies at the first `dies[item]` tries."""
    with log.open("a") as file:
        file.write(f"{item} {os.getpid()}\n")
    tries = [line.split()[0] for line in log.read_text().splitlines()].count(str(item))
    if tries <= dies.get(item, 0):
        os._exit(9)
    if item < 0:
        raise ValueError(f"{item} has no root")
    return item * item


def build(log: Path, dies: dict[int, int]) -> Callable[[int], int]:
    return partial(square, log, dies)


@pytest.fixture(scope="module", autouse=True)
def ray_sees_this_file() -> Iterator[None]:
    """Ray unpickles by import: its workers need the project's root on their path."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [before])])
    yield
    os.environ["PYTHONPATH"] = before
    if importlib.util.find_spec("ray"):
        import ray

        ray.shutdown()


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, math\nfrom functools import partial\nfrom search.workers import Processes\n"
        "print('runs')\n"
        "with Processes(partial(partial, math.sqrt), 2) as workers:\n"
        "    print(json.dumps(sorted(workers.map([4, 9, 16]))))\n"
        "import __main__\nassert __main__.__file__ == __file__\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=ROOT)
    first, *rest = ended.stdout.splitlines()
    assert first == "runs" and [json.loads(line) for line in rest] == [[[4, 2.0], [9, 3.0], [16, 4.0]]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_that_dies_costs_one_try_of_one_item(kind: type[Processes] | type[RayWorkers], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with kind(partial(build, log, {5: 1, 3: TRIES - 1}), 2) as workers:
        assert dict(workers.map(list(range(8)))) == {i: i * i for i in range(8)}
        assert dict(workers.map([20, 21])) == {20: 400, 21: 441}
    rows = [line.split() for line in log.read_text().splitlines()]
    assert Counter(int(item) for item, _ in rows) == Counter([*range(8), 5, *[3] * (TRIES - 1), 20, 21])
    for item in ("3", "5"):
        places = [process for tried, process in rows if tried == item]
        assert len(set(places)) == len(places)  # never again where it died
    assert len({process for _, process in rows}) == 2 + TRIES  # two, and one more for each that died


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_is_no_death(kind: type[Processes] | type[RayWorkers], tmp_path: Path) -> None:
    with kind(partial(build, tmp_path / "log", {}), 2) as workers:
        with pytest.raises(ValueError, match="-1 has no root"):
            list(workers.map([1, -1]))
        assert dict(workers.map([2, 3])) == {2: 4, 3: 9}


def test_an_item_that_kills_every_worker_is_named(tmp_path: Path) -> None:
    with Processes(partial(build, tmp_path / "log", {7: 99}), 2) as workers, pytest.raises(WorkersLost, match="7"):
        list(workers.map([7, 8]))
    assert (tmp_path / "log").read_text().split().count("7") == TRIES


def test_fewer_items_than_workers_start_fewer(tmp_path: Path) -> None:
    with Processes(partial(build, tmp_path / "log", {}), 4) as workers:
        assert list(workers.map([])) == []
        assert list(workers.map([6])) == [(6, 36)]
    assert len((tmp_path / "log").read_text().splitlines()) == 1
