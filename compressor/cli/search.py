"""`compressor search RUN`"""

from __future__ import annotations

from typing import Annotated

import typer

from compressor.cli.ending import ended
from compressor.cli.options import Given, Json, Redo, RunFolder, recipe_options
from compressor.cli.output import emit
from compressor.cli.request import run_recipe

Control = Annotated[
    bool,
    typer.Option("--control", help="also measure as many random sub-networks, and say whether the search beat them"),
]


@recipe_options(
    "tasks", "include_path", "evaluations", "limit", "max_params", "warm_start", "workers", "repair", any_key=True
)
def search(run: RunFolder, given: Given, control: Control = False, redo: Redo = None, json: Json = False) -> None:
    """Search a fine-tuned run.

    Measured sub-networks are kept and never measured twice. Of a run that was searched, --max-params and --evaluations
    ask for so many more, around that size; then it is picked.
    """
    run_recipe(run, given)
    from compressor import pipeline  # imports torch

    job = pipeline.resume_search(run, given, redo=redo)
    front = pipeline.search(job)
    if control:
        pipeline.measure_control(job)
    if any(name.startswith("targets.") for name in given):
        ended("pick", job, pipeline.pick(job))
    else:
        ended("search", job, front)
    emit(front, json)
