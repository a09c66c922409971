"""Progress of long work, on stderr: what is being done, how far it is, and how long it will still take.

On a terminal there is one live line, of the innermost work that runs, and it moves also while that is silent. Elsewhere
(a log, CI) there is one line when a bar starts and one when it ends, and one now and then where nothing else is said.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from supernet.common.formatting import duration


class _Console(Console):
    """One that falls silent where its reader has gone, as `head` or a terminal goes: the work goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # or Python complains when it flushes


# Of several processes that train together, only the first prints.
console = _Console(stderr=True, highlight=False, emoji=False, quiet=os.environ.get("RANK", "0") != "0")

IMPORTED = time.monotonic()
"""When this process began to import us, before any large library, by its monotonic clock."""
SILENCE, LONG_SILENCE = 8.0, 60.0
"""Seconds after which a log without a terminal says what still runs: in the first minute of a work, and later."""
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


_left_of_all: list[Callable[[], float | None]] = []
"""What says how many seconds are left of everything that was begun: the innermost counts."""
_kept: list[Callable[[str], None]] = []
"""Who else gets every line that is said."""


@contextmanager
def counting_down(left: Callable[[], float | None]) -> Iterator[None]:
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


def keep_lines(*keep: Callable[[str], None]) -> None:
    """Send every line to these functions from now on; they replace the earlier ones."""
    _kept[:] = keep


def log_line(line: str) -> None:
    """Send a line to those functions without printing it."""
    for keep in _kept:
        keep(line)


def say(line: str) -> None:
    """Print one plain line on stderr, and keep it. It is not wrapped: the terminal does that, and `grep` needs whole
    lines."""
    console.print(line, markup=False, soft_wrap=True)
    _screen.spoken = time.monotonic()
    if line.strip():
        log_line(line.strip())


@dataclass
class Bar:
    """One running task; `advance` moves it on and may show a note (a loss, a score)."""

    what: str = ""
    total: float | None = None
    done: float = 0
    note: str = field(default="")
    before: float = 0
    """How much of `done` was done before this began: it says nothing of the time that the rest takes."""
    began: float = field(default_factory=time.monotonic)

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.done += amount
        self.note = note or self.note

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def left(self) -> str:
        """`12 s left`, by what was done since this began; nothing before something is."""
        now_done = self.done - self.before
        if not self.total or now_done <= 0 or self.done >= self.total:
            return ""
        return f"{duration(self.seconds / now_done * (self.total - self.done))} left"


@contextmanager
def bar(what: str, total: float, before: float = 0) -> Iterator[Bar]:
    """A bar of `total` units of work, within `with bar("searching", 60) as b: b.advance()`. A finished one says so.
    `before`: how many an interrupted run has done already."""
    if not console.is_terminal:
        console.print(f"{what} ... {left_of_all()}".rstrip(), markup=False, soft_wrap=True)
    running = Bar(what, total, before, before=before)
    with _screen.showing(running):
        yield running
    console.print(
        f"{what}: {running.done:g} of {total:g} in {duration(running.seconds)} {running.note}".rstrip(),
        markup=False,
        soft_wrap=True,
    )


@contextmanager
def working(what: str) -> Iterator[Bar]:
    """Within, a terminal shows that something goes on whose length nobody knows, with its seconds; `note` says more."""
    running = Bar(what)
    with _screen.showing(running):
        yield running


def line(running: Bar, width: int) -> str:
    """What a terminal of this width shows of a task, in one line. The time left is never cut; then come, as far as
    there is room, what is done, how much of it, a bar, a note, and the task's own time left."""
    whole_left = left_of_all()
    end = f"  {whole_left or running.left}".rstrip()
    free = max(0, width - len(end) - 2)
    what = running.what[: min(28, free, max(12, free - 8))]  # eight are for how much of it is done
    room = width - len(end) - len(what) - 2
    shown = dict.fromkeys(("bar", "count", "note", "left"), "")

    def add(name: str, text: str) -> None:
        nonlocal room
        if text and len(text) + 2 <= room:
            shown[name] = f"  {text}"
            room -= len(text) + 2

    add("count", f"{running.done:g}/{running.total:g}" if running.total else duration(running.seconds))
    if running.total and room >= 10:
        cells = min(20, room - 2)
        full = round(cells * min(1.0, running.done / running.total))
        add("bar", "━" * full + "─" * (cells - full))
    note = running.note
    add("note", note if len(note) + 2 <= room else f"{note[: room - 3]}…" if room >= 12 else "")
    add("left", running.left if whole_left else "")
    spinner = SPINNER[int(running.seconds * 10) % len(SPINNER)]
    return f"{spinner} {what}{''.join(shown.values())}{end}"[:width]


class _Line(ProgressColumn):
    """The whole line of a task."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True, overflow="crop"))

    def render(self, task: Task) -> Text:
        return Text(line(task.fields["running"], console.width - 1))


class _Screen:
    """What is shown of the tasks that run, each within the one before it: the innermost."""

    def __init__(self) -> None:
        self.running: list[Bar] = []
        self.spoken = time.monotonic()
        """When something was said last."""
        self._progress: Progress | None = None
        self._ended = threading.Event()

    @contextmanager
    def showing(self, task: Bar) -> Iterator[None]:
        """Within, this task is the one that is shown."""
        self.running.append(task)
        if len(self.running) == 1:
            self._begin()
        self._show()
        try:
            yield
        finally:
            self.running.pop()
            self._show()
            if not self.running:
                self._end()

    def _begin(self) -> None:
        self.spoken = time.monotonic()
        if console.is_terminal:
            console.file = sys.stderr  # also while something else is kept off it (contextlib.redirect_stderr)
            self._progress = Progress(_Line(), console=console, transient=True, redirect_stdout=False)
            self._progress.start()
        elif not console.quiet:
            self._ended = threading.Event()
            threading.Thread(target=self._break_silence, args=(self._ended,), daemon=True).start()

    def _show(self) -> None:
        if self._progress is None:
            return
        for shown in self._progress.task_ids:
            self._progress.remove_task(shown)
        if self.running:
            self._progress.add_task("", total=None, running=self.running[-1])

    def _end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            console.file = None  # type: ignore[assignment]  # what sys.stderr is then
        self._ended.set()

    def _break_silence(self, ended: threading.Event) -> None:
        """Say what runs, where nothing else was said for a while."""
        while not ended.wait(1.0):
            running = self.running[-1] if self.running else None
            if running is None:
                continue
            quiet = time.monotonic() - self.spoken
            if quiet >= (SILENCE if running.seconds < LONG_SILENCE else LONG_SILENCE):
                console.print(line(running, 118)[2:], markup=False, soft_wrap=True)
                self.spoken = time.monotonic()


_screen = _Screen()
