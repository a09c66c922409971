"""Which optimizer, peak learning rate, batch and warm-up heal a sub-network best? Held-out loss after the same tokens.

    python -m benchmarks.healing_rate [--checkpoint DIR --data FILE] [--tokens 100000] [--rates 1e-3,3e-3,6e-3]
        [--optimizers muon,adamw] [--repair 0,16384] [--warmups 0.03,0.3] [--seeds 3]

A uniform cut to about two thirds of the parameters is taken from the ordered base, repaired in sequence on so many
tokens (0: sliced plainly), and healed by distillation, for each seed in another order of the text. The warm-up is the
share of the steps in which the rate rises.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

from benchmarks.common import make_parser, mean_spread, print_header, print_row, timed
from benchmarks.jobs import ordered_supernet, temporary_job
from compressor.inputs import calibration_batches, training_blocks
from compressor.sizing import uniform_near
from supernet.repair import repair_in_sequence
from supernet.slicing import extract
from supernet.training.history import History
from supernet.training.settings import TrainSettings
from supernet.training.supernet_training import heal
from supernet.variants import Variants


def main() -> None:
    own = {"tokens": 100_000, "rates": "1e-3,3e-3,6e-3", "batches": "4,16", "repair": ("0", "calibration tokens")}
    own |= {"warmups": "0.03", "optimizers": "muon", "seeds": 1}
    arguments = make_parser(__doc__, "checkpoint", "data", "device", **own).parse_args()
    rates, warmups = (list(map(float, given.split(","))) for given in (arguments.rates, arguments.warmups))
    batches = list(map(int, arguments.batches.split(",")))
    with temporary_job(arguments.checkpoint, arguments.data, device=arguments.device) as job:
        job.threads(scoring=False)
        blocks = training_blocks(job, arguments.tokens)
        supernet = ordered_supernet(job, calibration_batches(job, blocks))
        base = job.load_base(torch.float32)
        full = job.structure.parameters(job.structure.base)
        architecture = uniform_near(job, 0.67 * full)

        def variants(tokens: int) -> Variants | None:
            if not tokens:
                return None
            text = blocks.split()[0][: tokens // blocks.length].split(8)
            return repair_in_sequence(supernet, architecture, [batch.ids.to(job.device) for batch in text])

        cuts = {tokens: variants(tokens) for tokens in map(int, arguments.repair.split(","))}

        def healed(settings: TrainSettings, tokens: int, seed: int) -> History:
            network = extract(supernet.model, job.structure, architecture, cuts[tokens])
            with tempfile.TemporaryDirectory(dir=job.run.path) as scratch:
                state, settings = Path(scratch) / "state.safetensors", replace(settings, seed=seed)
                return heal(network, base, blocks, settings, state=state, accelerator=job.accelerator)

        print(f"{job.structure.parameters(architecture) / full:.3f} of the parameters, {arguments.tokens:,} tokens\n")
        columns = "repaired on", "optimizer", "rate", "batch", "warm-up", "held-out loss before", "after"
        print_header(*columns, "seconds of one")
        optimizers = arguments.optimizers.split(",")
        for tokens, optimizer, rate, batch, warmup in product(cuts, optimizers, rates, batches, warmups):
            settings = TrainSettings(arguments.tokens, batch, blocks.length, rate, 0)
            one = partial(healed, replace(settings, warmup_share=warmup, optimizer=optimizer), tokens)
            histories, seconds = timed(lambda one=one: list(map(one, range(arguments.seeds))))  # type: ignore[misc]
            before, after = histories[0].start["loss"], [(history.best or {})["loss"] for history in histories]
            cells = [f"{before:.3f}", mean_spread(after), f"{seconds / arguments.seeds:.0f}"]
            print_row(f"{tokens:,}", optimizer, f"{rate:g}", str(batch), f"{warmup:g}", *cells)


if __name__ == "__main__":
    main()
