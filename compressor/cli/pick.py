"""`compressor pick RUN --max-params 0.8`, or `--prefer speed`, or `--key KEY`"""

from __future__ import annotations

from compressor.cli.ending import ended
from compressor.cli.options import TARGETS, Given, Json, RunFolder, recipe_options
from compressor.cli.output import emit
from compressor.cli.request import run_recipe
from supernet.common.errors import RequestError
from supernet.common.progress import say


@recipe_options(*TARGETS, "prefer", "key", "bits")
def pick(run: RunFolder, given: Given, json: Json = False) -> None:
    """Choose from what was measured, for new targets or by a key."""
    if given.get("key") == "":
        say("note: --key is empty, so the pick is by the targets")  # a variable of the shell that is not set
    if given.get("key") and any(name.startswith("targets.") for name in given):
        raise RequestError("--key names one network; leave the targets out, or the key")
    run_recipe(run, given)
    from compressor import pipeline  # imports torch

    job, picks = pipeline.resume_pick(run, given)
    emit(ended("pick", job, picks), json)
