"""The front of a run as a table: every network that can be picked from it, with what is known of each."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from compressor.job import Job
from compressor.run import Run
from compressor.sizing import smallest_storage
from compressor.stages.front import read_front, scored_weights
from compressor.stages.picking import measured
from compressor.stages.picks import read_picks
from compressor.stages.requalify import current_front
from compressor.stages.score_keys import held_out_keys
from export.models import Model
from export.package_record import RECORD, read_record
from search.objectives import Evaluation
from search.store import EvaluationStore
from supernet.common.formatting import count, shell_word, size
from supernet.common.progress import console, say

MEASURED_LAYOUTS = ("uneven", "uniform")
"""Layouts of the packages whose speed is that of the network itself."""


class FrontRow(Model):
    """A network of the front. Speeds are over the base's, quality and loss of the search's documents and text."""

    key: str
    parameters: int
    share: float
    """Share of the base's parameters."""
    bytes: int
    """Bytes of its weights, in the smallest variant that the recipe asks for."""
    decode_tps: float | None
    """Tokens per second by the layers' timings."""
    speedup: float | None
    measured_speedup: float | None
    """Speed of its package, timed in turn with the base; None where there is none."""
    quality: float
    quality_stderr: float | None
    held_out_loss: float | None
    """Nats per token; None where no pick needed it."""
    layers: int
    """Layers that are left."""
    picked: list[str]
    """Names of the picks that are this network."""


ORDERS: dict[str, Callable[[FrontRow], Any]] = {
    "size": lambda row: -row.parameters,
    "quality": lambda row: -row.quality,
    "speed": lambda row: -(row.measured_speedup or row.speedup or 0.0),
    "loss": lambda row: (row.held_out_loss is None, row.held_out_loss or 0.0),
}


def front_rows(path: Path, sort: str = "size") -> list[FrontRow]:
    """The front of a run, by one of `ORDERS`. Reads only, also while the run works. Raises `RequestError` where nothing
    was searched yet."""
    run = Run(path)
    run.check_exists()
    job = Job(run, run.recipe().resolved(), weights=False)
    evaluations = {e.architecture.key: e for e in measured(job)}
    names: dict[str, list[str]] = {}
    for pick in read_picks(job) if run.picks.is_file() else []:
        names.setdefault(pick["key"], []).append(pick["name"])
    speeds, losses = measured_speedups(run), losses_of_picks(job, list(evaluations.values()))
    rows = []
    for key in current_front(job)["front"]:
        architecture = evaluations[key].architecture
        values = {name: value for name, value in evaluations[key].values.items() if isfinite(value)}
        rows.append(
            FrontRow(
                key=key,
                parameters=int(values["parameters"]),
                share=values["parameters"] / job.untouched_parameters,
                bytes=job.structure.bytes(architecture, smallest_storage(job, architecture)),
                decode_tps=values.get("decode_tps"),
                speedup=values.get("speedup"),
                measured_speedup=speeds.get(key),
                quality=values["quality"],
                quality_stderr=values.get("quality_stderr"),
                held_out_loss=values.get("held_out_loss", losses.get(key)),
                layers=len(architecture.kept),
                picked=names.get(key, []),
            )
        )
    return sorted(rows, key=ORDERS[sort])


def measured_speedups(run: Run) -> dict[str, float]:
    """Decode speed over the base's, of text where the vocabulary was cut, of every network that was packaged and timed,
    by its key."""
    speeds = {}
    for file in sorted(run.packages.glob(f"*/{RECORD}")):
        record = read_record(file.parent)
        entry, base = record.entry, record.lineage.base_speed
        bits = entry.quantization_report and entry.quantization_report.bits
        if entry.layout in MEASURED_LAYOUTS and (bits or not entry.quantization) and entry.speed and base:
            text = entry.vocabulary.text_per_token if entry.vocabulary else 1.0
            speeds[(bits or entry.architecture).key] = text * entry.speed.decode_tps / base.decode_tps
    return speeds


def losses_of_picks(job: Job, evaluations: list[Evaluation]) -> dict[str, float]:
    """Held-out losses that a pick measured, by the network's key."""
    key = held_out_keys(job, ["held_out_loss"])["held_out_loss"]
    weights = scored_weights(job, read_front(job.run.front))
    with EvaluationStore(job.run.evaluations) as store:
        scores = {e.architecture.key: store.get(e.architecture, weights, key) for e in evaluations}
    return {name: score.value for name, score in scores.items() if score is not None}


def print_front(path: Path, rows: list[FrontRow]) -> None:
    """The rows as a table that fits 80 columns, on stderr."""
    table = Table(box=box.SIMPLE, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("key", no_wrap=True)
    for column in ("params", "share", "bytes", "speed", "timed", "quality", "loss", "layers"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        error = "" if row.quality_stderr is None else f" ±{row.quality_stderr:.3f}".replace("±0.", "±.")
        table.add_row(
            f"{row.key[:8]}{' *' if row.picked else ''}",
            count(row.parameters),
            f"{row.share:.3f}",
            size(row.bytes),
            _times(row.speedup),
            _times(row.measured_speedup),
            f"{row.quality:.3f}{error}",
            "-" if row.held_out_loss is None else f"{row.held_out_loss:.3f}",
            str(row.layers),
        )
    console.print(table)
    say("share: of the base's parameters; bytes: of weights in the fewest bits that are asked for or compared,")
    say("without a file's header; speed: over the base's, by the layers' timings; timed: of the package; quality")
    say("(± one standard error; no task above the base's score) and loss: on the search's text, before healing")
    if picks := [f"{row.key[:8]} is {', '.join(row.picked)}" for row in rows if row.picked]:
        say(f"* {'; '.join(picks)}")
    if rows:
        run = shell_word(path)
        say(f"to make one: compressor pick {run} --key {rows[0].key[:8]}, then compressor export {run}")


def _times(speedup: float | None) -> str:
    return "-" if speedup is None else f"{speedup:.2f}x"
