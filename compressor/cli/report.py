"""`compressor report RUN`"""

from __future__ import annotations

from compressor.cli.ending import reported
from compressor.cli.options import Json, RunFolder
from compressor.cli.output import emit
from compressor.cli.request import run_recipe


def report(run: RunFolder, json: Json = False) -> None:
    """Write report.json and report.html from what the run holds.

    Where nothing changed since it was written, it is only shown.
    """
    from compressor.shown_report import current_report, show_report  # imports pydantic

    if (written := current_report(run)) is not None:
        show_report(written, run)
        emit(reported(run, written), json)
        return
    run_recipe(run, {})
    from compressor import pipeline  # imports torch

    emit(reported(run, pipeline.report(pipeline.resume(run, {}))), json)
