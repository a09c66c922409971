"""What losses read: hidden states of a forward pass and, where recorded, the outputs of layers and attention.

No pass computes logits. `HiddenStates` hold the last hidden states and the network's head, so that a loss can compute
logits in chunks of tokens, for a vocabulary of any size (`supernet.training.losses`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, Axis, unit_counts
from supernet.hooks import Hooks
from supernet.training.data import Batch
from supernet.uneven import family_of_standalone

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Head = Callable[[Tensor], Tensor]
"""Last hidden states [tokens, hidden] -> logits [tokens, vocabulary]."""

LayerOutput = Tensor | tuple[Tensor, ...]
"""What a decoder layer returns: hidden states [rows, length, hidden], in some families as the first of a tuple."""


@dataclass(frozen=True)
class HiddenStates:
    """One network's pass over a batch.

    `hidden` [tokens, hidden] and `targets` [tokens] are those of the positions that are learnt from. `layers` maps the
    index of a base's layer to its output [rows, length, hidden]. `attention` holds the queries, keys and values of the
    last attention block, each [rows, length, channels], before rotation. Both are empty unless a `Recorder` kept them.
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
        """The same without gradients, for a teacher."""
        return replace(
            self,
            hidden=self.hidden.detach(),
            layers={index: states.detach() for index, states in self.layers.items()},
            attention=[projected.detach() for projected in self.attention],
        )


class Recorder:
    """Keeps, from every pass of a super-network's model, the outputs of its layers or the projections of its attention.

    A context manager: its hooks are removed at the end.
    """

    def __init__(self, supernet: SuperNetwork, *, layers: bool = False, attention: bool = False) -> None:
        self.layers: dict[int, Tensor] = {}
        self.head_dim = supernet.structure.head_dim
        self._supernet = supernet
        self._projected: dict[int, dict[int, list[Tensor]]] = {}
        handles = []
        modules = dict(supernet.model.named_modules())  # the registered ones, not those that shadow them
        if layers:
            for index, layer in enumerate(modules[supernet.family.layers].children()):
                handles.append(layer.register_forward_hook(partial(self._keep_layer, index)))
        if attention:
            for position, tensor in enumerate(supernet.structure.tensors):
                module = modules[tensor.name.rpartition(".")[0]]
                outputs = tensor.axes[-1 if isinstance(module, Conv1D) else 0]  # GPT-2 stores its weights transposed
                units = {unit for unit, _ in outputs.blocks}
                if tensor.half == "attention" and tensor.role == "linear" and units & {"query", "kv"}:
                    assert tensor.layer is not None
                    keep = partial(self._keep_projection, tensor.layer, position, outputs)
                    handles.append(module.register_forward_hook(keep))
        self._hooks = Hooks(handles)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.remove()

    def clear(self) -> None:
        self.layers.clear()
        self._projected.clear()

    @property
    def attention(self) -> list[Tensor]:
        """Queries, keys and values of the last layer that has attention, in the order of the family's table. Where the
        family interleaves them head by head, they are one tensor."""
        last = self._projected[max(self._projected)] if self._projected else {}
        return [part for position in sorted(last) for part in last[position]]

    def _keep_layer(self, index: int, _: nn.Module, __: object, output: LayerOutput) -> None:
        self.layers[index] = output[0] if isinstance(output, tuple) else output

    def _keep_projection(self, layer: int, position: int, axis: Axis, _: nn.Module, __: object, output: Tensor) -> None:
        counts = unit_counts(0, self._supernet.current.layers[layer])
        widths = [width * counts[unit] for unit, width in axis.blocks]
        self._projected.setdefault(layer, {})[position] = list(output.split(widths, dim=-1))


class LayerCache:
    """Passes of one architecture after another over the same batches, which start at the first layer that differs.

    The layers' outputs of the last pass over each batch, [rows, length, hidden] each, are kept. The next pass reuses
    them for the leading layers that both architectures have in common. The weights must not change in between.
    """

    def __init__(self, supernet: SuperNetwork) -> None:
        self._supernet = supernet
        self._kept: dict[int, tuple[Architecture, dict[int, LayerOutput]]] = {}  # by number of the batch

    def trace(self, number: int, batch: Batch) -> HiddenStates:
        """The same as `trace` of the active sub-network over `batch`, which always has this `number`."""
        active = self._supernet.current
        previous, kept = self._kept.pop(number, (active, {}))
        common = active.common_layers(previous)
        outputs = {index: output for index, output in kept.items() if index < common}
        with ExitStack() as afterwards:
            for index, layer in enumerate(self._supernet.layers):
                if index in outputs:
                    layer.__dict__["forward"] = partial(_reuse, outputs[index])
                    afterwards.callback(layer.__dict__.pop, "forward")
                else:
                    afterwards.enter_context(Hooks([layer.register_forward_hook(partial(_keep, outputs, index))]))
            states = trace(self._supernet.model, batch)
        self._kept[number] = (active, outputs)
        return states


def _reuse(output: LayerOutput, *_: object, **__: object) -> LayerOutput:
    return output


def _keep(outputs: dict[int, LayerOutput], index: int, _: nn.Module, __: object, output: LayerOutput) -> None:
    outputs[index] = output


class _DecoderOutput:
    """What a head reads of a decoder's output: the hidden states; everything else is None."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]


def decoder_of(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that holds the decoder of a causal language model, plain or uneven, and the decoder's name in it."""
    decoder = family_of_standalone(model.config).layers.rpartition(".")[0]
    parent, _, name = decoder.rpartition(".")
    return model.get_submodule(parent), name


def trace(model: PreTrainedModel, batch: Batch, recorder: Recorder | None = None) -> HiddenStates:
    """The states of one pass of a causal language model, or of the active sub-network, up to its head."""
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


def head_of(model: PreTrainedModel, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
    """Logits [tokens, vocabulary] of `hidden` [tokens, hidden]. The model's forward pass computes them, since it may
    scale or cap them.

    The decoder is shadowed by a function that returns `hidden`. `weight` is the head's weight at the time when `hidden`
    was computed, since a sub-network with another residual width may be active now.
    """
    parent, name = decoder_of(model)
    head = model.get_output_embeddings().__dict__
    active = head.get("weight")
    parent.__dict__[name] = lambda *args, **kwargs: _DecoderOutput(hidden[None])
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
