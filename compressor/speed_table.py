"""Measure a speed table of a checkpoint on this device, for a search on another.

    python -m compressor.speed_table MODEL FILE

The search's recipe names it: `speed_table: FILE`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from evals.speed.table import SpeedTable
from supernet.checkpoint import open_checkpoint
from supernet.common.errors import RequestError
from supernet.slicing import extract


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m compressor.speed_table", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint: a folder or a hub name")
    parser.add_argument("file", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    try:
        checkpoint = open_checkpoint(arguments.model)
    except RequestError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = checkpoint.load_model(torch.float32 if device.type == "cpu" else "auto", device)
    SpeedTable.measure(lambda a: extract(model, checkpoint.structure, a), checkpoint.structure).save(arguments.file)


if __name__ == "__main__":
    main()
