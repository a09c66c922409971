"""What of a super-network is trained: all its weights, with or without routed changes, or elastic low-rank adapters
beside frozen ones.

`PARAMETERS` names the choices. Each is a context manager: within, only its `trained` parameters need gradients.
`frozen()` is the base before training, which may teach. `finish()` merges what was learnt into the super-network's
weights, so that search, slicing, healing and packages need to know nothing of adapters. What cannot be merged, since it
is another for other sizes, stays with the super-network as its variants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from math import sqrt
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from supernet.activation import SuperNetwork, slice_parameter
from supernet.architecture import Architecture, Axis, Structure, TensorSpec, unit_counts
from supernet.common.errors import RequestError
from supernet.hooks import Hooks
from supernet.routed import RoutedDeltas
from supernet.training.inactive import Inactive, inactive_slices
from supernet.training.sharding import shard_like

LORA_SCALE = 2.0
"""The factor of an adapter's product (alpha / rank), 64 / 32 as in LoNAS."""


class Parameters(Protocol):
    """One choice of what is trained."""

    supernet: SuperNetwork
    trained: dict[str, nn.Parameter]

    def __enter__(self) -> Parameters: ...

    def __exit__(self, *_: object) -> None: ...

    def frozen(self) -> AbstractContextManager[SuperNetwork]:
        """The base before any training, its full network active and without dropout, within the context."""

    def inactive(self, members: Sequence[Architecture]) -> Inactive:
        """The slices of what is trained that none of a step's members used."""

    def finish(self) -> None:
        """Put what was learnt into the super-network's weights."""


class AllWeights:
    """Every weight is trained. Where a scheme needs the base as a teacher, it is a second network."""

    def __init__(self, supernet: SuperNetwork, base: SuperNetwork | None = None) -> None:
        self.supernet = supernet
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

    def inactive(self, members: Sequence[Architecture]) -> Inactive:
        return inactive_slices(self.supernet.structure, members)

    def finish(self) -> None:
        pass


class RoutedWeights(AllWeights):
    """Every weight is trained, and routed changes of FFN matrices (`supernet.routed`), which start at zero. They stay
    in use afterwards."""

    def __init__(self, supernet: SuperNetwork, base: SuperNetwork | None, rank: int, seed: int) -> None:
        super().__init__(supernet, base)
        self._deltas = RoutedDeltas(supernet, rank, seed)
        self.trained |= self._deltas.parameters

    def __enter__(self) -> RoutedWeights:
        self.supernet.use(self._deltas)
        return self

    def inactive(self, members: Sequence[Architecture]) -> Inactive:
        """A layer that is whole uses none of its changes, be the others cut or not."""
        base, found = self.supernet.base, dict(super().inactive(members))
        for layer, whole in enumerate(base.layers):
            specs = tuple(spec for spec in self._deltas.specs.values() if spec.layer == layer)
            cut = [member for member in members if member.layers[layer] != whole]
            found |= inactive_slices(replace(self.supernet.structure, tensors=specs), cut)
        return found


class ElasticLora:
    """Low-rank adapters on the linear layers of a frozen super-network (LoRA, arXiv 2106.09685; elastic as in LoNAS,
    LREC-COLING 2024).

    A linear layer computes W x + s B A x with A [rank, inputs] and B [outputs, rank]. A sub-network has the columns of
    A and the rows of B that belong to the units it keeps, as of W, so its adapter is the slice of the full one: s B A
    can be added to W once, at the end, and every slice of the sum is what was trained. LoNAS also lets a sub-network
    have a smaller rank. That is left out: sub-networks of different ranks are not slices of one set of weights, so the
    search would need the adapters too, and would not score the network that ships.

    Memory beside the frozen weights is needed for adapters, their gradients and moments. The teacher is this network
    without its adapters. Embeddings, norms, biases and the head are not trained.
    """

    def __init__(self, supernet: SuperNetwork, rank: int, seed: int) -> None:
        self.supernet = supernet
        self.trained: dict[str, nn.Parameter] = {}
        self._adapters: list[_Adapter] = []
        self._hooks = Hooks()
        generator = torch.Generator().manual_seed(seed)
        for spec in adapted(supernet.structure):
            adapter = _Adapter(supernet, spec, rank, generator)
            self._adapters.append(adapter)
            self.trained |= {adapter.specs[0].name: adapter.a, adapter.specs[1].name: adapter.b}
        specs = tuple(spec for adapter in self._adapters for spec in adapter.specs)
        self.structure = replace(supernet.structure, tensors=specs)

    def __enter__(self) -> ElasticLora:
        self.supernet.model.requires_grad_(False)
        self._hooks = Hooks(adapter.module.register_forward_hook(adapter) for adapter in self._adapters)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.remove()
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

    def inactive(self, members: Sequence[Architecture]) -> Inactive:
        return inactive_slices(self.structure, members)

    def _switch(self, on: bool) -> None:
        for adapter in self._adapters:
            adapter.on = on

    @torch.no_grad()
    def finish(self) -> None:
        for adapter in self._adapters:
            adapter.merge()


def adapted(structure: Structure) -> list[TensorSpec]:
    """The weights that get adapters, those of linear layers. Raises `RequestError` for stacked experts."""
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
    """The two factors of one linear layer's adapter, and the forward hook that adds their product to its output."""

    def __init__(self, supernet: SuperNetwork, spec: TensorSpec, rank: int, generator: torch.Generator) -> None:
        name = spec.name.removesuffix(".weight")
        self.supernet = supernet
        self.module = supernet.model.get_submodule(name)
        self.on = True
        outputs, inputs = spec.axes[::-1] if isinstance(self.module, Conv1D) else spec.axes  # Conv1D is transposed
        within = Axis((("one", rank),))
        self.specs = (
            replace(spec, name=f"{name}.lora_A", axes=(within, inputs)),
            replace(spec, name=f"{name}.lora_B", axes=(outputs, within)),
        )
        shapes = [supernet.structure.shape(half, supernet.base) for half in self.specs]
        assert shapes[0] is not None and shapes[1] is not None
        device = self.weight.device
        # B starts at zero, so that the network starts as the base; A as torch starts a linear layer.
        start = (2 * torch.rand(shapes[0], generator=generator) - 1) / sqrt(shapes[0][1])
        self.a = nn.Parameter(start.to(device))
        self.b = nn.Parameter(torch.zeros(shapes[1], device=device))

    @property
    def weight(self) -> Tensor:
        """The full weight, also while a sub-network is active."""
        full = self.module._parameters["weight"]
        assert full is not None
        return full

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not self.on:
            return None
        layer, active = self.specs[0].layer, self.supernet.current
        assert layer is not None
        base = self.supernet.base
        counts, kept = (unit_counts(a.hidden_size, a.layers[layer]) for a in (base, active))
        (x,) = inputs
        a, b = (
            slice_parameter(factor, spec.axes, counts, kept).to(x.dtype)
            for factor, spec in zip((self.a, self.b), self.specs, strict=True)
        )
        return output + LORA_SCALE * (x @ a.T @ b.T)

    def merge(self) -> None:
        """Add the product to the weight. torch adds in the wider of the two precisions and rounds once."""
        product = LORA_SCALE * (self.b @ self.a)
        full = self.weight
        full.add_(shard_like(product.T if isinstance(self.module, Conv1D) else product, full))


Load = Callable[[], SuperNetwork]
"""Loads the base a second time, ordered like the super-network."""


def all_weights(supernet: SuperNetwork, load: Load | None, rank: int, seed: int) -> Parameters:
    return AllWeights(supernet, load() if load is not None else None)


def lora(supernet: SuperNetwork, load: Load | None, rank: int, seed: int) -> Parameters:
    return ElasticLora(supernet, rank, seed)


def routed(supernet: SuperNetwork, load: Load | None, rank: int, seed: int) -> Parameters:
    return RoutedWeights(supernet, load() if load is not None else None, rank, seed)


PARAMETERS: dict[str, Callable[[SuperNetwork, Load | None, int, int], Parameters]] = {
    "all": all_weights,
    "lora": lora,
    "routed": routed,
}
"""(super-network, how to load the base where a scheme needs it, rank, seed) -> what is trained."""
