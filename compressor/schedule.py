"""The stages of a run by name: which one runs, how long each took, and how long the rest will take.

`RUN/times.json` keeps the seconds of every stage, of all the processes that worked in the run together.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from export.models import Model
from supernet.common.errors import RequestError, reading
from supernet.common.files import read_json, write_json
from supernet.common.formatting import duration
from supernet.common.progress import left_of_all, log_line, say, working

STAGES = (
    "preparing",
    "writing text",
    "ordering",
    "fine-tuning",
    "timing the layers",
    "proposals",
    "search",
    "picking",
    "writing more text",
    "healing",
    "quantizing",
    "measuring",
    "proving",
)
"""In the order in which they come."""


class StageTime(Model):
    """How long a stage took, in all the processes that worked on it."""

    seconds: float = 0.0
    ended: bool = False
    """Whether it came to its end, and was not interrupted."""
    began: float = 0.0
    """When work on it began last, in seconds since 1970; 0 in runs of versions that did not keep it."""


class Schedule:
    """What a run spends its time on. `file` keeps it; None keeps nothing."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.expected: dict[str, float] = {}
        """Seconds that each stage takes by the plan; empty where nothing was planned."""
        self.times: dict[str, StageTime] = {}
        if file is not None and file.is_file():
            with reading(f"{file}: not what this version writes; remove it"):
                self.times = {name: StageTime.model_validate(row) for name, row in read_json(file).items()}
        self._done: set[str] = set()
        self._begun: set[str] = set()
        """What this process worked on."""
        self._running: tuple[str, float] | None = None
        self._earlier = sum(row.seconds for row in self.times.values())
        self._finished = self.over(STAGES[-1])
        self.began = time.monotonic()

    def redo(self, name: str) -> None:
        """Forget what a stage and all behind it took, for they are done again."""
        for later in STAGES[STAGES.index(name) :]:
            self.times.pop(later, None)
        self._earlier = sum(row.seconds for row in self.times.values())
        self._finished = False

    @property
    def running(self) -> str | None:
        """The stage that was begun last and has not ended, in whatever process; None where there is none."""
        begun = [name for name, row in self.times.items() if not row.ended]
        return max(begun, key=lambda name: self.times[name].began, default=None)

    @property
    def elapsed(self) -> float:
        """Seconds since this process began its work, and what earlier ones spent in stages."""
        return time.monotonic() - self.began + self._earlier

    def newly_done(self) -> set[str]:
        """The stages that this process did from beginning to end since this was asked last."""
        done, self._done = self._done, set()
        return done

    def over(self, name: str) -> bool:
        """Whether a stage has nothing left to do: it ended, and one that comes after it began."""
        begun = {*self.times, *([self._running[0]] if self._running else [])}
        done = name in self.times and self.times[name].ended
        return done or bool(begun & {*STAGES[STAGES.index(name) + 1 :]})

    def left(self) -> float | None:
        """Seconds until the last stage ends; None where nothing was planned, or all was done before."""
        if not self.expected or self._finished:
            return None
        left = 0.0
        for name, seconds in self.expected.items():
            if self._running is not None and self._running[0] == name:
                left += max(0.0, seconds - self._spent(name) - (time.monotonic() - self._running[1]))
            elif not self.over(name):
                left += max(0.0, seconds - self._spent(name))
        return left

    def _spent(self, name: str) -> float:
        return self.times[name].seconds if name in self.times else 0.0

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Within, the stage of this name runs. What runs within another stage counts as that."""
        if self._running is not None:
            yield
            return
        planned = [stage for stage, seconds in self.expected.items() if seconds]
        first = name not in self.times
        ended_before = not first and self.times[name].ended
        goes_on = not (first or ended_before or name in self._begun)
        if name in planned and (first or goes_on):
            say(f"[{planned.index(name) + 1} of {len(planned)}] {name}{' goes on' if goes_on else ''}; {left_of_all()}")
        self._begun.add(name)
        self.add(name, 0.0, ended=False)  # whoever goes on later must know that it began
        began = time.monotonic()
        self._running = name, began
        try:
            with working(name):
                yield
        except BaseException as error:
            refused = isinstance(error, RequestError)  # then what was done before stands
            with contextlib.suppress(OSError):  # the first cause is what the user needs to see
                self.add(name, time.monotonic() - began, ended=ended_before and refused)
            raise
        else:
            self.add(name, time.monotonic() - began, ended=True)
            log_line(f"{name} took {duration(time.monotonic() - began)}")
            if first:
                self._done.add(name)
        finally:
            self._running = None

    def add(self, name: str, seconds: float, ended: bool) -> None:
        """Count the seconds of a stage, and keep them."""
        before = self.times.get(name, StageTime())
        began = before.began if seconds else round(time.time(), 3)
        self.times[name] = StageTime(seconds=round(before.seconds + seconds, 3), ended=ended, began=began)
        if self.file is not None and (self.file.parent / "recipe.yaml").is_file():
            write_json(self.file, {name: row.model_dump() for name, row in self.times.items()})


class HasSchedule(Protocol):
    """What every stage is handed first."""

    @property
    def schedule(self) -> Schedule: ...


P = ParamSpec("P")
Result = TypeVar("Result")
AJob = TypeVar("AJob", bound=HasSchedule)


def stage(name: str) -> Callable[[Callable[Concatenate[AJob, P], Result]], Callable[Concatenate[AJob, P], Result]]:
    """Give a function whose first argument is the job the name of the stage that it is, or is a part of."""
    assert name in STAGES

    def decorate(function: Callable[Concatenate[AJob, P], Result]) -> Callable[Concatenate[AJob, P], Result]:
        @functools.wraps(function)
        def run(job: AJob, /, *args: P.args, **kwargs: P.kwargs) -> Result:
            with job.schedule.stage(name):
                return function(job, *args, **kwargs)

        return run

    return decorate
