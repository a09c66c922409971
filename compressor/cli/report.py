"""`compressor report RUN`"""

from __future__ import annotations

from compressor.cli.ending import reported
from compressor.cli.offline import offline_if_run_is_local
from compressor.cli.options import Json, RunFolder
from compressor.cli.output import emit


def report(run: RunFolder, json: Json = False) -> None:
    """Write report.json and report.html from what the run holds."""
    offline_if_run_is_local(run)
    from compressor import pipeline  # imports torch

    emit(reported(run, pipeline.report(pipeline.resume(run, {}))), json)
