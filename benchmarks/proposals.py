"""What block-wise proposals cost, and how good what they propose is.

    python -m benchmarks.proposals [--checkpoint DIR --data FILE.jsonl] [--sizes 0.8 0.67 0.5] [--blocks 64]

The base is ordered by Wanda and not trained. For each size: the best that block-wise proposes, before and after
measuring around it, as KL(whole || proposed) on text that the proposals did not see, in nats per token, ± the standard
error over blocks.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from benchmarks.common import make_parser, print_header, print_row, timed
from benchmarks.jobs import ordered_supernet, temporary_job
from compressor.inputs import FEW_AT_ONCE, few_blocks, training_blocks
from compressor.stages.warm_start import layer_variants, rounds_of
from evals.warm_starts.blockwise import blockwise, refined
from search.layer_options import Path
from search.space import SearchSpace
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture
from supernet.training.data import Blocks
from supernet.training.losses import divergence
from supernet.training.traces import trace


@torch.no_grad()
def held_out_divergence(supernet: SuperNetwork, architectures: list[Architecture], blocks: Blocks) -> list[str]:
    """KL(whole || architecture) of each, with its standard error over blocks."""
    rows: list[list[float]] = [[] for _ in architectures]
    for batch in blocks[: len(blocks)].split(1):
        whole = trace(supernet.model, batch)
        for row, architecture in zip(rows, architectures, strict=True):
            with supernet.activated(architecture) as network:
                row.append(float(divergence(trace(network, batch), whole)))
    values = torch.tensor(rows, dtype=torch.float64)
    errors = values.std(1) / math.sqrt(values.shape[1])
    return [f"{mean:.4f} ± {error:.4f}" for mean, error in zip(values.mean(1), errors, strict=True)]


def main() -> None:
    own = {"sizes": [0.8, 0.67, 0.5], "blocks": (64, "blocks of unseen text"), "threads": torch.get_num_threads()}
    arguments = make_parser(__doc__, "checkpoint", "data", **own).parse_args()
    torch.set_num_threads(arguments.threads)
    with temporary_job(arguments.checkpoint, arguments.data) as job:
        blocks = training_blocks(job, 3 * (arguments.blocks + 32) * 256)
        seen, held_out = blocks[: few_blocks(job)].split(FEW_AT_ONCE), blocks.split(least=arguments.blocks)[1]
        supernet = ordered_supernet(job, blocks[:32].ids.split(8))
        variants = layer_variants(SearchSpace.preset("fine", job.structure))
        whole = job.structure.parameters(job.structure.base)
        sizes = [int(share * whole) for share in arguments.sizes]
        found, first = timed(lambda: blockwise(supernet, variants, seen))
        before = [[a for p, a in found.path if p <= size][-1] for size in sizes]
        after: Path = []
        spent = []
        for size in sizes:
            around = partial(refined, supernet, variants, seen, found.path, [size], found.halves, rounds_of(job))
            improved, seconds = timed(around)
            after += improved
            spent.append(seconds)
        print(
            f"\n{job.checkpoint.path.name}: {len(variants)} variants; block-wise {first:.1f} s, measuring around "
            f"{', '.join(f'{seconds:.1f}' for seconds in spent)} s; {len(held_out)} blocks of unseen text\n"
        )
        print_header("size", "block by block", "measured around", right_from=1)
        cells = held_out_divergence(supernet, [*before, *(a for _, a in after)], held_out)
        for share, one, other in zip(arguments.sizes, cells, cells[len(sizes) :], strict=False):
            print_row(f"{share:g}", one, other)


if __name__ == "__main__":
    main()
