"""How far a run is, read from what it left on disk; nothing is opened that another process works with."""

from __future__ import annotations

import fcntl
from datetime import datetime
from pathlib import Path
from time import time as now
from typing import Literal, TypedDict

from compressor.run import Run
from compressor.schedule import STAGES, Schedule, StageTime
from supernet.architecture import Architecture
from supernet.common.errors import reading
from supernet.common.files import read_json
from supernet.common.formatting import duration, shell_word, size
from supernet.common.progress import say

State = Literal["running", "done", "interrupted", "to do"]


class StageStatus(TypedDict):
    """One stage of a run."""

    name: str
    state: State
    seconds: float | None
    """That it took so far; None for one that did not begin."""
    expected: float | None
    """Seconds by the run's plan; None without one."""
    began: float | None
    """When the running one began, seconds since the epoch."""


class RunStatus(TypedDict):
    """How far a run is."""

    run: str
    model: str
    stages: list[StageStatus]
    running: str | None
    """The process that works in it, and since when."""
    finished: bool
    picked_since: bool
    """Whether something was picked since packages were made: it is to be exported and reported."""
    exported_since: bool
    """Whether packages were made since the report was written."""
    report: str | None
    """The page, where there is one."""
    left: float | None
    """Seconds, by the run's plan."""
    refused: list[str]
    """Packages that their proof refused."""
    bytes: int
    """Size of all its files."""
    last_error: str | None


def run_status(folder: Path) -> RunStatus:
    """What is done, what is running and since when, what is left, disk used and the last error.

    Raises `RequestError` where the folder is no run.
    """
    run = Run(folder)
    run.check_exists()
    schedule = Schedule(run.times_file)
    expected = expected_seconds(run)
    holder = lock_holder(run)
    current = schedule.running if holder else None
    stages: list[StageStatus] = []
    for name in STAGES:
        needless = not expected.get(name) if expected else run.report.is_file()
        if name not in schedule.times and needless:
            continue  # this run has no such stage
        time = schedule.times.get(name)
        done = time is not None and time.ended
        state: State = "running" if name == current else "done" if done else "interrupted" if time else "to do"
        stages.append(
            {
                "name": name,
                "state": state,
                "seconds": seconds_so_far(time, state) if time else None,
                "expected": expected.get(name),
                "began": time.began if time and time.began else None,
            }
        )
    reported = run.report.is_file()
    picked = reported and picked_anew(run)
    proved = any(stage["name"] == STAGES[-1] and stage["state"] == "done" for stage in stages)
    measured = measured_packages(run)
    unmeasured = any(loss is None for _, loss in measured.values())
    exported = proved and not (picked or unmeasured) and measured != reported_packages(run)
    return {
        "run": str(folder),
        "model": run.recipe().model,
        "stages": stages,
        "running": holder,
        "finished": reported
        and not (picked or unmeasured or exported)
        and all(stage["state"] == "done" for stage in stages),
        "picked_since": picked,
        "exported_since": exported,
        "report": str(folder / "report.html") if reported else None,
        "left": left(stages) if expected else None,
        "refused": refused(run),
        "bytes": disk_used(folder),
        "last_error": last_error(run),
    }


def seconds_so_far(time: StageTime, state: State) -> float:
    """What a stage took, with what one that is running has taken since it was begun."""
    since = now() - time.began if state == "running" and time.began else 0.0
    return round(time.seconds + max(0.0, since), 3)


def picked_anew(run: Run) -> bool:
    """Whether the package of a pick is not there, or holds another network."""
    if not run.picks.is_file():
        return False
    with reading(f"{run.picks}: not what this version writes; pick again"):
        for pick in read_json(run.picks):
            record = run.packages / pick["name"] / "compression.json"
            network = Architecture.from_dict(pick["architecture"]).without_bits()
            if not record.is_file() or Architecture.from_dict(read_json(record)["entry"]["architecture"]) != network:
                return True
    return False


def measured_packages(run: Run) -> dict[str, tuple[int, float | None]]:
    """Bytes and held-out loss of every package that was measured last, by name; None where it was made anew since."""
    file = run.packages / "base.json"
    if not file.is_file():
        return {}
    with reading(f"{file}: not what this version writes; export again"):
        records = [run.packages / name / "compression.json" for name in read_json(file)["packages"]]
        entries = [read_json(record)["entry"] for record in records if record.is_file()]
        return {entry["name"]: (entry["bytes"], entry.get("held_out_loss")) for entry in entries}


def reported_packages(run: Run) -> dict[str, tuple[int, float | None]]:
    """The same of the packages in the report."""
    if not run.report.is_file():
        return {}
    with reading(f"{run.report}: not what this version writes; run compressor report"):
        packages = read_json(run.report)["packages"]
        return {package["name"]: (package["bytes"], package["held_out_loss"]) for package in packages}


def refused(run: Run) -> list[str]:
    """The packages that their proof refused."""
    records = sorted(run.packages.glob("*/compression.json"))
    with reading(f"{run.packages}: not what this version writes; export again"):
        return [file.parent.name for file in records if read_json(file)["entry"].get("refused")]


def expected_seconds(run: Run) -> dict[str, float]:
    """Seconds of every stage by the run's plan; empty where it has none."""
    if not run.plan_file.is_file():
        return {}
    with reading(f"{run.plan_file}: not what this version writes; remove it"):
        return {str(name): float(seconds) for name, seconds in read_json(run.plan_file)["expected"].items()}


def left(stages: list[StageStatus]) -> float:
    """Seconds that the stages that are not done will take, by the plan."""
    rest = 0.0
    for stage in stages:
        if stage["state"] != "done":
            rest += max(0.0, (stage["expected"] or 0.0) - (stage["seconds"] or 0.0))
    return rest


def lock_holder(run: Run) -> str | None:
    """The process that works in a run and since when; None where nobody does."""
    if not run.lock_file.is_file():
        return None
    with run.lock_file.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip().rstrip(",") or "another process"
    return None


def disk_used(folder: Path) -> int:
    """Bytes of all files in a folder; files that vanish meanwhile count nothing."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() and not file.is_symlink() else 0
        except FileNotFoundError:
            continue
    return total


def last_error(run: Run) -> str | None:
    """The last line of the log that tells of an error, where nothing was done since."""
    if not run.log_file.is_file():
        return None
    lines = [line for line in run.log_file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines[-3:]) if " error: " in line), None)


def print_status(status: RunStatus) -> None:
    """What `run_status` found, as lines on stderr."""
    say(f"{status['run']}: {status['model']}")
    number = len(status["stages"])
    for place, stage in enumerate(status["stages"], start=1):
        took = duration(stage["seconds"]) if stage["seconds"] is not None else ""
        of = f"of about {duration(stage['expected'])}" if stage["expected"] and stage["state"] != "done" else ""
        if stage["state"] == "running" and stage["began"]:
            began = datetime.fromtimestamp(stage["began"])
            took = f"since {began:%H:%M:%S}, {duration((datetime.now() - began).total_seconds())}"
        say(f"  {place:>2} of {number}  {stage['name']:<18} {stage['state']:<12} {took} {of}".rstrip())
    if status["running"]:
        say(f"working in it: {status['running']}")
    elif status["finished"]:
        say(f"finished: {status['report']}")
    elif status["picked_since"]:
        folder = shell_word(status["run"])
        say(f"picked and not packaged since: compressor export {folder}, then compressor report {folder}")
    elif status["exported_since"]:
        say(f"exported and not reported since: compressor report {shell_word(status['run'])}")
    else:
        say("nobody works in it; the command that began it goes on where it was")
    if status["refused"]:
        say(f"refused by their proof, not to be shipped: {', '.join(status['refused'])}")
    if status["left"] and not status["finished"]:
        say(f"left: about {duration(status['left'])}")
    say(f"on disk: {size(status['bytes'])}")
    if status["last_error"]:
        say(f"last error: {status['last_error']}")
