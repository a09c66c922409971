"""How to get a run again: as a recipe file, and as a command line."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from compressor.cli.options import RECIPE_OPTIONS
from compressor.local_paths import localized
from compressor.recipe import Recipe
from compressor.run import Run


def recipe_text(folder: Path) -> str:
    """The recipe of a run as YAML, budgets and all, without the keys that say nothing. What is local is named by where
    it lies now. Raises `RequestError` where the folder is no run, or something that it names is gone."""
    run = Run(folder)
    run.check_exists()
    recipe = localized(run.recipe(), folder, run.local_paths())
    lines = [
        f"# Made from {folder} by compressor recipe. It makes the same run again, on the same kind of machine:",
        "#",
        "#   compressor compress --recipe THIS_FILE --output runs/again",
        "#",
    ]
    return "\n".join(lines) + "\n" + yaml.safe_dump(said(recipe), sort_keys=False)


def said(recipe: BaseModel) -> dict[str, object]:
    """What a recipe says beyond the defaults, as YAML holds it."""
    values: dict[str, object] = {}
    for name, field in type(recipe).model_fields.items():
        value = getattr(recipe, name)
        if isinstance(value, BaseModel):
            if inner := said(value):
                values[name] = inner
        elif field.is_required() or value != field.get_default(call_default_factory=True):
            values[name] = recipe.model_dump(mode="json")[name]
    return values


def command_line(recipe: Recipe, output: str) -> str:
    """The command that makes a run of this recipe, on one line."""
    flat = _flat(said(recipe))
    options = {option.key: (option, name) for name, option in RECIPE_OPTIONS.items()}
    words = ["compressor", "compress", str(flat.pop("model"))]
    for key, value in sorted(flat.items(), key=lambda item: item[0] not in options):  # those that have an option first
        if key not in options or isinstance(value, dict):
            words += ["--set", f"{key}={_text(value)}"]
            continue
        option, name = options[key]
        flag = option.flag or f"--{name.replace('_', '-')}"
        if option.kind is bool:
            words += [flag] if value else []
        else:
            words += [flag, {True: "on", False: "off"}[value] if isinstance(value, bool) else _text(value)]
    return shlex.join([*words, "--output", output])


def _flat(values: dict[str, object], before: str = "") -> dict[str, object]:
    """{dotted key: value}; `loss`, `space` and the search's targets, whose values have keys of their own,
    stay whole."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("loss", "space") and before + key != "searching.targets":
            flat |= _flat(value, f"{before}{key}.")
        else:
            flat[before + key] = value
    return flat


def _text(value: Any) -> str:
    """A value as it is written behind an option, which `--set` reads as YAML."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return ",".join(value)
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
