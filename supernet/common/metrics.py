"""Every measured number as it comes, for whoever wants it: a run's metrics.jsonl, and trackers such as TensorBoard."""

from __future__ import annotations

from collections.abc import Callable

Number = float | int | str | bool | None
Sink = Callable[[str, int | None, dict[str, Number]], None]
"""(kind, step, {name: value}) -> taken."""

_sinks: list[Sink] = []


def send_to(*sinks: Sink) -> None:
    """From here on, these get every number, instead of those before."""
    _sinks[:] = sinks


def record(kind: str, step: int | None = None, /, **values: Number) -> None:
    """Hand numbers on. `kind` says what they are of (`fine-tuning`, `candidate`), `step` where they stand in it."""
    for sink in _sinks:
        sink(kind, step, values)
