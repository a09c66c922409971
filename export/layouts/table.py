"""The layouts that a sub-network can be written in, by name. To add one, write its function and name it below.

Every function takes the standalone network that `supernet.slicing.extract` made, its architecture, and the
destination folder, and returns the package; the keyword arguments are those of `export.package.write_package`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.layouts.gguf import checks as gguf_checks
from export.layouts.installed import check_installed
from export.package import write_package
from export.package_record import PackageInfo
from supernet.architecture import Architecture
from supernet.common.errors import RequestError, did_you_mean
from supernet.trust import UNEVEN_PREFIX

if TYPE_CHECKING:
    from torch import nn

Write = Callable[..., PackageInfo]


def write_uneven(model: nn.Module, architecture: Architecture, destination: Path, **options: Any) -> PackageInfo:
    """Sizes that differ by layer, in the family's classes and one small code file; plain where they do not differ."""
    return write_package(model, destination, **options)


def write_uniform(model: nn.Module, architecture: Architecture, destination: Path, **options: Any) -> PackageInfo:
    """The family's plain class, no code. Raises `RequestError` for a network that it cannot hold."""
    config: Any = model.config
    if config.model_type.startswith(UNEVEN_PREFIX):
        raise RequestError(
            "the layers of this architecture differ in size: a uniform package needs a uniform architecture "
            "(pick one), or use --format padded"
        )
    return write_package(model, destination, **options)


def write_padded(model: nn.Module, architecture: Architecture, destination: Path, **options: Any) -> PackageInfo:
    """The uneven network made uniform by zeros: loads everywhere, computes the same, gives back part of the saving."""
    from export.layouts.padded import pad

    entry = {key: value for key, value in options.pop("entry").items() if key != "params"}
    padded = pad(model, architecture)
    return write_package(padded, destination, entry=entry, layout="padded", expected=model, **options)


def write_gguf(model: nn.Module, architecture: Architecture, destination: Path, **options: Any) -> PackageInfo:
    """One file for llama.cpp, weights and tokenizer; `gguf_type` is f32, f16 (default), bf16, q8_0 or q4_0."""
    from export.layouts.gguf.layout import write

    return write(model, architecture, destination, **options)


def write_onnx(model: nn.Module, architecture: Architecture, destination: Path, **options: Any) -> PackageInfo:
    """A graph with its key-value cache for ONNX Runtime, weights in float32."""
    from export.layouts.graphs import write

    return write("onnx", model, architecture, destination, **options)


def write_openvino(model: nn.Module, architecture: Architecture, destination: Path, **options: Any) -> PackageInfo:
    """The same graph for OpenVINO."""
    from export.layouts.graphs import write

    return write("openvino", model, architecture, destination, **options)


LAYOUTS: dict[str, Write] = {
    "uneven": write_uneven,
    "uniform": write_uniform,
    "padded": write_padded,
    "gguf": write_gguf,
    **{f"gguf-{kind}": partial(write_gguf, gguf_type=kind) for kind in ("f32", "bf16", "q8_0", "q4_0")},
    "onnx": write_onnx,
    "openvino": write_openvino,
}


def write_layout(
    layout: str, model: nn.Module, architecture: Architecture, destination: Path, **options: Any
) -> PackageInfo:
    """Write `model` in the layout of that name. Raises `RequestError` for one that is not known."""
    if layout not in LAYOUTS:
        raise RequestError(f"unknown format '{layout}'; known are: {', '.join(LAYOUTS)}{did_you_mean(layout, LAYOUTS)}")
    check_installed(layout)
    return LAYOUTS[layout](model, architecture, destination, **options)


def of_the_uniform_one(layout: str, config: Any) -> bool:
    """Whether a layout is written of the best sub-network whose layers are alike: it holds no other of this family."""
    return layout.startswith("gguf") and not gguf_checks.holds_uneven(config)


def copies_hold(architecture: Architecture, config: Any, layouts: Iterable[str]) -> bool:
    """Whether all of `layouts` that are written of the uniform package can hold an architecture of this base's."""
    return not any(of_the_uniform_one(layout, config) for layout in layouts) or gguf_checks.holds(config, architecture)
