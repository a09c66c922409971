"""`compressor pick RUN --max-params 0.8`"""

from __future__ import annotations

from compressor.cli.options import TARGETS, Given, Json, RunFolder, recipe_options
from compressor.cli.output import emit
from compressor.cli.request import run_recipe


@recipe_options(*TARGETS, "bits")
def pick(run: RunFolder, given: Given, json: Json = False) -> None:
    """Choose from what was measured, for new targets."""
    run_recipe(run, given)
    from compressor import pipeline  # imports torch

    emit(pipeline.pick(pipeline.resume(run, given, replace_targets=True)), json)
