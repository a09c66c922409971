"""`compressor finetune MODEL --data SRC --output RUN`"""

from __future__ import annotations

from compressor.cli.ending import ended
from compressor.cli.options import Given, Json, Output, RecipeFile, Redo, recipe_options
from compressor.cli.output import emit
from compressor.cli.request import ModelUnlessInRecipe, recipe_of, required

OPTIONS = ("data", "tasks", "include_path", "space", "vocabulary", "vocabulary_text", "repair", "effort")


@recipe_options(
    *OPTIONS, "train_tokens", "max_params", "seed", "device", "dtype", "revision", "trust_remote_code", any_key=True
)
def finetune(
    given: Given,
    model: ModelUnlessInRecipe = None,
    output: Output = None,
    recipe: RecipeFile = None,
    redo: Redo = None,
    json: Json = False,
) -> None:
    """Create a run and fine-tune its super-network."""
    asked = recipe_of(recipe, model, given, output, redo)
    from compressor import pipeline  # imports torch

    job = pipeline.start(asked, required(output), redo=redo, tasks_needed=False)
    emit(ended("finetune", job, pipeline.finetune(job)), json)
