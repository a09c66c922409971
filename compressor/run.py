"""The run directory: where everything is, and which stages are whole.

A stage writes its manifest last, so the manifest's existence means that the stage is whole. A manifest holds the
fingerprint of what the stage read: the part of the recipe it depends on, and its inputs. When that changed, the stage
is done again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from fnmatch import fnmatch
from math import isfinite
from pathlib import Path
from typing import IO, Any

from compressor.local_paths import LocalPath, LocalPaths
from compressor.recipe import Recipe
from compressor.recipe_file import read_recipe, write_recipe
from supernet.common.errors import RequestError, reading
from supernet.common.files import fingerprint, follow_umask, read_json, write_json
from supernet.common.metrics import Number
from supernet.training.accelerator import is_main

_LOCKED: dict[Path, tuple[IO[str], int]] = {}
"""Lock files of the runs that this process works in, and the thread that does: closing one gives the lock up."""


def band_folder(supernet: Path, band: int) -> Path:
    """Where a super-network of a band of sizes lies; that of the largest, of number 0, as one for all sizes does."""
    return supernet / f"band-{band}" if band else supernet


class Run:
    """Paths and manifests of one run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / "recipe.yaml"
        self.log_file = path / "log.txt"
        self.debug_file = path / "debug.log"
        self.metrics_file = path / "metrics.jsonl"
        self.tracking = path / "tracking"
        self.requests = path / "requests"
        self.demo_text = path / "demo.jsonl"
        self.data = path / "data"
        self.base = path / "base"
        self.supernet = path / "supernet"
        self.speed_table = path / "speed.json"
        self.search = path / "search"
        self.evaluations = path / "search" / "evaluations.db"
        self.documents = path / "search" / "documents"
        self.passes = path / "search" / "passes.json"
        self.front = path / "search" / "front.json"
        self.picks = path / "search" / "picks.json"
        self.control = path / "search" / "control.json"
        self.subnets = path / "subnets"
        self.packages = path / "packages"
        self.comparison = path / "comparison"
        self.report = path / "report.json"
        self.paths_file = path / "paths.json"
        self.plan_file = path / "plan.json"
        self.times_file = path / "times.json"
        self.lock_file = path / ".lock"

    @property
    def writes(self) -> bool:
        """Whether this process may write here. Of several that fine-tune together, the first does."""
        return is_main()

    @classmethod
    def create(
        cls, path: Path, recipe: Recipe, provenance: Mapping[str, object], paths: LocalPaths | None = None
    ) -> Run:
        """The run at `path`, new or continued. Raises `RequestError` where the folder holds something else, or another
        process works in it."""
        run = cls(path)
        run.check_free()
        if run.writes:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RequestError(f"{path}: cannot be made a folder: {error.strerror}") from error
            run.lock()
            run.remember(recipe, provenance, paths or {})
        return run

    def remember(self, recipe: Recipe, provenance: Mapping[str, object], paths: LocalPaths) -> None:
        """Write recipe.yaml, and paths.json with what is new in `paths`."""
        known = {name: path.model_dump() for name, path in (self.local_paths() | dict(paths)).items()}
        write_json(self.paths_file, known)  # first: a recipe without its paths would look on the hub
        write_recipe(recipe, self.recipe_file, provenance)

    def local_paths(self) -> dict[str, LocalPath]:
        """Where everything local lay that the recipe names; empty for runs of versions that did not keep it."""
        if not self.paths_file.is_file():
            return {}
        with reading(f"{self.paths_file}: not what this version writes"):
            return {name: LocalPath.model_validate(path) for name, path in read_json(self.paths_file).items()}

    def lock(self) -> None:
        """Keep others out of this run until `unlock`, or until this process ends, however it ends.

        Raises `RequestError` that names the process that works here. A process that died holds no lock.
        """
        if not self.writes:
            return
        if (held := _LOCKED.get(self.path.resolve())) is not None:
            if held[1] != threading.get_ident():
                raise RequestError(f"{self.path}: another thread of this process works in this run; wait for it")
            return
        file = self.lock_file.open("a+", encoding="utf-8")
        if not is_locked_by_us(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise RequestError(f"{self.path}: {holder} works in this run; wait until it is done, or stop it")
        file.truncate(0)
        now = datetime.now().isoformat(timespec="seconds", sep=" ")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now},")
        file.flush()
        _LOCKED[self.path.resolve()] = file, threading.get_ident()

    def unlock(self) -> None:
        """Let others work in this run again."""
        if (held := _LOCKED.pop(self.path.resolve(), None)) is not None:
            held[0].close()

    def check_free(self) -> None:
        """Raises `RequestError` where the folder holds something that is not a run."""
        if not self.writes:  # the process that writes may be making it at this moment
            return
        if self.path.exists() and not self.path.is_dir():
            raise RequestError(f"--output {self.path}: is a file; give a folder")
        # The first that a run writes, whole or not.
        own = (self.lock_file, self.demo_text, self.paths_file, self.recipe_file)
        names = [pattern for file in own for pattern in (file.name, f".{file.name}.tmp-*")]
        held = (file.name for file in self.path.iterdir()) if self.path.is_dir() else ()
        others = [name for name in held if not any(fnmatch(name, pattern) for pattern in names)]
        if others and not self.recipe_file.is_file():
            raise RequestError(f"--output {self.path}: the folder holds something else; give a new or an empty folder")

    def check_exists(self) -> None:
        """Raises `RequestError` where the folder is no run."""
        if not self.recipe_file.is_file():
            raise RequestError(f"{self.path}: not a run (there is no recipe.yaml); make one with compress or finetune")

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing run, locked. Raises `RequestError` where there is none, or another process works in it."""
        run = cls(path)
        run.check_exists()
        run.lock()
        run.settle()
        return run

    def recipe(self) -> Recipe:
        return read_recipe(self.recipe_file, {})

    def log(self, line: str) -> None:
        """Add a line to log.txt, which is for people."""
        if not self.writes:
            return
        if self.log_file.exists() and not self.log_file.is_file():
            raise RequestError(f"{self.log_file}: not a file that can be written")
        with self.log_file.open("a", encoding="utf-8") as log:
            log.write(f"{datetime.now().isoformat(timespec='seconds')} {line}\n")

    def keep_metric(self, kind: str, step: int | None, values: dict[str, Number]) -> None:
        """Add measured numbers to metrics.jsonl, one line for each time that some come."""
        if self.writes:
            finite = {k: str(v) if isinstance(v, float) and not isfinite(v) else v for k, v in values.items()}
            row = {"time": round(time.time(), 3), "kind": kind, **({} if step is None else {"step": step}), **finite}
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def whole(self, folder: Path, inputs: Any) -> bool:
        """Whether the stage that fills `folder` is whole and was made from the same inputs."""
        manifest = self.manifest(folder)
        return manifest is not None and manifest.get("inputs") == fingerprint(inputs)

    @property
    def trains(self) -> bool:
        """Whether the super-network is there, or its training has begun."""
        partial = self.supernet.with_name(f".{self.supernet.name}.partial")
        return self.manifest(self.supernet) is not None or any(partial.glob("**/training.safetensors*"))

    def manifest(self, folder: Path) -> dict[str, Any] | None:
        file = folder / "manifest.json"
        if not file.is_file():
            return None
        with reading(f"{file}: not what this version writes"):
            return dict(read_json(file))

    @property
    def supernet_weights(self) -> str:
        """Fingerprint of the fine-tuned super-network's weights; empty where there is no such network yet."""
        manifest = self.manifest(self.supernet)
        if manifest is None:
            return ""
        if not isinstance(weights := manifest.get("weights"), str):
            raise RequestError(f"{self.supernet / 'manifest.json'}: not what this version writes (it names no weights)")
        return weights

    @contextmanager
    def stage(self, folder: Path, inputs: Any) -> Iterator[tuple[Path, dict[str, object]]]:
        """Fill a folder under a temporary name; manifest last, then rename.

        Yields the temporary folder, kept across interruptions for whatever a stage can resume from, and a dictionary
        of facts that goes into the manifest. A temporary folder made from other inputs is thrown away. In a process
        that does not write, the folder is only named.
        """
        temporary = folder.with_name(f".{folder.name}.partial")
        if not self.writes:
            yield temporary, {}
            return
        mark = temporary / "inputs.json"
        if temporary.exists() and (not mark.is_file() or read_json(mark) != fingerprint(inputs)):
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True, exist_ok=True)
        write_json(mark, fingerprint(inputs))
        facts: dict[str, object] = {}
        yield temporary, facts
        follow_umask(temporary)
        write_json(temporary / "manifest.json", {"inputs": fingerprint(inputs), **facts})
        mark.unlink()  # only now: without it, and without a manifest, all that is in the folder would be thrown away
        self.settle()

    def settle(self) -> None:
        """Give every folder whose manifest is written its name. An interruption may have come in between.

        What had the name before is renamed aside first: removing it takes a while, and it must not be lost half-way.
        """
        if not self.writes:
            return
        for temporary in self.path.glob(".*.partial"):
            if (temporary / "manifest.json").is_file():
                name = temporary.name.removeprefix(".").removesuffix(".partial")
                if (self.path / name).exists():
                    (self.path / name).replace(self.path / f".{name}.old-{time.time_ns()}")
                temporary.replace(self.path / name)
        for old in self.path.glob(".*.old-*"):
            shutil.rmtree(old)


def is_locked_by_us(file: IO[str]) -> bool:
    """Lock a file for this process. Returns whether it could: who looks at a run (`compressor status`) holds it for a
    moment, so it is tried for a second."""
    for _ in range(10):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.1)
    return False
