"""The report of a run where nothing changed since it was written: shown at once, without the network or its tasks."""

from __future__ import annotations

from pathlib import Path

from compressor.run import Run
from export.report.schema import Report, validate_report
from export.report.table import footnotes, terminal_table
from export.report.verdict import verdict
from supernet.common.files import read_json
from supernet.common.progress import console, say
from supernet.common.versions import versions


def current_report(folder: Path) -> Report | None:
    """The report of a run, or None where it is still to be written: because there is none, because something that it
    is made from is newer, or because another version wrote it. Raises `RequestError` where the folder is no run."""
    run = Run(folder)
    run.check_exists()
    page = folder / "report.html"
    if not run.report.is_file() or not page.is_file():
        return None
    written = min(run.report.stat().st_mtime_ns, page.stat().st_mtime_ns)
    read = [run.recipe_file, run.front, run.picks, run.evaluations, run.supernet / "manifest.json"]
    read += [*run.packages.glob("*.json"), *run.packages.glob("*/compression.json"), *run.comparison.glob("*.json")]
    read += run.subnets.glob("*/*.json")
    if any(file.is_file() and file.stat().st_mtime_ns > written for file in read):
        return None
    data = read_json(run.report)
    if (
        not isinstance(data, dict)
        or (data.get("versions") or {}).get("nas-compressor") != versions(())["nas-compressor"]
    ):
        return None
    return validate_report(data)


def show_report(report: Report, folder: Path) -> None:
    """Print the report's table, its footnotes and its verdict on stderr."""
    console.print(terminal_table(report))
    for line in [*footnotes(report), "", *verdict(report)]:
        say(line)
    say(f"report: {folder / 'report.html'}")
