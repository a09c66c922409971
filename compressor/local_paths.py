"""Files and folders that a recipe names: where they lie, so that a run can be used from any folder, and moved.

A recipe keeps what the user wrote. Beside it, `RUN/paths.json` says for every name that was local where it lay: as an
absolute path, and relative to the run. Run and inputs can so be moved together. What was local is never looked for on
the hub.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from compressor.names import WARM_STARTS
from compressor.recipe import Recipe
from supernet.common.errors import RequestError
from supernet.training.sources import is_generated


class LocalPath(BaseModel):
    """Where something local lay when it was named."""

    model_config = ConfigDict(frozen=True)

    absolute: str
    relative: str
    """Seen from the run directory."""


LocalPaths = Mapping[str, LocalPath]
"""{what the recipe says: where that is}."""


def remembered(recipe: Recipe, run: Path) -> dict[str, LocalPath]:
    """Everything in a recipe that is a file or folder, seen from the current folder."""
    names: list[str] = []

    def collect(_: str, name: str) -> str:
        names.append(name)
        return name

    _replaced(recipe, collect)
    here = {name: Path(name).expanduser() for name in names}
    return {
        name: LocalPath(absolute=_absolute(path), relative=os.path.relpath(path, run))
        for name, path in here.items()
        if path.exists()
    }


def localized(recipe: Recipe, run: Path, paths: LocalPaths) -> Recipe:
    """A copy of a recipe that names everything local by where it lies now.

    Raises `RequestError` for what lies neither where it lay nor, seen from the run, where it lay.
    """

    def place(key: str, name: str) -> str:
        if name not in paths:
            return name
        known = paths[name]
        moved = run / known.relative
        for path in (Path(known.absolute), moved):
            if path.exists():
                return _absolute(path)
        raise RequestError(
            f"{key}: {name} lay at {known.absolute} when the run named it, and is there no more, nor at "
            f"{_absolute(moved)}; put it back"
        )

    return _replaced(recipe, place)


def _replaced(recipe: Recipe, replace: Callable[[str, str], str]) -> Recipe:
    """A copy of a recipe with `replace(key, value)` for everything that may be a path."""
    copy = recipe.model_copy(deep=True)
    copy.model = replace("model", copy.model)
    for key in ("data", "include_path", "speed_table"):
        value = getattr(copy, key)
        if value is not None and not (key == "data" and is_generated(value)):
            setattr(copy, key, replace(key, value))
    if copy.vocabulary.text is not None:
        copy.vocabulary.text = replace("vocabulary.text", copy.vocabulary.text)
    # Names of spaces, criteria and warm starts are none of files, even where a file is called so.
    if isinstance(copy.space, str) and Path(copy.space).suffix in (".yaml", ".yml"):
        copy.space = replace("space", copy.space)
    ordering = copy.finetuning.ordering
    if ordering is not None and Path(ordering).suffix == ".safetensors":
        copy.finetuning.ordering = replace("finetuning.ordering", ordering)
    copy.searching.warm_start = [
        name if name in WARM_STARTS else replace("searching.warm_start", name) for name in copy.searching.warm_start
    ]
    return copy


def _absolute(path: Path) -> str:
    """An absolute path without `..`; a link keeps its name, so that it may be pointed elsewhere."""
    return os.path.normpath(path.absolute())
