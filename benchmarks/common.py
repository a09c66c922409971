"""What the benchmarks share: options, Markdown tables, time, memory, processes, and a file of what was measured.

Light imports only, since some benchmarks measure the memory of their process. What needs torch is in `benchmarks.jobs`.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, TypeVar

from compressor import demo
from supernet.common.files import read_json, write_json

Result = TypeVar("Result")

SHARED_OPTIONS: Mapping[str, object] = {
    "checkpoint": (str(demo.MODEL), "folder of the network; default: the bundled one"),
    "data": (str, "training text; default: generated"),
    "include_path": (str(demo.TASKS), "folder of lm-eval task files"),
    "device": ("cpu", "cpu or cuda"),
    "output": (Path, "JSON file of what is measured; the next call goes on from it"),
    "minutes": (60.0, "after these, nothing new is measured"),
}
"""Options that several benchmarks have, as `add_options` takes them."""


def make_parser(docstring: str, *shared: str, **options: object) -> argparse.ArgumentParser:
    """A parser described by the first line of a benchmark's docstring, with options as in `add_options`."""
    parser = argparse.ArgumentParser(description=docstring.splitlines()[0])
    add_options(parser, *shared, **options)
    return parser


def add_options(parser: argparse.ArgumentParser, *shared: str, **options: object) -> None:
    """Add these of `SHARED_OPTIONS`, and options by name: each a default, which decides the type, or (default, help).
    A list takes several values, False makes a flag, a class has no default."""
    for name, option in ({name: SHARED_OPTIONS[name] for name in shared} | options).items():
        default, text = option if isinstance(option, tuple) else (option, None)
        settings: dict[str, Any] = {"type": type(default), "default": default}
        if default is False:
            settings = {"action": "store_true"}
        elif isinstance(default, list):
            settings |= {"type": type(default[0]), "nargs": "+"}
        elif isinstance(default, type):
            settings = {"type": default}
        parser.add_argument(f"--{name.replace('_', '-')}", help=text, **settings)


def print_header(*names: str, right_from: int | None = None) -> None:
    """The first two lines of a Markdown table. Columns from number `right_from` on are aligned to the right."""
    print_row(*names)
    left = len(names) if right_from is None else right_from
    print("|" + "---|" * left + "---:|" * (len(names) - left), flush=True)


def print_row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def mean_spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and standard deviation, `1.695 ± 0.008`; of a single value, the value."""
    spread = f" ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{spread}"


def median_range(values: Sequence[float], form: str = ".3f") -> str:
    """Median, least and largest: `0.984 (0.980 to 0.989)`."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def timed(work: Callable[[], Result], clock: Callable[[], float] = time.perf_counter) -> tuple[Result, float]:
    """What `work` returns, and the seconds that it took by `clock`."""
    began = clock()
    return work(), clock() - began


def resident(key: str) -> int:
    """Bytes of this process in memory: now (`VmRSS`), or at its peak (`VmHWM`). Linux only. The peak is that of the
    program that runs: `ru_maxrss` would also count what the process that started it held."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def run_process(*command: str | Path) -> str:
    """What a command prints. Where it fails, all that it printed is shown and the benchmark ends."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]}:\n{done.stdout}{done.stderr}")
    return done.stdout


class Measurements:
    """What was measured, by the settings that it was measured with; kept in a JSON file where one is named."""

    def __init__(self, file: Path | None, minutes: float) -> None:
        self.file = file
        self.deadline = time.monotonic() + 60 * minutes
        self.by_settings: dict[str, Any] = read_json(file) if file and file.is_file() else {}

    def measure(self, results: dict[str, Result], key: str, work: Callable[[], Result]) -> None:
        """Put what `work` returns into `results`, a part of `by_settings`, and write the file; not where the key is
        there already, or the minutes are over."""
        if key not in results and time.monotonic() <= self.deadline:
            results[key] = work()
            if self.file:
                write_json(self.file, self.by_settings)
