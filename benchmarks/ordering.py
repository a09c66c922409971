"""Which ordering of neurons and heads is best? Held-out loss of untrained sub-networks, cut alike in every layer.

    python -m benchmarks.ordering [--checkpoint DIR --data FILE] [--criteria wanda surgeon] [--seeds 5]
    python -m benchmarks.ordering --layers 1 2 3 [--checkpoint DIR --data FILE]       # which layers to remove?

Every criterion sees the same calibration blocks; the loss is measured on blocks from the other end of the data. A size
is reached without removing layers, by shares of the head groups and of the FFN width that are as equal as they can be.
With `--layers`, so many whole layers are removed instead, by each of the depth baselines' criteria.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import make_parser, mean_spread, print_header, print_row, timed
from benchmarks.jobs import subnet_loss, temporary_job
from compressor.inputs import training_blocks
from compressor.job import Job
from evals.baselines import PruningContext, baselines, without
from supernet.architecture import Architecture, LayerSizes, Structure
from supernet.importance import IMPORTANCES, random
from supernet.moments import gather
from supernet.ordering import Scores, apply_ordering, order_by
from supernet.repair import RepairedVariants
from supernet.training.data import Blocks
from supernet.training.losses import held_out_loss

SIZES = (0.9, 0.8, 0.67)
DEPTH = ("shortgpt", "late-block", "minitron-depth", "nemotron-depth", "sleb")
"""Baselines that remove whole layers."""


def evenly_cut(structure: Structure, size: float) -> Architecture:
    """The network of `size` of the parameters, within 1 %, whose layers keep the most equal shares of both halves."""
    base, full = structure.base, structure.base.layers[0]
    candidates = []
    for groups in range(1, full.num_key_value_heads + 1):
        heads = groups * full.num_attention_heads // full.num_key_value_heads
        for width in range(1, full.intermediate_size + 1):
            sizes = LayerSizes(heads, groups, width)
            architecture = Architecture(base.hidden_size, (sizes,) * len(base.layers))
            miss = abs(structure.parameters(architecture) / structure.parameters(base) - size)
            uneven = abs(groups / full.num_key_value_heads - width / full.intermediate_size)
            candidates.append((round(miss / 0.01), uneven, miss, architecture))
    return min(candidates, key=lambda c: c[:3])[3]


def main() -> None:
    criteria = ([name for name in IMPORTANCES if name != "random"], "orderings by name")
    seeds = (5, "random orderings behind the row `random`")
    blocks_option = (64, "calibration blocks of 256 tokens, and held-out ones")
    layers = ([0], "remove so many layers instead, by each criterion of layers")
    parser = make_parser(
        __doc__, "checkpoint", "data", criteria=criteria, seeds=seeds, blocks=blocks_option, layers=layers
    )
    arguments = parser.parse_args()
    with temporary_job(arguments.checkpoint, arguments.data) as job:
        job.threads(scoring=True)
        blocks = training_blocks(job, 3 * arguments.blocks * 256)
        calibration, held_out = blocks[: arguments.blocks], blocks.split(least=arguments.blocks)[1]
        batches = [batch.ids for batch in calibration.split(8)]
        if any(arguments.layers):
            print_layers(job, batches, held_out, arguments.layers)
            return
        full = job.structure.parameters(job.structure.base)
        cuts = [evenly_cut(job.structure, size) for size in SIZES]

        def losses(scores: Scores, repaired: bool = False) -> list[float]:
            """Of the cuts of the base, its units ordered by these scores."""
            supernet = job.supernet_of(job.load_base(torch.float32))
            apply_ordering(supernet, order_by(scores))
            if repaired:
                supernet.use(RepairedVariants(supernet, dict(gather(supernet, batches)).__getitem__, 2**30))
            return [subnet_loss(supernet, cut, held_out) for cut in cuts]

        untouched = job.supernet_of(job.load_base(torch.float32))
        base = subnet_loss(untouched, untouched.base, held_out)
        print(f"Base: {base:.3f} nats per token. Cuts, as head groups and FFN width of every layer: ", end="")
        print("; ".join(f"{a.layers[0].num_key_value_heads} and {a.layers[0].intermediate_size}" for a in cuts) + "\n")
        shares = [f"{job.structure.parameters(cut) / full:.3f}" for cut in cuts]
        print_header("ordering", *shares, *(f"{share}, repaired" for share in shares), "seconds", right_from=1)
        for name in arguments.criteria:
            scores, seconds = timed(partial(IMPORTANCES[name], untouched, batches))
            print_row(
                name, *(f"{loss:.3f}" for loss in losses(scores) + losses(scores, repaired=True)), f"{seconds:.1f}"
            )
        if arguments.seeds:
            runs = [random(untouched, [], seed) for seed in range(arguments.seeds)]
            by_cut = zip(*(losses(scores) + losses(scores, repaired=True) for scores in runs), strict=True)
            print_row(f"random, {arguments.seeds} seeds", *map(mean_spread, by_cut), "0.0")


def print_layers(job: Job, batches: Sequence[Tensor], held_out: Blocks, counts: Sequence[int]) -> None:
    """A row for each criterion of layers: the held-out loss without so many of them, and which go first."""
    base, structure = job.load_base(torch.float32), job.structure
    whole = held_out_loss(base, held_out, 8, job.device)
    print(f"Base: {whole:.3f} nats per token, {len(structure.base.layers)} layers.\n")
    print_header("criterion", *(f"{count} removed" for count in counts), "which", "seconds", right_from=1)
    for name in DEPTH:
        began, losses, removed = time.perf_counter(), list[float](), set[int]()
        for count in counts:
            wanted = structure.parameters(without(structure.base, set(range(count))))
            network, architecture = baselines()[name].cut(PruningContext(base, structure, tuple(batches), wanted))
            losses.append(held_out_loss(network.eval(), held_out, 8, job.device))
            removed = set(range(len(structure.base.layers))) - set(architecture.kept)
        which, seconds = ", ".join(map(str, sorted(removed))), time.perf_counter() - began
        print_row(name, *(f"{loss:.3f}" for loss in losses), which, f"{seconds:.0f}")


if __name__ == "__main__":
    main()
