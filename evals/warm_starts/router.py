"""A learned router: a small network that is told a budget and says the size of every half-block, trained with the
weights.

Nemotron Elastic (Taghibakhshi et al., arXiv 2511.16664, section 3.3) learns which sizes a budget should have while it
trains the elastic network: a router of two linear layers reads the budget as a one-hot vector, Gumbel-softmax samples a
size of each choice from its logits at a temperature that falls, and the loss adds how far the sample's cost is from the
budget. Here it proposes where a search may start, so the weights are trained on the same text for as long as it learns,
and are put back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evals.warm_starts import Proposals, WarmStart
from evals.warm_starts.superposition import Mixture
from search.layer_options import Variants
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture
from supernet.common.progress import bar
from supernet.training.data import Batch
from supernet.training.losses import divergence
from supernet.training.traces import HiddenStates, head_of, trace

BUDGETS, STEPS = 8, 240
"""Sizes that the router is told, in even steps below the base's, and steps of training for all of them together."""
HIDDEN = 64
"""Width of the router."""
HOT, COLD = 1.0, 0.05
"""Temperatures that samples begin and end at, as in the paper."""
WEIGHT = 10.0
"""Of the cost in the loss: a tenth too much costs as much as a nat."""
ROUTER_RATE = 0.05
"""Learning rate of the router."""
RATE = 0.03
"""Learning rate of the network's weights, times its residual width: under a third of fine-tuning's."""
PASSES = 3.0
"""Passes over all of the text that a step costs: over one batch of two, the base's, the mixture's and twice the way
back."""


class Router(nn.Module):
    """Logits of every choice's sizes for a budget, by its number; they begin as `start` for all budgets."""

    def __init__(self, budgets: int, start: Sequence[Tensor], generator: torch.Generator) -> None:
        super().__init__()
        self.sizes = [len(of_choice) for of_choice in start]
        self.first = nn.Linear(budgets, HIDDEN)
        self.second = nn.Linear(HIDDEN, sum(self.sizes))
        with torch.no_grad():
            for parameter, spread in ((self.first.weight, 1.0), (self.second.weight, 0.1 / HIDDEN**0.5)):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            self.first.bias.zero_()
            self.second.bias.copy_(torch.cat(list(start)))

    def forward(self, budget: int) -> tuple[Tensor, ...]:
        told = F.one_hot(torch.tensor(budget), self.first.in_features).float()
        logits: Tensor = self.second(F.leaky_relu(self.first(told)))
        return logits.split(self.sizes)


def gumbel_softmax(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A soft sample: softmax((logits + g) / temperature) with g = -log(-log(u)), u uniform (Jang et al., arXiv
    1611.01144, equation 2)."""
    uniform = torch.rand(logits.shape, generator=generator).clamp(1e-9, 1 - 1e-7)
    return ((logits - (-uniform.log()).log()) / temperature).softmax(-1)


def router(supernet: SuperNetwork, variants: Variants, batches: Sequence[Batch], steps: int = STEPS) -> Proposals:
    """The most probable architecture of each budget, once the router and the weights were trained together.

    The loss is KL(base || mixture) and how far the mixture's expected size is from the budget's. As for superposition,
    choices are made together in the end, where the paper takes the most probable size of each. Weights that are stored
    in half precision hardly move, since most of these steps are smaller than what they can tell apart.
    """
    generator = torch.Generator().manual_seed(0)
    mixture = Mixture(supernet, variants, "router")
    start = mixture.whole()
    full, smallest = supernet.structure.parameters(supernet.base), mixture.smallest(start)
    budgets = [full + (smallest - full) * (number + 1) / BUDGETS for number in range(BUDGETS)]
    routed = Router(BUDGETS, start, generator)
    weights = [weight for weight in supernet.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(
        [
            {"params": routed.parameters(), "lr": ROUTER_RATE},
            {"params": weights, "lr": RATE / supernet.base.hidden_size},
        ]
    )
    with restored(weights) as base, bar("learning a router of sizes", steps) as progress:
        for step in range(steps):
            # 1. A budget and a batch: every budget in turn, all batches for each.
            budget = step % BUDGETS
            batch = batches[step // BUDGETS % len(batches)]
            # 2. A sample of sizes, ever nearer to a choice.
            temperature = HOT * (COLD / HOT) ** (step / max(1, steps - 1))
            shares = [gumbel_softmax(logits, temperature, generator) for logits in routed(budget)]
            # 3. Router and weights learn from the base's predictions, and the router from the cost.
            with torch.no_grad(), exchanged(weights, base):
                taught = with_its_head(supernet, trace(supernet.model, batch))
            optimizer.zero_grad()
            with mixture.active(shares):
                kept = divergence(trace(supernet.model, batch), taught)
                over = (mixture.expected(shares) - budgets[budget]).abs() / full
                (kept + WEIGHT * over).backward()
            optimizer.step()
            progress.advance()
    proposed: dict[Architecture, int] = {}
    with torch.no_grad():
        for number, wanted in enumerate(budgets):
            parameters, architecture = mixture.most_probable(routed(number), wanted)
            proposed[architecture] = parameters
    return Proposals(sorted(((p, a) for a, p in proposed.items()), key=lambda point: point[0]))


def with_its_head(supernet: SuperNetwork, states: HiddenStates) -> HiddenStates:
    """States whose head stays the one of now, whatever becomes of its weights afterwards."""
    weight = supernet.model.get_output_embeddings().weight.detach()
    return replace(states, head=partial(head_of, supernet.model, weight=weight))


@contextmanager
def restored(weights: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Copies of weights, which are put back at the end; their gradients are gone then."""
    before = [weight.detach().clone() for weight in weights]
    try:
        yield before
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
                weight.grad = None


@contextmanager
def exchanged(weights: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Within, parameters have other values."""
    own = [weight.data for weight in weights]
    for weight, value in zip(weights, values, strict=True):
        weight.data = value
    try:
        yield
    finally:
        for weight, value in zip(weights, own, strict=True):
            weight.data = value


WARM_STARTS = (WarmStart("router", router, lambda layers: PASSES * STEPS),)
