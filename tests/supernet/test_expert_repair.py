"""Repair of experts: least squares by hand where one is left, nothing made worse, and what few tokens leave alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, LayerSizes
from supernet.expert_repair import FEWEST_TOKENS, Experts, Routed, refit_experts, stacked_experts
from supernet.layer_walk import LayerWalk
from supernet.moments import Sums, refit
from supernet.repair import repair_in_sequence
from supernet.variants import Variants
from tests.support.tiny_families import tiny_network

FAMILIES = ["mixtral", "qwen3_moe"]


def rows_of_text(rows: int = 192, length: int = 16) -> list[Tensor]:
    ids = torch.randint(3, 101, (rows, length), generator=torch.Generator().manual_seed(2))
    return list(ids.split(5))


def first_sparse(supernet: SuperNetwork) -> int:
    return min(stacked_experts(supernet))


def cut_in(supernet: SuperNetwork, index: int, sizes: LayerSizes) -> Architecture:
    layers = list(supernet.base.layers)
    layers[index] = sizes
    return Architecture(supernet.base.hidden_size, tuple(layers))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cut", ["neurons", "experts", "both"])
def test_experts_come_nearer_to_the_uncut_layer(family: str, cut: str) -> None:
    """On text that they were not fitted to, behind the cut layer."""
    supernet = SuperNetwork(tiny_network(family))
    index = first_sparse(supernet)
    full = supernet.base.layers[index]
    neurons = full.intermediate_size // (1 if cut == "experts" else 2)
    experts = full.num_experts // (1 if cut == "neurons" else 2)
    architecture = cut_in(supernet, index, replace(full, intermediate_size=neurons, num_experts=experts))
    text = rows_of_text(384)
    fitted_to, new = text[:64], text[64:]

    def behind(architecture: Architecture, variants: Variants | None) -> Tensor:
        supernet.use(variants)
        with supernet.activated(architecture):
            walk = LayerWalk(supernet, new)
            for number in range(index):
                walk.step(number)
            outputs = torch.cat(walk.outputs(index))
        supernet.use(None)
        return outputs

    whole, sliced = behind(supernet.base, None), behind(architecture, None)
    repaired = behind(architecture, repair_in_sequence(supernet, architecture, fitted_to))
    assert (repaired - whole).square().sum() < (sliced - whole).square().sum()


def routed(experts: Experts, tokens: int, each: int) -> Routed:
    """States and a routing of their own, a quarter of the tokens held out."""
    generator = torch.Generator().manual_seed(tokens)
    number, hidden, _ = experts.outputs.shape
    states = torch.randn(tokens, hidden, generator=generator)
    weights, chosen = torch.randn(tokens, number, generator=generator).softmax(-1).topk(each, dim=-1)
    return Routed(states, chosen, weights, torch.arange(tokens) % 4 == 3)


def lacking(experts: Experts, batch: Routed) -> Tensor:
    """A gap that other weights of the same experts would close."""
    generator = torch.Generator().manual_seed(1)
    gap = torch.zeros_like(batch.states)
    for number, weight in enumerate(experts.outputs.detach()):
        share = (batch.weights * (batch.chosen == number)).sum(-1, keepdim=True)
        gap += share * experts.read(batch.states, number).detach() @ torch.randn(weight.T.shape, generator=generator)
    return gap


@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_is_fitted_to_what_those_before_it_left(family: str) -> None:
    supernet = SuperNetwork(tiny_network(family))
    (experts, *_) = stacked_experts(supernet).values()
    batch = routed(experts, 3000, each=2)
    gap = lacking(experts, batch)
    fitted = refit_experts(experts, [batch], [gap])
    assert fitted is not None
    left = gap.clone()
    for number, weight in enumerate(experts.outputs.detach()):
        share = (batch.weights * (batch.chosen == number)).sum(-1)
        coming = share > 0
        x = experts.read(batch.states, number).detach() * share[:, None]
        training, held = Sums(*weight.T.shape), Sums(*weight.T.shape)
        for part, of in ((training, coming & ~batch.held_out), (held, coming & batch.held_out)):
            part.add(x[of], x[of] @ weight.T + left[of])
        expected, _ = refit(weight.double(), training, held, centred=False)
        assert (fitted[number] - expected).abs().max() <= 1e-4 * expected.abs().max()
        left -= x @ (expected.float() - weight).T
    assert left[~batch.held_out].square().sum() < gap[~batch.held_out].square().sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_to_which_no_token_comes_stays(family: str) -> None:
    supernet = SuperNetwork(tiny_network(family))
    (experts, *_) = stacked_experts(supernet).values()
    batch = routed(experts, 3000, each=1)
    batch = replace(batch, chosen=torch.where(batch.chosen == 1, 0, batch.chosen))
    gap = lacking(experts, batch)
    fitted = refit_experts(experts, [batch], [gap])
    assert fitted is not None
    assert torch.equal(fitted[1], experts.outputs[1])
    assert not torch.equal(fitted[0], experts.outputs[0])


def test_too_few_tokens_change_nothing() -> None:
    (experts, *_) = stacked_experts(SuperNetwork(tiny_network("mixtral"))).values()
    batch = routed(experts, FEWEST_TOKENS - 1, each=1)
    assert refit_experts(experts, [batch], [lacking(experts, batch)]) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_an_uncut_network_keeps_its_experts(family: str) -> None:
    supernet = SuperNetwork(tiny_network(family))
    repaired = repair_in_sequence(supernet, supernet.base, rows_of_text())
    assert not {experts.name for experts in stacked_experts(supernet).values()} & repaired.names


def test_a_dense_network_has_none() -> None:
    assert stacked_experts(SuperNetwork(tiny_network("llama"))) == {}
