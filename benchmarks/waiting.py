"""How long people wait: for the first output, for a refusal, and for any sign of life in a demo run.

    python -m benchmarks.waiting [--run RUN] [--only refusals commands demo] [--also COMMAND]

Commands run as users start them, each in a process of its own. Those that show progress run on a pseudo-terminal of 80
columns; movement of its live line counts as a sign of life.
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import make_parser, median_range, print_header, print_row
from compressor import demo

COLUMNS = 80
REPEATS = 3
COMMAND = (sys.executable, "-c", "from compressor.cli import main; main()")
WRONG: Mapping[str, tuple[str, str]] = {
    "an option that there is not": ("--evalutions", "60"),
    "a key that no recipe has": ("--set", "healing.tokns=2M"),
    "a number that is none": ("--train-tokens", "many"),
    "a size that is none": ("--max-params", "1.5x"),
    "a value of another option": ("--effort", "fast"),
    "a search space that there is not": ("--space", "fien"),
    "an algorithm that there is not": ("--set", "searching.algorithm=linsa"),
    "a quantization that there is not": ("--quantize", "int5"),
    "a task that nobody knows": ("--tasks", "world_grammer"),
    "data that are not there": ("--data", "nowhere.jsonl"),
}


@dataclass(frozen=True)
class Waited:
    """What a command let somebody wait for, in seconds."""

    first: float
    """To the first output."""
    longest: float
    """The longest time without any output, from the start to the end."""
    total: float
    processor: float
    """Seconds of a processor, which other work on the machine does not lengthen."""
    status: int


def on_terminal(*arguments: str) -> Waited:
    """Run `compressor` on a terminal of `COLUMNS` columns, and note when something comes."""
    child, terminal = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    began = last = time.monotonic()
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=terminal, stderr=terminal, stdin=terminal, env=os.environ | {"TERM": "xterm"}
    )
    os.close(terminal)
    first, longest = None, 0.0
    while True:
        ready, _, _ = select.select([child], [], [], 0.2)
        if ready:
            try:
                if not os.read(child, 65536):
                    break
            except OSError:  # the terminal is closed when the command has ended
                break
            now = time.monotonic()
            first = now - began if first is None else first
            longest, last = max(longest, now - last), now
        elif os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
    _, status, used = os.wait4(process.pid, 0)
    ended = time.monotonic()
    os.close(child)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Waited(
        first=ended - began if first is None else first,
        longest=max(longest, ended - last),
        total=ended - began,
        processor=used.ru_utime + used.ru_stime,
        status=process.returncode,
    )


def refusals() -> None:
    """Seconds until each wrong option is refused."""
    print_header("refused", "seconds", "of a processor", right_from=1)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        data.write_text('{"text": "the cat sees the dog"}\n')
        for what, wrong in WRONG.items():
            given = {"--data": str(data), "--tasks": "world_grammar", "--include-path": str(demo.TASKS)}
            given |= {"--output": str(Path(folder) / "run")} | dict([wrong])
            words = [word for pair in given.items() for word in pair]
            waited = [on_terminal("compress", str(demo.MODEL), *words) for _ in range(REPEATS)]
            assert all(one.status == 2 for one in waited), what
            print_row(f"{what} (`{' '.join(wrong)}`)", spread(waited, "total"), spread(waited, "processor"))


def commands(run: Path | None) -> None:
    """Seconds of commands that compute no network, or next to nothing."""
    print_header("command", "first output", "all of it", "of a processor", right_from=1)
    rows = {"--version": ["--version"], "--help": ["--help"], "list tasks": ["list", "tasks"]}
    rows["inspect"] = ["inspect", str(demo.MODEL)]
    if run is not None:
        rows |= {name: [name, str(run)] for name in ("status", "recipe", "report")}
        rows["pick"] = ["pick", str(run), "--max-params", "0.8"]
    for name, arguments in rows.items():
        waited = [on_terminal(*arguments) for _ in range(REPEATS)]
        assert all(one.status == 0 for one in waited), name
        print_row(f"`{name}`", *(spread(waited, part) for part in ("first", "total", "processor")))


def whole_runs(with_demo: bool, also: str | None) -> None:
    """The longest silence of a demo, of another command, or of both."""
    print_header("run", "first output", "longest silence", "all of it", right_from=1)
    with tempfile.TemporaryDirectory() as folder:
        rows = {"demo": ["demo", "--output", f"{folder}/run"]} if with_demo else {}
        rows |= {also: shlex.split(also)} if also else {}
        for name, arguments in rows.items():
            one = on_terminal(*arguments)
            assert one.status == 0, name
            print_row(f"`{name}`", f"{one.first:.1f} s", f"{one.longest:.1f} s", f"{one.total:.0f} s")


def spread(waited: list[Waited], part: str) -> str:
    return median_range([getattr(one, part) for one in waited], ".1f")


def main() -> None:
    options = make_parser(
        __doc__ or "",
        run=(Path, "a finished run, for the commands that read one"),
        only=(["refusals", "commands", "demo"], "what is measured; another word: nothing but --also"),
        also=(str, "another command whose longest silence is measured, without the word compressor"),
    ).parse_args()
    if "refusals" in options.only:
        refusals()
    if "commands" in options.only:
        print()
        commands(options.run)
    if "demo" in options.only or options.also:
        print()
        whole_runs("demo" in options.only, options.also)


if __name__ == "__main__":
    main()
