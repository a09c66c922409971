"""`compressor speed-table MODEL FILE`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.options import Model
from compressor.cli.output import writable
from supernet.common.progress import say


def speed_table(model: Model, file: Annotated[Path, typer.Argument(help="where to write the table")]) -> None:
    """Time a checkpoint's layers on this device, for a search on another.

    The search's recipe names the file: `speed_table: FILE`.
    """
    import torch  # these take seconds to import

    from evals.speed.table import SpeedTable
    from supernet.checkpoint import open_checkpoint
    from supernet.slicing import extract

    writable("FILE", file)
    checkpoint = open_checkpoint(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = checkpoint.load_model(torch.float32 if device.type == "cpu" else "auto", device)
    SpeedTable.measure(lambda a: extract(network, checkpoint.structure, a), checkpoint.structure).save(file)
    say(f"{file}: written; name it in the recipe of the search (speed_table: {file})")
