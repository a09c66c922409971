"""`compressor list tasks|spaces|families|baselines|recipes|algorithms|formats`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor import names
from compressor.cli.options import IncludePath, Json
from compressor.cli.output import emit
from supernet.common.errors import RequestError, unknown

Listed = dict[str, str]
"""What is listed by name, each with a sentence or with nothing."""


def list_names(
    what: Annotated[
        str | None, typer.Argument(help="tasks, spaces, families, baselines, recipes, algorithms or formats")
    ] = None,
    include_path: IncludePath = None,
    json: Json = False,
) -> None:
    """Show the names that an option or a recipe takes, one a line."""
    if what is None:
        raise RequestError(f"list: say what: {', '.join(LISTS)}")
    if what not in LISTS:
        raise unknown("list", what, LISTS)
    listed = _tasks(include_path) if what == "tasks" else LISTS[what]()
    if not json:
        width = max(map(len, listed), default=0)
        for name, sentence in listed.items():
            print(f"{name:<{width}}  {sentence}".rstrip())
    emit(listed, json)


def _tasks(include_path: str | None = None) -> Listed:
    """Those of a folder where one is named, else lm-eval's."""
    if include_path is None:
        return dict.fromkeys(names.lm_eval_tasks(), "")
    from compressor.early_checks import task_files, tasks_of  # imports pydantic

    if not Path(include_path).expanduser().is_dir():
        raise RequestError(f"--include-path {include_path}: no such folder")
    return dict.fromkeys(sorted(tasks_of(task_files(Path(include_path).expanduser()))), "")


def _spaces() -> Listed:
    from search.presets import PRESETS  # imports numpy

    return {name: _first_sentence(preset.__doc__) for name, preset in PRESETS.items()}


def _families() -> Listed:
    from supernet.families import families  # imports every family's file

    return {name: family.class_name("ForCausalLM") for name, family in sorted(families().items())}


def _baselines() -> Listed:
    from evals.baselines import baselines  # imports torch

    return {name: baseline.paper for name, baseline in baselines().items()}


def _recipes() -> Listed:
    firsts = {name: file.read_text(encoding="utf-8").partition("\n")[0] for name, file in names.recipes().items()}
    return {name: first.lstrip("# ").partition(". ")[0].rstrip(".") for name, first in firsts.items()}


def _first_sentence(docstring: str | None) -> str:
    return " ".join((docstring or "").split()).partition(". ")[0].rstrip(".")


LISTS = {
    "tasks": _tasks,
    "spaces": _spaces,
    "families": _families,
    "baselines": _baselines,
    "recipes": _recipes,
    "algorithms": lambda: dict(names.ALGORITHMS),
    "formats": lambda: dict(names.FORMATS),
}
