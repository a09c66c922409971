"""`compressor compare RUN`"""

from __future__ import annotations

from typing import Annotated

import typer

from compressor.cli.ending import ended
from compressor.cli.options import Json, RunFolder
from compressor.cli.output import emit
from compressor.cli.request import run_recipe
from compressor.names import BASELINES, OWN_METHODS
from supernet.common.errors import unknown
from supernet.common.progress import console, say


def compare(
    run: RunFolder,
    baselines: Annotated[
        str | None,
        typer.Option(
            help="methods to compare with, comma-separated; all by default. Where ours is repaired also "
            "ours-unrepaired, magnitude-repaired, wanda-repaired, taylor-repaired, flap-repaired"
        ),
    ] = None,
    max_params: Annotated[
        str | None, typer.Option(help="sizes, as in compress; the run's own picks by default")
    ] = None,
    seeds: Annotated[int, typer.Option(help="how often each method is drawn and healed")] = 1,
    others: Annotated[
        list[str] | None, typer.Option("--with", help="a checkpoint compressed elsewhere: a folder or a hub name")
    ] = None,
    json: Json = False,
) -> None:
    """Put the result beside pruning baselines.

    Same base, text, tokens, tasks, documents and size for all.
    """
    known = ("ours", *OWN_METHODS, *BASELINES)
    for name in _listed(baselines):
        if name.removesuffix("-repaired") not in known and name != "ours-unrepaired":
            raise unknown("--baselines", name, known)
    run_recipe(run, {})
    from compressor import pipeline  # these import torch
    from export.report.comparison import summarize, summary, terminal_table

    job = pipeline.resume(run, {})
    rows = pipeline.compare(
        job, baselines=_listed(baselines), sizes=_listed(max_params), seeds=seeds, others=others or []
    )
    tables = summarize(rows)
    console.print(terminal_table(tables))
    for table in tables:
        say(summary(table))
    ended("compare", job, rows)
    emit(rows, json)


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]
