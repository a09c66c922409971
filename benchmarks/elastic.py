"""What the elastic network costs beside plain ones: time of a pass, time of a switch, memory.

    python -m benchmarks.elastic [--checkpoint DIR ...] [--rounds 40] [--tokens 128]

Times are paired: each round runs both networks of a pair, in turns; a cell is the median of the ratio of their times,
with its quartiles. The plain model is a copy that was never made elastic; twins are cut out of the elastic network.
Sub-networks are drawn from the space `fine`. Besides the checkpoints there is a random Llama of 32 layers, whose
weights dominate the memory of a process; each peak of memory is that of a separate process (Linux). One thread.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.common import make_parser, print_header, print_row, resident, run_process, timed
from compressor import demo
from search.sampling import sample_near
from search.space import SearchSpace
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture
from supernet.slicing import extract

RANDOM = "random Llama, 32 layers"
SHARES = (0.8, 0.6, 0.4)
"""Sub-networks of about these shares of the parameters."""

Work = Callable[[], object]


def load(checkpoint: str) -> PreTrainedModel:
    """A checkpoint in float32, or the random Llama."""
    if checkpoint != RANDOM:
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1376, num_hidden_layers=32, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def subnetworks(supernet: SuperNetwork) -> list[Architecture]:
    """One random sub-network at each of `SHARES`."""
    space = SearchSpace.preset("fine", supernet.structure)
    full = supernet.structure.parameters(supernet.base)
    return space.decode_all(sample_near(space, np.random.default_rng(0), [share * full for share in SHARES]))


def ratio(work: Work, reference: Work, rounds: int) -> str:
    """Time of `work` as a multiple of that of `reference`, median and quartiles over rounds that run both in turns."""
    ratios = []
    for number in range(rounds + 2):
        pair = (work, reference) if number % 2 else (reference, work)
        seconds = {run: timed(run)[1] for run in pair}
        ratios.append(seconds[work] / seconds[reference])
    low, middle, high = quantiles(ratios[2:], n=4)  # the first two fill the caches
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


@torch.no_grad()
def run_step(checkpoint: str, step: str, tokens: int) -> None:
    """Load the model and run it, in full and as sub-networks; print the largest resident memory of this process."""
    model = load(checkpoint)
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    model(input_ids=ids, use_cache=False)
    if step == "elastic":
        supernet = SuperNetwork(model)
        for architecture in subnetworks(supernet):
            with supernet.activated(architecture):
                model(input_ids=ids, use_cache=False)
    print(resident("VmHWM"))


@torch.no_grad()
def costs(checkpoint: str, rounds: int, tokens: int) -> list[str]:
    """The row of a checkpoint."""
    supernet = SuperNetwork(load(checkpoint))
    model, plain = supernet.model, copy.deepcopy(supernet.model)
    ids = torch.arange(tokens)[None] % supernet.structure.vocab_size
    chosen = subnetworks(supernet)
    for architecture in (*chosen, supernet.base):  # what activation leaves behind is there from here on
        supernet.activate(architecture)

    def run(network: torch.nn.Module) -> Work:
        return lambda: network(input_ids=ids, use_cache=False)

    cells = [ratio(run(model), run(plain), rounds)]
    for architecture in chosen:
        twin = extract(model, supernet.structure, architecture)
        with supernet.activated(architecture):
            cells.append(ratio(run(model), run(twin), rounds))
    switches = [timed(partial(supernet.activate, a))[1] for _ in range(rounds) for a in chosen]
    cells.append(f"{1000 * median(switches):.2f} ms, {len(supernet.base.layers)} layers")
    command = [sys.executable, "-m", "benchmarks.elastic", "--checkpoint", checkpoint, "--tokens", str(tokens)]
    elastic, inelastic = (int(run_process(*command, "--step", step)) for step in ("elastic", "plain"))
    cells.append(f"{elastic / 2**20:,.0f} / {inelastic / 2**20:,.0f} MiB = {elastic / inelastic:.3f}")
    weights = supernet.structure.parameters(supernet.base) * 4 / 2**20
    return [checkpoint.rstrip("/").rpartition("/")[2], f"{weights:,.1f} MiB", *cells]


def main() -> None:
    tokens, step = (128, "in the one sequence of a pass"), (str, argparse.SUPPRESS)
    arguments = make_parser(__doc__, checkpoint=[str(demo.MODEL)], rounds=40, tokens=tokens, step=step).parse_args()
    torch.set_num_threads(1)
    if arguments.step:
        run_step(arguments.checkpoint[0], arguments.step, arguments.tokens)
        return
    twins = [f"sub-network of {share:g} / its twin" for share in SHARES]
    print_header("network", "weights", "full / plain", *twins, "switch", "peak memory, elastic / plain", right_from=1)
    for checkpoint in (*arguments.checkpoint, RANDOM):
        print_row(*costs(checkpoint, arguments.rounds, arguments.tokens))


if __name__ == "__main__":
    main()
