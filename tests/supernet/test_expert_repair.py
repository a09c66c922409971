"""Repair of experts: least squares by hand where one is left, nothing made worse, and what few tokens leave alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, LayerSizes
from supernet.expert_repair import refit_experts
from supernet.experts import FEWEST_TOKENS, ExpertInputs, Experts, stacked_experts
from supernet.hooks import Hooks
from supernet.layer_walk import LayerWalk
from supernet.least_squares import Sums, refit
from supernet.moments import expert_place, gather, layer_file, load_moments, save_moments
from supernet.repair import RepairedVariants, experts_bytes, repair_in_sequence
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


def behind_layer(
    supernet: SuperNetwork, index: int, text: list[Tensor], architecture: Architecture, variants: Variants | None
) -> Tensor:
    """What leaves a layer on a text, [tokens, hidden]."""
    supernet.use(variants)
    with supernet.activated(architecture):
        walk = LayerWalk.of(supernet, text)
        for number in range(index):
            walk.step(number)
        outputs = torch.cat(walk.outputs(index))
    supernet.use(None)
    return outputs


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
        return behind_layer(supernet, index, new, architecture, variants)

    whole, sliced = behind(supernet.base, None), behind(architecture, None)
    repaired = behind(architecture, repair_in_sequence(supernet, architecture, fitted_to))
    assert (repaired - whole).square().sum() < (sliced - whole).square().sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_in_a_search_each_expert_is_fitted_to_its_own_output(family: str, tmp_path: Path) -> None:
    """By hand: least squares on the tokens that come to it in the full network, towards the plain slice."""
    supernet = SuperNetwork(tiny_network(family))
    index = first_sparse(supernet)
    experts, full = stacked_experts(supernet)[index], supernet.base.layers[index]
    text, seen = rows_of_text(512), list[tuple[Tensor, Tensor, Tensor]]()
    gathered = dict(gather(supernet, text, experts=True))
    for layer, moments in gathered.items():
        save_moments(moments, layer_file(tmp_path, layer), "w")
    variants = RepairedVariants(supernet, lambda layer: load_moments(layer_file(tmp_path, layer), "w"), 2**30)
    width, number = full.intermediate_size // 2, full.num_experts - 1
    repaired = variants.tensor(experts.name, replace(full, intermediate_size=width, num_experts=number))
    assert repaired is not None and repaired.shape == (number, supernet.base.hidden_size, width)

    with Hooks([experts.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))]):
        walk = LayerWalk.of(supernet, text)
        for layer in range(index + 1):
            walk.step(layer)
    states, chosen, weights = (torch.cat(parts) for parts in zip(*seen, strict=True))
    batch = ExpertInputs(states, chosen, weights, torch.zeros(len(states), dtype=torch.bool))
    fitted = 0
    for expert in range(number):
        whole = experts.outputs[expert].detach().double()
        ridge = gathered[index][expert_place(expert)].ridge
        if math.isinf(ridge):
            assert torch.equal(repaired[expert], experts.outputs[expert, :, :width])
            continue
        fitted += 1
        x = experts.coming(batch, expert)[1].detach().double()
        second = x.T @ x / len(x) + ridge * x.square().mean() * torch.eye(x.shape[1], dtype=torch.float64)
        by_hand = whole @ second[:, :width] @ torch.linalg.inv(second[:width, :width])
        assert (repaired[expert] - by_hand).abs().max() <= 1e-3 * by_hand.abs().max()
    assert fitted
    # Neurons that all stay are their own best fit, and few bytes hold no less than many.
    assert variants.tensor(experts.name, replace(full, num_experts=number)) is None
    few = RepairedVariants(supernet, gathered.__getitem__, 0)
    again = few.tensor(experts.name, replace(full, intermediate_size=width, num_experts=number))
    assert again is not None and torch.equal(again, repaired)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_search_sees_experts_nearer_to_the_uncut_ones(family: str) -> None:
    supernet = SuperNetwork(tiny_network(family))
    index = first_sparse(supernet)
    full, text = supernet.base.layers[index], rows_of_text(512)
    architecture = cut_in(supernet, index, replace(full, intermediate_size=full.intermediate_size // 2))
    moments = dict(gather(supernet, text, experts=True))

    def behind(architecture: Architecture, variants: Variants | None) -> Tensor:
        return behind_layer(supernet, index, text, architecture, variants)

    whole, sliced = behind(supernet.base, None), behind(architecture, None)
    repaired = behind(architecture, RepairedVariants(supernet, moments.__getitem__, 2**30))
    assert (repaired - whole).square().sum() < (sliced - whole).square().sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_to_which_nothing_came_is_sliced_plainly(family: str, tmp_path: Path) -> None:
    supernet = SuperNetwork(tiny_network(family))
    index = first_sparse(supernet)
    experts, full = stacked_experts(supernet)[index], supernet.base.layers[index]

    def without_the_first(_: object, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        states, chosen, weights = inputs
        return states, torch.where(chosen == 0, 1, chosen), weights

    with Hooks([experts.module.register_forward_pre_hook(without_the_first)]):
        gathered = dict(gather(supernet, rows_of_text(512), experts=True))
    assert expert_place(0) not in gathered[index] and expert_place(1) in gathered[index]
    for layer, moments in gathered.items():
        save_moments(moments, layer_file(tmp_path, layer), "w")
    variants = RepairedVariants(supernet, lambda layer: load_moments(layer_file(tmp_path, layer), "w"), 2**30)
    width = full.intermediate_size // 2
    repaired = variants.tensor(experts.name, replace(full, intermediate_size=width))
    assert repaired is not None and torch.equal(repaired[0], experts.outputs[0, :, :width])
    assert not torch.equal(repaired[1], experts.outputs[1, :, :width])


def test_experts_are_gathered_where_they_are_asked_for() -> None:
    supernet = SuperNetwork(tiny_network("mixtral"))
    index = first_sparse(supernet)
    moments = dict(gather(supernet, rows_of_text()))
    assert expert_place(0) not in moments[index]
    full = supernet.base.layers[index]
    variants = RepairedVariants(supernet, moments.__getitem__, 2**30)
    halved = replace(full, intermediate_size=full.intermediate_size // 2)
    assert variants.tensor(stacked_experts(supernet)[index].name, halved) is None
    each = 4 * full.intermediate_size * (full.intermediate_size + supernet.base.hidden_size)
    sparse = [layer for layer in supernet.base.layers if layer.num_experts]
    assert experts_bytes(supernet.structure) == each * full.num_experts * len(sparse)
    assert experts_bytes(SuperNetwork(tiny_network("llama")).structure) == 0


def routed(experts: Experts, tokens: int, each: int) -> ExpertInputs:
    """States and a routing of their own, a quarter of the tokens held out."""
    generator = torch.Generator().manual_seed(tokens)
    number, hidden, _ = experts.outputs.shape
    states = torch.randn(tokens, hidden, generator=generator)
    weights, chosen = torch.randn(tokens, number, generator=generator).softmax(-1).topk(each, dim=-1)
    return ExpertInputs(states, chosen, weights, torch.arange(tokens) % 4 == 3)


def lacking(experts: Experts, batch: ExpertInputs) -> Tensor:
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
