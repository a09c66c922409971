"""How exact the super-network is on real checkpoints: differences of logits, as a share of the largest logit.

    python -m benchmarks.parity [--checkpoint DIR ...] [--architectures 50]

Of the full architecture after others were active, of the network after ordering, and the worst of so many random
sub-networks beside what is cut out of it; and how many of their parameter counts are right. In float32 on the CPU.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.common import make_parser, print_header, print_row
from compressor import demo
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, LayerSizes
from supernet.importance import wanda
from supernet.ordering import apply_ordering, order_by
from supernet.slicing import extract


def main() -> None:
    arguments = make_parser(__doc__, checkpoint=[demo.MODEL], architectures=50).parse_args()
    print_header("checkpoint", "full = original", "ordered", "sub-network, worst", "counts equal")
    for folder in arguments.checkpoint:
        print_row(folder.resolve().name, *differences(folder, arguments.architectures))


@torch.no_grad()
def differences(folder: Path, count: int) -> list[str]:
    """The cells of a checkpoint's row."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    before = model(ids).logits
    supernet, rng = SuperNetwork(model), random.Random(0)
    supernet.activate(random_subnet(supernet.base, rng))
    supernet.activate(supernet.base)
    same = "bit for bit" if torch.equal(model(ids).logits, before) else "no"
    apply_ordering(supernet, order_by(wanda(supernet, [ids])))
    ordered = difference(model(ids).logits, before)
    worst, equal = 0.0, 0
    for _ in range(count):
        architecture = random_subnet(supernet.base, rng)
        standalone = extract(model, supernet.structure, architecture)
        with supernet.activated(architecture):
            worst = max(worst, difference(standalone(ids).logits, model(ids).logits))
        equal += supernet.structure.parameters(architecture) == sum(p.numel() for p in standalone.parameters())
    return [same, f"{ordered:.1e}", f"{worst:.1e}", f"{equal} of {count}"]


def random_subnet(base: Architecture, rng: random.Random) -> Architecture:
    """Heads and FFN width of every layer at random, 0 included; the first layer that attends is kept whole."""
    first = next(i for i, full in enumerate(base.layers) if full.num_key_value_heads)
    layers = []
    for i, full in enumerate(base.layers):
        groups, width = rng.randint(0, full.num_key_value_heads), rng.randint(0, full.intermediate_size)
        heads = groups * full.num_attention_heads // max(full.num_key_value_heads, 1)
        layers.append(full if i == first else LayerSizes(heads, groups, width, full.num_experts))
    return Architecture(base.hidden_size, tuple(layers))


def difference(logits: Tensor, reference: Tensor) -> float:
    """The largest difference, as a share of the largest logit of the reference."""
    return float((logits - reference).abs().max() / reference.abs().max())


if __name__ == "__main__":
    main()
