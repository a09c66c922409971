"""The quantization schemes by name: what is stored, in which form, and how large an error is allowed. To add one, add a
line.

Weights of linear layers become whole numbers times scales; embeddings, output head and norms stay bfloat16. Packages
are compressed-tensors, but for names that end in `-auto-round`: those are in auto-round's own form, which is GPTQ's.
int8-dynamic has no such form: auto-round has no layer that runs it on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from supernet.architecture import StorageFormat

SchemeName = Literal["int8", "int8-dynamic", "int4", "int8-auto-round", "int4-auto-round"]


@dataclass(frozen=True)
class Scheme:
    """`preset` is AutoRound's name of the number formats, `bits` are those of a weight.

    8 bits have one scale for each output channel, 4 bits one for each group of input channels. `bound` is the largest
    mean |Δ log-probability| (nats) of next tokens that a package may show: networks of a few hundred thousand
    parameters come to half of it at 4 bits; weights or scales that were misread cost several nats. It finds errors in
    storage; whether the loss is acceptable is for tasks to show. `dynamic`: activations are rounded to 8 bits while the
    network runs, token by token. `auto_round`: in auto-round's own form.
    """

    preset: str
    bits: int
    bound: float
    dynamic: bool = False
    auto_round: bool = False

    def storage_format(self, group_size: int | None = None) -> StorageFormat:
        """How linear layers are stored, to count bytes exactly; `group_size` is the user's, for 4 bits."""
        group_size = -1 if self.bits == 8 else group_size or 32
        if self.auto_round:  # a zero point beside every scale, and layers that do not fit stay as they are
            return StorageFormat(self.bits, group_size, scale_bits=16 + self.bits, fallback=16)
        return StorageFormat(self.bits, group_size)


SCHEMES: dict[SchemeName, Scheme] = {
    "int8": Scheme("W8A16", 8, 0.1),
    "int8-dynamic": Scheme("INT8_W8A8", 8, 0.25, dynamic=True),
    "int4": Scheme("W4A16", 4, 1.0),
    "int8-auto-round": Scheme("W8A16", 8, 0.1, auto_round=True),
    "int4-auto-round": Scheme("W4A16", 4, 1.0, auto_round=True),
}


@dataclass(frozen=True)
class LinearLayers:
    """The linear layers of a network, by module name."""

    widths: dict[str, tuple[int, int]]
    """Of those inside its blocks: output and input width."""
    outside: list[str]
    """All others, such as the output head."""
    blocks: str
    """Name of the list of blocks."""


@dataclass(frozen=True)
class SchemePlan:
    """How one scheme is applied to a network."""

    scheme: SchemeName
    group_size: int
    """Input channels that share a scale; -1: all of an output channel's."""
    left_out: list[str]
    """Linear layers inside blocks that are not under the scheme."""
