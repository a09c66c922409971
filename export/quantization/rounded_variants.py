"""Rounded weights in a super-network: what a sub-network with bits computes with, as its package stores it.

Every half-block's linear weights are rounded to nearest in the bits that the architecture says (SimQ-NAS, Sridhar et
al., arXiv 2312.13301, searches such bits with the sizes), after they were cut, and after a repair where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import Tensor

from export.quantization.round_to_nearest import rounded
from export.quantization.schemes import weight_format
from supernet.activation import SuperNetwork, slice_parameter
from supernet.architecture import LayerSizes, TensorSpec, table_format, unit_counts
from supernet.common.byte_cache import ByteCache
from supernet.variants import Variants

Round = Callable[[Tensor, int], Tensor]
"""A weight [outputs, inputs] as a format stores it where so many bits are asked for."""


def in_groups(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """As a `mixed` package of compressed-tensors stores it: below 8 bits `group_size` input channels share a scale; at
    8 bits, and where a width is no multiple of 32, all of an output channel's do."""
    return rounded(weight, *weight_format(weight.shape, bits, group_size))


class RoundedVariants:
    """Rounded weights of a super-network of the base's residual width, on top of the variants `inner`.

    `round_` says how weights are stored. What was rounded is kept within `memory` bytes, and made again where it was
    dropped.
    """

    def __init__(self, supernet: SuperNetwork, inner: Variants | None, round_: Round, memory: int) -> None:
        self._supernet, self._inner, self._round = supernet, inner, round_
        self._full = dict(supernet.model.named_parameters())  # what shadows hide from `get_parameter`
        self._linear = {spec.name: spec for spec in supernet.structure.tensors if spec.role == "linear" and spec.half}
        self._names = frozenset(self._linear).union(() if inner is None else inner.names)
        self._kept: ByteCache[Tensor] = ByteCache(memory, lambda made: made.nbytes)

    @property
    def names(self) -> Collection[str]:
        return self._names

    def tensor(self, name: str, kept: LayerSizes) -> Tensor | None:
        inner = self._inner if self._inner is not None and name in self._inner.names else None
        spec, plain = self._linear.get(name), kept.without_bits()
        bits = kept.bits(spec.half) if spec is not None else 0
        if spec is None or not bits or (spec.half is not None and spec.half in kept.skip):
            return None if inner is None else inner.tensor(name, plain)
        # A repaired half-block may carry what the other one said, so the sizes of both tell variants apart.
        return self._kept.get_or_make((name, plain, bits), lambda: self._round(self._cut(spec, kept, inner), bits))

    def table(self, name: str, bits: int) -> Tensor:
        weight = self._full[name].detach()
        return self._kept.get_or_make((name, bits), lambda: rounded(weight, *table_format(bits, weight.shape[1])))

    def _cut(self, spec: TensorSpec, kept: LayerSizes, inner: Variants | None) -> Tensor:
        """A weight of a layer of these sizes before it is rounded: the variant that `inner` has, or a slice."""
        weight = None if inner is None else inner.tensor(spec.name, kept.without_bits())
        if weight is not None:
            return weight
        assert spec.layer is not None
        base = self._supernet.base
        counts, left = (unit_counts(base.hidden_size, sizes) for sizes in (base.layers[spec.layer], kept))
        return slice_parameter(self._full[spec.name].detach(), spec.axes, counts, left)
