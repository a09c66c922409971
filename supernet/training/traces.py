"""What a forward pass leaves for the losses: hidden states and, where asked for, what layers and attention put out.

No pass computes logits. A `Trace` carries the last hidden states and the network's own head, so that a loss can go
through a vocabulary of any size in chunks of tokens (`supernet.training.losses`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, Axis, unit_counts
from supernet.families import families
from supernet.training.data import Batch

Head = Callable[[Tensor], Tensor]
"""Last hidden states [tokens, hidden] -> logits [tokens, vocabulary]."""


@dataclass(frozen=True)
class HiddenStates:
    """One network's pass over a batch.

    `hidden` [tokens, hidden] and `targets` [tokens] are those of the positions that are learnt from. `layers` maps a
    layer of the base to its output [rows, length, hidden]; `attention` are the queries, keys and values of the last
    attention block, each [rows, length, channels], before rotation. Both are empty unless a `Recorder` kept them.
    """

    batch: Batch
    hidden: Tensor
    targets: Tensor
    head: Head
    vocabulary: int
    head_dim: int = 0
    layers: dict[int, Tensor] = field(default_factory=dict)
    attention: list[Tensor] = field(default_factory=list)

    def detached(self) -> HiddenStates:
        """The same as a teacher: nothing flows back."""
        return replace(
            self,
            hidden=self.hidden.detach(),
            layers={index: states.detach() for index, states in self.layers.items()},
            attention=[projected.detach() for projected in self.attention],
        )


class Recorder:
    """Keeps, in every pass of a super-network's model, the outputs of its layers or the projections of its attention.

    A context manager: its hooks are gone afterwards.
    """

    def __init__(self, supernet: SuperNetwork, *, layers: bool = False, attention: bool = False) -> None:
        self.layers: dict[int, Tensor] = {}
        self.head_dim = supernet.structure.head_dim
        self._supernet = supernet
        self._projected: dict[int, dict[int, list[Tensor]]] = {}
        self._handles: list[Any] = []
        modules = dict(supernet.model.named_modules())  # the registered ones, whatever is shadowed
        if layers:
            for index, layer in enumerate(modules[supernet.family.layers].children()):
                self._handles.append(layer.register_forward_hook(partial(self._keep_layer, index)))
        if attention:
            for position, tensor in enumerate(supernet.structure.tensors):
                module = modules[tensor.name.rpartition(".")[0]]
                outputs = tensor.axes[-1 if isinstance(module, Conv1D) else 0]  # GPT-2 stores its weights transposed
                units = {unit for unit, _ in outputs.blocks}
                if tensor.half == "attention" and tensor.role == "linear" and units & {"query", "kv"}:
                    assert tensor.layer is not None
                    keep = partial(self._keep_projection, tensor.layer, position, outputs)
                    self._handles.append(module.register_forward_hook(keep))

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def clear(self) -> None:
        self.layers.clear()
        self._projected.clear()

    @property
    def attention(self) -> list[Tensor]:
        """Queries, keys and values of the last layer that has attention, in the order of the family's table (one
        tensor of all three, head by head, where the family interleaves them)."""
        last = self._projected[max(self._projected)] if self._projected else {}
        return [part for position in sorted(last) for part in last[position]]

    def _keep_layer(self, index: int, _: nn.Module, __: Any, output: Any) -> None:
        self.layers[index] = output[0] if isinstance(output, tuple) else output

    def _keep_projection(self, layer: int, position: int, axis: Axis, _: nn.Module, __: Any, output: Tensor) -> None:
        counts = unit_counts(0, self._supernet.current.layers[layer])
        widths = [width * counts[unit] for unit, width in axis.blocks]
        self._projected.setdefault(layer, {})[position] = list(output.split(widths, dim=-1))


class LayerCache:
    """Passes over the same batches, one architecture after another, that begin where two in a row begin to differ.

    Of the last pass over each batch it keeps what the layers put out, [rows, length, hidden] each, and hands that out
    again for as many leading layers as the next architecture has in common. True as long as nobody moves the weights.
    """

    def __init__(self, supernet: SuperNetwork) -> None:
        self._supernet = supernet
        self._kept: dict[int, tuple[Architecture, dict[int, Any]]] = {}

    def trace(self, number: int, batch: Batch) -> HiddenStates:
        """As `trace` of the active sub-network, over the batch of this `number`."""
        now = self._supernet.current
        before, known = self._kept.pop(number, (now, {}))
        common = next((i for i, (a, b) in enumerate(zip(now.layers, before.layers, strict=True)) if a != b), None)
        if now.hidden_size != before.hidden_size:
            common = 0
        outputs = {index: output for index, output in known.items() if common is None or index < common}
        shadowed, handles = [], []
        for index, layer in enumerate(self._supernet.layers):
            if index in outputs:
                layer.__dict__["forward"] = partial(_again, outputs[index])
                shadowed.append(layer)
            else:
                handles.append(layer.register_forward_hook(partial(_keep, outputs, index)))
        try:
            found = trace(self._supernet.model, batch)
        finally:
            for layer in shadowed:
                del layer.__dict__["forward"]
            for handle in handles:
                handle.remove()
        self._kept[number] = (now, outputs)
        return found


def _again(output: Any, *_: Any, **__: Any) -> Any:
    return output


def _keep(outputs: dict[int, Any], index: int, _: nn.Module, __: Any, output: Any) -> None:
    outputs[index] = output


class _Passed:
    """What a decoder returns, as far as a head looks at it: hidden states, and nothing else."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]


def decoder_of(model: Any) -> tuple[nn.Module, str]:
    """Where a model, standalone and uneven too, keeps the decoder that feeds its head: the parent module and a name."""
    family = families()[model.config.model_type.removeprefix("uneven_")]
    parent, _, name = family.layers.rpartition(".")[0].rpartition(".")
    return model.get_submodule(parent), name


def trace(model: Any, batch: Batch, recorder: Recorder | None = None) -> HiddenStates:
    """Run a causal language model up to its head, with whatever sub-network is active in it."""
    if recorder is not None:
        recorder.clear()
    parent, name = decoder_of(model)
    hidden = getattr(parent, name)(**batch.inputs, use_cache=False).last_hidden_state
    return HiddenStates(
        batch,
        hidden[:, :-1][batch.learnt],
        batch.labels[:, 1:][batch.learnt],
        partial(head_of, model, weight=model.get_output_embeddings().weight),
        model.config.vocab_size,
        recorder.head_dim if recorder else 0,
        dict(recorder.layers) if recorder else {},
        recorder.attention if recorder else [],
    )


def head_of(model: Any, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
    """Logits [tokens, vocabulary] by the model's own forward pass, which may scale or cap them.

    The decoder is shadowed by a function that returns `hidden`, the way a removed block is shadowed. `weight` is the
    head's when `hidden` was computed: a sub-network with another residual width may be active by now.
    """
    parent, name = decoder_of(model)
    head = model.get_output_embeddings().__dict__
    active = head.get("weight")
    parent.__dict__[name] = lambda *args, **kwargs: _Passed(hidden[None])
    if weight is not None:
        head["weight"] = weight
    try:
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        return model(input_ids=ids, use_cache=False).logits[0]
    finally:
        del parent.__dict__[name]
        if active is not None:
            head["weight"] = active
        else:
            head.pop("weight", None)
