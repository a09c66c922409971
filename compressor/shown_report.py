"""The report of a run where nothing changed since it was written: shown at once, without the network or its tasks."""

from __future__ import annotations

import os
from pathlib import Path

from compressor.run import Run
from export.report.alternatives import alternatives
from export.report.schema import Report, validate_report
from export.report.table import footnotes, terminal_table
from export.report.verdict import verdict
from supernet.common.errors import RequestError
from supernet.common.files import read_json
from supernet.common.progress import console, say
from supernet.common.versions import versions

TOGETHER = 5 * 10**9
"""Nanoseconds within which page and report.json are written, one after the other; one that is newer was edited."""


def current_report(folder: Path) -> Report | None:
    """The report of a run, or None where it is still to be written: because there is none, because something that it
    is made from is newer, or because another version wrote it. One that cannot be written again is shown as it is,
    which is said. Raises `RequestError` where the folder is no run."""
    run = Run(folder)
    run.check_exists()
    page = folder / "report.html"
    if not run.report.is_file() or not page.is_file():
        return None
    times = [file.stat().st_mtime_ns for file in (page, run.report)]
    written = min(times)
    read = [run.recipe_file, run.front, run.picks, run.control, run.evaluations, run.supernet / "manifest.json"]
    read += [*run.packages.glob("*.json"), *run.packages.glob("*/compression.json"), *run.comparison.glob("*.json")]
    read += [*run.subnets.glob("*/*.json"), run.packages, run.comparison]  # folders: something may have been removed
    stale = max(times) - written > TOGETHER or any(p.exists() and p.stat().st_mtime_ns > written for p in read)
    if stale and os.access(folder, os.W_OK):
        return None
    try:
        report = validate_report(read_json(run.report))
    except (RequestError, ValueError):  # somebody spoiled it: it is written again
        return None
    if report.versions.get("nas-compressor") != versions(())["nas-compressor"]:
        return None
    if stale:
        say(f"note: nothing can be written to {folder}; this is the report that lies there, parts of the run are newer")
    return report


def show_report(report: Report, folder: Path) -> None:
    """Print the report's table, its footnotes and its verdict on stderr."""
    console.print(terminal_table(report))
    for line in [*footnotes(report), "", *verdict(report), *alternatives(report)]:
        say(line)
    say(f"report: {folder / 'report.html'}")
