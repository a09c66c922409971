"""Trackers that get every measured number, through accelerate: TensorBoard, Weights & Biases, Trackio."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from compressor.names import TRACKERS
from compressor.recipe import Recipe
from supernet.common.errors import RequestError
from supernet.common.metrics import Number, Sink

if TYPE_CHECKING:
    from accelerate import Accelerator


def check_trackers(recipe: Recipe) -> None:
    """Raises `RequestError` for a tracker that is not installed."""
    for name in recipe.report_to:
        modules = TRACKERS[name]
        if not any(map(find_spec, modules)):
            raise RequestError(f"--report-to {name}: it is not installed; pip install {modules[0]}")


def open_trackers(recipe: Recipe, accelerator: Accelerator) -> list[Sink]:
    """A sink for each tracker that the recipe names; an accelerator made with their names starts them."""
    if not recipe.report_to:
        return []
    accelerator.init_trackers("nas-compressor", config=_flat(recipe.model_dump(mode="json")))
    return [_sink(tracker, by_step=tracker.name == "tensorboard") for tracker in accelerator.trackers]


def _sink(tracker: Any, by_step: bool) -> Sink:
    """Trackers but TensorBoard know one count of steps for all kinds of numbers, so there the step is a number too."""

    def take(kind: str, step: int | None, values: dict[str, Number]) -> None:
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        if by_step:
            tracker.log(numbers, step=step or 0)
        else:
            tracker.log(numbers | ({} if step is None else {f"{kind}/step": step}))

    return take


def _flat(values: dict[str, Any], before: str = "") -> dict[str, str | int | float | bool]:
    """The recipe by dotted keys, as trackers take it."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{before}{key}.")
        else:
            flat[before + key] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat
