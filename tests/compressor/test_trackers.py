"""Numbers go to metrics.jsonl, and to a tracker where one is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compressor.job import Job
from compressor.recipe import Recipe
from compressor.run import Run
from compressor.trackers import check_trackers, open_trackers
from supernet.common.errors import RequestError
from supernet.common.metrics import record, send_to


def test_every_number_is_a_line_of_json(tmp_path: Path) -> None:
    run = Run(tmp_path)
    send_to(run.keep_metric)
    try:
        record("healing", 3, loss=1.5, learning_rate=1e-3)
        record("candidate", key="abc", quality=float("nan"))
    finally:
        send_to()
    record("healing", 4, loss=1.4)  # nobody listens
    rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "time"} for row in rows] == [
        {"kind": "healing", "step": 3, "loss": 1.5, "learning_rate": 1e-3},
        {"kind": "candidate", "key": "abc", "quality": "nan"},  # JSON has no such number
    ]


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.trackers.TRACKERS", {"wandb": ("no_such_module",)})
    with pytest.raises(RequestError, match="--report-to wandb: it is not installed; pip install no_such_module"):
        check_trackers(Recipe(model="m", report_to=["wandb"]))
    check_trackers(Recipe.model_validate({"model": "m", "report_to": "none"}))


def test_tensorboard_gets_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = Job(Run(tmp_path), Recipe(model="m", report_to=["tensorboard"], device="cpu"))
    for sink in open_trackers(job.recipe, job.accelerator):
        for step, loss in enumerate((1.5, 1.25)):
            sink("healing", step, {"loss": loss, "note": "text is no number"})
    (events,) = (file for file in job.run.tracking.rglob("events.*") if file.parent.name == "nas-compressor")
    read = EventAccumulator(str(events)).Reload()
    assert [event.value for event in read.Scalars("healing/loss")] == [1.5, 1.25]
