"""`compressor demo`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.ending import reported
from compressor.cli.offline import stay_offline
from compressor.cli.options import Json
from compressor.cli.output import emit
from compressor.cli.request import announce


def demo(
    output: Annotated[Path, typer.Option(help="the run directory")] = Path("runs/demo"), json: Json = False
) -> None:
    """The whole job on a bundled checkpoint: about three minutes."""
    stay_offline()
    announce("the demo, on the bundled checkpoint")
    from compressor import pipeline  # imports torch
    from compressor.run import Run

    emit(reported(output, pipeline.demo(output)), json)
    pipeline.check_proved(Run(output))
