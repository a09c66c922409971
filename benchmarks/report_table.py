"""The result of a run as Markdown tables, from its report.json: what docs/results.md shows.

    python -m benchmarks.report_table runs/stories

The base and all packages; then, where the run was compared with other methods, the methods at every size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import make_parser, print_header, print_row
from export.report.comparison import MethodSummary, summarize, summary
from export.report.schema import Base, Package, Report, validate_report
from supernet.common.files import read_json


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a run that has its report.json")
    report = validate_report(read_json(parser.parse_args().run / "report.json"))
    print_packages(report)
    for methods in summarize(report.comparison):
        print(f"\n{summary(methods)}\n")
        print_methods(methods, report.tasks)


def print_packages(report: Report) -> None:
    """Size, scores and speed of the base and of every package. A cell is empty where the report has no number."""
    base, tasks = report.base, report.tasks
    scored = [f"{task} ({base.tasks[task].n} documents)" if task in base.tasks else task for task in tasks]
    print_header("", "parameters", "bytes", *scored, "quality", "prefill / decode tokens/s", "runtime")

    def print_entry(name: str, entry: Base | Package) -> None:
        speed = entry.speed
        print_row(
            name,
            f"{entry.params:,} ({entry.params / base.params:.3f})",
            f"{entry.bytes:,} ({entry.bytes / base.bytes:.3f})",
            *(entry.tasks[task].text if task in entry.tasks else "" for task in tasks),
            f"{entry.quality:.3f}",
            f"{speed.prefill_tps:,.0f} / {speed.decode_tps:,.0f}" if speed else "",
            speed.runtime if speed else "",
        )

    print_entry("base", base)
    for package in [*report.quantized_base, *report.packages]:
        print_entry(package.name, package)
    notes = [f"Speed: {base.speed.where}, {base.speed.workload}."] if base.speed else []
    if report.search:
        notes.append(f"Sub-networks measured: {report.search.evaluations}.")
    if notes:
        print("\n" + " ".join(notes))


def print_methods(methods: Sequence[MethodSummary], tasks: Sequence[str]) -> None:
    """Ours and the methods that it was compared with at one size, by falling quality. A star: more than chance."""
    columns = ["method", "seeds", "parameters", "before healing", "quality", "ours less this, points (95 %)"]
    print_header(*columns, *tasks, "decode, base 1")
    for method in methods:
        ours, base = method.decode_tps, method.base_decode_tps
        print_row(
            f"**{method.method}**" if method.ours else method.method,
            str(method.seeds),
            f"{method.params:,}",
            "" if method.before_healing is None else f"{method.before_healing:.3f}",
            f"{method.quality:.3f} ± {method.stderr:.3f}",
            method.difference_text + (" *" if method.meaning in ("better", "worse") else ""),
            *(method.tasks[task].text if task in method.tasks else "" for task in tasks),
            f"{ours / base:.2f}" if ours and base else "",
        )


if __name__ == "__main__":
    main()
