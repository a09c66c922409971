"""`compressor inspect MODEL`"""

from __future__ import annotations

from pathlib import Path

from compressor.cli.options import Given, Json, Model, RecipeFile, recipe_options
from compressor.cli.output import emit
from compressor.cli.request import recipe_of
from supernet.common.progress import working


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
    any_key=True,
)
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
        job = Job(Run(Path("no run")), asked.resolved(), weights=False)
        facts = inspect_job(job)
        if asked.vocabulary.size is not None:
            from compressor.stages.trimming import sizes
            from supernet.loading import checkpoint_folder

            # Of a hub model its tokenizer, and not its weights.
            checkpoint_folder(model, asked.revision, weights=False, beside=True)
            facts["vocabulary"] = sizes(job, asked.vocabulary.size)
    if not json:
        print_inspection(facts)
    emit(facts, json)
