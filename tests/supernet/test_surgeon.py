"""The order that knows of the repair: against brute force, against least squares, and in a network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from supernet.activation import SuperNetwork
from supernet.importance import IMPORTANCES
from supernet.least_squares import factorised, prefix_weight
from supernet.moments import Moments, projections
from supernet.ordering import order_by, score_shapes
from supernet.surgeon import RIDGE, removal_errors, removed_in_turn
from tests.support.tiny_families import assert_close, tiny_network


def problem(inputs: int, outputs: int = 4) -> tuple[Tensor, Tensor]:
    """A weight, and second moments of inputs that say much about one another."""
    generator = torch.Generator().manual_seed(inputs)
    x = torch.randn(400, 3, generator=generator) @ torch.randn(3, inputs, generator=generator)
    x = (x + 0.3 * torch.randn(400, inputs, generator=generator)).double()
    return torch.randn(outputs, inputs, generator=generator).double(), x.T @ x / 400 + 1e-3 * torch.eye(inputs)


def error_without(weight: Tensor, second: Tensor, gone: list[int]) -> float:
    """Mean square error of the output when these inputs are gone and the others refitted, by solving for the weight."""
    kept = [i for i in range(len(second)) if i not in gone]
    gap = weight.clone()
    gap[:, kept] -= torch.linalg.solve(second[kept][:, kept], second[kept] @ weight.T).T
    return float(((gap @ second) * gap).sum())


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("count", "width"), [(12, 1), (12, 3), (576, 192)])  # 192: heads of SmolLM2-135M
def test_each_step_removes_what_costs_least(two_threads: None, count: int, width: int) -> None:
    weight, second = problem(count)
    units = count // width
    errors = removed_in_turn(weight, second.inverse(), units, steps=100)
    gone: list[int] = []
    for unit in errors.argsort():
        inputs = [range(u * width, (u + 1) * width) for u in range(units)]
        left = [u for u in range(units) if inputs[u][0] not in gone]
        cheapest = min(left, key=lambda u: error_without(weight, second, gone + list(inputs[u])))
        assert cheapest == unit
        gone += inputs[unit]
        assert errors[unit] == pytest.approx(error_without(weight, second, gone), rel=1e-6)


def test_of_two_that_say_the_same_one_stays() -> None:
    """Inputs 0 and 1 are nearly equal and loud, 2 and 3 soft: Wanda removes a soft one, and loses what it said."""
    second = torch.tensor([[9.0, 8.999, 0, 0], [8.999, 9.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 2.0]], dtype=torch.float64)
    weight = torch.ones(1, 4, dtype=torch.float64)
    order = removed_in_turn(weight, second.inverse(), 4).argsort().tolist()
    assert order[0] in (0, 1) and order[1:3] == [2, 3]


def test_several_at_once_are_about_as_good() -> None:
    """Half of the units gone, in 8 steps and in 48: the error after repair is within a tenth, and far below Wanda's."""
    weight, second = problem(48, outputs=20)

    def error(order: Tensor) -> float:
        return error_without(weight, second, order[24:].tolist())

    in_turn = [removed_in_turn(weight, second.inverse(), 48, steps).argsort(descending=True) for steps in (48, 8)]
    slow, fast = map(error, in_turn)
    wanda = error((second.diagonal() * weight.square().sum(0)).argsort(descending=True))
    assert slow <= fast * 1.0001 and fast < 1.1 * slow and fast < wanda


def test_errors_behind_steps_of_two_are_of_both_together() -> None:
    weight, second = problem(12)
    errors = removed_in_turn(weight, second.inverse(), 12, steps=6)
    order = errors.argsort().tolist()
    for first in range(0, 12, 2):
        assert errors[order[first]] == pytest.approx(error_without(weight, second, order[: first + 1]), rel=1e-6)


@pytest.mark.parametrize(("judged", "taken"), [(0.5, 0.5), (math.inf, RIDGE)])
def test_moments_are_taken_less_their_means_and_with_the_ridge_that_was_judged(judged: float, taken: float) -> None:
    """Of a projection with a bias, which carries the means."""
    projection = projections(SuperNetwork(tiny_network("opt")))[0, "mlp"]
    _, second = problem(56)
    moments = Moments((second + 1).float(), torch.ones(56), 400, judged)
    ridge = taken * second.diagonal().mean() * torch.eye(56)
    expected = removed_in_turn(projection.weight(), (second + ridge).inverse(), 56)
    assert_close(removal_errors(projection, moments, 56), expected)


def test_brute_force_of_a_small_case() -> None:
    """Greedy removal of two of six is the best pair or within a twentieth of it."""
    weight, second = problem(6)
    order = removed_in_turn(weight, second.inverse(), 6).argsort().tolist()
    best = min(error_without(weight, second, list(pair)) for pair in itertools.combinations(range(6), 2))
    assert error_without(weight, second, order[:2]) <= 1.05 * best


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mixtral", "gemma2"])
def test_it_scores_all_units_of_a_network(family: str) -> None:
    supernet = SuperNetwork(tiny_network(family))
    ids = torch.randint(3, 101, (8, 16), generator=torch.Generator().manual_seed(2))
    scores = IMPORTANCES["surgeon"](supernet, list(ids.split(4)))
    shapes = score_shapes(supernet.structure)
    assert {units: tuple(value.shape) for units, value in scores.items()} == shapes
    assert all(bool(torch.isfinite(value).all()) for value in scores.values())
    assert order_by(scores).keys() == shapes.keys()


def test_prefixes_of_the_order_are_repaired_to_the_stated_error() -> None:
    weight, second = problem(10)
    errors = removed_in_turn(weight, second.inverse(), 10)
    order = errors.argsort(descending=True)
    factor = factorised(second[order][:, order], 0.0)
    for count in (3, 7):
        gap = weight[:, order].clone()
        gap[:, :count] -= prefix_weight(weight[:, order] @ factor, factor, count)
        error = ((gap @ second[order][:, order]) * gap).sum()
        assert_close(error, errors[order[count]])
