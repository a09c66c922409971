"""Kills: a command dies at any moment, is run again, and has done what an undisturbed one does."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaign.good import Attempts, Before, Ended, Good, Tally, run_apart

RENAMES = 60
"""About as many files and folders get their final names in a run."""


def commands(good: Good) -> dict[str, list[list[str]]]:
    """By name, commands that end in the good run's result; the first is killed, and all are run after it.

    Those that begin with `redo` and `compare` work on a whole run, the others on none.
    """
    run = str(good.run)
    made = good.compress()
    finetune = ["finetune", *made[1:3], made[3], *made[8:]]
    tasks = made[4:8]
    return {
        "compress": [made],
        "finetune": [finetune, made],
        "search": [["search", run, *tasks], made],
        "redo finetune": [good.compress("--redo", "finetune"), made],
        "redo search": [good.compress("--redo", "search"), made],
        "redo export": [good.compress("--redo", "export"), made],
        "pick": [["pick", run, "--max-params", "0.8"], made],
        # Not another quantization: beside one that is tuned, the base's are tuned too.
        "export": [["export", run, "--format", "padded"], ["export", run], ["report", run]],
        "compare": [["compare", run, "--baselines", "late-block,wanda"], ["report", run]],
        "report": [["report", run]],
    }


def dies_in_rename(number: int, done: bool) -> Before:
    """The process kills itself at its n-th rename, before it or after it."""

    def before() -> None:
        renamed = 0

        def dying(real: Callable[..., None]) -> Callable[..., None]:
            def rename(*arguments: Any, **options: Any) -> None:
                nonlocal renamed
                renamed += 1
                if renamed == number and not done:
                    os.kill(os.getpid(), signal.SIGKILL)
                real(*arguments, **options)
                if renamed == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            return rename

        os.rename, os.replace = dying(os.rename), dying(os.replace)

    return before


def clock_jumps(rng: random.Random) -> Before:
    """The clock jumps by up to a day, to and fro, at every look."""
    seed = rng.random()

    def before() -> None:
        jumps, real = random.Random(seed), time.time
        time.time = lambda: real() + jumps.uniform(-86400, 86400)

    return before


def attempts(good: Good, scratch: Path, rng: random.Random, tally: Tally) -> Attempts:
    """Kill a command once or twice, run it again, compare."""
    seconds: dict[str, float] = {}
    while True:
        name = rng.choice(["compress"] * 6 + list(commands(good)))
        if name not in seconds:
            seconds[name] = undisturbed(name, good, scratch)
        copy = prepared(name, good, scratch)
        first, *others = commands(copy)[name]
        expected, rows = good.result(), copy.rows()
        how, problem = "", None
        for _ in range(rng.choice([1, 1, 2])):
            label, ended = disturb(first, seconds[name], scratch / "output.txt", rng)
            how += f", {label}"
            problem = problem or fault_of(ended, copy, rows)
            rows |= copy.rows()
        for command in [first, *others]:
            ended = run_apart(command, scratch / "output.txt")
            if ended.status != 0 and problem is None:
                problem = f"not resumed by {command[0]}: {ended.status} {ended.last}"
        if problem is None:
            problem = difference(copy, expected, rows)
        tally.add("the same in the end", problem and f"{name}{how}: {problem}")
        shutil.rmtree(copy.folder)
        yield


def undisturbed(name: str, good: Good, scratch: Path) -> float:
    """Seconds of the command of this name, left alone."""
    copy = prepared(name, good, scratch)
    began = time.monotonic()
    ended = run_apart(commands(copy)[name][0], scratch / "output.txt")
    assert ended.status == 0, f"{name}: {ended.output}"
    shutil.rmtree(copy.folder)
    return time.monotonic() - began


def prepared(name: str, good: Good, scratch: Path) -> Good:
    """A copy in which the command of this name has its work to do."""
    copy = good.copy(scratch / "copy")
    if name in ("compress", "finetune", "search"):
        shutil.rmtree(copy.run)
    if name == "search":
        run_apart(commands(copy)["finetune"][0], scratch / "output.txt")
    return copy


def disturb(command: list[str], seconds: float, output: Path, rng: random.Random) -> tuple[str, Ended]:
    """Run the command and end it: at a moment, at a rename, by SIGTERM, or with a clock that jumps; say how."""
    kind = rng.choice(["kill"] * 5 + ["rename"] * 3 + ["term", "clock"])
    if kind == "rename":
        number, done = rng.randint(1, RENAMES), rng.random() < 0.5
        place = f"killed {'after' if done else 'before'} rename {number}"
        return place, run_apart(command, output, dies_in_rename(number, done))
    moment = rng.uniform(0, 1.05 * seconds)
    with_signal = signal.SIGTERM if kind == "term" else signal.SIGKILL
    before = clock_jumps(rng) if kind == "clock" else None
    ended = run_apart(command, output, before, after=moment, with_signal=with_signal)
    return f"{kind} after {moment:.2f} s", ended


def fault_of(ended: Ended, copy: Good, rows: set[tuple[object, ...]]) -> str | None:
    """What is wrong right after a kill."""
    if ended.status not in (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
        return f"ended with {ended.status}: {ended.last}"
    return copy.half_written()


def difference(copy: Good, expected: dict[str, object], rows: set[tuple[object, ...]]) -> str | None:
    """What is not as in the undisturbed run, or lost."""
    found = copy.result()
    weights, expected_weights = found["weights"], expected["weights"]
    assert isinstance(weights, dict) and isinstance(expected_weights, dict)
    if any(weights.get(name) != content for name, content in expected_weights.items()):
        return "other bytes"
    packages, expected_packages = found["packages"], expected["packages"]
    assert isinstance(packages, dict) and isinstance(expected_packages, dict)
    if any(packages.get(name) != row for name, row in expected_packages.items()):
        return "other picks or scores"
    if lost := rows - copy.rows():
        return f"{len(lost)} measured rows lost"
    leftovers = [file for file in copy.run.rglob(".*") if file.name != ".lock"]
    return f"left behind: {leftovers[0].relative_to(copy.run)}" if leftovers else copy.half_written()
