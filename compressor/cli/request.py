"""What a command that creates a run asks for: its recipe and its folder."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compressor import __version__
from compressor.cli.offline import offline_if_local
from compressor.cli.options import Given
from supernet.common.errors import RequestError
from supernet.common.progress import say, working

if TYPE_CHECKING:
    from compressor.recipe import Recipe

ModelUnlessInRecipe = Annotated[str | None, typer.Argument(help="a checkpoint: a folder or a hub name")]


def recipe_of(
    file: Path | None,
    model: str | None,
    given: Given,
    output: Path | None = None,
    redo: str | None = None,
    of: str = "compressor.pipeline",
) -> Recipe:
    """The recipe that the options ask for, of the command whose work is done by a module; it is imported at the end.

    Raises `RequestError` before that, for all that is wrong with the recipe and with `output` that can be seen without
    torch.
    """
    # Here, since pydantic takes longer to import than --help may.
    from compressor.early_checks import check_request
    from compressor.local_paths import localized, remembered
    from compressor.recipe_file import read_recipe
    from compressor.run import Run

    recipe = read_recipe(file, {"model": model} | given)
    if output is not None:
        run = Run(output)
        run.check_free()
        paths = run.local_paths() | remembered(recipe, output)
        check_request(localized(recipe, output, paths), redo)
    else:
        check_request(recipe, redo)
    offline_if_local(recipe)
    announce(recipe.model, of)
    return recipe


def announce(what: str, module: str = "compressor.pipeline") -> None:
    """Say what a command that computes is about, then import the module that does it: with torch and others behind it,
    that takes seconds."""
    say(f"compressor {__version__}: {what}")
    with working("loading libraries"):
        import_module(module)


def run_recipe(run: Path, given: Given) -> None:
    """Refuse a folder that is no run, and options that its recipe cannot have, before anything heavy is imported."""
    from compressor.early_checks import check_names, check_tasks  # here, as above
    from compressor.local_paths import localized, remembered
    from compressor.recipe_file import read_recipe
    from compressor.run import Run

    opened = Run(run)
    opened.check_exists()
    recipe = read_recipe(opened.recipe_file, given)
    recipe = localized(recipe, run, opened.local_paths() | remembered(recipe, run))
    if given:  # what the run has already was looked at when it began, perhaps where more is installed
        check_names(recipe)
        check_tasks(recipe)
    offline_if_local(recipe)
    announce(str(run))


def required(output: Path | None) -> Path:
    """The run directory. Raises `RequestError` where none was named."""
    if output is None:
        raise RequestError("--output is missing; name the folder that will hold the run")
    return output
