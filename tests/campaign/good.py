"""A good run, the commands on it, and how a command on a spoilt copy ended."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import pkgutil
import shutil
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open

import compressor
import evals
import export
import search
import supernet
from compressor.cli import run
from tests.support import tiny

SECONDS = 90
"""After these a command hangs."""

RECIPE = """
finetuning: {tokens: 256, batch_size: 2, sequence_length: 32}
searching: {evaluations: 8, population: 4, limit: 8}
healing: {tokens: 256}
repair: {enabled: true, tokens: 256}
targets: {max_params: [0.8]}
seed: 3
"""

Before = Callable[[], None]
"""Something to be done in the process of a command before it begins."""


@dataclass(frozen=True)
class Good:
    """A folder with a checkpoint, data, a task, a speed table, a recipe, and the run that they made."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def package(self) -> Path:
        return self.run / "packages" / "best"

    def compress(self, *more: str) -> list[str]:
        """The command that makes the run."""
        return [
            "compress", str(self.folder / "model"),
            *("--data", str(self.folder / "data.jsonl"), "--tasks", "tiny_choice"),
            *("--include-path", str(self.folder / "tasks"), "--recipe", str(self.folder / "recipe.yaml")),
            *("--output", str(self.run)),
            *more,
        ]  # fmt: skip

    def write_recipe(self) -> None:
        """The recipe, with the speed table beside it: measured once, so that every run has the same timings."""
        (self.folder / "recipe.yaml").write_text(f"{RECIPE}speed_table: {self.folder / 'speed-table.json'}\n")

    def copy(self, folder: Path) -> Good:
        copied = Good(Path(shutil.copytree(self.folder, folder, symlinks=True)))
        task = copied.folder / "tasks" / "tiny_choice.yaml"
        task.write_text(task.read_text().replace(str(self.folder), str(folder)))
        copied.write_recipe()
        return copied

    def result(self) -> dict[str, object]:
        """What the run found: picks, scores, and the bytes of the weights."""
        report = json.loads((self.run / "report.json").read_text())
        packages = {
            row["name"]: [row["architecture"], {name: score["value"] for name, score in row["tasks"].items()}]
            for row in report["packages"]
        }
        weights = {package.name: (package / "model.safetensors").read_bytes() for package in self.packages()}
        return {"packages": packages, "weights": weights}

    def packages(self) -> list[Path]:
        return sorted(f for f in self.run.glob("packages/*") if f.is_dir() and not f.name.startswith("."))

    def rows(self) -> set[tuple[object, ...]]:
        """What the store holds: architecture, weights, task, documents, score, of every measured row."""
        file = self.run / "search" / "evaluations.db"
        if not file.is_file():
            return set()
        connection = sqlite3.connect(file)
        try:
            return set(connection.execute("SELECT architecture, weights, task, documents, score FROM evaluations"))
        except sqlite3.OperationalError:  # it was just being made
            return set()
        finally:
            connection.close()

    def half_written(self) -> str | None:
        """What stands under its final name in the run and is not whole."""
        for file in sorted(self.run.rglob("*")):
            if any(part.startswith(".") for part in file.relative_to(self.run).parts):
                continue
            try:
                if file.suffix == ".json":
                    json.loads(file.read_text())
                elif file.suffix == ".safetensors":
                    with safe_open(file, "pt") as weights:
                        list(weights.keys())
            except Exception as error:
                return f"{file.relative_to(self.run)}: {error}"
        marks = {"supernet": "manifest.json", "subnets/*": "compression.json", "packages/*": "compression.json"}
        for pattern, mark in marks.items():
            for folder in self.run.glob(pattern):
                if folder.is_dir() and not folder.name.startswith(".") and not (folder / mark).is_file():
                    return f"{folder.relative_to(self.run)}: there is no {mark}"
        return None


def import_all() -> None:
    """Import every module of ours, and so what they need, for the forks to share."""
    for package in (compressor, export, evals, search, supernet):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)


def make_good(folder: Path) -> Good:
    """The good run, made here."""
    import_all()
    good = Good(folder)
    tiny.checkpoint(folder / "model")
    tiny.data(folder / "data.jsonl")
    tiny.task(folder / "tasks")
    good.write_recipe()
    table = ["speed-table", str(folder / "model"), str(folder / "speed-table.json")]
    for command in (table, good.compress()):
        ended = run_apart(command, folder / "output.txt")
        assert ended.status == 0, ended.output
    return good


@dataclass(frozen=True)
class Ended:
    """How a command ended. `status` is None where it hung, and negative where a signal ended it."""

    status: int | None
    output: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("error:")]

    @property
    def last(self) -> str:
        """The line that says most."""
        return (self.errors or self.output.strip().splitlines() or [""])[-1][:300]

    def fault(self) -> str | None:
        """What is wrong with how it ended, or None: 0, or 2 with one line that says why."""
        if self.status is None:
            return "it hangs"
        if "Traceback (most recent call last)" in self.output:
            return "a traceback"
        if self.status == 0:
            return None
        if self.status != 2:
            return f"status {self.status}"
        return None if len(self.errors) == 1 else f"{len(self.errors)} lines of errors"


def run_apart(
    arguments: list[str],
    output: Path,
    before: Before | None = None,
    *,
    after: float = SECONDS,
    with_signal: int = signal.SIGKILL,
) -> Ended:
    """Run a command in a fork of this process, which has imported what takes long.

    `before` is called in it first. After so many seconds it gets the signal; without `after` that is a hang.
    """
    process = multiprocessing.get_context("fork").Process(target=_child, args=(arguments, output, before))
    process.start()
    process.join(after)
    alive = process.is_alive()
    if alive and process.pid is not None:
        os.kill(process.pid, with_signal)
        process.join()
    status = None if alive and after == SECONDS else process.exitcode
    return Ended(status, output.read_text(errors="replace") if output.exists() else "")


def _child(arguments: list[str], output: Path, before: Before | None) -> None:
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.chdir(output.parent)
    if before is not None:
        before()
    status = run(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@dataclass
class Tally:
    """What was tried and how it ended. `faults` are lines for a person to read."""

    tried: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, how: str, fault: str | None = None) -> None:
        self.tried += 1
        self.ended[how if fault is None else "faults"] += 1
        if fault is not None:
            self.faults.append(fault)
            print(fault, flush=True)

    def __str__(self) -> str:
        return f"{self.tried} tried: " + ", ".join(f"{count} {how}" for how, count in self.ended.most_common())


Attempts = Iterator[None]
"""A part of the campaign, one attempt after another."""
