"""What the report says of a vocabulary that was cut: since tokens are no longer the same, speed in bytes of text."""

from __future__ import annotations

from export.report.schema import Base, Package, Report
from supernet.common.formatting import percent, rate


def text_speed(row: Base | Package, base: Base) -> float | None:
    """Bytes of text that a network writes in a second, by what its tokens stand for on text that was not counted; None
    where all have the same tokens, or speed was not measured."""
    record = row.vocabulary if isinstance(row, Package) and row.vocabulary else base
    if row.speed is None or record.bytes_per_token is None:
        return None
    return row.speed.decode_tps * record.bytes_per_token


def decode_ratio(package: Package, base: Base) -> float:
    """How many times as fast as the base a package writes: tokens, or text where tokens are not the same."""
    assert package.speed is not None and base.speed is not None
    text, base_text = text_speed(package, base), text_speed(base, base)
    if text is not None and base_text is not None:
        return text / base_text
    return package.speed.decode_tps / base.speed.decode_tps


def vocabulary_notes(report: Report) -> list[str]:
    """What was kept of the vocabulary, and speeds in bytes of text a second; nothing where all tokens were."""
    record = next((package.vocabulary for package in report.packages if package.vocabulary), None)
    if record is None:
        return []
    tasks = "" if record.tasks_coverage is None else f", {percent(record.tasks_coverage)} of the tasks' documents"
    speeds = [(row.name, text_speed(row, report.base)) for row in report.rows]
    written = ", ".join(f"{name} {rate(speed)}" for name, speed in speeds if speed is not None)
    return [
        f"The vocabulary was cut to {record.rows:,} of {record.base_rows:,} tokens. They cover "
        f"{percent(record.coverage)} of text that was not counted{tasks}. There a token stands for "
        f"{record.bytes_per_token:.2f} bytes, one of the base for {record.base_bytes_per_token:.2f}.",
        *([f"Text written, bytes a second: {written}."] if written else []),
        "Losses of base and packages are in nats for each token of the base, those of trainings for each that stayed.",
    ]
