"""Variants: which tensor a sub-network uses where it is not simply a prefix of the base's.

A provider of variants is asked by a parameter's name and the sizes that are kept of its layer. Activation, slicing and
streaming ask the same one, so what is scored is what is cut out. Without a provider, every part is a prefix.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from supernet.architecture import Architecture, LayerSizes, TensorSpec


class Variants(Protocol):
    """A provider. What it gives must depend on nothing but the name and the sizes, since activation does not ask again
    for a layer whose sizes stay as they are."""

    @property
    def names(self) -> Collection[str]:
        """The parameters that it may have variants of, by their names in the full network; all within layers."""
        ...

    def tensor(self, name: str, kept: LayerSizes) -> Tensor | None:
        """The parameter in a layer of these sizes, shaped and laid out as the part of the full one that is kept; None
        where it is that part."""
        ...


@runtime_checkable
class RoundingVariants(Variants, Protocol):
    """A provider that rounds weights to the bits that an architecture says."""

    def table(self, name: str, bits: int) -> Tensor:
        """The embedding, or an output head, in so many bits."""
        ...


@dataclass(frozen=True)
class FixedVariants:
    """Variants of one architecture, by the parameters' names: its layers are asked for in no other sizes."""

    tensors: Mapping[str, Tensor]

    @property
    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def tensor(self, name: str, kept: LayerSizes) -> Tensor | None:
        return self.tensors.get(name)


def variant_of(
    variants: Variants | None, tensor: TensorSpec, architecture: Architecture, base: Architecture
) -> Tensor | None:
    """The variant of a parameter in `architecture`, or None where there is none: variants are of the base's residual
    width, and outside the layers nothing has any."""
    if variants is None or tensor.layer is None or architecture.hidden_size != base.hidden_size:
        return None
    return variants.tensor(tensor.name, architecture.layers[tensor.layer]) if tensor.name in variants.names else None
