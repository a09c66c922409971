"""How a command ends: what it made, how large that is and what it scores, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supernet.common.formatting import parse_bytes, percent, size
from supernet.common.progress import say

if TYPE_CHECKING:
    from compressor.job import Job
    from compressor.stages.front import FrontRecord
    from compressor.stages.picks import PickRecord
    from export.package_record import PackageEntry
    from export.report.schema import Report


def ended(command: str, job: Job, result: Any) -> Any:
    """Say how `command` ended, which gave `result`; returns that."""
    for line in ENDINGS[command](job, result):
        say(line)
    return result


def _next(job: Job, command: str, options: str = "") -> str:
    return f"next: compressor {command} {shlex.quote(str(job.run.path))}{options and ' '}{options}"


def _finetuned(job: Job, result: Any) -> Iterable[str]:
    weights = sum(file.stat().st_size for file in job.run.supernet.rglob("*.safetensors"))
    yield f"super-network: {job.run.supernet}, {size(weights)}"
    yield _next(job, "search", "" if job.recipe.tasks else "--tasks A,B")


def _searched(job: Job, front: FrontRecord) -> Iterable[str]:
    measured = len(front["evaluations"])
    yield f"front: {job.run.front}, {len(front['front'])} of {measured} measured sub-networks are on it"
    targets = job.recipe.targets
    options = "" if not targets.empty else "--max-params 0.67"
    yield _next(job, "pick", options)


def _picked(job: Job, picks: list[PickRecord]) -> Iterable[str]:
    yield f"picks: {job.run.picks}, {', '.join(row['name'] for row in picks)}"
    yield _next(job, "export")


def _exported(job: Job, packages: list[PackageEntry]) -> Iterable[str]:
    for entry in packages:
        yield package_line(job.run.packages / entry.name, entry)
    yield _next(job, "report")


def _compared(job: Job, rows: list[Any]) -> Iterable[str]:
    yield f"comparison: {job.run.comparison}, {len(rows)} rows"
    if job.run.report.is_file():
        yield f"report: {job.run.path / 'report.html'}"
    else:
        yield _next(job, "report")


def package_line(folder: Path, entry: PackageEntry) -> str:
    """A package in one line: where it is, its size, its quality on the report split and its scores."""
    scores = ", ".join(f"{task} {score.value:.3g}" for task, score in entry.tasks.items())
    quality = f", quality {percent(entry.quality)}" if entry.quality is not None else ""
    refused = "; refused by its proof" if entry.refused else "" if entry.verified else "; not proved"
    return f"package: {folder}, {size(entry.bytes)}{quality}{f' ({scores})' if scores else ''}{refused}"


def reported(run: Path, report: Report) -> Report:
    """Say where the packages of a report are, and what to do with them; returns the report."""
    for entry in report.packages:
        say(package_line(run / entry.path, entry))
    if proved := [entry for entry in report.packages if entry.verified]:
        asked = (report.recipe.get("targets") or {}).get("max_bytes")
        fitting = [entry for entry in proved if not asked or entry.bytes <= parse_bytes(asked)]
        first = shlex.quote(str(run / (fitting or proved)[0].path))
        say(f"next: compressor verify {first}, or compressor push {first} OWNER/NAME")
    return report


ENDINGS: dict[str, Callable[[Job, Any], Iterable[str]]] = {
    "finetune": _finetuned,
    "search": _searched,
    "pick": _picked,
    "export": _exported,
    "compare": _compared,
}
