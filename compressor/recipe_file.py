"""A recipe read from YAML and options, with what is wrong in one line, and written with its run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from compressor.names import recipes
from compressor.recipe import Recipe
from supernet.common.errors import RequestError, did_you_mean, reading
from supernet.common.files import load_yaml, read_text, write_text


def read_recipe(file: Path | None, overrides: Mapping[str, object], *, new_targets: bool = False) -> Recipe:
    """A recipe from a YAML file (or nothing) and overrides by dotted name; `new_targets` forgets the file's targets.
    Targets among the overrides are the search's too.

    Raises `RequestError` in one line.
    """
    values: dict[str, Any] = {}
    where = "the command line"
    if file is not None:
        where = f"--recipe {file}"
        if not file.is_file():
            if str(file) not in recipes():
                raise RequestError(f"--recipe {file}: no such file{did_you_mean(str(file), recipes())}")
            file = recipes()[str(file)]
        with reading(f"--recipe {file}: not valid YAML"):
            loaded = load_yaml(read_text(file))
        if not isinstance(loaded, dict):
            raise RequestError(f"--recipe {file}: expected keys and values")
        values = {name: value for name, value in loaded.items() if value is not None}  # no value says nothing
    if new_targets:
        values.pop("targets", None)
    if any(name.startswith("targets.") for name in overrides) and isinstance(values.get("searching"), dict):
        values["searching"].pop("targets", None)
    for name, value in overrides.items():
        if value is None:
            continue
        section, _, key = name.rpartition(".")
        target = values.setdefault(section, {}) if section else values
        if not isinstance(target, dict):
            raise RequestError(f"{where}: '{section}': expected keys and values (got {target!r})")
        target[key or name] = value
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        place = [str(part) for part in error.errors()[0]["loc"]]
        given = any(place[: name.count(".") + 1] == name.split(".") for name, v in overrides.items() if v is not None)
        raise RequestError(f"{'the command line' if given else where}: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """The first problem of a validation error in one line, with the nearest known key for an unknown one."""
    problem = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in problem["loc"][:-1]:
            if part in getattr(section, "model_fields", {}):
                section = section.model_fields[part].annotation
            elif isinstance(part, int):  # one of a list
                section = get_args(section)[0]
        known, word = list(getattr(section, "model_fields", Recipe.model_fields)), str(problem["loc"][-1])
        elsewhere = [key for key in keys() if section is Recipe and key.endswith(f".{word}")]
        if elsewhere:
            return f"unknown key '{path}'; did you mean {', '.join(elsewhere)}?"
        return f"unknown key '{path}'{did_you_mean(word, known) or '; known are ' + ', '.join(known)}"
    if problem["type"] == "missing":
        return f"'{path}' is missing"
    hint = ""
    if problem["type"] == "literal_error":
        hint = did_you_mean(str(problem["input"]), re.findall(r"'([^']+)'", problem["ctx"]["expected"]), 1)
    return f"'{path}': {problem['msg'].removeprefix('Value error, ')} (got {problem['input']!r}){hint}"


def keys() -> list[str]:
    """Every key of a recipe with its section, such as `healing.tokens`."""
    dotted = []
    for name, field in Recipe.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        dotted += [name] if inner is None else [f"{name}.{key}" for key in inner]
    return dotted


def write_recipe(recipe: Recipe, path: Path, extra: Mapping[str, object]) -> None:
    """`recipe.yaml`: the resolved recipe, with versions and fingerprints under `provenance` for the reader."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    provenance = yaml.safe_dump({"provenance": extra}, sort_keys=False)
    commented = "".join(f"# {line}\n" for line in provenance.splitlines())
    write_text(path, text + "\n# Written for the reader; not part of the recipe:\n" + commented)
