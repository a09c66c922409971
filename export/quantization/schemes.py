"""The quantization schemes by name: what is stored, in which form, and how large an error is allowed. To add one, add a
line.

Weights of linear layers become whole numbers times scales, and so do embedding and output head where the package can
hold them (`OuterBits`); norms and biases stay bfloat16. Packages are compressed-tensors, but for names that end in
`-auto-round`: those are in auto-round's own form, which is GPTQ's.
int8-dynamic has no such form: auto-round has no layer that runs it on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeGuard

from supernet.architecture import Architecture, StorageFormat

SchemeName = Literal["int8", "int8-dynamic", "int4", "int3", "int2", "int8-auto-round", "int4-auto-round"]
EmbeddingBits = Literal[16, 8, 4]


@dataclass(frozen=True)
class Scheme:
    """`preset` is AutoRound's name of the number formats, `bits` are those of a weight.

    8 bits have one scale for each output channel, fewer one for each group of input channels. `bound` is the largest
    mean |Δ log-probability| (nats) of random next tokens that a package may show. It lies above what rounding costs a
    real language model and, down to 4 bits, below what misread weights cost (docs/results.md, "What a proof allows").
    It finds errors in storage; whether the loss is acceptable is for tasks to show. `dynamic`: activations are rounded
    to 8 bits while the network runs, token by token. `auto_round`: in auto-round's own form.
    """

    preset: str
    bits: int
    bound: float
    dynamic: bool = False
    auto_round: bool = False

    def storage_format(self, group_size: int | None = None, outer: OuterBits | None = None) -> StorageFormat:
        """How weights are stored, to count bytes exactly; `group_size` is the user's, for fewer than 8 bits."""
        group_size = -1 if self.bits == 8 else group_size
        if self.auto_round:  # a zero point beside every scale, and layers that do not fit stay as they are
            return StorageFormat(self.bits, group_size, scale_bits=16 + self.bits, fallback=16, extra=0)
        outer = outer or OuterBits()
        word, extra = (8, 0) if self.dynamic else (32, 16)  # int8-dynamic packs nothing
        return StorageFormat(self.bits, group_size, word=word, extra=extra, embedding=outer.embedding, head=outer.head)


@dataclass(frozen=True)
class OuterBits:
    """Bits of the embedding and of an output head that is not the embedding."""

    embedding: int = 16
    head: int = 16


def outer_bits(form: Scheme, *, tied: bool, code: bool, asked: EmbeddingBits | None = None) -> OuterBits:
    """What embedding and head are stored in where `asked` (None: 8) is wanted of both.

    Packages with a code file hold both; transformers' plain classes hold a head that has its own weight, and no
    embedding (5.23: "Embedding has no attribute weight"). auto-round's own form holds neither.
    """
    bits = 16 if form.auto_round else asked or 8
    return OuterBits(bits if code else 16, 16 if tied else bits)


SCHEMES: dict[SchemeName, Scheme] = {
    "int8": Scheme("W8A16", 8, 0.5),
    "int8-dynamic": Scheme("INT8_W8A8", 8, 0.75, dynamic=True),
    "int4": Scheme("W4A16", 4, 2.5),
    "int3": Scheme("W3A16", 3, 4.0),
    "int2": Scheme("W2A16", 2, 9.0),
    "int8-auto-round": Scheme("W8A16", 8, 0.5, auto_round=True),
    "int4-auto-round": Scheme("W4A16", 4, 2.5, auto_round=True),
}


MIXED = Scheme("W4A16", 2, 9.0)
"""Of packages named `mixed`, whose half-blocks have bits of their own; AutoRound is told those of each layer."""
FormName = Literal[SchemeName, "mixed"]


def in_transformers(name: str) -> TypeGuard[FormName]:
    """Whether a package of a quantization of this name is one of transformers."""
    return name == "mixed" or name in SCHEMES


def form_of(name: FormName) -> Scheme:
    """The scheme of a package, by the name in its record."""
    return MIXED if name == "mixed" else SCHEMES[name]


def bound_of(name: FormName, bits: Architecture | None) -> float:
    """What a package's proof allows; of a `mixed` one, what is allowed for the fewest of its `bits`."""
    if name != "mixed" or bits is None:
        return form_of(name).bound
    outer = [asked for asked in (bits.embedding_bits, bits.head_bits) if asked]
    inner = [asked for layer in bits.layers for asked in (layer.attention_bits, layer.ffn_bits) if asked]
    return {2: SCHEMES["int2"], 3: SCHEMES["int3"], 4: SCHEMES["int4"], 8: SCHEMES["int8"]}[min(outer + inner)].bound


def weight_format(shape: Sequence[int], bits: int, group_size: int) -> tuple[int, int]:
    """Bits and group size of a linear weight [outputs, inputs] of a `mixed` package where `bits` are asked for: 8 with
    one scale for each output channel where they are 8, or a width is no multiple of 32 or of the group."""
    odd = any(width % 32 for width in shape) or shape[1] % group_size
    return (8, -1) if bits == 8 or odd else (bits, group_size)


@dataclass(frozen=True)
class LinearLayers:
    """The linear layers of a network, by module name."""

    widths: dict[str, tuple[int, int]]
    """Of those inside its blocks: output and input width."""
    outside: list[str]
    """All others, such as the output head."""
    blocks: str
    """Name of the list of blocks."""
    embedding: str = ""
    """Name of the embedding."""
    head: str = ""
    """Name of the output head, which is among those outside."""
    tied: bool = False
    """Whether the head's weight is the embedding's."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """The network's names of tensors that the hub's files name otherwise, as GPT-NeoX's `embed_out.weight`. A quantized
    package has the network's, which every class loads."""

    def name_of(self, stored: str) -> str:
        """The network's name of a tensor in a file."""
        return self.renamed.get(stored, stored)

    def module_of(self, stored: str) -> str:
        """The network's name of a linear layer that a file's configuration names."""
        return self.name_of(f"{stored}.weight").removesuffix(".weight")


@dataclass(frozen=True)
class SchemePlan:
    """How one scheme is applied to a network."""

    scheme: FormName
    group_size: int
    """Input channels that share a scale; -1: all of an output channel's."""
    left_out: list[str]
    """Linear layers inside blocks that are not under the scheme."""
    outer: OuterBits = OuterBits()
    """Bits of what lies outside the blocks."""
    bits: Mapping[str, int] | None = None
    """Of a `mixed` plan, those of every linear layer inside blocks, by module name; 16: it stays bfloat16."""

    def format_of(self, module: str, shape: Sequence[int]) -> tuple[int, int]:
        """Bits and group size of the weight [outputs, inputs] of a linear layer inside blocks; 16 bits: bfloat16."""
        if self.bits is not None:
            bits = self.bits[module]
            return (16, -1) if bits == 16 else weight_format(shape, bits, self.group_size)
        return (8, -1) if module in self.left_out else (form_of(self.scheme).bits, self.group_size)
