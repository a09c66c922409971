"""How well does a table of timings predict the speed of sub-networks that were never timed, and what does it cost?

    python -m benchmarks.speed [--checkpoint DIR | --shape 100M] [--networks 50] [--output FILE] [--minutes 5]

The table is measured as a run does it (`speed.json`). Then unseen networks drawn from the `fine` space at 0.4 to 1.0 of
the parameters are cut out and timed in turns with the base: reading a prompt of 128 tokens, and one token half-way
through writing 128, batch 1, float32. Times are shares of the base's beside them, as timed and as predicted. Printed
are the median and 90th percentile of the relative error, and Kendall's tau, of two predictions:

- parameters: a straight line through (parameters, share) of the unseen networks themselves;
- speed.json: the sum of the parts' times.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.common import Measurements, make_parser, print_header, print_row, timed
from compressor import demo
from evals.speed.beside import Reference
from evals.speed.table import PartTimes, SpeedTable
from search.sampling import sample_near
from search.space import SearchSpace
from supernet.architecture import Architecture
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
    unseen = [space.decode(sample_near(space, rng, [share * full])[0].tolist()) for share in shares]

    settings = f"{name}, {full:,} parameters, {arguments.threads} threads, {arguments.rounds} rounds"
    results: dict[str, Any] = measurements.by_settings.setdefault(settings, {"timings": {}})
    cut = partial(extract, model, structure)

    def measure_table() -> dict[str, Any]:
        table, seconds = timed(lambda: SpeedTable.measure(cut, structure))
        return {"seconds": seconds, "prefill": asdict(table.prefill), "decode": asdict(table.decode)}

    measurements.measure(results, "table", measure_table)
    reference = Reference(cut(structure.base), rounds=arguments.rounds, batch=1, prompt=128, new=128)

    def time_pair(architecture: Architecture) -> object:
        """Prefill and decode seconds of the network, and of the base beside it."""
        return reference.beside(cut(architecture))

    for architecture in unseen:
        measurements.measure(results["timings"], architecture.key, partial(time_pair, architecture))
    done = [a for a in unseen if a.key in results["timings"]]
    print(f"\n{settings}; {len(done)} unseen networks; the table took {results['table']['seconds']:.0f} s\n")
    print_header("", "prediction", "median error", "90 % within", "Kendall tau")
    size = np.array([structure.parameters(a) for a in done], float)
    for column, phase in enumerate(("prefill", "decode")):
        pairs = np.array([results["timings"][a.key] for a in done])  # [networks, itself or the base, prefill or decode]
        truth: Seconds = pairs[:, 0, column] / pairs[:, 1, column]
        times = PartTimes(**results["table"][phase])
        parts = np.array([times.seconds(a, structure.base.hidden_size) for a in [structure.base, *done]])
        predictions = {"parameters": np.poly1d(np.polyfit(size, truth, 1))(size), "speed.json": parts[1:] / parts[0]}
        for way, predicted in predictions.items():
            error = np.abs(predicted / truth - 1)
            numbers = np.median(error), np.quantile(error, 0.9), kendalltau(predicted, truth).statistic
            print_row(phase, way, *(f"{number:.3f}" for number in numbers))


if __name__ == "__main__":
    main()
