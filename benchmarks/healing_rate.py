"""Which peak learning rate and batch heal a sub-network best? Held-out loss after the same tokens.

    python -m benchmarks.healing_rate [--checkpoint DIR --data FILE] [--tokens 100000] [--rates 1e-3,3e-3,6e-3]
        [--batches 4,16]

A uniform cut to about two thirds of the parameters is taken from the ordered base and healed by distillation. Without
a checkpoint: the bundled one on generated text.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from compressor import demo
from compressor.inputs import training_blocks
from compressor.job import Job
from compressor.recipe import Recipe
from compressor.run import Run
from compressor.sizing import uniform_near
from supernet.activation import SuperNetwork
from supernet.importance import wanda
from supernet.ordering import apply_ordering, order_by
from supernet.slicing import extract
from supernet.training.loop import TrainSettings
from supernet.training.supernet_training import heal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=str(demo.MODEL))
    parser.add_argument("--data", help="training text; default: generated")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--rates", default="1e-3,3e-3,6e-3")
    parser.add_argument("--batches", default="4,16")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    if arguments.data is None:
        arguments.data = str(folder / "text.jsonl")
        demo.training_text(Path(arguments.data), n_documents=6000, seed=1)
    job = Job(Run(folder), Recipe(model=arguments.checkpoint, data=arguments.data, device="cpu"))
    job.threads(scoring=False)
    blocks = training_blocks(job, arguments.tokens)
    supernet = SuperNetwork(job.load_base(torch.float32))
    apply_ordering(supernet, order_by(wanda(supernet, blocks[:64].ids.split(8))))
    base = job.load_base(torch.float32)
    full = job.structure.parameters(job.structure.base)
    architecture = uniform_near(job, 0.67 * full)
    print(f"{job.structure.parameters(architecture) / full:.3f} of the parameters, {arguments.tokens:,} tokens\n")
    print("| rate | batch | held-out loss before | after | seconds |\n|---|---|---|---|---|")
    for rate in map(float, arguments.rates.split(",")):
        for batch in map(int, arguments.batches.split(",")):
            began = time.monotonic()
            settings = TrainSettings(arguments.tokens, batch, blocks.length, rate, seed=0)
            history = heal(
                extract(supernet.model, job.structure, architecture),
                base,
                blocks,
                settings,
                state=folder / f"{rate}-{batch}.safetensors",
                accelerator=Accelerator(cpu=True),
            )
            first, last = history.curve[0]["loss"], history.curve[-1]["loss"]
            print(f"| {rate:g} | {batch} | {first:.3f} | {last:.3f} | {time.monotonic() - began:.0f} |", flush=True)


if __name__ == "__main__":
    main()
