"""How well does a table of timings predict the speed of sub-networks that were never timed?

    python -m benchmarks.speed [--checkpoint DIR | --shape 100M] [--networks 50] [--output FILE] [--minutes 5]

The networks of the table's design, then unseen ones drawn from the `fine` space at 0.4 to 1.0 of the parameters, are
cut out and timed in turns with the base: reading a prompt of 128 tokens, and one token half-way through writing 128,
batch 1, float32. Times are stated as shares of the base's beside them. Every network is written to `--output` once it
is timed, under the settings it was timed with; a run stops after `--minutes` and the next one goes on. The table:
median and 90th percentile of the relative error on the unseen networks, and Kendall's tau, of several ways to come from
timings to predictions:

- parameters: a straight line through (parameters, seconds) of the design;
- parts alone: the sum of parts, from networks whose layers are alike;
- parts, scaled: the same times one factor, found on the design's mixtures;
- parts, straightened: the same under a straight line, found on the design's mixtures;
- parts from all: the sum of parts, from all of the design at once (what `speed.json` holds).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau
from transformers import LlamaConfig, LlamaForCausalLM

from compressor import demo
from evals.speed.measured import time_beside
from evals.speed.table import MIXED, PartTimes, designed, sizes_to_time
from search.sampling import sample_near
from search.space import SearchSpace
from supernet.architecture import Architecture
from supernet.checkpoint import open_checkpoint
from supernet.families import describe
from supernet.slicing import extract

SHAPES = {
    "100M": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "intermediate_size": 2048,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": True,
    }
}
WORKLOAD = {"batch": 1, "prompt": 128, "new": 128}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", default=str(demo.MODEL))
    which.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--networks", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    arguments = parser.parse_args()
    ends = time.monotonic() + 60 * arguments.minutes
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model: Any
    if arguments.shape:
        name, model = f"{arguments.shape}-shaped", LlamaForCausalLM(LlamaConfig(**SHAPES[arguments.shape])).eval()
    else:
        checkpoint = open_checkpoint(arguments.checkpoint)
        name, model = checkpoint.path.name, checkpoint.load_model(torch.float32, torch.device("cpu"))
    structure = describe(model.config)
    space = SearchSpace.preset("fine", structure)
    rng = np.random.default_rng(1)
    full = structure.parameters(structure.base)
    shares = rng.uniform(0.4, 1.0, arguments.networks)
    design = designed(structure, 0)
    unseen = [space.decode(sample_near(space, rng, [share * full])[0].tolist()) for share in shares]
    known: dict[str, Any] = {}
    if arguments.output and arguments.output.is_file():
        known = json.loads(arguments.output.read_text())
    settings = f"{name}, {full:,} parameters, {arguments.threads} threads, {arguments.rounds} rounds"
    timed = known.setdefault(settings, {})
    reference = extract(model, structure, structure.base)
    for architecture in [*design, *unseen]:
        if architecture.key not in timed and time.monotonic() < ends:
            standalone = extract(model, structure, architecture)
            timed[architecture.key] = time_beside(standalone, reference, rounds=arguments.rounds, **WORKLOAD)
            if arguments.output:
                arguments.output.write_text(json.dumps(known) + "\n")
    done = [a for a in unseen if a.key in timed]
    if not done:
        print(f"{sum(a.key in timed for a in design)} of {len(design)} networks of the design timed: run again")
        return

    def seconds(networks: list[Architecture], column: int) -> NDArray[np.float64]:
        pairs = np.array([timed[a.key] for a in networks])  # [networks, itself or the base, prefill or decode]
        base = np.median([pair[1][column] for pair in timed.values()])
        return pairs[:, 0, column] / pairs[:, 1, column] * base

    print(f"\n{settings}; {len(done)} unseen networks\n")
    print("| | way | median error | 90 % within | Kendall tau |\n|---|---|---|---|---|")
    for column, what in enumerate(("prefill", "decode")):
        truth = seconds(done, column)
        for way, guess in predictions(design, seconds(design, column), done, structure).items():
            error = np.abs(guess / truth - 1)
            tau = kendalltau(guess, truth).statistic
            print(f"| {what} | {way} | {np.median(error):.3f} | {np.quantile(error, 0.9):.3f} | {tau:.3f} |")


def predictions(
    design: list[Architecture], seconds: NDArray[np.float64], unseen: list[Architecture], structure: Any
) -> dict[str, NDArray[np.floating[Any]]]:
    """Seconds of the unseen networks by each way of coming from the design's to theirs."""
    hidden, sizes = structure.base.hidden_size, sizes_to_time(structure)

    def parts(count: int) -> PartTimes:
        return PartTimes.fit(design[:count], seconds[:count], *sizes, hidden)

    def by(times: PartTimes, networks: list[Architecture]) -> NDArray[np.float64]:
        return np.array([times.seconds(a, hidden) for a in networks])

    def size(networks: list[Architecture]) -> NDArray[np.float64]:
        return np.array([structure.parameters(a) for a in networks], float)

    alike, mixed = len(design) - MIXED, design[-MIXED:]
    alone, everything = parts(alike), parts(len(design))
    ratio = float(np.median(seconds[alike:] / by(alone, mixed)))
    return {
        "parameters": np.polyval(np.polyfit(size(design), seconds, 1), size(unseen)),
        "parts alone": by(alone, unseen),
        "parts, scaled": ratio * by(alone, unseen),
        "parts, straightened": np.polyval(np.polyfit(by(alone, mixed), seconds[alike:], 1), by(alone, unseen)),
        "parts from all": by(everything, unseen),
    }


if __name__ == "__main__":
    main()
