"""What `compressor compare` found in a run, as Markdown tables from its report.json: what docs/results.md shows.

python -m benchmarks.comparison_table runs/stories
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from export.report.comparison import summarize, summary
from export.report.schema import validate_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run that was compared")
    report = validate_report(json.loads((parser.parse_args().run / "report.json").read_text()))
    tasks = report.tasks
    for table in summarize(report.comparison):
        print(f"\n{summary(table)}\n")
        header = ["method", "seeds", "parameters", "before healing", "quality", "ours less this, points (95 %)", *tasks]
        print("| " + " | ".join([*header, "decode, base 1"]) + " |\n" + "|---" * (len(header) + 1) + "|")
        for one in table:
            before = "" if one.before_healing is None else f"{one.before_healing:.3f}"
            faster = one.decode_tps / one.base_decode_tps if one.decode_tps and one.base_decode_tps else None
            clear = " *" if one.meaning in ("better", "worse") else ""
            cells = [
                f"**{one.method}**" if one.ours else one.method,
                str(one.seeds),
                f"{one.params:,}",
                before,
                f"{one.quality:.3f} ± {one.stderr:.3f}",
                one.difference_text + clear,
                *(one.tasks[task].text if task in one.tasks else "" for task in tasks),
                "" if faster is None else f"{faster:.2f}",
            ]
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
