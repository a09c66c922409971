"""The result of a run as a Markdown table, from its report.json: what docs/results.md shows.

python -m benchmarks.run_table runs/stories
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from export.report.schema import Base, Package, validate_report


def row(entry: Base | Package, name: str, base: Base, tasks: list[str]) -> str:
    """A cell is empty where the report has no number."""
    speed = entry.speed
    cells = [
        name,
        f"{entry.params:,} ({entry.params / base.params:.3f})",
        f"{entry.bytes:,} ({entry.bytes / base.bytes:.3f})",
        *(entry.tasks[task].text if task in entry.tasks else "" for task in tasks),
        f"{entry.quality:.3f}",
        f"{speed.prefill_tps:,.0f} / {speed.decode_tps:,.0f}" if speed else "",
        speed.runtime if speed else "",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run that has its report.json")
    report = validate_report(json.loads((parser.parse_args().run / "report.json").read_text()))
    base, tasks = report.base, report.tasks
    shown = [f"{task} ({base.tasks[task].n} documents)" if task in base.tasks else task for task in tasks]
    header = ["", "parameters", "bytes", *shown, "quality", "prefill / decode tokens/s", "runtime"]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    print(row(base, "base", base, tasks))
    for package in report.packages:
        print(row(package, package.name, base, tasks))
    said = [f"Speed: {base.speed.where}, {base.speed.workload}."] if base.speed else []
    if report.search:
        said.append(f"Sub-networks measured: {report.search.evaluations}.")
    if said:
        print("\n" + " ".join(said))


if __name__ == "__main__":
    main()
