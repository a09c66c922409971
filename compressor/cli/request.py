"""What a command that creates a run asks for: its recipe and its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compressor.cli.offline import offline_if_local
from compressor.cli.options import Given
from supernet.common.errors import RequestError

if TYPE_CHECKING:
    from compressor.recipe import Recipe

ModelUnlessInRecipe = Annotated[str | None, typer.Argument(help="a checkpoint: a folder or a hub name")]


def recipe_of(file: Path | None, model: str | None, given: Given) -> Recipe:
    """The recipe that the options ask for. Raises `RequestError`."""
    from compressor.recipe import read_recipe  # here, since pydantic takes longer to import than --help may

    recipe = read_recipe(file, {"model": model} | given)
    offline_if_local(recipe)
    return recipe


def required(output: Path | None) -> Path:
    """The run directory. Raises `RequestError` where none was named."""
    if output is None:
        raise RequestError("--output is missing; name the folder that will hold the run")
    return output
