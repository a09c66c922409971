"""`compressor export RUN --quantize int8`"""

from __future__ import annotations

from compressor.cli.ending import ended
from compressor.cli.offline import offline_if_run_is_local
from compressor.cli.options import Given, Json, RunFolder, recipe_options
from compressor.cli.output import emit


@recipe_options("quantize", "group_size", "formats", "heal_tokens", "repair")
def export(run: RunFolder, given: Given, json: Json = False) -> None:
    """Slice, heal, quantize, package and prove what was picked.

    Formats and quantizations named here are added to those that the run has.
    """
    offline_if_run_is_local(run)
    from compressor import pipeline  # imports torch

    job = pipeline.resume(run, given, add=True)
    emit(ended("export", job, pipeline.export(job)), json)
