"""docs/walk.md's pictures: one run of the demo, as a terminal and the report show it.

python -m examples.walk            # makes runs/walk first where it is not there: eight minutes
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parent.parent
RUN = Path("runs/walk")
PICTURES = ROOT / "docs" / "walk"
STYLE = ROOT / "export" / "report" / "templates" / "report.css"

SHOWN = {
    "inspect": ["inspect", "compressor/demo/world-1.7m", "--effort", "quick"],
    "report": ["report", str(RUN)],
    "verify": ["verify", str(RUN / "packages" / "best-int4")],
}
"""Commands whose whole output is a picture, by its name."""

COMPARED = ["compare", str(RUN), "--baselines", "shortgpt,minitron-width,magnitude"]

FIGURES = ("front-size", "front-speed", "architecture-1")
"""Figures of the report that the page shows."""

STEPS = r" \.\.\.( |$)|: after \d+ of \d+ |^\s*$"
"""Lines of the demo's output that say how far a stage is: too many for a picture."""


def terminal(command: str, output: str) -> str:
    """A terminal of 80 columns as SVG, with the command and what it printed. It loads no font from elsewhere."""
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ {command}", style="bold"))
    console.print(Text.from_ansi(output.rstrip("\n")))
    form = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return console.export_svg(title="", code_format=form, unique_id=re.sub(r"\W+", "-", command))


def figure(page: str, name: str) -> str:
    """A figure of a report's page as an SVG file of its own, in light and dark colours. Raises KeyError where the page
    has no figure of this name."""
    found = re.search(rf'<figure data-name="{name}"><svg(?: data-plot)?( .*?)</svg>', page, re.DOTALL)
    if found is None:
        raise KeyError(f"the report has no figure {name}")
    return f'<svg xmlns="http://www.w3.org/2000/svg"{found[1].replace(">", f"><style>{style()}</style>", 1)}</svg>\n'


def style() -> str:
    """The part of the report's style that its pictures need."""
    css = re.sub(r"/\*.*?\*/", "", STYLE.read_text(encoding="utf-8"), flags=re.DOTALL)
    colours = css[: css.index("*")].replace("color-scheme: light dark; ", "")
    rules = [line for line in css.splitlines() if line.startswith("svg") and not line.startswith("svg {")]
    ground = "svg { background: var(--page); font: 12px system-ui, sans-serif; }"
    return "\n".join([colours.strip(), ground, *rules])


def run(arguments: list[str]) -> str:
    """What a command prints on a terminal of 80 columns. Raises CalledProcessError where it fails."""
    environment = os.environ | {"COLUMNS": "80", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-c", "from compressor.cli import main; main()", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stderr + done.stdout


def once(name: str, arguments: list[str]) -> str:
    """What a long command printed; it runs where runs/NAME does not hold that yet."""
    log = ROOT / RUN.parent / name
    if not log.is_file():
        log.parent.mkdir(exist_ok=True)
        log.write_text(run(arguments), encoding="utf-8")
    return log.read_text(encoding="utf-8")


def stages(output: str) -> str:
    """What the demo said of its stages, up to its table of results, without the lines of every step."""
    told = output[max(0, output.find("[2 of ")) :].partition("world_")[0]
    return "\n".join(line for line in told.splitlines() if not re.search(STEPS, line))


def main() -> None:
    """Write the pictures of docs/walk.md."""
    PICTURES.mkdir(exist_ok=True)
    pictures = {"demo": terminal("compressor demo", stages(once("walk.txt", ["demo", "--output", str(RUN)])))}
    compared = once("walk-compare.txt", COMPARED).splitlines()
    heading = max(at for at, line in enumerate(compared) if line.split()[:2] == ["before", "quality"])
    pictures["compare"] = terminal(" ".join(["compressor", *COMPARED]), "\n".join(compared[heading:]))
    pictures |= {name: terminal(" ".join(["compressor", *words]), run(words)) for name, words in SHOWN.items()}
    page = (ROOT / RUN / "report.html").read_text(encoding="utf-8")
    pictures |= {name: figure(page, name) for name in FIGURES}
    for name, picture in pictures.items():
        (PICTURES / f"{name}.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
