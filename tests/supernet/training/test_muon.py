"""Muon: what is made orthogonal, how far a step moves, and which parameters are AdamW's."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from supernet.training import muon
from supernet.training.loop import parameter_groups
from supernet.training.muon import Muon, in_stacks, operations, orthogonal
from supernet.training.settings import TrainSettings
from tests.support.tiny_families import CONFIGS, tiny_network

BETAS = (0.9, 0.95)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_directions_stay_and_all_move_alike(shape: tuple[int, int]) -> None:
    u, _, v = torch.linalg.svd(random(*shape), full_matrices=False)
    matrix = 7 * u @ torch.diag(torch.linspace(1, 0.2, len(v))) @ v
    made = u.T @ orthogonal(matrix) @ v.T
    values = made.diagonal()
    assert values.min() > 0.5 and values.max() < 1.3
    assert torch.allclose(made, torch.diag(values), atol=1e-4)


def test_a_stack_is_many_matrices_and_nothing_stays_nothing() -> None:
    stack = random(3, 8, 12)
    stack[1] = 0
    made = orthogonal(stack)
    assert torch.allclose(made, torch.stack([orthogonal(matrix) for matrix in stack]), atol=1e-6)
    assert not made[1].any()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (4, 64), (2, 16, 24)])
def test_a_step_moves_a_matrix_by_the_rate(shape: tuple[int, ...]) -> None:
    parameter = nn.Parameter(random(*shape))
    optimizer = Muon([{"params": [parameter], "weight_decay": 0.0, "matrices": True}], 0.01, BETAS)
    before = parameter.detach().clone()
    parameter.grad = 100 * random(*shape)
    optimizer.step()
    moved = parameter.detach() - before
    assert 0.006 < moved.square().mean().sqrt() < 0.012
    assert (moved * parameter.grad).sum() < 0


def test_a_step_follows_nesterovs_momentum() -> None:
    parameter = nn.Parameter(torch.zeros(4, 6))
    optimizer = Muon([{"params": [parameter], "weight_decay": 0.0, "matrices": True}], 0.01, BETAS)
    before, first, second = parameter.detach().clone(), *random(2, 4, 6)
    for gradient in (first, second):
        before.copy_(parameter.detach())
        parameter.grad = gradient.clone()
        optimizer.step()
    new = 1 - muon.MOMENTUM
    momentum = muon.MOMENTUM * new * first + new * second
    assert torch.allclose(optimizer.state[parameter]["momentum"], momentum, atol=1e-6)
    move = orthogonal(new * second + muon.MOMENTUM * momentum)
    assert torch.allclose(parameter - before, -0.01 * sqrt(6) * move, atol=1e-5)


def test_rates_are_shared_and_what_is_no_matrix_is_adamws() -> None:
    matrix, vector, plain = (nn.Parameter(random(*shape)) for shape in ((6, 4), (5,), (5,)))
    groups = [
        {"params": [matrix], "weight_decay": 0.5, "matrices": True},
        {"params": [vector], "weight_decay": 0.1, "matrices": False},
    ]
    ours = Muon(groups, 1.0, BETAS)
    theirs = torch.optim.AdamW([plain], 0.02, BETAS, weight_decay=0.1)
    start = matrix.detach().clone()
    for step in range(3):
        vector.grad = plain.grad = random(5) + step
        matrix.grad = torch.zeros_like(matrix)
        for group in (*ours.param_groups, *theirs.param_groups):
            group["lr"] = 0.02 / (step + 1)
        ours.step()
        theirs.step()
    assert torch.allclose(vector, plain, atol=1e-6)
    assert torch.allclose(matrix, start * (1 - 0.01) * (1 - 0.005) * (1 - 0.01 / 3), atol=1e-6)  # it only decays
    assert ours.state[matrix].keys() == {"momentum"}


def test_an_expert_that_nothing_came_to_stays_and_its_momentum_fades() -> None:
    experts = nn.Parameter(random(2, 4, 6))
    optimizer = Muon([{"params": [experts], "weight_decay": 0.0, "matrices": True}], 0.01, BETAS)
    for step in range(5):
        before = experts.detach().clone()
        experts.grad = random(2, 4, 6)
        experts.grad[1] *= step == 0
        optimizer.step()
        moved = (experts - before).abs().amax((-2, -1)) > 0
        assert moved.tolist() == [True, step == 0]
    sizes = optimizer.state[experts]["momentum"].abs().amax((-2, -1))
    assert sizes[1] < 0.2 * sizes[0]


def test_a_large_stack_is_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts, plain = orthogonal(random(5, 4, 6)), [], muon._orthogonal

    def counted(part: Tensor) -> Tensor:
        parts.append(len(part))
        return plain(part)

    monkeypatch.setattr(muon, "AT_ONCE", 2 * 4 * 6)
    monkeypatch.setattr(muon, "_orthogonal", counted)
    assert torch.allclose(orthogonal(random(5, 4, 6)), whole, atol=1e-6)
    assert parts == [2, 2, 1]


@pytest.mark.parametrize("family", CONFIGS)
def test_matrices_are_muons_and_tables_are_not(family: str) -> None:
    network = tiny_network(family)
    parameters = dict(network.named_parameters())
    groups = parameter_groups(network, parameters, TrainSettings(1, 1, 1, 0.1, 0, weight_decay=0.1))
    matrices = {id(parameter) for group in groups if group["matrices"] for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(parameters)
    for name, parameter in parameters.items():
        table = any(word in name for word in ("embed", "wte", "wpe", "lm_head", "embed_out", "conv1d"))
        assert (id(parameter) in matrices) == (parameter.ndim > 1 and not table), name
    decayed = {parameter for group in groups if group["weight_decay"] for parameter in group["params"]}
    assert all((parameter in decayed) == (parameter.ndim > 1) for parameter in parameters.values())


def test_what_has_no_gradient_does_not_move_and_needs_no_state() -> None:
    parameter = nn.Parameter(random(4, 4))
    optimizer = Muon([{"params": [parameter], "weight_decay": 0.5, "matrices": True}], 0.01, BETAS)
    optimizer.step()
    assert torch.equal(parameter, random(4, 4)) and not optimizer.state


def test_operations_are_those_of_its_products() -> None:
    with FlopCounterMode(display=False) as counter:
        orthogonal(random(3, 8, 12))
        orthogonal(random(12, 8))
    assert counter.get_total_flops() == operations((3, 8, 12)) + operations((12, 8))


@pytest.mark.parametrize("most", [0, 2 * 24, 10**6])
def test_matrices_of_one_shape_move_together_as_they_move_alone(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "STACKED", {"cpu": most})
    shapes = [(4, 6), (6, 4), (4, 6), (2, 4, 6), (4, 6)]
    parameters = [nn.Parameter((n + 1) * random(*shape)) for n, shape in enumerate(shapes)]
    alone = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    sizes = sorted(len(stack) for stack in in_stacks(parameters))
    assert sizes == {0: [1, 1, 1, 1, 1], 48: [1, 1, 1, 2], 10**6: [1, 1, 3]}[most]
    optimizer = Muon([{"params": parameters, "weight_decay": 0.1, "matrices": True}], 0.01, BETAS)
    others = [Muon([{"params": [one], "weight_decay": 0.1, "matrices": True}], 0.01, BETAS) for one in alone]
    for step in range(3):
        for n, pair in enumerate(zip(parameters, alone, strict=True)):
            for parameter in pair:
                parameter.grad = random(*shapes[n]).roll(n + step, 0) if n + step != 3 else None
        optimizer.step()
        for other in others:
            other.step()
    for parameter, one in zip(parameters, alone, strict=True):
        assert torch.allclose(parameter, one, atol=1e-6)
