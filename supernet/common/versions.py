"""Versions of Python, of this tool, and of the packages on which results depend."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import version

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


def versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Version by name: `python`, `nas-compressor`, and every installed package of `names`."""
    return {"python": platform.python_version()} | {name: version(name) for name in ("nas-compressor", *names)}
