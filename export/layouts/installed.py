"""What each layout needs beside the project's own dependencies, and whether it is installed."""

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
"""Modules that writing and proving a layout takes, the runtime last: the extra of its name."""
EXPORTERS = "5.23"
"""The oldest transformers whose exporters write graphs that its `ExportedModel` runs."""


def check_installed(layout: str) -> None:
    """Raises `RequestError` where what writing and proving the layout takes is not installed."""
    extra = layout.partition("-")[0]
    if not all(map(importlib.util.find_spec, EXTRAS.get(extra, ()))):
        raise RequestError(f"--format {layout} needs the extra: pip install 'nas-compressor[{extra}]'")
    if layout in ("onnx", "openvino") and Version(version("transformers")) < Version(EXPORTERS):
        raise RequestError(f"--format {layout} needs the exporters of transformers {EXPORTERS} or newer")
