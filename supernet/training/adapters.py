"""What of a super-network is trained: all its weights, or elastic low-rank adapters beside frozen ones.

`PARAMETERS` names the choices. Each is a context manager: inside, its `trained` parameters are the only ones that need
gradients; `frozen()` is the base as it was, which may teach; `finish()` leaves an ordinary super-network with what was
learnt in its weights, so that search, slicing, healing and packages know of no adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from math import sqrt
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from supernet.activation import SuperNetwork, slice_parameter
from supernet.architecture import Axis, Structure, TensorSpec, unit_counts
from supernet.common.errors import RequestError
from supernet.training.sharding import shard_like

LORA_SCALE = 2.0
"""What an adapter's product is multiplied with (alpha / rank): LoNAS's 64 / 32."""


class Parameters(Protocol):
    """One choice of what is trained."""

    supernet: SuperNetwork
    structure: Structure
    """Of what is trained: names, axes and layers, by which slices that took no part in a step are found."""
    trained: dict[str, nn.Parameter]

    def __enter__(self) -> Parameters: ...

    def __exit__(self, *_: object) -> None: ...

    def frozen(self) -> AbstractContextManager[SuperNetwork]:
        """The base before any training, whole and without dropout, for as long as the context lasts."""

    def finish(self) -> None:
        """Put what was learnt into the super-network's own weights."""


class AllWeights:
    """Every weight. The base that teaches is a second network, where a scheme needs one."""

    def __init__(self, supernet: SuperNetwork, base: SuperNetwork | None = None) -> None:
        self.supernet, self.structure = supernet, supernet.structure
        self.trained = dict(supernet.model.named_parameters())
        self._base = base

    def __enter__(self) -> AllWeights:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @contextmanager
    def frozen(self) -> Iterator[SuperNetwork]:
        assert self._base is not None, "a scheme that needs the base was given none"
        yield self._base

    def finish(self) -> None:
        pass


class ElasticLora:
    """Low-rank adapters on the linear layers of a frozen super-network (LoRA, arXiv 2106.09685; elastic as in LoNAS,
    LREC-COLING 2024).

    A linear layer computes W x + s B A x with A [rank, inputs] and B [outputs, rank]. A sub-network has the columns of
    A and the rows of B that belong to the units it keeps, as it has those of W, so its adapter is the slice of the full
    one: s B A can be added to W once, at the end, and every slice of the sum is what was trained. LoNAS also lets a
    sub-network have a smaller rank. That is left out: two sub-networks of different ranks are no slices of one set of
    weights, so the search would need the adapters too, and what it scores would not be what ships.

    Memory beside the weights, which are frozen: adapters, their gradients and moments. Without its adapters the network
    is the base, so the teacher is no second one. Embeddings, norms, biases and the head stay as they are.
    """

    def __init__(self, supernet: SuperNetwork, rank: int, seed: int) -> None:
        self.supernet = supernet
        self.trained: dict[str, nn.Parameter] = {}
        self._adapters: list[_Adapter] = []
        self._handles: list[Any] = []
        generator = torch.Generator().manual_seed(seed)
        for entry in adapted(supernet.structure):
            adapter = _Adapter(supernet, entry, rank, generator)
            self._adapters.append(adapter)
            self.trained |= {adapter.entries[0].name: adapter.a, adapter.entries[1].name: adapter.b}
        entries = tuple(entry for adapter in self._adapters for entry in adapter.entries)
        self.structure = replace(supernet.structure, tensors=entries)

    def __enter__(self) -> ElasticLora:
        self.supernet.model.requires_grad_(False)
        self._handles = [adapter.module.register_forward_hook(adapter) for adapter in self._adapters]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.supernet.model.requires_grad_(True)

    @contextmanager
    def frozen(self) -> Iterator[SuperNetwork]:
        training = self.supernet.model.training
        self._switch(False)
        self.supernet.model.eval()
        try:
            with self.supernet.activated(self.supernet.base):
                yield self.supernet
        finally:
            self.supernet.model.train(training)
            self._switch(True)

    def _switch(self, on: bool) -> None:
        for adapter in self._adapters:
            adapter.on = on

    @torch.no_grad()
    def finish(self) -> None:
        for adapter in self._adapters:
            adapter.merge()


def adapted(structure: Structure) -> list[TensorSpec]:
    """The weights that get adapters: those of the linear layers. Raises `RequestError` for stacked experts."""
    if any(tensor.role == "experts" for tensor in structure.tensors):
        raise RequestError(
            "finetuning.parameters: lora has no adapters for stacked experts, which would be cut but never trained"
        )
    return [tensor for tensor in structure.tensors if tensor.role == "linear"]


def adapter_parameters(structure: Structure, rank: int) -> int:
    """Number of parameters of a network's adapters."""
    shapes = (structure.shape(tensor, structure.base) for tensor in adapted(structure))
    return rank * sum(sum(shape) for shape in shapes if shape is not None)


class _Adapter:
    """The two factors of one linear layer, and the forward hook that adds what they compute to its output."""

    def __init__(self, supernet: SuperNetwork, entry: TensorSpec, rank: int, generator: torch.Generator) -> None:
        name = entry.name.removesuffix(".weight")
        self.supernet = supernet
        self.module = supernet.model.get_submodule(name)
        self.on = True
        outputs, inputs = entry.axes[::-1] if isinstance(self.module, Conv1D) else entry.axes  # Conv1D is transposed
        within = Axis((("one", rank),))
        self.entries = (
            replace(entry, name=f"{name}.lora_A", axes=(within, inputs)),
            replace(entry, name=f"{name}.lora_B", axes=(outputs, within)),
        )
        shapes = [supernet.structure.shape(half, supernet.base) for half in self.entries]
        assert shapes[0] is not None and shapes[1] is not None
        device = self.weight.device
        # B starts at zero, so that the network starts as the base; A as torch starts a linear layer.
        start = (2 * torch.rand(shapes[0], generator=generator) - 1) / sqrt(shapes[0][1])
        self.a = nn.Parameter(start.to(device))
        self.b = nn.Parameter(torch.zeros(shapes[1], device=device))

    @property
    def weight(self) -> Tensor:
        """The full weight, whatever is active."""
        full = self.module._parameters["weight"]
        assert full is not None
        return full

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not self.on:
            return None
        layer, active = self.entries[0].layer, self.supernet.current
        assert layer is not None
        base = self.supernet.base
        counts, kept = (unit_counts(a.hidden_size, a.layers[layer]) for a in (base, active))
        (x,) = inputs
        a, b = (
            slice_parameter(factor, entry.axes, counts, kept).to(x.dtype)
            for factor, entry in zip((self.a, self.b), self.entries, strict=True)
        )
        return output + LORA_SCALE * (x @ a.T @ b.T)

    def merge(self) -> None:
        """Add the product to the weight; torch adds in the wider of two precisions and rounds once."""
        product = LORA_SCALE * (self.b @ self.a)
        full = self.weight
        full.add_(shard_like(product.T if isinstance(self.module, Conv1D) else product, full))


Load = Callable[[], SuperNetwork]
"""Loads the base a second time, ordered like the super-network."""


def all_weights(supernet: SuperNetwork, load: Load | None, rank: int, seed: int) -> Parameters:
    return AllWeights(supernet, load() if load is not None else None)


def lora(supernet: SuperNetwork, load: Load | None, rank: int, seed: int) -> Parameters:
    return ElasticLora(supernet, rank, seed)


PARAMETERS: dict[str, Callable[[SuperNetwork, Load | None, int, int], Parameters]] = {"all": all_weights, "lora": lora}
"""(super-network, how to load the base where a scheme needs it, rank, seed) -> what is trained."""
