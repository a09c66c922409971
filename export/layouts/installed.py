"""The optional dependencies of each layout, and whether they are installed."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version

from packaging.version import Version

from supernet.common.errors import RequestError

EXTRAS = {
    "gguf": ("gguf", "xllamacpp"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
}
"""Modules that writing and proving a layout needs, the runtime last; the project's extra has the layout's name."""

EXPORTERS = "5.23"
"""The oldest transformers whose exporters write graphs that its `ExportedModel` runs."""


def check_installed(layout: str) -> None:
    """Raises `RequestError` where something is not installed that writing and proving the layout needs."""
    extra = layout.partition("-")[0]
    if not all(map(importlib.util.find_spec, EXTRAS.get(extra, ()))):
        raise RequestError(f"--format {layout} needs the extra: pip install 'nas-compressor[{extra}]'")
    if layout in ("onnx", "openvino") and Version(version("transformers")) < Version(EXPORTERS):
        raise RequestError(f"--format {layout} needs the exporters of transformers {EXPORTERS} or newer")
