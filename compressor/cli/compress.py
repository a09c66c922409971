"""`compressor compress MODEL --data SRC --tasks A,B --output RUN`"""

from __future__ import annotations

from typing import Annotated

import typer

from compressor.cli.ending import reported
from compressor.cli.options import RECIPE_OPTIONS, Given, Json, Output, RecipeFile, Redo, recipe_options
from compressor.cli.output import emit
from compressor.cli.request import ModelUnlessInRecipe, recipe_of, required

Plan = Annotated[bool, typer.Option("--plan", help="show what would be done, and what it costs; do nothing")]


@recipe_options(*RECIPE_OPTIONS, any_key=True)
def compress(
    given: Given,
    model: ModelUnlessInRecipe = None,
    output: Output = None,
    recipe: RecipeFile = None,
    redo: Redo = None,
    plan: Plan = False,
    json: Json = False,
) -> None:
    """Fine-tune once, search, slice, heal, quantize, prove, report.

    The whole job. Stopped and run again, it resumes.
    """
    asked = recipe_of(recipe, model, given, output, redo)
    from compressor import pipeline  # imports torch
    from compressor.run import Run

    if plan:
        emit(pipeline.plan(asked, output), json)
        return
    run = required(output)
    emit(reported(run, pipeline.compress(asked, run, redo=redo)), json)
    pipeline.check_proved(Run(run))
