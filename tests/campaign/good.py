"""A good run, the commands on it, and how a command on a spoilt copy ended."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from compressor.cli import run
from tests.support import tiny

SECONDS = 60
"""After these a command hangs."""

RECIPE = """
finetuning: {tokens: 256, batch_size: 2, sequence_length: 32}
searching: {evaluations: 8, population: 4, limit: 8}
healing: {tokens: 256}
targets: {max_params: [0.8]}
seed: 3
"""


@dataclass(frozen=True)
class Good:
    """A folder with a checkpoint, data, a task, a recipe, and the run that they made."""

    folder: Path

    def compress(self, *more: str) -> list[str]:
        """The command that makes the run."""
        return [
            "compress", str(self.folder / "model"),
            *("--data", str(self.folder / "data.jsonl"), "--tasks", "tiny_choice"),
            *("--include-path", str(self.folder / "tasks"), "--recipe", str(self.folder / "recipe.yaml")),
            *("--output", str(self.folder / "run")),
            *more,
        ]  # fmt: skip

    @property
    def package(self) -> Path:
        return self.folder / "run" / "packages" / "best"

    def copy(self, folder: Path) -> Good:
        return Good(Path(shutil.copytree(self.folder, folder, symlinks=True)))

    def result(self) -> dict[str, object]:
        """What the run found: picks, scores, and the bytes of the weights."""
        report = json.loads((self.folder / "run" / "report.json").read_text())
        packages = {
            row["name"]: [row["architecture"], {name: score["value"] for name, score in row["tasks"].items()}]
            for row in report["packages"]
        }
        weights = (self.package / "model.safetensors").read_bytes()
        return {"packages": packages, "weights": weights}


def make_good(folder: Path) -> Good:
    """The good run, made here."""
    tiny.checkpoint(folder / "model")
    tiny.data(folder / "data.jsonl")
    tiny.task(folder / "tasks")
    (folder / "recipe.yaml").write_text(RECIPE)
    good = Good(folder)
    ended = run_apart(good.compress(), folder / "output.txt")
    assert ended.status == 0, ended.output
    return good


@dataclass(frozen=True)
class Ended:
    """How a command ended. `status` is None where it hung."""

    status: int | None
    output: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("error:")]

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


def run_apart(arguments: list[str], output: Path, before: Callable[[], None] | None = None) -> Ended:
    """Run a command in a fork of this process, which has imported what takes long; `before` is called in it first."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_child, args=(arguments, output, before))
    process.start()
    process.join(SECONDS)
    hung = process.is_alive()
    if hung:
        process.kill()
        process.join()
    return Ended(None if hung else process.exitcode, output.read_text(errors="replace") if output.exists() else "")


def _child(arguments: list[str], output: Path, before: Callable[[], None] | None) -> None:
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
