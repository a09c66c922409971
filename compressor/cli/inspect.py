"""`compressor inspect MODEL`"""

from __future__ import annotations

from pathlib import Path

from compressor.cli.options import Given, Json, Model, RecipeFile, recipe_options
from compressor.cli.output import emit


@recipe_options("space", "effort", "revision", "trust_remote_code", any_key=True)
def inspect(model: Model, given: Given, recipe: RecipeFile = None, json: Json = False) -> None:
    """What a checkpoint holds, what may be cut, what it would cost.

    Trains nothing.
    """
    from compressor.inspection import inspect_job, print_inspection  # imports torch
    from compressor.job import Job
    from compressor.recipe import read_recipe
    from compressor.run import Run

    asked = read_recipe(recipe, {"model": model} | given)
    asked = asked.model_copy(update={"device": "auto"})  # a recipe for a GPU may be looked at without one
    facts = inspect_job(Job(Run(Path()), asked.resolved(), weights=False))
    if not json:
        print_inspection(facts)
    emit(facts, json)
