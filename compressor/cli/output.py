"""What commands print: results as JSON on stdout; everything else goes to stderr."""

from __future__ import annotations

import json
from typing import Any

from supernet.training.accelerator import is_main


def emit(value: Any, as_json: bool) -> None:
    """Print a result where JSON was asked for; of several processes, the first does."""
    if as_json and is_main():
        print(json.dumps(value, indent=1))
