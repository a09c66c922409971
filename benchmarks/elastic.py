"""What the elastic network costs beside plain ones: time of a pass, time of a switch, memory.

    python -m benchmarks.elastic [--checkpoint DIR ...] [--rounds 40] [--tokens 128]

Times are paired: each round runs both networks of a pair, first one then the other, in turns; the cell is the median
over the rounds of the ratio of their times, with its quartiles. The plain model is a second copy that was never made
elastic; twins are cut out of the elastic network. Sub-networks are drawn from the space `fine`. Besides the
checkpoints (the bundled one by default) there is a random Llama of 32 layers, large enough for its weights to dominate
the memory of a process; each peak of memory is that of a process of its own, read from /proc (Linux). One thread.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.memory import resident
from compressor import demo
from search.sampling import sample_near
from search.space import SearchSpace
from supernet.activation import SuperNetwork
from supernet.slicing import extract

RANDOM = "random Llama, 32 layers"
SHARES = (0.8, 0.6, 0.4)
"""Sub-networks of about these shares of the parameters."""


def load(checkpoint: str) -> Any:
    if checkpoint != RANDOM:
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1376, num_hidden_layers=32, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def ratio(one: Callable[[], Any], other: Callable[[], Any], rounds: int) -> str:
    """Time of `one` as a multiple of that of `other`."""
    ratios = []
    for number in range(rounds + 2):
        pair = (one, other) if number % 2 else (other, one)
        times = {run: seconds(run) for run in pair}
        ratios.append(times[one] / times[other])
    ratios = ratios[2:]  # the first warm caches up
    low, _, high = quantiles(ratios, n=4)
    return f"{median(ratios):.3f} ({low:.3f} to {high:.3f})"


def peak(checkpoint: str, elastic: bool, tokens: int) -> int:
    """Largest resident memory, in bytes, of a process that loads the model and runs it, in full and as sub-networks."""
    options = ["--step", "elastic" if elastic else "plain", "--checkpoint", checkpoint, "--tokens", str(tokens)]
    command = [sys.executable, "-m", "benchmarks.elastic", *options]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def step(checkpoint: str, elastic: bool, tokens: int) -> None:
    model = load(checkpoint)
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        if elastic:
            supernet = SuperNetwork(model)
            for architecture in subnetworks(supernet):
                with supernet.activated(architecture):
                    model(input_ids=ids, use_cache=False)
    print(resident("VmHWM"))


def subnetworks(supernet: SuperNetwork) -> list[Any]:
    space = SearchSpace.preset("fine", supernet.structure)
    full = supernet.structure.parameters(supernet.base)
    return space.decode_all(sample_near(space, np.random.default_rng(0), [share * full for share in SHARES]))


def row(checkpoint: str, rounds: int, tokens: int) -> list[str]:
    supernet = SuperNetwork(load(checkpoint))
    model, plain = supernet.model, copy.deepcopy(supernet.model)
    ids = torch.arange(tokens)[None] % supernet.structure.vocab_size
    chosen = subnetworks(supernet)
    for architecture in (*chosen, supernet.base):  # so that whatever activation leaves behind is there
        supernet.activate(architecture)

    def run(network: Any) -> Callable[[], Any]:
        return lambda: network(input_ids=ids, use_cache=False)

    cells = [ratio(run(model), run(plain), rounds)]
    for architecture in chosen:
        twin = extract(model, supernet.structure, architecture)
        with supernet.activated(architecture):
            cells.append(ratio(run(model), run(twin), rounds))
    switches = [seconds(lambda a=a: supernet.activate(a)) for _ in range(rounds) for a in chosen]  # type: ignore[misc]
    layers = len(supernet.base.layers)
    with_elastic, without = (peak(checkpoint, elastic, tokens) for elastic in (True, False))
    memory = f"{with_elastic / 2**20:,.0f} / {without / 2**20:,.0f} MiB = {with_elastic / without:.3f}"
    weights = supernet.structure.parameters(supernet.base) * 4 / 2**20
    name = checkpoint.rstrip("/").rpartition("/")[2]
    return [name, f"{weights:,.1f} MiB", *cells, f"{1000 * median(switches):.2f} ms, {layers} layers", memory]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", nargs="+", default=[str(demo.MODEL)])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=128, help="in the one sequence of a pass")
    parser.add_argument("--step", choices=["plain", "elastic"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.step:
        step(arguments.checkpoint[0], arguments.step == "elastic", arguments.tokens)
        return
    twins = [f"sub-network of {share:g} / its twin" for share in SHARES]
    header = ["network", "weights", "full / plain", *twins, "switch", "peak memory, elastic / plain"]
    print("| " + " | ".join(header) + " |\n|---" + "|---:" * (len(header) - 1) + "|")
    with torch.no_grad():
        for checkpoint in (*arguments.checkpoint, RANDOM):
            print("| " + " | ".join(row(checkpoint, arguments.rounds, arguments.tokens)) + " |", flush=True)


if __name__ == "__main__":
    main()
