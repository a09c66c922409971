"""Is a power exponent for each layer worth it? Number formats of equal bits: error of the weights, and bits per byte.

    python -m benchmarks.number_formats [--checkpoint DIR --data FILE.jsonl] [--documents 60] [--bits 4 3 2]

Every linear layer of the blocks is rounded without data, in groups of 32 input channels with a 16-bit scale: as
compressed-tensors stores it (`nearest`), by a power map whose exponent is searched for each layer (NUPES and
PowerQuant, arXiv 2308.05600 and 2301.09858: symmetric, so one level less), and at 4 bits with the values of NF4
(QLoRA, arXiv 2305.14314, appendix E) and of llama.cpp's IQ4_NL. With a searched scale, that of each group is the one
of a few that makes the least squared error. Text that was set aside is scored, one thread.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import make_parser, print_header, print_row, timed
from benchmarks.jobs import temporary_job
from benchmarks.quantization import HELD_OUT, bits_per_byte, logits_of
from export.layouts.gguf.types import VALUES
from export.quantization.plan import linear_layers_in

GROUP = 32
SHARES = [1.0, *(0.6 + 0.025 * number for number in range(16)), 1.025, 1.05]
"""What the scale is multiplied by where it is searched; 1 first, so that it stays where nothing is better."""
EXPONENTS = [0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0]
NF4 = (
    -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
    0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0,
)  # fmt: skip

Rounder = Callable[[Tensor, Tensor], Tensor]
"""From groups [..., 32] and what their scales are multiplied by [..., 1] to their rounded values."""

Format = Callable[[Tensor, bool], tuple[Tensor, float | None]]
"""From a weight, and whether scales are searched, to its values and the exponent of a power map."""


def nearest(groups: Tensor, share: Tensor, bits: int) -> Tensor:
    """Whole numbers that reach one step further on the side of the largest weight."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    lowest = -(2 ** (bits - 1))
    scale = _stored(largest / lowest * share)
    return (groups / scale).round().clamp(lowest, -lowest - 1) * scale


def power(groups: Tensor, share: Tensor, bits: int, exponent: float) -> Tensor:
    """Whole numbers of the weights' power, symmetric."""
    most = 2 ** (bits - 1) - 1
    scale = _stored(groups.abs().amax(-1, keepdim=True) * share)
    codes = ((groups.abs() / scale) ** exponent * most).round().clamp(max=most)
    return groups.sign() * (codes / most) ** (1 / exponent) * scale


def listed(groups: Tensor, share: Tensor, values: Tensor) -> Tensor:
    """The nearest of listed values, ascending; the first is the furthest from zero."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = _stored(largest / values[0] * share)
    return values[torch.bucketize(groups / scale, (values[1:] + values[:-1]) / 2)] * scale


def _stored(scale: Tensor) -> Tensor:
    """Scales in bfloat16, none of them zero."""
    return torch.where(scale == 0, 1.0, scale).to(torch.bfloat16).float()


def rounded(weight: Tensor, rounder: Rounder, searched: bool) -> Tensor:
    """A weight [out, in] in the values of a format; `searched`: of the scales tried, each group has its best."""
    groups = weight.float().unflatten(1, (-1, GROUP if weight.shape[1] % GROUP == 0 else weight.shape[1]))
    ones = torch.ones_like(groups[..., :1])
    best = rounder(groups, ones)
    for share in SHARES[1:] if searched else []:
        tried = rounder(groups, share * ones)
        better = (tried - groups).square().sum(-1, keepdim=True) < (best - groups).square().sum(-1, keepdim=True)
        best = torch.where(better, tried, best)
    return best.flatten(1)


def best_power(weight: Tensor, bits: int, searched: bool) -> tuple[Tensor, float]:
    """A weight in the values of the power map whose exponent makes the least squared error, and that exponent."""
    tried = [(rounded(weight, partial(power, bits=bits, exponent=e), searched), e) for e in EXPONENTS]
    return min(tried, key=lambda pair: float((pair[0] - weight).square().sum()))


def formats(bits: int) -> dict[str, Format]:
    """Every format of so many bits, by name."""

    def plain(rounder: Rounder) -> Format:
        return lambda weight, searched: (rounded(weight, rounder, searched), None)

    known: dict[str, Format] = {
        "nearest": plain(partial(nearest, bits=bits)),
        "power": lambda weight, searched: best_power(weight, bits, searched),
    }
    if bits == 4:
        known["NF4"] = plain(partial(listed, values=torch.tensor(NF4)))
        known["IQ4_NL"] = plain(partial(listed, values=torch.tensor(VALUES, dtype=torch.float32)))
    return known


@torch.no_grad()
def round_all(network: torch.nn.Module, form: Format, searched: bool) -> tuple[float, list[float]]:
    """Round every linear layer of the blocks in place; returns the squared error as a share, and the exponents."""
    error = total = 0.0
    exponents = []
    for name in linear_layers_in(network).widths:
        parameter = network.get_parameter(f"{name}.weight")
        values, exponent = form(parameter, searched)
        error += float((values - parameter).square().sum())
        total += float(parameter.square().sum())
        parameter.copy_(values)
        exponents += [] if exponent is None else [exponent]
    return error / total, exponents


def main() -> None:
    own = {"documents": (HELD_OUT, "that are scored"), "bits": [4, 3, 2]}
    arguments = make_parser(__doc__, "checkpoint", "data", **own).parse_args()
    torch.set_num_threads(1)
    best: dict[int, dict[str, float]] = {}
    with temporary_job(arguments.checkpoint, arguments.data, documents=3000) as job:
        lines = Path(job.recipe.data or "").read_text(encoding="utf-8").splitlines()[-HELD_OUT:]
        texts = [json.loads(line)["text"] for line in lines[: arguments.documents]]
        network = job.load_base(torch.float32)
        length = min(256, network.config.max_position_embeddings)
        score = partial(bits_per_byte, length=length, tokenizer=job.tokenizer, texts=texts)
        reference = score(logits_of(network))
        print(f"{Path(arguments.checkpoint).name}: {reference:.4f} bits per byte as it is\n")
        print_header("bits", "format", "scale", "relative squared error", "bits per byte", "change", "s", right_from=3)
        for bits in arguments.bits:
            best[bits] = {}
            for name, form in formats(bits).items():
                for searched in (False, True):
                    copied = copy.deepcopy(network)
                    (error, exponents), seconds = timed(partial(round_all, copied, form, searched))
                    found = score(logits_of(copied))
                    best[bits][name] = min(found, best[bits].get(name, found))
                    label = f"{name}, {min(exponents)} to {max(exponents)}" if exponents else name
                    scale = "searched" if searched else "of the largest"
                    change = f"{100 * (found / reference - 1):+.2f} %"
                    print_row(str(bits), label, scale, f"{error:.5f}", f"{found:.4f}", change, f"{seconds:.1f}")
    wins = [str(bits) for bits, row in best.items() if row.pop("power") < min(row.values())]
    print(f"\nbits at which a power exponent is the best: {', '.join(wins) or 'none'}")


if __name__ == "__main__":
    main()
