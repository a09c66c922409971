"""How much of a slice's loss does repair give back, without training? Held-out loss of uniform cuts.

    python -m benchmarks.repair [--checkpoint DIR --data FILE] [--tokens 4096 16384] [--shares 0.8 0.67 0.5]

Cuts are those of `benchmarks.ordering`, of the base ordered by Wanda. Each is sliced plainly; repaired from moments of
the whole network, as in a search; and repaired in sequence, as a pick is. The held-out blocks are from the other end of
the data, and the excess is the loss less the base's. One thread.
"""

from __future__ import annotations

from functools import partial
from statistics import mean

import torch
from torch import Tensor

from benchmarks.common import make_parser, print_header, print_row, resident, timed
from benchmarks.jobs import ordered_supernet, subnet_loss, temporary_job
from benchmarks.ordering import evenly_cut
from compressor.inputs import CALIBRATION_BLOCKS, training_blocks
from supernet.activation import SuperNetwork
from supernet.architecture import Half
from supernet.moments import Moments, gather
from supernet.repair import RepairedVariants, repair_in_sequence

ROWS = 8
"""Blocks in a batch of calibration text."""


def gathered(supernet: SuperNetwork, text: list[Tensor]) -> dict[int, dict[Half, Moments]]:
    """The moments of all layers."""
    return dict(gather(supernet, text))


def main() -> None:
    own = {
        "tokens": ([4096, 16384], "calibration tokens"),
        "shares": ([0.8, 0.67, 0.5], "sizes, as shares of the parameters"),
        "blocks": (48, "held-out blocks"),
    }
    arguments = make_parser(__doc__, "checkpoint", "data", **own).parse_args()
    torch.set_num_threads(1)
    removed: dict[int, list[float]] = {tokens: [] for tokens in arguments.tokens}
    with temporary_job(arguments.checkpoint, arguments.data) as job:
        most = max(arguments.tokens)
        blocks = training_blocks(job, 3 * most)
        calibration, held_out = blocks.split(least=arguments.blocks)
        held_out = held_out.part(0, min(arguments.blocks, len(held_out)))
        batches = [batch.ids for batch in calibration[: -(-most // blocks.length)].split(ROWS)]
        supernet = ordered_supernet(job, batches[: CALIBRATION_BLOCKS // ROWS])
        loss = partial(subnet_loss, supernet, held_out=held_out)
        base, full = loss(supernet.base), job.structure.parameters(supernet.base)
        print(f"Base: {base:.3f} nats per token.\n")
        print_header(
            "parameters", "tokens", "sliced", "repaired", "in sequence", "excess removed", "seconds", right_from=1
        )
        for tokens in arguments.tokens:
            text = batches[: max(1, tokens // (ROWS * blocks.length))]
            moments, gathering = timed(partial(gathered, supernet, text))
            repaired = RepairedVariants(supernet, moments.__getitem__, 2**30)
            for share in arguments.shares:
                cut = evenly_cut(job.structure, share)
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
    print(f"\nSeconds: moments of all layers, and one sequence. Peak memory {resident('VmHWM') / 2**30:.1f} GiB.")
    print(f"excess removed without training: {100 * mean(removed[max(removed)]):.0f} %")


if __name__ == "__main__":
    main()
