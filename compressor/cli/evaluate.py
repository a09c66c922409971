"""`compressor evaluate PATH_OR_REPO --tasks A,B`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from compressor.cli.options import RECIPE_OPTIONS, Given, IncludePath, Json, recipe_options
from compressor.cli.output import emit, writable
from compressor.cli.request import announce
from supernet.common.files import write_json
from supernet.common.progress import console, working
from supernet.raw_config import local_folder


@recipe_options("device", "dtype", "revision", "trust_remote_code")
def evaluate(
    path_or_repo: Annotated[str, typer.Argument(help="any checkpoint: a folder or a hub name")],
    given: Given,
    tasks: Annotated[str, typer.Option(help=RECIPE_OPTIONS["tasks"].help)],
    output: Annotated[Path | None, typer.Option(help="where to write the results, in lm-eval's format")] = None,
    include_path: IncludePath = None,
    limit: Annotated[int | None, typer.Option(min=1, help="documents per task, or per group")] = None,
    json: Json = False,
) -> None:
    """Score any checkpoint on lm-eval tasks.

    Ours or not, quantized or not, with the code that the search uses.
    """
    from compressor.early_checks import check_tasks  # these import pydantic
    from compressor.recipe_file import read_recipe

    asked = read_recipe(None, {"model": path_or_repo, "tasks": tasks, "include_path": include_path} | given)
    check_tasks(asked)
    local_folder(path_or_repo)
    if output is not None:
        writable("--output", output)
    announce(path_or_repo, "evals.scoring.evaluate")
    from evals.scoring.evaluate import evaluate as run_evaluation  # imports torch

    with working("scoring"):
        results = run_evaluation(path_or_repo, asked.tasks, include_path=include_path, limit=limit, **given)
    if not json:
        console.print(score_table(results["scores"]))
    emit(results, json)
    if output is not None:  # last: a disk that is full by now costs no result
        write_json(output, results)


def score_table(scores: dict[str, dict[str, Any]]) -> Table:
    """Each task's score with its standard error and documents."""
    table = Table(box=box.SIMPLE)
    for column in ("task", "metric", "score", "± standard error", "documents"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for name, score in scores.items():
        error = "" if score["stderr"] is None else f"{score['stderr']:.4f}"
        note = " (near chance)" if score["near_chance"] else ""
        table.add_row(name, score["metric"], f"{score['value']:.4f}{note}", error, f"{score['n']:,}")
    return table
