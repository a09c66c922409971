"""Measure in several processes at once: on this machine (`Processes`), or on many through Ray (`RayWorkers`).

A worker builds its measuring function once and is then handed one item at a time. A worker that dies (out of memory,
a lost machine) costs one try of the item that it had: another worker takes its place, and the item is tried again. An
item that is lost `TRIES` times is an error that names it. An exception that the function raises is raised here; the
worker lives on.
"""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import signal
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from types import ModuleType, TracebackType
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Build = Callable[[], Callable[[Item], Result]]
"""Makes a worker's function. Runs in the worker, so it must be picklable: a module's function, or a `partial`."""

Worker = Any
"""A worker as its kind holds it: a `_Process`, or a Ray actor."""
Outcome = tuple[bool, Any]
"""Whether the worker lives, and the function's result or the exception that it raised (None of a dead worker)."""

TRIES = 3
"""Deaths of workers on one item after which it is taken to be the item's fault."""


ENDS_WITHIN = 5.0
"""Seconds in which a worker that nothing more is asked of ends by itself."""


class WorkersLost(RuntimeError):
    """Several workers in a row died on the same item."""


class Workers(ABC, Generic[Item, Result]):
    """`n` workers. A context manager: leaving it ends them.

    A kind of worker has four methods: `_start` a worker, `_submit` an item to it, `_wait` for results, `_stop` it.
    """

    def __init__(self, build: Build[Item, Result], n: int) -> None:
        self.build = build
        self.n = n
        self._waiting: list[Worker] = []

    def map(self, items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
        """Each item with its result, as they arrive. Items next to one another go to the same worker where possible,
        since neighbours may share work.

        Raises what the function raised, and `WorkersLost`.
        """
        # 1. A queue of neighbouring items for each worker.
        n = min(self.n, len(items))
        queues = [deque(range(i * len(items) // n, (i + 1) * len(items) // n)) for i in range(n)]
        lost = [0] * len(items)
        busy: dict[Worker, tuple[int, deque[int]]] = {}

        def submit_next(worker: Worker, queue: deque[int]) -> None:
            """From its own queue or else the end of the longest, which is the farthest from being reached."""
            source = queue or max(queues, key=len)
            if not source:
                self._waiting.append(worker)
                return
            number = source.popleft() if source is queue else source.pop()
            busy[worker] = number, queue
            self._submit(worker, items[number])

        try:
            # 2. Start with one item each.
            for queue in queues:
                submit_next(self._waiting.pop() if self._waiting else self._start(), queue)
            while busy:
                for worker, (alive, result) in self._wait(list(busy)):
                    number, queue = busy.pop(worker)
                    # 3. A result: the worker goes on with the next item.
                    if alive:
                        submit_next(worker, queue)
                        if isinstance(result, Exception):
                            raise result
                        yield items[number], result
                        continue
                    # 4. A death: another worker takes its place. The item goes to the longest queue, so to another
                    #    machine where there is one: what killed the worker may be the machine.
                    lost[number] += 1
                    if lost[number] == TRIES:
                        raise WorkersLost(f"{TRIES} workers died measuring {items[number]}")
                    max(queues, key=len).append(number)
                    submit_next(self._start(), queue)
        finally:
            for worker in busy:  # left early: their results are no longer wanted
                self._stop(worker)

    @abstractmethod
    def _start(self) -> Worker:
        """A new worker, which builds its function."""

    @abstractmethod
    def _submit(self, worker: Worker, item: Item) -> None:
        """Give a waiting worker an item."""

    @abstractmethod
    def _wait(self, busy: list[Worker]) -> list[tuple[Worker, Outcome]]:
        """Wait until at least one worker is done or dead; each of these with its outcome."""

    @abstractmethod
    def _stop(self, worker: Worker) -> None:
        """End a worker, in the midst of its work or not."""

    def close(self) -> None:
        """End all workers."""
        while self._waiting:
            self._stop(self._waiting.pop())

    def __enter__(self) -> Workers[Item, Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Process:
    """A local worker: a process and our end of the pipe to it."""

    def __init__(self, build: Build[Any, Any]) -> None:
        # A forked copy of a process that has threads, or a GPU open, can hang.
        context = multiprocessing.get_context("spawn")
        self.connection, far_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(build, far_end), daemon=True)
        with _without_main():
            self.process.start()
        far_end.close()  # so that the end of the process is the end of the pipe


@contextmanager
def _without_main() -> Iterator[None]:
    """Within, a process that is started does not run the program's main module again, as multiprocessing has it. That
    may be a script of the user's without `if __name__ == "__main__"`, which would begin its whole job once more."""
    own = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = own


class Processes(Workers[Item, Result]):
    """Workers that are processes of this machine."""

    def _start(self) -> _Process:
        return _Process(self.build)

    def _submit(self, worker: _Process, item: Item) -> None:
        with suppress(BrokenPipeError):  # already dead: `_wait` will find the pipe closed
            worker.connection.send(item)

    def _wait(self, busy: list[_Process]) -> list[tuple[_Process, Outcome]]:
        ready = wait([worker.connection for worker in busy])
        outcomes: list[tuple[_Process, Outcome]] = []
        for worker in busy:
            if worker.connection in ready:
                try:
                    outcomes.append((worker, (True, worker.connection.recv())))
                except (EOFError, ConnectionResetError):
                    self._stop(worker)
                    outcomes.append((worker, (False, None)))
        return outcomes

    def close(self) -> None:
        for worker in self._waiting:
            worker.connection.close()  # so it ends, and gives back what it holds of the system
        for worker in self._waiting:
            worker.process.join(ENDS_WITHIN)
        super().close()

    def _stop(self, worker: _Process) -> None:
        worker.process.kill()  # it holds nothing that is needed: results are recorded here
        worker.process.join()
        worker.connection.close()


def _serve(build: Build[Any, Any], connection: Connection) -> None:
    """What a local worker runs, until the pipe is closed or the process at its other end dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes; the parent handles it
    server = _Server(build)
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        connection.send(server.answer(item))


class _Server:
    """Runs the function within a worker. It is built for the first item, so that a fault in building is answered like
    any other."""

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
            except Exception:  # its constructor takes other arguments than it keeps
                return RuntimeError(f"{type(error).__name__}: {error}")
            return error


def check_ray() -> None:
    """Raise ValueError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError("ray is not installed; install it with: pip install 'nas-compressor[ray]'")


class RayWorkers(Workers[Item, Result]):
    """Workers that are Ray actors, each with `gpus` GPUs: on the cluster that RAY_ADDRESS names, or else on this
    machine. All machines must see the files that `build` reads under the same paths. Raises ValueError without Ray.
    """

    def __init__(self, build: Build[Item, Result], n: int, gpus: int = 0) -> None:
        check_ray()
        import ray  # optional, and slow to import

        super().__init__(build, n)
        self._ray = ray
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        self._actor = ray.remote(_Server).options(num_cpus=1, num_gpus=gpus, max_restarts=0)
        self._pending: dict[Any, Worker] = {}  # Ray's references to results that are to come

    def _start(self) -> Worker:
        return self._actor.remote(self.build)

    def _submit(self, worker: Worker, item: Item) -> None:
        self._pending[worker.answer.remote(item)] = worker

    def _wait(self, busy: list[Worker]) -> list[tuple[Worker, Outcome]]:
        (ready,), _ = self._ray.wait([ref for ref, worker in self._pending.items() if worker in busy], num_returns=1)
        worker = self._pending.pop(ready)
        try:
            return [(worker, (True, self._ray.get(ready)))]
        except self._ray.exceptions.RayError:  # `answer` returns what the function raises: only deaths come this way
            return [(worker, (False, None))]

    def _stop(self, worker: Worker) -> None:
        self._ray.kill(worker)
