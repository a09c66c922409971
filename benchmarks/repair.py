"""How much of a slice's loss does repair give back, without training? Held-out loss of uniform cuts.

    python -m benchmarks.repair [--checkpoint DIR --data FILE] [--tokens 4096 16384] [--shares 0.8 0.67 0.5]
        [--ordering wanda] [--halves 4]
    python -m benchmarks.repair --picks RUN [--tokens 4096 16384]   # what a search picked
    python -m benchmarks.repair --inputs 11008 --outputs 4096       # what one projection of this size costs

Cuts are those of `benchmarks.ordering`, or the picks of a run in its super-network, on its text. Each is sliced
plainly; repaired from moments of the whole network, as in a search; and repaired in sequence, as a pick is. The
held-out blocks are from the other end of the data, and the excess is the loss less the base's. `--halves` removes one
half-block of so many layers instead. One thread, two for `--inputs`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from benchmarks.common import make_parser, print_header, print_row, resident, timed
from benchmarks.jobs import ordered_supernet, subnet_loss, temporary_job
from benchmarks.ordering import evenly_cut
from compressor.inputs import CALIBRATION_BLOCKS, training_blocks
from compressor.job import Job
from compressor.pipeline import resume
from compressor.stages.picks import cut_out, read_picks
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, Half
from supernet.least_squares import Sums, choose_ridge, factorised, prefix_weight
from supernet.moments import Moments, gather
from supernet.repair import RepairedVariants, repair_in_sequence

ROWS = 8
"""Blocks in a batch of calibration text."""


def gathered(supernet: SuperNetwork, text: list[Tensor]) -> dict[int, dict[str, Moments]]:
    """The moments of all layers."""
    return dict(gather(supernet, text))


def one_half_less(base: Architecture, half: Half, index: int) -> Architecture:
    """The base without one half-block of one layer."""
    layers, full = list(base.layers), base.layers[index]
    layers[index] = replace(full, num_key_value_heads=0) if half == "attention" else replace(full, intermediate_size=0)
    return replace(base, layers=tuple(layers))


def removed_halves(
    supernet: SuperNetwork, loss: Callable[[Architecture], float], text: list[Tensor], many: int
) -> None:
    """A table of single removed half-blocks, repaired without and with what they said."""
    moments = gathered(supernet, text)
    apart = {i: {half: replace(m, other=None) for half, m in layer.items()} for i, layer in moments.items()}
    print_header("removed", "layer", "sliced", "each half-block for itself", "each layer for itself", "in sequence")
    layers = len(supernet.base.layers)
    for half in ("attention", "mlp"):
        for index in (round((n + 0.5) * layers / many) for n in range(many)):
            cut = one_half_less(supernet.base, half, index)
            ways = [None, *(RepairedVariants(supernet, of.__getitem__, 2**30) for of in (apart, moments))]
            losses = []
            for variants in (*ways, repair_in_sequence(supernet, cut, text)):
                supernet.use(variants)
                losses.append(f"{loss(cut):.3f}")
                supernet.use(None)
            print_row(half, str(index), *losses)


def cost_of_one(inputs: int, outputs: int, widths: int = 10) -> None:
    """Seconds and memory of refitting one projection for so many widths, from moments of random text."""
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(inputs // 4, inputs, generator=generator) / inputs**0.5
    parts = []
    for rows in (3, 1):  # to fit to, and held out
        sums = Sums(inputs)
        for _ in range(rows * 4):
            noise = torch.randn(2048, inputs, generator=generator)
            sums.add(torch.randn(2048, inputs // 4, generator=generator) @ mixing + noise)
        parts.append(sums)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    second = (parts[0] + parts[1]).moments(False)[0]

    def all_widths() -> None:
        ridge = choose_ridge(weight, parts[0], parts[1], False)
        lower = factorised(second, ridge if isfinite(ridge) else 0.1)
        products = weight @ lower
        for n in range(widths):
            prefix_weight(products, lower, (n + 1) * inputs // (widths + 1))

    _, seconds = timed(all_widths)
    print(f"{inputs:,} inputs, {outputs:,} outputs, {widths} widths: {seconds:.0f} s with the ridge chosen; ", end="")
    print(f"peak memory {resident('VmHWM') / 2**30:.1f} GiB, 8,192 tokens' sums among it.")


def cost_of_switching(supernet: SuperNetwork, variants: RepairedVariants, cuts: list[Architecture]) -> None:
    """Milliseconds to switch between cuts: at first, when their variants are made, and while these are held."""
    supernet.use(variants)

    def switch(times: int) -> None:
        for cut in cuts * times:
            supernet.activate(cut)

    _, first = timed(partial(switch, 1))
    _, seconds = timed(partial(switch, 50))
    supernet.activate(supernet.base)
    supernet.use(None)
    each = 1000 * seconds / 50 / len(cuts)
    print(f"\nTo switch between repaired cuts: {each:.2f} ms, of {len(supernet.base.layers)} layers;", end=" ")
    print(f"{1000 * first / len(cuts):.0f} ms where their weights are made.")


def main() -> None:
    own = {
        "ordering": ("wanda", "criterion by which units are ordered"),
        "halves": (0, "layers whose half-blocks are removed one at a time; no uniform cuts then"),
        "inputs": (0, "inputs of one projection whose cost is measured; nothing else then"),
        "outputs": (4096, "its outputs"),
        "tokens": ([4096, 16384], "calibration tokens"),
        "shares": ([0.8, 0.67, 0.5], "sizes, as shares of the parameters"),
        "blocks": (48, "held-out blocks"),
        "picks": ("", "a run whose picks are cut; no uniform cuts then"),
    }
    arguments = make_parser(__doc__, "checkpoint", "data", "device", **own).parse_args()
    if arguments.inputs:
        cost_of_one(arguments.inputs, arguments.outputs)
        return
    torch.set_num_threads(1)
    if arguments.picks:
        measure(arguments, resume(Path(arguments.picks), {}))
    else:
        with temporary_job(arguments.checkpoint, arguments.data, device=arguments.device) as job:
            measure(arguments, job)


def measure(arguments: argparse.Namespace, job: Job) -> None:
    """The table of a job's cuts, and its last line."""
    # 1. Text, the super-network and what is cut.
    most = max(arguments.tokens)
    blocks = training_blocks(job, 3 * most)
    calibration, held_out = blocks.split(least=arguments.blocks)
    held_out = held_out.part(0, min(arguments.blocks, len(held_out)))
    batches = [batch.ids.to(job.device) for batch in calibration[: -(-most // blocks.length)].split(ROWS)]
    if arguments.picks:
        supernet, cuts = job.load_supernet(), [cut_out(picked) for picked in read_picks(job)]
    else:
        supernet = ordered_supernet(job, batches[: CALIBRATION_BLOCKS // ROWS], arguments.ordering)
        cuts = [evenly_cut(job.structure, share) for share in arguments.shares]
    loss = partial(subnet_loss, supernet, held_out=held_out)
    base, full = loss(supernet.base), job.structure.parameters(supernet.base)
    print(f"Base: {base:.3f} nats per token.\n")
    if arguments.halves:
        removed_halves(supernet, loss, batches[: max(1, most // (ROWS * blocks.length))], arguments.halves)
        return
    # 2. A row for each of them and each number of tokens.
    removed: dict[int, list[float]] = {tokens: [] for tokens in arguments.tokens}
    print_header("parameters", "tokens", "sliced", "repaired", "in sequence", "excess removed", "seconds", right_from=1)
    for tokens in arguments.tokens:
        text = batches[: max(1, tokens // (ROWS * blocks.length))]
        moments, gathering = timed(partial(gathered, supernet, text))
        repaired = RepairedVariants(supernet, moments.__getitem__, 2**30)
        for cut in cuts:
            losses = [loss(cut)]
            in_sequence, seconds = timed(partial(repair_in_sequence, supernet, cut, text))
            for variants in (repaired, in_sequence):
                supernet.use(variants)
                losses.append(loss(cut))
                supernet.use(None)
            gone = [1 - (one - base) / (losses[0] - base) for one in losses[1:]]
            removed[tokens].append(gone[1])
            cells = [f"{one:.3f}" for one in losses] + [" and ".join(f"{100 * one:.0f} %" for one in gone)]
            size = job.structure.parameters(cut) / full
            print_row(f"{size:.3f}", f"{tokens:,}", *cells, f"{gathering:.1f} and {seconds:.1f}")
    cost_of_switching(supernet, RepairedVariants(supernet, moments.__getitem__, 2**30), cuts)
    print(f"\nSeconds: moments of all layers, and one sequence. Peak memory {resident('VmHWM') / 2**30:.1f} GiB.")
    print(f"excess removed without training: {100 * mean(removed[max(removed)]):.0f} %")


if __name__ == "__main__":
    main()
