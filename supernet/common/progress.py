"""Progress of long work, on stderr: what is being done, how far it is, and how long it will still take.

On a terminal these are live bars; elsewhere (a log, CI) one line when a task starts and one when it ends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import TimeRemainingColumn as TimeLeft
from rich.text import Text

from supernet.common.formatting import duration

# Of several processes that train together, only the first prints.
console = Console(stderr=True, highlight=False, emoji=False, quiet=os.environ.get("RANK", "0") != "0")


_left_of_all: list[Callable[[], float | None]] = []
"""What says how many seconds are left of everything that was begun: the innermost counts."""


@contextmanager
def whole(left: Callable[[], float | None]) -> Iterator[None]:
    """Within, bars show what `left` says: seconds until all the work is done that they are parts of, or None."""
    _left_of_all.append(left)
    try:
        yield
    finally:
        _left_of_all.pop()


def left_of_all() -> str:
    """`about 1 h 12 min left of the run`; nothing where nobody knows."""
    seconds = _left_of_all[-1]() if _left_of_all else None
    return "" if seconds is None else f"about {duration(max(0.0, seconds))} left of the run"


class WholeLeft(ProgressColumn):
    """The time left of everything, beside that of the bar."""

    max_refresh = 1.0

    def render(self, task: Task) -> Text:
        return Text(left_of_all())


@dataclass
class Bar:
    """One running task; `advance` moves it on and may show a note (a loss, a score)."""

    _progress: Progress | None = None
    _task: int = 0
    done: float = 0
    note: str = field(default="")

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.done += amount
        self.note = note or self.note
        if self._progress is not None:
            self._progress.update(self._task, advance=amount, note=self.note)  # type: ignore[arg-type]


@contextmanager
def bar(what: str, total: float) -> Iterator[Bar]:
    """A bar of `total` units of work, within `with bar("searching", 60) as b: b.advance()`. Bars do not nest."""
    started = time.monotonic()
    if console.is_terminal:
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeLeft(),
            *([WholeLeft()] if _left_of_all else []),
            TextColumn("{task.fields[note]}"),
            console=console,
        ) as progress:
            yield Bar(progress, progress.add_task(what, total=total, note=""))
        return
    console.print(f"{what} ... {left_of_all()}".rstrip())
    running = Bar()
    yield running
    console.print(
        f"{what}: {running.done:g} of {total:g} in {time.monotonic() - started:.0f} s {running.note}".rstrip()
    )


def say(line: str) -> None:
    """Print one plain line on stderr. It is not wrapped: the terminal does that, and `grep` needs whole lines."""
    console.print(line, markup=False, soft_wrap=True)
