"""The quantization schemes by name: what is stored, in which form, and how much it may cost. One line adds one.

Weights of linear layers become whole numbers times scales; embeddings, output head and norms stay bfloat16. Packages
are compressed-tensors, but for names that end in `-auto-round`: those are in auto-round's own form, which is GPTQ's.
int8-dynamic has none there: auto-round brings no layer that runs it on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from supernet.architecture import StorageFormat as StoredScheme

SchemeName = Literal["int8", "int8-dynamic", "int4", "int8-auto-round", "int4-auto-round"]


@dataclass(frozen=True)
class Scheme:
    """`preset` is AutoRound's name of the numbers, `bits` are those of a weight.

    8 bits have one scale for each output channel, 4 bits one for each group of input channels. `bound` is the largest
    mean |Δ log-probability| (nats) of next tokens that a package may show: networks of a few hundred thousand
    parameters come to half of it at 4 bits; weights or scales that were misread cost several nats. Whether the loss is
    acceptable is for the tasks to say. `dynamic`: activations are rounded to 8 bits on the fly, token by token.
    `auto_round`: in auto-round's own form.
    """

    preset: str
    bits: int
    bound: float
    dynamic: bool = False
    auto_round: bool = False

    def sizes(self, group_size: int | None = None) -> StoredScheme:
        """What it takes on disk, for exact accounting; `group_size` is the user's, for 4 bits."""
        group_size = -1 if self.bits == 8 else group_size or 32
        if self.auto_round:  # a zero point beside every scale, and layers that do not fit stay as they are
            return StoredScheme(self.bits, group_size, scale_bits=16 + self.bits, fallback=16)
        return StoredScheme(self.bits, group_size)


SCHEMES: dict[SchemeName, Scheme] = {
    "int8": Scheme("W8A16", 8, 0.1),
    "int8-dynamic": Scheme("INT8_W8A8", 8, 0.25, dynamic=True),
    "int4": Scheme("W4A16", 4, 1.0),
    "int8-auto-round": Scheme("W8A16", 8, 0.1, auto_round=True),
    "int4-auto-round": Scheme("W4A16", 4, 1.0, auto_round=True),
}
