"""The sizes of a sub-network: canonical form, key, JSON, and exact accounting. Needs no torch.

An `Architecture` says, for every layer of the base model, how many heads and neurons a sub-network keeps.
A `Structure` lists the base model's tensors by symbolic axes. From the two, parameters, bytes, multiply-accumulates
and KV-cache bytes follow exactly, without building a network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import gcd, prod
from typing import Any, Literal, NotRequired, TypedDict

Half = Literal["attention", "mlp"]
Unit = Literal["one", "hidden", "query", "kv", "ffn", "experts"]
Role = Literal["linear", "matrix", "experts", "embedding", "head", "other"]

HALVES: tuple[Half, Half] = ("attention", "mlp")


@dataclass(frozen=True, slots=True, order=True)
class LayerSizes:
    """Sizes of one layer, under Hugging Face's names. A removed half-block has size 0.

    `num_experts` is 0 for a dense MLP. `attention_bits` and `ffn_bits` are those that the half-block's linear weights
    are rounded to; 0: they are as stored. Sizes that have no effect are set to 0, so that two descriptions of one
    network are equal: no key-value heads means no query heads and no bits, no neurons means no experts and no bits.
    Raises ValueError where a size is negative, or where key-value heads do not divide the query heads.
    """

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    num_experts: int = 0
    attention_bits: int = 0
    ffn_bits: int = 0

    def __post_init__(self) -> None:
        sizes = (self.num_attention_heads, self.num_key_value_heads, self.intermediate_size, self.num_experts)
        if min(*sizes, self.attention_bits, self.ffn_bits) < 0:
            raise ValueError(f"sizes must not be negative: {sizes}")
        if not (self.num_attention_heads and self.num_key_value_heads):
            object.__setattr__(self, "num_attention_heads", 0)
            object.__setattr__(self, "num_key_value_heads", 0)
            object.__setattr__(self, "attention_bits", 0)
        elif self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot be shared evenly by "
                f"{self.num_key_value_heads} key-value heads"
            )
        if not self.intermediate_size:
            object.__setattr__(self, "num_experts", 0)
            object.__setattr__(self, "ffn_bits", 0)

    @property
    def skip(self) -> list[Half]:
        """The removed half-blocks, as Hugging Face's `per_layer_config` names them."""
        absent: list[Half] = []
        if not self.num_key_value_heads:
            absent.append("attention")
        if not self.intermediate_size:
            absent.append("mlp")
        return absent

    @property
    def removed(self) -> bool:
        """Whether the whole layer is removed."""
        return not (self.num_key_value_heads or self.intermediate_size)

    def bits(self, half: Half | None) -> int:
        """Bits of a half-block's linear weights; 0: as stored."""
        return {"attention": self.attention_bits, "mlp": self.ffn_bits, None: 0}[half]

    def without_bits(self) -> LayerSizes:
        """The same sizes, with all weights as stored."""
        if not (self.attention_bits or self.ffn_bits):
            return self
        return replace(self, attention_bits=0, ffn_bits=0)


REMOVED = LayerSizes(0, 0, 0)
"""A removed layer."""


class ArchitectureJSON(TypedDict):
    """An architecture as JSON. Layers have the fields of `LayerSizes`; `num_experts` and bits only where not 0."""

    hidden_size: int
    layers: list[dict[str, int]]
    embedding_bits: NotRequired[int]
    head_bits: NotRequired[int]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes of a sub-network: the residual width, and one `LayerSizes` for each layer of the *base*, in order.

    A layer with both halves removed is a removed layer. There is no separate gene for that, so one network has one
    architecture. `embedding_bits`, and `head_bits` of a head that is not the embedding, are as a layer's; 0: as stored.
    """

    hidden_size: int
    layers: tuple[LayerSizes, ...]
    embedding_bits: int = 0
    head_bits: int = 0

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices, in the base, of the layers that are not removed."""
        return tuple(i for i, layer in enumerate(self.layers) if not layer.removed)

    def without_layers(self) -> Architecture:
        """This architecture with every layer removed: embeddings, last norm and head."""
        return replace(self, layers=(REMOVED,) * len(self.layers))

    @property
    def has_bits(self) -> bool:
        """Whether any weight is rounded."""
        outer = self.embedding_bits or self.head_bits
        return bool(outer or any(layer.attention_bits or layer.ffn_bits for layer in self.layers))

    def without_bits(self) -> Architecture:
        """The same sizes, with all weights as stored."""
        if not self.has_bits:
            return self
        return Architecture(self.hidden_size, tuple(layer.without_bits() for layer in self.layers))

    def common_layers(self, other: Architecture) -> int:
        """How many leading layers have the same outputs in both sub-networks of one base."""
        if (self.hidden_size, self.embedding_bits) != (other.hidden_size, other.embedding_bits):
            return 0
        pairs = enumerate(zip(self.layers, other.layers, strict=True))
        return next((index for index, (one, two) in pairs if one != two), len(self.layers))

    def is_uniform_in(self, base: Architecture) -> bool:
        """Whether all kept layers have equal sizes and both halves, so that the family's plain class can hold them.

        Layers of a base may differ in kind (linear attention, dense MLPs among experts). A kept layer must have all
        halves that it has in the base. Layers with attention heads must have equal heads, those with experts equal
        experts and widths, and dense ones equal widths.
        """
        kept = [(self.layers[i], base.layers[i]) for i in self.kept]
        heads = {(own.num_attention_heads, own.num_key_value_heads) for own, full in kept if full.num_key_value_heads}
        dense = {own.intermediate_size for own, full in kept if not full.num_experts}
        sparse = {(own.intermediate_size, own.num_experts) for own, full in kept if full.num_experts}
        return (
            bool(kept)
            and all(own.skip == full.skip for own, full in kept)
            and max(len(heads), len(dense), len(sparse)) == 1
        )

    @property
    def key(self) -> str:
        """16 hexadecimal digits that identify this architecture in stores and file names."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def fits(self, base: Architecture) -> bool:
        """Whether every size is at most the base's, and a kept MLP has experts where the base's has them."""
        return (
            self.hidden_size <= base.hidden_size
            and len(self.layers) == len(base.layers)
            and all(
                own.num_attention_heads <= full.num_attention_heads
                and own.num_key_value_heads <= full.num_key_value_heads
                and own.intermediate_size <= full.intermediate_size
                and own.num_experts <= full.num_experts
                and (own.num_experts > 0 or full.num_experts == 0 or "mlp" in own.skip)
                for own, full in zip(self.layers, base.layers, strict=True)
            )
        )

    def to_dict(self) -> ArchitectureJSON:
        """The architecture as JSON."""
        rows = []
        for layer in self.layers:
            row = {
                "num_attention_heads": layer.num_attention_heads,
                "num_key_value_heads": layer.num_key_value_heads,
                "intermediate_size": layer.intermediate_size,
            }
            for name in ("num_experts", "attention_bits", "ffn_bits"):
                if value := getattr(layer, name):
                    row[name] = value
            rows.append(row)
        data: ArchitectureJSON = {"hidden_size": self.hidden_size, "layers": rows}
        if self.embedding_bits:
            data["embedding_bits"] = self.embedding_bits
        if self.head_bits:
            data["head_bits"] = self.head_bits
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        """The architecture that `to_dict` wrote. Raises KeyError, TypeError or ValueError where `data` is none."""
        layers = tuple(LayerSizes(**row) for row in data["layers"])
        return cls(int(data["hidden_size"]), layers, int(data.get("embedding_bits", 0)), int(data.get("head_bits", 0)))


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of a tensor as blocks of `(unit, width)`: a block holds `width` entries for each unit.

    `Axis((("query", 64),))` is 64 rows for each query head. A fused query-key-value projection is
    `(("query", d), ("kv", d), ("kv", d))`; a dimension that never changes is `(("one", n),)`.
    """

    blocks: tuple[tuple[Unit, int], ...]

    def size(self, counts: Mapping[Unit, int]) -> int:
        """Entries of the dimension where there are `counts` units."""
        return sum([width * counts[unit] for unit, width in self.blocks])  # a list: summed faster than a generator


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A parameter of the base model: its name, axes, layer and half-block, and what it is used for.

    `linear` weights are those of linear modules within a layer, which quantization rounds. Those of role `matrix` and
    `experts` [experts, outputs, inputs] are multiplied with activations too, but are never quantized.
    """

    name: str
    axes: tuple[Axis, ...]
    layer: int | None = None
    half: Half | None = None
    role: Role = "other"


def unit_counts(hidden_size: int, layer: LayerSizes | None = None) -> dict[Unit, int]:
    """How many of each unit there are within one layer or, where `layer` is None, outside the layers."""
    counts: dict[Unit, int] = {"one": 1, "hidden": hidden_size, "query": 0, "kv": 0, "ffn": 0, "experts": 0}
    if layer is not None:
        counts |= {
            "query": layer.num_attention_heads,
            "kv": layer.num_key_value_heads,
            "ffn": layer.intermediate_size,
            "experts": layer.num_experts,
        }
    return counts


GROUP_SIZES = (128, 64, 32)
"""Input channels that may share a scale, unless the user says otherwise; the largest that divides is taken."""


@dataclass(frozen=True, slots=True)
class StorageFormat:
    """How many bits a quantized weight takes: `bits` each, and one scale of `scale_bits` for each group of input
    channels. `group_size` -1: one group per output channel; None: the largest of `GROUP_SIZES` that divides the inputs
    of all layers that are not left out. Activations are not stored and do not count.

    A layer that cannot be quantized so is stored in `fallback` bits: 8 with one scale per output channel, or 16.

    The codes of an output channel fill whole words of `word` bits, and each layer has `extra` bytes more (its shape).
    `embedding` and `head` are the bits of the two: 16, 8 with one scale per row, or 4 with one per group.
    """

    bits: int
    group_size: int | None
    scale_bits: int = 16
    fallback: Literal[8, 16] = 8
    word: int = 32
    extra: int = 16
    embedding: int = 16
    head: int = 16
    by_architecture: bool = False
    """Whether the bits are those that the architecture says, 16 of what it says none of; the group size is given."""

    def bits_of(self, tensor: TensorSpec, architecture: Architecture) -> int:
        """Bits of a tensor's weights, 16 of one that is not quantized."""
        outer = {"embedding": self.embedding, "head": self.head}
        if self.by_architecture:
            outer = {"embedding": architecture.embedding_bits or 16, "head": architecture.head_bits or 16}
        if tensor.role != "linear":
            return outer.get(tensor.role, 16)
        if not self.by_architecture:
            return self.bits
        return 16 if tensor.layer is None else architecture.layers[tensor.layer].bits(tensor.half) or 16

    def rows_bytes(self, rows: int, columns: int, bits: int, group_size: int) -> int:
        """Bytes of a weight [rows, columns] with the scales of its groups, and its shape."""
        groups = 1 if group_size < 0 else columns // group_size
        codes = -(-columns * bits // self.word) * self.word
        return rows * (codes + groups * self.scale_bits) // 8 + self.extra


def table_format(bits: int, columns: int) -> tuple[int, int]:
    """Bits and group size of an embedding or a head of `columns` channels where `bits` are asked for: 4 bits need a
    group that divides the channels, or become 8."""
    if bits == 4:
        group = next((size for size in GROUP_SIZES if columns % size == 0), None)
        return (8, -1) if group is None else (4, group)
    return bits, -1


@dataclass(frozen=True)
class Structure:
    """The base model's tensors and what they cost. Sizes are linear in every unit, so counting is exact.

    `dtype_bytes` is the width of an unquantized weight as stored. A tied output head is not listed: its weight is the
    embedding's. `experts_per_token` is how many experts a router chooses, or all that are left. `windows` says for each
    layer how many tokens its attention reaches, the current one included (0: all). `fixed_hidden` is the reason why the
    residual width is not elastic, or empty.
    """

    base: Architecture
    head_dim: int
    vocab_size: int
    tied: bool
    dtype_bytes: int
    tensors: tuple[TensorSpec, ...]
    experts_per_token: int = 0
    windows: tuple[int, ...] = ()
    fixed_hidden: str = ""
    _sums: dict[Hashable, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def step(self, layer: LayerSizes) -> int:
        """What the FFN width of `layer`, and the residual width with it, must be a multiple of.

        torch's grouped multiplication, which stacked experts use, needs rows of a multiple of 16 bytes.
        """
        return 16 // self.dtype_bytes if layer.num_experts else 1

    def shape(self, tensor: TensorSpec, arch: Architecture) -> tuple[int, ...] | None:
        """The tensor's shape in `arch`, or None where the half-block or layer it belongs to is removed."""
        layer = None
        if tensor.layer is not None:
            layer = arch.layers[tensor.layer]
            if layer.removed or (tensor.half is not None and tensor.half in layer.skip):
                return None
        counts = unit_counts(arch.hidden_size, layer)
        return tuple(axis.size(counts) for axis in tensor.axes)

    def parameters(self, arch: Architecture) -> int:
        """Number of parameters; embeddings counted, tied ones once."""
        return self._sum("parameters", arch, lambda tensor, shape: prod(shape))

    def bytes(self, arch: Architecture, storage: StorageFormat | None = None) -> int:
        """Bytes of all weights as stored: unquantized at `dtype_bytes`, or with the linear layers in `storage`.

        A layer whose input width the group size does not divide, or with a width that is no multiple of 32, is stored
        in the `fallback`, as export does; norms and biases are stored in 16 bits. It is what the files hold but for
        their headers.
        """
        if storage is None:
            return self.dtype_bytes * self.parameters(arch)
        common = self.group_size(arch) if storage.group_size is None else storage.group_size

        def cost(tensor: TensorSpec, shape: tuple[int, ...]) -> int:
            bits = storage.bits_of(tensor, arch)
            if bits == 16:
                return 2 * prod(shape)
            if tensor.role in ("embedding", "head"):
                outer = replace(storage, scale_bits=16, word=32, extra=16)
                return outer.rows_bytes(shape[0], shape[1], *table_format(bits, shape[1]))
            outputs, inputs = shape
            group = -1 if storage.by_architecture and bits == 8 else common
            odd = inputs % 32 or outputs % 32 or (group > 0 and inputs % group)
            if odd and storage.fallback == 16:
                return 2 * prod(shape)
            return storage.rows_bytes(outputs, inputs, *((8, -1) if odd else (bits, group)))

        return self._sum(("bytes", storage, common), arch, cost)

    def group_size(self, arch: Architecture) -> int:
        """The largest of `GROUP_SIZES` that divides the input width of every linear layer whose widths are multiples
        of 32; the smallest where none does."""
        key = ("inputs", arch)
        if key not in self._sums:
            shapes = [self.shape(tensor, arch) for tensor in self.tensors if tensor.role == "linear"]
            inputs = {shape[1] for shape in shapes if shape is not None and not (shape[0] % 32 or shape[1] % 32)}
            common = gcd(*inputs) if inputs else GROUP_SIZES[-1]
            self._sums[key] = next((size for size in GROUP_SIZES if common % size == 0), GROUP_SIZES[-1])
        return self._sums[key]

    def macs(self, arch: Architecture, context: int = 0) -> int:
        """Multiply-accumulates to compute one token's logits after `context` earlier tokens.

        Matrix products only: projections, head, the experts that a router chooses, and attention's scores and weighted
        sum over context + 1 tokens. The state updates of linear attention are not counted.
        """

        def cost(tensor: TensorSpec, shape: tuple[int, ...]) -> int:
            if tensor.role == "experts":
                return prod(shape[1:]) * min(shape[0], self.experts_per_token)
            used = tensor.role in ("linear", "matrix", "head") or self._is_tied_head(tensor)
            return prod(shape) if used else 0

        reached = self._reached(context + 1)
        heads = sum(layer.num_attention_heads * tokens for layer, tokens in zip(arch.layers, reached, strict=True))
        return self._sum("macs", arch, cost) + 2 * heads * self.head_dim

    def kv_cache_bytes(self, arch: Architecture, tokens: int = 1) -> int:
        """Bytes of keys and values for `tokens` tokens of one sequence, at the stored dtype.

        A sliding window keeps those that the next token reaches.
        """
        held = [reached - 1 for reached in self._reached(tokens + 1)]
        heads = sum(layer.num_key_value_heads * kept for layer, kept in zip(arch.layers, held, strict=True))
        return 2 * heads * self.head_dim * self.dtype_bytes

    def _reached(self, tokens: int) -> list[int]:
        """How many of `tokens` tokens each layer's attention reaches from the last one, that one included."""
        windows = self.windows or (0,) * len(self.base.layers)
        return [min(tokens, window) if window else tokens for window in windows]

    def _is_tied_head(self, tensor: TensorSpec) -> bool:
        return self.tied and tensor.role == "embedding"

    def _sum(self, what: Hashable, arch: Architecture, cost: Callable[[TensorSpec, tuple[int, ...]], int]) -> int:
        """Sum of `cost(tensor, shape)`. Each distinct (layer, sizes) is computed once: a search asks for thousands."""
        total = 0
        for index, layer in [(None, None), *enumerate(arch.layers)]:
            outer = (arch.embedding_bits, arch.head_bits) if index is None else ()
            key = (what, index, layer, arch.hidden_size, outer)
            if key not in self._sums:
                self._sums[key] = sum(
                    cost(tensor, shape)
                    for tensor in self._by_layer.get(index, ())
                    if (shape := self.shape(tensor, arch)) is not None
                )
            total += self._sums[key]
        return total

    @cached_property
    def _by_layer(self) -> dict[int | None, list[TensorSpec]]:
        groups: dict[int | None, list[TensorSpec]] = {}
        for tensor in self.tensors:
            groups.setdefault(tensor.layer, []).append(tensor)
        return groups
