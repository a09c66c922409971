"""Which peak learning rate and batch heal a sub-network best? Held-out loss after the same tokens.

    python -m benchmarks.healing_rate [--checkpoint DIR --data FILE] [--tokens 100000] [--rates 1e-3,3e-3,6e-3]
        [--repair 0,16384]

A uniform cut to about two thirds of the parameters is taken from the ordered base, repaired in sequence on so many
tokens (0: sliced plainly), and healed by distillation.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch

from benchmarks.common import make_parser, print_header, print_row, timed
from benchmarks.jobs import ordered_supernet, temporary_job
from compressor.inputs import calibration_batches, training_blocks
from compressor.sizing import uniform_near
from supernet.repair import repair_in_sequence
from supernet.slicing import extract
from supernet.training.history import History
from supernet.training.loop import TrainSettings
from supernet.training.supernet_training import heal
from supernet.variants import Variants


def main() -> None:
    own = {"tokens": 100_000, "rates": "1e-3,3e-3,6e-3", "batches": "4,16", "repair": ("0", "calibration tokens")}
    arguments = make_parser(__doc__, "checkpoint", "data", "device", **own).parse_args()
    rates, batches = map(float, arguments.rates.split(",")), map(int, arguments.batches.split(","))
    with temporary_job(arguments.checkpoint, arguments.data, device=arguments.device) as job:
        job.threads(scoring=False)
        blocks = training_blocks(job, arguments.tokens)
        supernet = ordered_supernet(job, calibration_batches(job, blocks))
        base = job.load_base(torch.float32)
        full = job.structure.parameters(job.structure.base)
        architecture = uniform_near(job, 0.67 * full)

        def variants(tokens: int) -> Variants | None:
            text = blocks.split()[0][: tokens // blocks.length].split(8)
            return (
                repair_in_sequence(supernet, architecture, [batch.ids.to(job.device) for batch in text])
                if tokens
                else None
            )

        cuts = {tokens: variants(tokens) for tokens in map(int, arguments.repair.split(","))}

        def healed(rate: float, batch: int, tokens: int) -> History:
            network = extract(supernet.model, job.structure, architecture, cuts[tokens])
            settings = TrainSettings(arguments.tokens, batch, blocks.length, rate, seed=0)
            state = job.run.path / f"{rate}-{batch}-{tokens}.safetensors"
            return heal(network, base, blocks, settings, state=state, accelerator=job.accelerator)

        print(f"{job.structure.parameters(architecture) / full:.3f} of the parameters, {arguments.tokens:,} tokens\n")
        print_header("repaired on", "rate", "batch", "held-out loss before", "after", "seconds")
        for tokens, rate, batch in product(cuts, rates, batches):
            history, seconds = timed(partial(healed, rate, batch, tokens))
            before, after = history.start["loss"], (history.best or {})["loss"]
            print_row(f"{tokens:,}", f"{rate:g}", str(batch), f"{before:.3f}", f"{after:.3f}", f"{seconds:.0f}")


if __name__ == "__main__":
    main()
