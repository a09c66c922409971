"""Which ordering of neurons and heads is best? Held-out loss of untrained sub-networks, cut alike in every layer.

    python -m benchmarks.ordering [--checkpoint DIR --data FILE] [--seeds 5] [--blocks 64]

Every criterion sees the same calibration blocks; the loss is measured on blocks from the other end of the data. A
size is reached by the number of head groups and the FFN width that come nearest to it, the two shares as equal as they
can be, and no layer removed. `random` is the mean of several seeds. Without a checkpoint: the bundled one on generated
text.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

import torch

from compressor import demo
from compressor.inputs import training_blocks
from compressor.job import Job
from compressor.recipe import Recipe
from compressor.run import Run
from supernet.architecture import Architecture, LayerSizes, Structure
from supernet.importance import IMPORTANCES, random
from supernet.ordering import Scores, apply_ordering, order_by
from supernet.training.losses import held_out_loss

SIZES = (0.9, 0.8, 0.67)


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=str(demo.MODEL))
    parser.add_argument("--data", help="training text; default: generated")
    parser.add_argument("--seeds", type=int, default=5, help="random orderings behind the row `random`")
    parser.add_argument("--blocks", type=int, default=64, help="calibration blocks of 256 tokens, and held-out ones")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    if arguments.data is None:
        arguments.data = str(folder / "text.jsonl")
        demo.training_text(Path(arguments.data), n_documents=6000, seed=1)
    job = Job(Run(folder), Recipe(model=arguments.checkpoint, data=arguments.data, device="cpu").resolved())
    job.threads(scoring=True)
    blocks = training_blocks(job, 3 * arguments.blocks * 256)
    calibration, held_out = blocks[: arguments.blocks], blocks.split(least=arguments.blocks)[1]
    cuts = [evenly_cut(job.structure, size) for size in SIZES]
    batches = [batch.ids for batch in calibration.split(8)]

    def losses(scores: Scores) -> list[float]:
        supernet = job.supernet_of(job.load_base(torch.float32))
        apply_ordering(supernet, order_by(scores))
        found = []
        for architecture in cuts:
            with torch.no_grad(), supernet.activated(architecture) as network:
                found.append(held_out_loss(network, held_out, 8, torch.device("cpu")))
        return found

    full = job.structure.parameters(job.structure.base)
    untouched = job.supernet_of(job.load_base(torch.float32))
    with torch.no_grad():
        base = held_out_loss(untouched.model, held_out, 8, torch.device("cpu"))
    print(f"Base: {base:.3f} nats per token. Cuts, as head groups and FFN width of every layer: ", end="")
    print("; ".join(f"{a.layers[0].num_key_value_heads} and {a.layers[0].intermediate_size}" for a in cuts))
    header = ["ordering", *(f"{job.structure.parameters(a) / full:.3f}" for a in cuts), "seconds"]
    print("\n| " + " | ".join(header) + " |\n|---" + "|---:" * (len(header) - 1) + "|")
    for name, criterion in IMPORTANCES.items():
        if name == "random":
            continue
        began = time.monotonic()
        scores = criterion(untouched, batches)
        seconds = time.monotonic() - began
        print("| " + " | ".join([name, *(f"{x:.3f}" for x in losses(scores)), f"{seconds:.1f}"]) + " |", flush=True)
    columns = list(zip(*(losses(random(untouched, [], seed)) for seed in range(arguments.seeds)), strict=True))
    cells = [f"{mean(column):.3f}" + (f" ± {stdev(column):.3f}" if len(column) > 1 else "") for column in columns]
    print("| " + " | ".join([f"random, {arguments.seeds} seeds", *cells, "0.0"]) + " |")


if __name__ == "__main__":
    main()
