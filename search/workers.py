"""Measure in several processes at once, on this machine or, through Ray, on many.

A worker builds its measuring function once and is then handed one item at a time. A worker that dies (out of memory,
a lost machine) costs the one item it had: another worker takes its place, and the item is tried again. An item
that every try is lost on is an error that names it; so is an exception that the function raises, which is no death.
"""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import signal
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Build = Callable[[], Callable[[Item], Result]]
"""Makes a worker's function. Runs in the worker, so it must be picklable: a module's function, or a `partial`."""

TRIES = 3
"""Deaths of workers on one item after which it is taken to be the item's fault."""


class WorkersLost(RuntimeError):
    """Several workers in a row died on the same item."""


class Workers(ABC, Generic[Item, Result]):
    """`n` workers. A context manager: leaving it ends them."""

    def __init__(self, build: Build[Item, Result], n: int) -> None:
        self.build = build
        self.n = n
        self._idle: list[Any] = []

    def map(self, items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
        """Each item with its result, as they arrive. Items next to one another go to the same worker where they can,
        since neighbours may share work.

        Raises what the function raised, and `WorkersLost`.
        """
        n = min(self.n, len(items))
        lanes = [deque(range(i * len(items) // n, (i + 1) * len(items) // n)) for i in range(n)]
        lost = [0] * len(items)
        busy: dict[Any, tuple[int, deque[int]]] = {}

        def start(worker: Any, lane: deque[int]) -> None:
            if not lane:  # the end of the longest lane is the farthest from being reached
                longest = max(lanes, key=len)
                number = longest.pop() if longest else None
            else:
                number = lane.popleft()
            if number is None:
                self._idle.append(worker)
            else:
                busy[worker] = number, lane
                self._send(worker, items[number])

        try:
            for lane in lanes:
                start(self._idle.pop() if self._idle else self._hire(), lane)
            while busy:
                for worker, (alive, answer) in self._answers(list(busy)):
                    number, lane = busy.pop(worker)
                    if alive:
                        start(worker, lane)
                        if isinstance(answer, Exception):
                            raise answer
                        yield items[number], answer
                        continue
                    lost[number] += 1
                    if lost[number] == TRIES:
                        raise WorkersLost(f"{TRIES} workers died measuring {items[number]}")
                    # Elsewhere first, where there is an elsewhere: what killed one worker may be the machine.
                    max(lanes, key=len).append(number)
                    start(self._hire(), lane)
        finally:
            for worker in busy:  # left early: what they are at is no longer wanted
                self._dismiss(worker)

    @abstractmethod
    def _hire(self) -> Any:
        """A new worker, building its function."""

    @abstractmethod
    def _send(self, worker: Any, item: Item) -> None:
        """Give an idle worker something to do."""

    @abstractmethod
    def _answers(self, busy: list[Any]) -> list[tuple[Any, tuple[bool, Any]]]:
        """Wait, then what at least one worker has to say: whether it lives, and its result or exception."""

    @abstractmethod
    def _dismiss(self, worker: Any) -> None:
        """End a worker, whatever it is doing."""

    def close(self) -> None:
        """End all workers."""
        while self._idle:
            self._dismiss(self._idle.pop())

    def __enter__(self) -> Workers[Item, Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Process:
    """A local worker: a process and our end of the pipe to it."""

    def __init__(self, build: Build[Any, Any]) -> None:
        # A forked copy of a process that has threads, or a GPU open, hangs sooner or later.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(build, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe


class Processes(Workers[Item, Result]):
    """Workers that are processes of this machine."""

    def _hire(self) -> _Process:
        return _Process(self.build)

    def _send(self, worker: _Process, item: Item) -> None:
        with suppress(BrokenPipeError):  # already dead: `_answers` will find the pipe closed
            worker.connection.send(item)

    def _answers(self, busy: list[_Process]) -> list[tuple[_Process, tuple[bool, Any]]]:
        ready = wait([worker.connection for worker in busy])
        found = []
        for worker in busy:
            if worker.connection in ready:
                try:
                    found.append((worker, (True, worker.connection.recv())))
                except (EOFError, ConnectionResetError):
                    self._dismiss(worker)
                    found.append((worker, (False, None)))
        return found

    def _dismiss(self, worker: _Process) -> None:
        worker.process.kill()  # nothing it holds is worth a goodbye: results are recorded here
        worker.process.join()
        worker.connection.close()


def _serve(build: Build[Any, Any], connection: Connection) -> None:
    """A local worker's life: ends with the pipe, so with whoever holds its other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes; ours to handle
    server = _Server(build)
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        connection.send(server.answer(item))


class _Server:
    """Builds the function for the first item, so that a fault in building is answered like any other."""

    def __init__(self, build: Build[Any, Any]) -> None:
        self._build = build
        self._function: Callable[[Any], Any] | None = None

    def answer(self, item: Any) -> Any:
        """The function's result, or the exception that it raised."""
        try:
            if self._function is None:
                self._function = self._build()
            return self._function(item)
        except Exception as error:
            try:
                ForkingPickler.loads(ForkingPickler.dumps(error))  # what the pipe will do
            except Exception:  # an exception whose constructor takes something else than it was given
                return RuntimeError(f"{type(error).__name__}: {error}")
            return error


class RayWorkers(Workers[Item, Result]):
    """Workers that are Ray actors, each with `gpus` GPUs: on the cluster that RAY_ADDRESS names, or else on this
    machine. All machines must see the files that `build` reads under the same paths.
    """

    def __init__(self, build: Build[Item, Result], n: int, gpus: int = 0) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ValueError("ray is not installed; install it with: pip install 'nas-compressor[ray]'")
        import ray  # optional, and slow to import

        super().__init__(build, n)
        self._ray = ray
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        self._actor = ray.remote(_Server).options(num_cpus=1, num_gpus=gpus, max_restarts=0)
        self._asked: dict[Any, Any] = {}

    def _hire(self) -> Any:
        return self._actor.remote(self.build)

    def _send(self, worker: Any, item: Item) -> None:
        self._asked[worker.answer.remote(item)] = worker

    def _answers(self, busy: list[Any]) -> list[tuple[Any, tuple[bool, Any]]]:
        (ready,), _ = self._ray.wait([ref for ref, worker in self._asked.items() if worker in busy], num_returns=1)
        worker = self._asked.pop(ready)
        try:
            return [(worker, (True, self._ray.get(ready)))]
        except self._ray.exceptions.RayError:  # `answer` returns what the function raises: only deaths come this way
            return [(worker, (False, None))]

    def _dismiss(self, worker: Any) -> None:
        self._ray.kill(worker)
