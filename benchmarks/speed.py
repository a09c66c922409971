"""How well does a table of timings predict the speed of sub-networks that were never timed?

    python -m benchmarks.speed [--checkpoint DIR | --shape 100M] [--networks 50] [--output FILE] [--minutes 5]

The networks of the table's design, then unseen ones drawn from the `fine` space at 0.4 to 1.0 of the parameters, are
cut out and timed in turns with the base: reading a prompt of 128 tokens, and one token half-way through writing 128,
batch 1, float32. Times are shares of the base's beside them. The table: median and 90th percentile of the relative
error on the unseen networks, and Kendall's tau, of several ways to come from timings to predictions:

- parameters: a straight line through (parameters, seconds) of the design;
- parts alone: the sum of parts, from networks whose layers are alike;
- parts, scaled: the same times one factor, found on the design's mixtures;
- parts, straightened: the same under a straight line, found on the design's mixtures;
- parts from all: the sum of parts, from all of the design at once (what `speed.json` holds).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.common import Measurements, make_parser, print_header, print_row
from compressor import demo
from evals.speed.measured import time_beside
from evals.speed.table import MIXED, PartTimes, designed, sizes_to_time
from search.sampling import sample_near
from search.space import SearchSpace
from supernet.architecture import Architecture, Structure
from supernet.checkpoint import open_checkpoint
from supernet.families import describe
from supernet.slicing import extract

SHAPES = {
    "100M": LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, tie_word_embeddings=True,
    )
}  # fmt: skip

Seconds = NDArray[np.float64]
"""Of networks in their order, [n]."""


def main() -> None:
    parser = make_parser(__doc__, "output", "minutes", networks=50, rounds=3, threads=1)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", default=str(demo.MODEL))
    which.add_argument("--shape", choices=SHAPES)
    arguments = parser.parse_args()
    measurements = Measurements(arguments.output, arguments.minutes)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model: PreTrainedModel
    if arguments.shape:
        name, model = f"{arguments.shape}-shaped", LlamaForCausalLM(SHAPES[arguments.shape]).eval()
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

    settings = f"{name}, {full:,} parameters, {arguments.threads} threads, {arguments.rounds} rounds"
    timings = measurements.by_settings.setdefault(settings, {})
    reference = extract(model, structure, structure.base)

    def time_pair(architecture: Architecture) -> object:
        """Prefill and decode seconds of the network, and of the base beside it."""
        network = extract(model, structure, architecture)
        return time_beside(network, reference, rounds=arguments.rounds, batch=1, prompt=128, new=128)

    for architecture in [*design, *unseen]:
        measurements.measure(timings, architecture.key, partial(time_pair, architecture))
    done = [a for a in unseen if a.key in timings]
    if not done:
        print(f"{sum(a.key in timings for a in design)} of {len(design)} networks of the design timed: run again")
        return

    def seconds(networks: Sequence[Architecture], column: int) -> Seconds:
        pairs = np.array([timings[a.key] for a in networks])  # [networks, itself or the base, prefill or decode]
        base = np.median([pair[1][column] for pair in timings.values()])
        return pairs[:, 0, column] / pairs[:, 1, column] * base

    print(f"\n{settings}; {len(done)} unseen networks\n")
    print_header("", "way", "median error", "90 % within", "Kendall tau")
    for column, phase in enumerate(("prefill", "decode")):
        truth = seconds(done, column)
        for way, predicted in predictions(design, seconds(design, column), done, structure).items():
            error = np.abs(predicted / truth - 1)
            numbers = np.median(error), np.quantile(error, 0.9), kendalltau(predicted, truth).statistic
            print_row(phase, way, *(f"{number:.3f}" for number in numbers))


def predictions(
    design: Sequence[Architecture], seconds: Seconds, unseen: Sequence[Architecture], structure: Structure
) -> dict[str, Seconds]:
    """Seconds of the unseen networks by each way of coming from the design's to theirs."""
    hidden, sizes = structure.base.hidden_size, sizes_to_time(structure)

    def by(times: PartTimes, networks: Sequence[Architecture]) -> Seconds:
        return np.array([times.seconds(a, hidden) for a in networks])

    def size(networks: Sequence[Architecture]) -> Seconds:
        return np.array([structure.parameters(a) for a in networks], float)

    alike, mixed = len(design) - MIXED, design[-MIXED:]
    alone = PartTimes.fit(design[:alike], seconds[:alike], *sizes, hidden)
    everything = PartTimes.fit(design, seconds, *sizes, hidden)
    ratio = float(np.median(seconds[alike:] / by(alone, mixed)))
    return {
        "parameters": np.poly1d(np.polyfit(size(design), seconds, 1))(size(unseen)),
        "parts alone": by(alone, unseen),
        "parts, scaled": ratio * by(alone, unseen),
        "parts, straightened": np.poly1d(np.polyfit(by(alone, mixed), seconds[alike:], 1))(by(alone, unseen)),
        "parts from all": by(everything, unseen),
    }


if __name__ == "__main__":
    main()
