"""The search alone, on a super-network of one's own that has nothing to do with language.

    python -m examples.own_supernet          # some seconds

A residual network reads pictures of 8 x 8 pixels: 4 blocks, each x + B relu(A x) with 64 neurons, of which any number
may be left out, or the whole block. It is trained once with the sandwich rule, as a super-network; then
`search.run.search` looks for the best sub-network of every size. What the search needs of a super-network is this:

- a `Structure`: which parameters there are and which sizes they follow, so that those of any sub-network are counted;
- a `SearchSpace` of genes over these sizes;
- a function that measures architectures: here one that activates each and counts right answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from search.objectives import choose, computed
from search.run import SearchResult, search
from search.sampling import sample
from search.space import SearchSpace
from supernet.architecture import Architecture, Axis, LayerSizes, Structure, TensorSpec

PIXELS, WIDTH, BLOCKS, NEURONS, DIGITS = 64, 32, 4, 64, 10


class Block(nn.Module):
    """B relu(A x), of the first so many neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(WIDTH, NEURONS), nn.Linear(NEURONS, WIDTH)

    def forward(self, x: Tensor, width: int) -> Tensor:
        inner = F.relu(F.linear(x, self.wide.weight[:width], self.wide.bias[:width]))
        return F.linear(inner, self.narrow.weight[:, :width], self.narrow.bias)


class ElasticNetwork(nn.Module):
    """The super-network: sub-networks use the first neurons of each block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(PIXELS, WIDTH), nn.Linear(WIDTH, DIGITS)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.widths = [NEURONS] * BLOCKS

    def activate(self, architecture: Architecture) -> None:
        self.widths = [layer.intermediate_size for layer in architecture.layers]

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.first(pixels)
        for block, width in zip(self.blocks, self.widths, strict=True):
            x = x + block(x, width) if width else x
        return self.last(x)


def structure() -> Structure:
    """What every parameter's dimensions count: residual channels (`hidden`), neurons of a block (`ffn`), or what never
    changes (`one`)."""
    hidden, neurons = Axis((("hidden", 1),)), Axis((("ffn", 1),))
    tensors = [
        TensorSpec("first.weight", (hidden, Axis((("one", PIXELS),)))),
        TensorSpec("first.bias", (hidden,)),
        TensorSpec("last.weight", (Axis((("one", DIGITS),)), hidden)),
        TensorSpec("last.bias", (Axis((("one", DIGITS),)),)),
    ]
    for block in range(BLOCKS):
        tensors += [
            TensorSpec(f"blocks.{block}.wide.weight", (neurons, hidden), block, "mlp"),
            TensorSpec(f"blocks.{block}.wide.bias", (neurons,), block, "mlp"),
            TensorSpec(f"blocks.{block}.narrow.weight", (hidden, neurons), block, "mlp"),
            TensorSpec(f"blocks.{block}.narrow.bias", (hidden,), block, "mlp"),
        ]
    base = Architecture(WIDTH, (LayerSizes(0, 0, NEURONS),) * BLOCKS)  # no heads: these blocks have no attention
    return Structure(base, head_dim=1, vocab_size=1, tied=True, dtype_bytes=4, tensors=tuple(tensors))


class Pictures(NamedTuple):
    pixels: Tensor
    """[pictures, 64], from 0 to 1."""
    digits: Tensor


def pictures() -> tuple[Pictures, Pictures]:
    """Those to learn from, and those to measure on."""
    found = load_digits()
    pixels, digits = torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    return tuple(Pictures(pixels[rows], digits[rows]) for rows in (order[600:], order[:600]))  # type: ignore[return-value]


def train(network: ElasticNetwork, space: SearchSpace, text: Pictures, steps: int = 400) -> None:
    """The sandwich rule: the largest, a random and the smallest sub-network in every step."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = torch.from_numpy(rng.integers(0, len(text.digits), 64))
        drawn = space.decode_all(sample(space, rng))[0]
        for architecture in (space.base, drawn, space.smallest()):
            network.activate(architecture)
            F.cross_entropy(network(text.pixels[rows]), text.digits[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


def main(evaluations: int = 80) -> SearchResult:
    torch.manual_seed(0)
    learn, measure_on = pictures()
    space = SearchSpace.from_dict({"ffn.*": [8, 16, 32, 48, NEURONS], "layer.*": [0, 1]}, structure())
    network = ElasticNetwork()
    assert sum(p.numel() for p in network.parameters()) == space.structure.parameters(space.base)
    train(network, space, learn)

    @torch.no_grad()
    def measure(architectures: Iterable[Architecture]) -> Iterator[tuple[Architecture, dict[str, float]]]:
        for architecture in architectures:
            network.activate(architecture)
            right = network(measure_on.pixels).argmax(-1) == measure_on.digits
            yield architecture, {"accuracy": float(right.float().mean())}

    objectives = choose(["accuracy", "parameters"], computed(space.structure), {"accuracy": "max"})
    found = search(space, objectives, measure, evaluations=evaluations, population=20)
    print(f"{len(found.evaluations)} of {space.size:,} sub-networks were measured; on the front:")
    print("parameters  accuracy  neurons of each block")
    for evaluation in islice(sorted(found.front, key=lambda e: e.values["parameters"]), 20):
        widths = [layer.intermediate_size for layer in evaluation.architecture.layers]
        print(f"{evaluation.values['parameters']:10,.0f}  {evaluation.values['accuracy']:8.3f}  {widths}")
    return found


if __name__ == "__main__":
    main()
