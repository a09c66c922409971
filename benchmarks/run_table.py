"""The result of a run as a Markdown table, from its report.json: what docs/results.md shows.

python -m benchmarks.run_table runs/stories
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def row(name: str, entry: dict[str, Any], base: dict[str, Any], tasks: list[str]) -> str:
    scores = [f"{score['value']:.3f} ± {score['stderr']:.3f}" for score in (entry["tasks"][task] for task in tasks)]
    speed = entry["speed"]
    cells = [
        name,
        f"{entry['params']:,} ({entry['params'] / base['params']:.3f})",
        f"{entry['bytes']:,} ({entry['bytes'] / base['bytes']:.3f})",
        *scores,
        f"{entry['quality']:.3f}",
        f"{speed['prefill_tps']:,.0f} / {speed['decode_tps']:,.0f}",
        speed["runtime"],
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    report = json.loads((Path(sys.argv[1]) / "report.json").read_text())
    base = report["base"]
    tasks = list(base["tasks"])
    header = ["", "parameters", "bytes", *(f"{t} ({base['tasks'][t]['n']} documents)" for t in tasks)]
    header += ["quality", "prefill / decode tokens/s", "runtime"]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    print(row("base", base, base, tasks))
    for package in report["packages"]:
        print(row(package["name"], package, base, tasks))
    speed = base["speed"]
    print(
        f"\nSpeed: {speed['device']}, {speed['threads']} thread(s), {speed['dtype']}, batch {speed['batch']}, "
        f"prompt {speed['prompt']}, {speed['new']} new tokens. "
        f"Sub-networks measured: {report['search']['evaluations']}."
    )


if __name__ == "__main__":
    main()
