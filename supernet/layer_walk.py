"""Passes through a decoder one layer at a time, over batches whose hidden states are kept between the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from supernet.activation import SuperNetwork, removed_layer
from supernet.hooks import Hooks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Through(Exception):
    """Ends the pass of a batch: behind the layer that was asked for, or where a hook has seen what it needs."""


class LayerWalk:
    """A walk from the first layer to the last; several over one network may take turns.

    `states` are what the next layer reads, [rows, length, hidden] for each batch of token ids; empty before the first
    layer. Each step runs one layer as it is then, on the model's own embeddings, masks and positions; the layers
    before it are not run again. So it needs memory for two sets of states and no more.

    `layers` is the name of the list of layers in the model. `removed` says which of them are removed now.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: str,
        batches: Sequence[Tensor],
        removed: Callable[[int], bool] = lambda _: False,
    ) -> None:
        self._batches, self._removed = batches, removed
        path, _, self._name = layers.rpartition(".")
        self._decoder = model.get_submodule(path)
        registered = self._decoder._modules[self._name]  # an attribute may stand in its place, where some are removed
        assert isinstance(registered, nn.ModuleList)
        self._layers = list(registered)
        self.states: list[Tensor] = []
        self.number = 0
        """The batch that is being run, for hooks."""

    @classmethod
    def of(cls, supernet: SuperNetwork, batches: Sequence[Tensor]) -> LayerWalk:
        """A walk through the sub-network that is active at each step."""
        return cls(supernet.model, supernet.family.layers, batches, lambda i: supernet.current.layers[i].removed)

    @torch.no_grad()
    def outputs(self, index: int) -> list[Tensor]:
        """The outputs of layer `index` for each batch whose pass no hook ends; `states` stay as they are."""
        outputs: list[Tensor] = []

        def through(hidden: Tensor, *_: object, **__: object) -> Tensor:
            outputs.append(hidden)
            raise Through

        def entry(hidden: Tensor, *_: object, **__: object) -> Tensor:
            return self.states[self.number]

        own = removed_layer if self._removed(index) else self._layers[index]
        # A last layer has none behind it: its place is taken by the decoder's norm, which sees what leaves it.
        walk: list[object] = [removed_layer] * index + [own] + [through] * (len(self._layers) - 1 - index)
        if index:
            walk[index - 1] = entry
        with self._standing_in(walk), self._last(index, own, outputs):
            for number, ids in enumerate(self._batches):
                self.number = number
                try:
                    self._decoder(input_ids=ids, use_cache=False)
                except Through:
                    continue
        return outputs

    def step(self, index: int) -> None:
        """Run layer `index` on `states`, which become its outputs."""
        self.states = self.outputs(index)

    @contextmanager
    def _standing_in(self, walk: Sequence[object]) -> Iterator[None]:
        shadow = self._decoder.__dict__
        previous = shadow.get(self._name)
        shadow[self._name] = walk
        try:
            yield
        finally:
            if previous is None:
                del shadow[self._name]
            else:
                shadow[self._name] = previous

    @contextmanager
    def _last(self, index: int, own: object, outputs: list[Tensor]) -> Iterator[None]:
        """Within, what leaves the last layer is kept too."""
        if index < len(self._layers) - 1:
            yield
            return
        if not isinstance(own, nn.Module):  # removed: what enters it leaves it
            outputs += self.states
            yield
            return

        def keep(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            outputs.append(first_of(output))

        with Hooks([own.register_forward_hook(keep)]):
            yield


def first_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The tensor that a module puts out, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def residual_scale(supernet: SuperNetwork, ids: Tensor) -> float | None:
    """What the outputs of half-blocks are multiplied by when they are added to the residual stream; None where they are
    not simply added, as in families with a norm behind them. Asked of one pass of the first layer with both."""
    scale = float(getattr(supernet.model.config, "residual_multiplier", 1.0))
    index = next((i for i, full in enumerate(supernet.base.layers) if not full.skip), None)
    if index is None:
        return None
    layer, added = supernet.layers[index], []

    def add(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        added.append(first_of(output).flatten(0, -2))

    ends: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        ends.extend([inputs[0].flatten(0, -2), first_of(output).flatten(0, -2)])

    halves = supernet.halves(index).values()
    with Hooks([*(half.register_forward_hook(add) for half in halves), layer.register_forward_hook(keep)]):
        walk = LayerWalk.of(supernet, [ids])
        for number in range(index + 1):
            walk.step(number)
    first, last = (end.float() for end in ends)
    gap, change = last - first - scale * sum(output.float() for output in added), last - first
    # What the additions round away, in the precision that is computed in, is no gap.
    rounding = torch.finfo(ends[1].dtype).eps * float(torch.maximum(first.abs(), last.abs()).max())
    return scale if float(gap.abs().max()) <= 0.01 * float(change.abs().max()) + 2 * rounding else None
