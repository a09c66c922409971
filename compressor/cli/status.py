"""`compressor status RUN`"""

from __future__ import annotations

from compressor.cli.options import Json, RunFolder
from compressor.cli.output import emit


def status(run: RunFolder, json: Json = False) -> None:
    """How far a run is: done, running, left, disk used, last error."""
    from compressor.run_status import print_status, run_status  # imports pydantic

    found = run_status(run)
    if not json:
        print_status(found)
    emit(found, json)
