"""`compressor inspect MODEL`"""

from __future__ import annotations

from pathlib import Path

from compressor.cli.options import Given, Json, Model, RecipeFile, recipe_options
from compressor.cli.output import emit


@recipe_options(
    "space",
    "effort",
    "vocabulary",
    "vocabulary_text",
    "data",
    "text_key",
    "tasks",
    "include_path",
    "revision",
    "trust_remote_code",
)
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
    job = Job(Run(Path()), asked.resolved(), weights=False)
    facts = inspect_job(job)
    if asked.vocabulary.size is not None:
        from compressor.stages.trimming import sizes
        from supernet.loading import checkpoint_folder

        checkpoint_folder(model, asked.revision, weights=False, beside=True)  # a hub model's tokenizer, not its weights
        facts["vocabulary"] = sizes(job, asked.vocabulary.size)
    if not json:
        print_inspection(facts)
    emit(facts, json)
