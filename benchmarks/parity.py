"""How exact the super-network is on real checkpoints: differences of logits, as a share of the largest logit.

    python -m benchmarks.parity [--checkpoint DIR ...] [--architectures 50]

Prints the table of docs/results.md: the full architecture after others were active, the network after ordering, the
worst of so many random sub-networks beside what is cut out of it, and how many of their counts are those of the cut-out
network. In float32 on the CPU.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compressor import demo
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, LayerSizes
from supernet.importance import wanda
from supernet.ordering import apply_ordering, order_by
from supernet.slicing import extract


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=[demo.MODEL])
    parser.add_argument("--architectures", type=int, default=50)
    arguments = parser.parse_args()
    print("| checkpoint | full = original | ordered | sub-network, worst | counts equal |\n|---|---|---|---|---|")
    for folder in arguments.checkpoint:
        print(row(folder, arguments.architectures), flush=True)


@torch.no_grad()
def row(folder: Path, count: int) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    before = model(ids).logits
    supernet, rng = SuperNetwork(model), random.Random(0)
    supernet.activate(drawn(supernet.base, rng))
    supernet.activate(supernet.base)
    same = "bit for bit" if torch.equal(model(ids).logits, before) else "no"
    apply_ordering(supernet, order_by(wanda(supernet, [ids])))
    ordered = difference(model(ids).logits, before)
    worst, equal = 0.0, 0
    for _ in range(count):
        architecture = drawn(supernet.base, rng)
        standalone: nn.Module = extract(model, supernet.structure, architecture)
        with supernet.activated(architecture):
            worst = max(worst, difference(standalone(ids).logits, model(ids).logits))
        equal += supernet.structure.parameters(architecture) == sum(p.numel() for p in standalone.parameters())
    return f"| {folder.resolve().name} | {same} | {ordered:.1e} | {worst:.1e} | {equal} of {count} |"


def drawn(base: Architecture, rng: random.Random) -> Architecture:
    """Heads and FFN width of every layer at random, 0 included; the first layer that attends is kept whole."""
    first = next(i for i, full in enumerate(base.layers) if full.num_key_value_heads)
    layers = []
    for i, full in enumerate(base.layers):
        groups, width = rng.randint(0, full.num_key_value_heads), rng.randint(0, full.intermediate_size)
        heads = groups * full.num_attention_heads // max(full.num_key_value_heads, 1)
        layers.append(full if i == first else LayerSizes(heads, groups, width, full.num_experts))
    return Architecture(base.hidden_size, tuple(layers))


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


if __name__ == "__main__":
    main()
