"""`compressor report RUN`"""

from __future__ import annotations

from compressor.cli.options import Json, RunFolder
from compressor.cli.output import emit
from compressor.cli.request import run_recipe


def report(run: RunFolder, json: Json = False) -> None:
    """Write report.json and report.html from what the run holds."""
    run_recipe(run, {})
    from compressor import pipeline  # imports torch

    emit(pipeline.report(pipeline.resume(run, {})), json)
