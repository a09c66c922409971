"""The cores that this process may use, and the environment of interpreters that it starts."""

from __future__ import annotations

import os
from pathlib import Path

SMALL_BYTES = 200 * 2**20
"""Networks with fewer bytes of weights are computed on one thread, since more threads make them slower."""


def available_cores() -> int:
    """The number of CPU cores for this process: OMP_NUM_THREADS (its first level) where the user set it, else those
    that the process is bound to."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdecimal() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fresh_environment(scratch: Path, network_bytes: int) -> dict[str, str]:
    """The environment of an interpreter that finds our packages, stays offline, and keeps remote code in `scratch`."""
    root = Path(__file__).resolve().parents[2]
    search_path = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if network_bytes < SMALL_BYTES else {}
    settings = {
        "PYTHONPATH": os.pathsep.join(search_path),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return os.environ | threads | settings


def last_line(output: str) -> str:
    """The last line that is not empty: an exception's message, where a traceback ends the output."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
