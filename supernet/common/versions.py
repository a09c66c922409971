"""Versions of Python, of this tool, and of the packages on which results depend."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import version

from supernet.common.processes import available_cores

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "lm-eval",
    "pymoo",
    "neural-compressor",
    "auto-round",
    "datasets",
    "safetensors",
)


def machine() -> str:
    """The kind of processor and the number of cores for this process, such as `x86_64, 2 cores`."""
    cores = available_cores()
    return f"{platform.machine()}, {cores} core{'s' * (cores > 1)}"


def versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Version by name: `python`, `nas-compressor`, and every installed package of `names`."""
    return {"python": platform.python_version()} | {name: version(name) for name in ("nas-compressor", *names)}
