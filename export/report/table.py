"""The report's table in a terminal, and the notes below every table of it."""

from __future__ import annotations

import re

from rich import box
from rich.table import Table
from rich.text import Text

from export.package_record import PackageEntry
from export.report.schema import Base, Package, Report, Training
from export.report.vocabulary import vocabulary_notes
from search.scores import Score
from supernet.common.formatting import count, percent, rate, size


def terminal_table(report: Report) -> Table:
    """Base and packages: parameters and bytes with their share, scores on the report split, speed and its runtime.

    Cells hold two or three short lines, so that four tasks fit in 80 columns; runtimes are numbered, and `footnotes`,
    to be printed below, says what the numbers mean.
    """
    padding = 1 if len(report.tasks) < 4 else 0
    table = Table(box=box.SIMPLE, padding=(0, padding), collapse_padding=True)
    table.add_column("", min_width=10 + 2 * padding, style="bold")
    table.add_column("params", justify="right", min_width=7)
    table.add_column("on disk", justify="right", min_width=7)
    for task in report.tasks:
        heading = Text(f"{_broken(task)}\n", justify="right", overflow="fold")
        heading.append(_broken(metric_name(report, task)), style="dim")
        table.add_column(heading, justify="right", min_width=7, overflow="fold")
    table.add_column("prefill\ntok/s", justify="right", min_width=7)
    table.add_column("decode\ntok/s", justify="right", min_width=6)
    base = report.base
    marks = _marks(report)
    for row in report.rows:
        speed = row.speed
        mark = f" {marks[measured_in(row)]}" if speed else ""
        name = Text(row.label if isinstance(row, Package) else "base")
        if isinstance(row, Package) and not row.verified:
            name.append("\nrefused" if row.refused else "\nnot proved", style="yellow")
        table.add_row(
            name,
            f"{count(row.params)}\n{percent(row.params / base.params)}",
            f"{size(row.bytes)}\n{percent(row.bytes / base.bytes)}",
            *(_score_cell(row.tasks.get(task)) for task in report.tasks),
            rate(speed.prefill_tps) + mark if speed else "-",
            rate(speed.decode_tps) + mark if speed else "-",
        )
    return table


def _broken(name: str, width: int = 9) -> str:
    """A task's name on several lines, broken after underscores, so that narrow columns can hold it."""
    lines = [""]
    for part in re.findall(r"[^_]*_|[^_]+", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _marks(report: Report) -> dict[str, str]:
    """A superscript number for every runtime that speed was measured in."""
    return {where: str(number).translate(_SUPERSCRIPT) for number, where in enumerate(runtimes(report), start=1)}


_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def measured_in(row: Base | Package) -> str:
    """What a row's speed was measured in; a star refers to the note on decompressed weights. Empty: not measured."""
    where = row.speed.where if row.speed else ""
    return f"{where} *" if isinstance(row, Package) and decompressed_at_load(row) else where


def runtimes(report: Report) -> list[str]:
    """Everything that speed was measured in, in the order of the rows."""
    return list(dict.fromkeys(measured_in(row) for row in report.rows if row.speed))


def footnotes(report: Report) -> list[str]:
    """Lines below the terminal table: the runtimes by their marks, what the numbers are, and what training did."""
    return [*(f"{mark} {where}" for where, mark in _marks(report).items()), *notes(report), *trainings(report)]


def trainings(report: Report) -> list[str]:
    """What fine-tuning and healing did to held-out losses, nats per token, and which of their states are kept."""
    done: dict[str, Training | None] = {"Fine-tuning": report.finetune}
    bands = report.finetune.bands if report.finetune else []
    done |= {f"Fine-tuning of band {number}": band for number, band in enumerate(bands, start=2)}
    done |= {f"Healing of {name}": healed for name, healed in report.healing.items()}
    return [f"{what}: {training.outcome}." for what, training in done.items() if training and training.outcome]


ABOUT_QUALITY = (
    "Quality: mean over tasks of (score - chance) / (base's score - chance), of score / base's score where chance has "
    "no meaning (inverted where lower is better, ↓); never below 0. The base is 100 %."
)


def notes(report: Report) -> list[str]:
    """What the numbers of the table are."""
    lines = ["Scores on documents that the search never saw, ± one standard error."]
    searched = report.search and report.search.quality
    if searched and searched.left_out != report.scale.left_out:
        lines.append(f"On the search's documents: {searched.remark or 'all tasks count for the quality.'}")
    if searched and searched.counted:
        lines.append("In the search's own qualities no task is worth more than the base's score.")
    workloads: dict[str, list[str]] = {}
    for row in report.rows:
        if row.speed:
            workloads.setdefault(row.speed.workload, []).append("the base" if isinstance(row, Base) else row.label)
    if workloads:
        usual, *others = workloads  # a file for llama.cpp may hold a shorter context
        parts = [f"Speed at {usual}", *(f"of {', '.join(workloads[work])} at {work}" for work in others)]
        lines.append(f"{'; '.join(parts)}.")
    lines += vocabulary_notes(report)
    if any(decompressed_at_load(package) for package in [*report.packages, *report.quantized_base]):
        lines.append(f"* {DECOMPRESSED}")
    stamps = {score.stamp for row in report.rows for score in row.tasks.values()}
    if "near chance" in stamps:
        lines.append("near chance: within two standard errors of what guessing scores.")
    if "below chance" in stamps:
        lines.append("below chance: worse than guessing by more than two standard errors.")
    return lines


def metric_name(report: Report, task: str) -> str:
    """The metric of a task, marked `↓` where lower is better."""
    score = next(row.tasks[task] for row in report.rows if task in row.tasks)
    return score.metric if score.higher_is_better else f"{score.metric} ↓"


def _score_cell(score: Score | None) -> Text:
    if score is None:
        return Text("-")
    cell = Text(score.text.replace(" ± ", "\n± "))
    if score.stamp:
        cell.append(f"\n{score.stamp}", style="yellow")
    return cell


def decompressed_at_load(package: PackageEntry) -> bool:
    """Whether the measured speed is that of floats: plain transformers unpacks compressed-tensors when it loads them on
    a CPU. Where activations are rounded too, that takes longer."""
    speed = package.speed
    if speed is None or package.quantization is None or package.quantization.endswith(("auto-round", "dynamic")):
        return False
    return "decompress" in speed.runtime or (speed.runtime.startswith("transformers") and speed.device == "cpu")


DECOMPRESSED = (
    "Transformers unpacks compressed-tensors on a CPU: the speed there is that of floats, measured with weights that "
    "were unpacked once. By default compressed-tensors rounds them again at every call, which is slower. The package's "
    "code file switches that off; for packages without one, the card shows the lines that do."
)
