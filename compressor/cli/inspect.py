"""`compressor inspect MODEL`"""

from __future__ import annotations

from pathlib import Path

from compressor.cli.options import Given, Json, Model, RecipeFile, recipe_options
from compressor.cli.output import emit
from compressor.cli.request import recipe_of
from supernet.common.progress import working


@recipe_options("space", "effort", "revision", "trust_remote_code", any_key=True)
def inspect(model: Model, given: Given, recipe: RecipeFile = None, json: Json = False) -> None:
    """What a checkpoint holds, what may be cut, what it would cost.

    Trains nothing.
    """
    given = given | {"device": "auto"}  # a recipe for a GPU may be looked at without one
    asked = recipe_of(recipe, model, given, of="compressor.inspection")
    from compressor.inspection import inspect_job, print_inspection  # these import torch
    from compressor.job import Job
    from compressor.run import Run

    with working("looking at the network"):
        facts = inspect_job(Job(Run(Path()), asked.resolved(), weights=False))
    if not json:
        print_inspection(facts)
    emit(facts, json)
