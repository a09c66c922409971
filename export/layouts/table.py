"""The layouts that a sub-network can be written in, by name. To add one, write its function and name it below.

Every function takes the standalone network that `supernet.slicing.extract` made (`elastic`: an `ElasticSource`), its
architecture, and the destination folder, and returns the package's record; the keyword arguments are those of
`export.package.write_package` (`reference` only where a folder of weights is written).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.layouts import elastic, graphs
from export.layouts.elastic import ElasticSource
from export.layouts.gguf import checks as gguf_checks
from export.layouts.gguf import layout as gguf_layout
from export.layouts.gguf.types import MIXED
from export.layouts.gguf.types import TYPES as GGUF_TYPES
from export.layouts.installed import check_installed
from export.layouts.padded import check_network, pad
from export.package import write_package
from export.package_record import PackageRecord
from supernet.architecture import Architecture
from supernet.common.errors import RequestError, did_you_mean
from supernet.slicing import standalone_config
from supernet.uneven import UNEVEN_PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Write = Callable[..., PackageRecord]


def write_uneven(
    model: PreTrainedModel, architecture: Architecture, destination: Path, **options: Any
) -> PackageRecord:
    """Sizes that differ by layer, in the family's classes and one small code file; plain where they do not differ."""
    return write_package(model, destination, **options)


def write_uniform(
    model: PreTrainedModel, architecture: Architecture, destination: Path, **options: Any
) -> PackageRecord:
    """The family's plain class, no code. Raises `RequestError` for a network that it cannot hold."""
    if model.config.model_type.startswith(UNEVEN_PREFIX):
        raise RequestError(
            "the layers of this architecture differ in size: a uniform package needs a uniform architecture "
            "(pick one), or use --format padded"
        )
    return write_package(model, destination, **options)


def write_padded(
    model: PreTrainedModel, architecture: Architecture, destination: Path, **options: Any
) -> PackageRecord:
    """The uneven network made uniform by zeros: loads everywhere, computes the same, gives back part of the saving."""
    entry = {key: value for key, value in options.pop("entry").items() if key != "params"}
    padded = pad(model, architecture)
    return write_package(padded, destination, entry=entry, layout="padded", expected=model, **options)


GGUF_MIXED = f"gguf-{MIXED}"
"""The layout whose types are those that fit a number of bytes."""
LAYOUTS: dict[str, Write] = {
    "uneven": write_uneven,
    "uniform": write_uniform,
    "padded": write_padded,
    "elastic": elastic.write,
    "gguf": gguf_layout.write,
    **{f"gguf-{kind}": partial(gguf_layout.write, gguf_type=kind) for kind in (*GGUF_TYPES, MIXED) if kind != "f16"},
    "onnx": partial(graphs.write, "onnx"),
    "openvino": partial(graphs.write, "openvino"),
}


def write_layout(
    layout: str, model: PreTrainedModel | ElasticSource, architecture: Architecture, destination: Path, **options: Any
) -> PackageRecord:
    """Write `model` in the layout of that name. Raises `NotHeldError` for a network that it does not hold, and
    `RequestError` for a layout that is unknown or not installed."""
    if layout not in LAYOUTS:
        raise RequestError(f"unknown format '{layout}'; known are: {', '.join(LAYOUTS)}{did_you_mean(layout, LAYOUTS)}")
    check_installed(layout)
    return LAYOUTS[layout](model, architecture, destination, **options)


def check_sizes(layout: str, config: PreTrainedConfig, architecture: Architecture) -> None:
    """Raises `NotHeldError` where a layout does not hold this architecture of the base, as far as its sizes tell: what
    only tracing the network tells (`graphs`), `write_layout` finds."""
    if layout == "padded":
        check_network(standalone_config(config, architecture), architecture)


def needs_uniform(layout: str, config: PreTrainedConfig) -> bool:
    """Whether a layout holds networks of this family only if their layers are alike."""
    return layout.startswith("gguf") and not gguf_checks.holds_uneven(config)


def copies_hold(architecture: Architecture, config: PreTrainedConfig, layouts: Iterable[str]) -> bool:
    """Whether those of `layouts` that are written of a uniform network can hold this architecture of the base."""
    return not any(needs_uniform(layout, config) for layout in layouts) or gguf_checks.holds(config, architecture)
