"""`compressor export RUN --quantize int8`"""

from __future__ import annotations

from compressor.cli.ending import ended
from compressor.cli.options import Given, Json, RunFolder, recipe_options
from compressor.cli.output import emit
from compressor.cli.request import run_recipe


@recipe_options("quantize", "group_size", "rounding_steps", "formats", "heal_tokens", "repair", any_key=True)
def export(run: RunFolder, given: Given, json: Json = False) -> None:
    """Slice, heal, quantize, package and prove what was picked.

    Formats and quantizations named here are added to those that the run has.
    """
    run_recipe(run, given)
    from compressor import pipeline  # imports torch

    job = pipeline.resume_export(run, given)
    emit(ended("export", job, pipeline.export(job)), json)
    pipeline.check_proved(job.run)
