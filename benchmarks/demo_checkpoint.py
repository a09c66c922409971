"""Is there something to win and to lose on the bundled checkpoint? Base and untrained random sub-networks, by task.

    python -m benchmarks.demo_checkpoint [--share 0.67] [--networks 10]

Sub-networks are drawn at random from the `fine` space near `--share` of the parameters, cut from the ordered base
(calibrated on generated text) without any training, and scored on all documents of the bundled tasks.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from compressor import demo
from compressor.job import Job
from compressor.recipe import Recipe
from compressor.run import Run
from compressor.sizing import draw_near
from supernet.activation import SuperNetwork
from supernet.importance import wanda
from supernet.ordering import apply_ordering, order_by
from supernet.training.data import pack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=0.67)
    parser.add_argument("--networks", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "text.jsonl"
        demo.training_text(data, n_documents=1000, seed=1)
        job = Job(
            Run(Path(folder)),
            Recipe(model=str(demo.MODEL), tasks=list(demo.TASK_NAMES), include_path=str(demo.TASKS), device="cpu"),
        )
        supernet = SuperNetwork(job.load_base())
        calibration = pack(str(data), job.tokenizer, 256)[:64].ids.split(8)
    apply_ordering(supernet, order_by(wanda(supernet, calibration)))
    scorer = job.scorer(supernet.model)
    full = job.structure.parameters(job.structure.base)
    rng = np.random.default_rng(0)

    print("| network | parameters | " + " | ".join(demo.TASK_NAMES) + " | mean |")
    print("|---|---|" + "---|" * (len(demo.TASK_NAMES) + 1))
    means = []
    for number in range(arguments.networks + 1):
        architecture = job.structure.base if number == 0 else draw_near(job, rng, arguments.share * full)
        with supernet.activated(architecture), torch.no_grad():
            scores = [score.value for score in scorer.score("all").values()]
        means.append(sum(scores) / len(scores))
        name = "base" if number == 0 else f"random {number}"
        row = " | ".join(f"{score:.3f}" for score in [*scores, means[-1]])
        print(f"| {name} | {job.structure.parameters(architecture):,} | {row} |", flush=True)
    print(f"\nmean loss of a random sub-network: {100 * (means[0] - np.mean(means[1:])):.1f} points")


if __name__ == "__main__":
    main()
