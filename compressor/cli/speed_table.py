"""`compressor speed-table MODEL FILE`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.options import Model
from compressor.cli.output import writable
from compressor.cli.request import announce
from supernet.common.progress import bar, say
from supernet.raw_config import local_folder


def speed_table(model: Model, file: Annotated[Path, typer.Argument(help="where to write the table")]) -> None:
    """Time a checkpoint's layers on this device, for a search on another.

    The search's recipe names the file: `speed_table: FILE`.
    """
    writable("FILE", file)
    local_folder(model)
    announce(model, "evals.speed.table")
    import torch  # these take seconds to import

    from compressor.job import threads_to_score
    from evals.speed.table import SpeedTable
    from supernet.checkpoint import open_checkpoint
    from supernet.common.processes import available_cores
    from supernet.slicing import extract

    checkpoint = open_checkpoint(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # As a search computes here: what is timed in another way would not be what it compares.
    if device.type == "cpu":
        parameters = checkpoint.structure.parameters(checkpoint.structure.base)
        torch.set_num_threads(threads_to_score(parameters, available_cores()))
    network = checkpoint.load_model(torch.float32 if device.type == "cpu" else torch.bfloat16, device)
    with bar("timing the layers", SpeedTable.steps(checkpoint.structure, device)) as progress:
        table = SpeedTable.measure(
            lambda a: extract(network, checkpoint.structure, a), checkpoint.structure, on_step=progress.advance
        )
    table.save(file)
    say(f"{file}: written; name it in the recipe of the search (speed_table: {file})")
