"""`compressor front RUN`"""

from __future__ import annotations

from typing import Annotated

import typer

from compressor.cli.options import Json, RunFolder
from compressor.cli.output import emit
from compressor.cli.request import run_recipe
from compressor.names import FRONT_ORDERS
from supernet.common.errors import unknown

Sort = Annotated[str, typer.Option(help=f"by {', '.join(FRONT_ORDERS)}")]


def front(run: RunFolder, sort: Sort = "size", json: Json = False) -> None:
    """What a search found: its Pareto front as a table.

    Each line is a network that `compressor pick RUN --key KEY` picks.
    """
    if sort not in FRONT_ORDERS:
        raise unknown("--sort", sort, FRONT_ORDERS)
    run_recipe(run, {})
    from compressor.front_table import front_rows, print_front  # imports torch

    rows = front_rows(run, sort)
    if not json:
        print_front(run, rows)
    emit(rows, json)
