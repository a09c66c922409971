"""Hooks, and frozen weights, for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


class Hooks:
    """The handles of registered hooks. `with Hooks(handles):` removes them at the end, after an error too."""

    def __init__(self, handles: Iterable[RemovableHandle] = ()) -> None:
        self._handles = list(handles)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within, no parameter of the model needs a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
