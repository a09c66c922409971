"""The number formats of gguf files: what a block of weights takes, and how weights become blocks.

The `gguf` package packs floats and Q8_0. Formats whose scales are searched are packed here: Q4_0, Q5_1 and IQ4_NL, of
32 weights, and the K types, in which 256 weights share two half-precision numbers and parts of 16 or 32 have scales of
their own in 4 to 8 bits. For each part a few scales are tried, each refined by least squares, weighted by what the
inputs are worth (`importance`): the idea of llama.cpp's importance matrix. `gguf.quants` reads what is written here,
and so says where each bit lies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from search.genes import AS_STORED
from supernet.architecture import Architecture

SUPER = 256
"""Weights in a block of the K types."""
TRIED = 17
"""Scales that are tried for each part."""
ROWS = 512
"""Rows that are packed at a time, to bound memory."""
VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The 16 values of IQ4_NL, denser around zero."""


@dataclass(frozen=True)
class GGUFType:
    """A number format: `bytes` for each block of `block` weights.

    `bound` is the largest mean |Δ log-probability| (nats) of the likeliest tokens that a file may show, as in `Scheme`;
    None for types that are not quantized.
    `instead` is the type of rows that the block does not divide. `searched`: its scales are searched here.
    """

    block: int
    bytes: int
    bound: float | None = None
    instead: str = "f16"
    searched: bool = False

    @property
    def bits(self) -> float:
        """Stored bits for each weight."""
        return 8 * self.bytes / self.block


TYPES = {
    "f32": GGUFType(1, 4),
    "f16": GGUFType(1, 2),
    "bf16": GGUFType(1, 2),
    "q8_0": GGUFType(32, 34, 0.5),
    "q6_k": GGUFType(SUPER, 210, 0.75, "q8_0", searched=True),
    "q5_k": GGUFType(SUPER, 176, 1.5, "q5_1", searched=True),
    "q5_1": GGUFType(32, 24, 1.5, searched=True),
    "q4_k": GGUFType(SUPER, 144, 2.5, "iq4_nl", searched=True),
    "iq4_nl": GGUFType(32, 18, 2.5, searched=True),
    "q4_0": GGUFType(32, 18, 2.5, searched=True),
    "q3_k": GGUFType(SUPER, 110, 4.0, "iq4_nl", searched=True),
    "q2_k": GGUFType(SUPER, 84, 6.0, "iq4_nl", searched=True),
}
QUANTIZED = tuple(name for name, kind in TYPES.items() if kind.bound is not None)
OUTER = {16: "f16", 8: "q8_0", 4: "iq4_nl"}
"""The type of embedding and head by their bits."""
MIXED = "mixed"
"""Files whose half-blocks have types of their own."""
BY_BITS = {16: "f16", 8: "q8_0", 6: "q6_k", 5: "q5_k", 4: "q4_k", 3: "q3_k", 2: "q2_k"}
"""The type of a half-block of a `mixed` file by its bits."""


def type_of(name: str, shape: tuple[int, ...], gguf_type: str, embedding: int | None = None) -> str:
    """The stored type of a tensor of a file of a type: vectors are f32; where blocks do not divide the rows the type's
    `instead` is taken. What lies outside the blocks has 8 bits in quantized files, embedding and head `embedding` bits
    where that is said."""
    if len(shape) == 1:
        return "f32"
    if gguf_type in QUANTIZED and not name.startswith("blk."):
        tables = name.partition(".")[0] in ("token_embd", "output")
        gguf_type = OUTER[embedding] if embedding is not None and tables else "q8_0"
    while shape[-1] % TYPES[gguf_type].block:
        gguf_type = TYPES[gguf_type].instead
    return gguf_type


def type_by_bits(name: str, shape: tuple[int, ...], bits: Architecture) -> str:
    """The stored type of a tensor of a `mixed` file, whose half-blocks, embedding and head have these `bits`."""
    if not name.startswith("blk."):
        outer = bits.head_bits if name.startswith("output.") else bits.embedding_bits
        return type_of(name, shape, BY_BITS[8], outer or AS_STORED)
    return type_of(name, shape, asked_type(name, bits))


def asked_type(name: str, bits: Architecture) -> str:
    """The type of the bits of the half-block that a tensor `blk.N.…` of a file is of."""
    _, number, tensor = name.split(".", 2)
    layer = bits.layers[bits.kept[int(number)]]
    return BY_BITS[(layer.ffn_bits if tensor.startswith("ffn") else layer.attention_bits) or AS_STORED]


def as_stored(weight: Tensor, bits: int) -> Tensor:
    """A weight [outputs, inputs] of a half-block of these bits with the values that a `mixed` file holds, all input
    channels alike."""
    from gguf import GGMLQuantizationType, quants  # an optional dependency

    kind = type_of("blk.", tuple(weight.shape), BY_BITS[bits])
    ggml, values = GGMLQuantizationType[kind.upper()], weight.detach().float().cpu()
    blocks = blocks_of(values, kind) if TYPES[kind].searched else quants.quantize(values.numpy(), ggml)
    return torch.from_numpy(quants.dequantize(blocks, ggml).astype("float32")).view_as(values).to(weight)


def bound_of_bits(bits: Architecture) -> float:
    """What the proof of a `mixed` file allows: what is allowed for the fewest of its bits."""
    inner = [of for layer in bits.layers for of in (layer.attention_bits, layer.ffn_bits)]
    return TYPES[BY_BITS[min([of for of in (*inner, bits.embedding_bits, bits.head_bits) if of] or [8])]].bound or 0.0


def stored_bytes(shape: tuple[int, ...], gguf_type: str) -> int:
    """Bytes of a tensor in a file, which are padded to 32."""
    kind, count = TYPES[gguf_type], 1
    for length in shape:
        count *= length
    return -(-(count // kind.block * kind.bytes) // 32) * 32


def blocks_of(values: Tensor, gguf_type: str, importance: Tensor | None = None) -> NDArray[np.uint8]:
    """Blocks of a matrix (or several) whose scales are searched, as bytes [..., rows, bytes].

    `importance` [columns] weighs the error of every input channel; None: all alike.
    """
    rows = values.reshape(-1, values.shape[-1]).float()
    weights = torch.ones(rows.shape[1]) if importance is None else importance.float().cpu()
    weights = weights / weights.mean().clamp(min=1e-30) + 1e-6  # channels that are never used count a little
    block = TYPES[gguf_type].block
    packed = [
        _PACK[gguf_type](part.reshape(-1, block), weights.expand_as(part).reshape(-1, block)).view(len(part), -1)
        for part in rows.split(ROWS)
    ]
    return torch.cat(packed).view(*values.shape[:-1], -1).numpy()


# Fitting. Parts are [..., n]; scales [..., 1].


def _tried() -> list[float]:
    """Shares by which the range of the codes is stretched or shrunk."""
    return [1 + 0.25 * (2 * number / (TRIED - 1) - 1) for number in range(TRIED)]


def _fit(x: Tensor, w: Tensor, codes: Callable[[Tensor], Tensor], ends: tuple[int, int]) -> Tensor:
    """The scale [..., 1] for which scale · codes(x / scale) is nearest to x, weighted.

    Of some around those that put the largest x at either of the codes' `ends`, each refined once by least squares. A
    scale may be negative: where the ends differ, that is another grid.
    """
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    best, most = largest / ends[0], torch.full_like(largest, -1.0)
    for scale in (largest / end * share for end in ends for share in _tried()):
        found = codes(x / torch.where(scale == 0, 1.0, scale))
        across, within = (w * x * found).sum(-1, keepdim=True), (w * found * found).sum(-1, keepdim=True)
        explained = across * across / within.clamp(min=1e-30)  # of the weighted sum of squares
        better = explained > most
        best = torch.where(better, across / within.clamp(min=1e-30), best)
        most = torch.where(better, explained, most)
    return best


def _fit_affine(x: Tensor, w: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scale and offset, both at least 0, for which scale · code - offset is nearest to x with codes up to `levels`."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True)
    total, mean = w.sum(-1, keepdim=True), (w * x).sum(-1, keepdim=True)
    best_scale, best_offset = (high - low).clamp(min=0) / levels, -low
    least = torch.full_like(low, torch.inf)
    for share in _tried():
        scale = (high - low).clamp(min=1e-30) / levels * share
        found = ((x - low) / scale).round_().clamp_(0, levels)
        # Least squares of x on the codes, the offset kept at 0 or above.
        ones, squares = (w * found).sum(-1, keepdim=True), (w * found * found).sum(-1, keepdim=True)
        across = (w * x * found).sum(-1, keepdim=True)
        determinant = total * squares - ones * ones
        solvable = determinant > 1e-12 * total * squares
        divisor = torch.where(solvable, determinant, 1.0)
        fitted = torch.where(solvable, (total * across - ones * mean) / divisor, scale)
        offset = torch.where(solvable, (ones * across - squares * mean) / divisor, -low)
        above = offset < 0
        fitted = torch.where(above, across / squares.clamp(min=1e-30), fitted)
        offset = offset.clamp(min=0)
        error = (w * (fitted * found - offset - x) ** 2).sum(-1, keepdim=True)
        better = (error < least) & (fitted > 0)
        best_scale = torch.where(better, fitted, best_scale)
        best_offset = torch.where(better, offset, best_offset)
        least = torch.where(better, error, least)
    return best_scale, best_offset


# Packing: blocks [n, block] and their weights to bytes [n, bytes].


def _half(values: Tensor) -> Tensor:
    """[n] as the two bytes of a half-precision number, [n, 2]."""
    return values.to(torch.float16).view(torch.uint8).view(-1, 2)


def _joined(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., 8 / bits, m] as bytes [..., m], the first in the lowest bits."""
    shifts = bits * torch.arange(codes.shape[-2]).view(-1, 1)
    return (codes.int() << shifts).sum(-2).to(torch.uint8)


def _signed(x: Tensor, w: Tensor, lowest: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [n, 16, 16] from `lowest` to -lowest - 1, their parts' scales [n, 16] in whole numbers of which the lowest
    is -steps, and what these are multiplied by [n]."""
    parts, weights, highest = x.view(-1, 16, 16), w.view(-1, 16, 16), -lowest - 1
    scales = _fit(parts, weights, lambda v: v.round().clamp(lowest, highest), (lowest, highest)).squeeze(-1)
    whole = scales.gather(-1, scales.abs().argmax(-1, keepdim=True)) / -steps
    whole = whole.to(torch.float16).float()
    units = (scales / torch.where(whole == 0, 1.0, whole)).round().clamp(-steps, steps - 1)
    step = (units * whole)[..., None]
    codes = (parts / torch.where(step == 0, 1.0, step)).round().clamp(lowest, highest)
    return codes.int(), units.int(), whole.squeeze(-1)


def _affine(x: Tensor, w: Tensor, parts: int, levels: int, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes [n, parts, 256 / parts], scales and offsets of the parts in whole numbers up to `most` [n, parts], and what
    these are multiplied by [n]."""
    split, weights = x.view(-1, parts, SUPER // parts), w.view(-1, parts, SUPER // parts)
    scales, offsets = (value.squeeze(-1) for value in _fit_affine(split, weights, levels))
    units, wholes = [], []
    for values in (scales, offsets):
        whole = (values.amax(-1, keepdim=True) / most).to(torch.float16).float()
        units.append((values / torch.where(whole == 0, 1.0, whole)).round().clamp(0, most))
        wholes.append(whole)
    step, offset = ((unit * whole)[..., None] for unit, whole in zip(units, wholes, strict=True))
    codes = ((split + offset) / torch.where(step == 0, 1.0, step)).round().clamp(0, levels)
    return codes.int(), units[0].int(), units[1].int(), wholes[0].squeeze(-1), wholes[1].squeeze(-1)


def _six_bits(scales: Tensor, offsets: Tensor) -> Tensor:
    """Eight scales and eight offsets of 6 bits each [n, 8] in 12 bytes: the high bits of the last four of each stand
    above the first four."""
    first = [kind[:, :4] | kind[:, 4:] >> 4 << 6 for kind in (scales, offsets)]
    return torch.cat([*first, scales[:, 4:] & 15 | (offsets[:, 4:] & 15) << 4], 1).to(torch.uint8)


def _q6_k(x: Tensor, w: Tensor) -> Tensor:
    codes, units, whole = _signed(x, w, -32, 128)
    codes = codes + 32
    low, high = _joined((codes & 15).view(-1, 2, 2, 64), 4), _joined((codes >> 4).view(-1, 2, 4, 32), 2)
    return torch.cat([low.flatten(1), high.flatten(1), units.to(torch.int8).view(torch.uint8), _half(whole)], 1)


def _q5_k(x: Tensor, w: Tensor) -> Tensor:
    codes, scales, offsets, whole, whole_offset = _affine(x, w, 8, 31, 63)
    high, low = _joined(codes >> 4, 1), _joined((codes & 15).view(-1, 4, 2, 32), 4)
    return torch.cat([_half(whole), _half(whole_offset), _six_bits(scales, offsets), high, low.flatten(1)], 1)


def _q4_k(x: Tensor, w: Tensor) -> Tensor:
    codes, scales, offsets, whole, whole_offset = _affine(x, w, 8, 15, 63)
    low = _joined(codes.view(-1, 4, 2, 32), 4)
    return torch.cat([_half(whole), _half(whole_offset), _six_bits(scales, offsets), low.flatten(1)], 1)


def _q3_k(x: Tensor, w: Tensor) -> Tensor:
    codes, units, whole = _signed(x, w, -4, 32)
    codes, units = codes + 4, units + 32
    high, low = _joined((codes >> 2).view(-1, 8, 32), 1), _joined((codes & 3).view(-1, 2, 4, 32), 2)
    scales = [_joined((units & 15).view(-1, 2, 8), 4), _joined((units >> 4).view(-1, 4, 4), 2)]
    return torch.cat([high, low.flatten(1), *scales, _half(whole)], 1)


def _q2_k(x: Tensor, w: Tensor) -> Tensor:
    codes, scales, offsets, whole, whole_offset = _affine(x, w, 16, 3, 15)
    low = _joined(codes.view(-1, 2, 4, 32), 2)
    units = (scales | offsets << 4).to(torch.uint8)
    return torch.cat([units, low.flatten(1), _half(whole), _half(whole_offset)], 1)


def _iq4_nl(x: Tensor, w: Tensor) -> Tensor:
    values = torch.tensor(VALUES, dtype=torch.float32)
    # Middles between values are multiples of a half, so the half above a number says where it lies: a table of them.
    halves = torch.arange(2 * VALUES[0], 2 * VALUES[-1] + 1)
    codes_of = torch.bucketize(halves / 2, (values[1:] + values[:-1]) / 2)
    values_of = values[codes_of]

    def above(v: Tensor) -> Tensor:
        return (v * 2).ceil_().clamp_(halves[0], halves[-1]).sub_(halves[0]).int()

    scale = _fit(x, w, lambda v: values_of[above(v)], (VALUES[0], VALUES[-1]))
    scale = scale.to(torch.float16).float()
    codes = codes_of[above(x / torch.where(scale == 0, 1.0, scale))]
    return torch.cat([_half(scale.squeeze(-1)), _joined(codes.view(-1, 2, 16), 4)], 1)


def _q5_1(x: Tensor, w: Tensor) -> Tensor:
    above = x.amin(-1, keepdim=True).clamp(min=0)  # its offset has a sign
    scale, offset = _fit_affine(x - above, w, 31)
    scale, offset = (value.to(torch.float16).float() for value in (scale, offset - above))
    codes = ((x + offset) / torch.where(scale == 0, 1.0, scale)).round().clamp(0, 31).int()
    high = _joined((codes >> 4).view(-1, 4, 8, 1), 1).flatten(1)
    low = _joined((codes & 15).view(-1, 2, 16), 4)
    return torch.cat([_half(scale.squeeze(-1)), _half(-offset.squeeze(-1)), high, low], 1)


def _q4_0(x: Tensor, w: Tensor) -> Tensor:
    scale = _fit(x, w, lambda v: v.round().clamp(-8, 7), (-8, 7))
    scale = scale.to(torch.float16).float()
    codes = (x / torch.where(scale == 0, 1.0, scale)).round().clamp(-8, 7).int() + 8
    return torch.cat([_half(scale.squeeze(-1)), _joined(codes.view(-1, 2, 16), 4)], 1)


_PACK: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "q6_k": _q6_k,
    "q5_k": _q5_k,
    "q4_k": _q4_k,
    "q3_k": _q3_k,
    "q2_k": _q2_k,
    "iq4_nl": _iq4_nl,
    "q5_1": _q5_1,
    "q4_0": _q4_0,
}
