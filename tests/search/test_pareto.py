"""Fronts, hypervolumes and targets by hand, and the objectives that a search may have."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from search.objectives import Computer, Constraint, Evaluation, Objective, choose, computed
from search.pareto import (
    Target,
    contenders,
    costs,
    front,
    hypervolume,
    hypervolume_in,
    knee,
    non_dominated,
    ranks,
    spread,
    violations,
)
from search.space import SearchSpace
from supernet.architecture import Architecture, LayerSizes, StorageFormat
from tests.support.search_helpers import SMALL, quality

QUALITY, PARAMETERS = Objective("quality", "max"), Objective("parameters", "min", SMALL.parameters, additive=True)


def architecture(*widths: int, kv: int = 2) -> Architecture:
    return Architecture(16, tuple(LayerSizes(2 * kv, kv, w) for w in widths))


def evaluation(quality: float, parameters: int, *widths: int, **more: float) -> Evaluation:
    return Evaluation(architecture(*(widths or (parameters,))), {"quality": quality, "parameters": parameters} | more)


def test_front_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    for objectives in (2, 3, 4):
        values = rng.integers(0, 6, size=(80, objectives)).astype(float)
        better = [[(a <= b).all() and (a < b).any() for a in values] for b in values]
        assert non_dominated(values).tolist() == [i for i, row in enumerate(better) if not any(row)]
    assert [sorted(r.tolist()) for r in ranks(np.array([[0, 1], [1, 0], [1, 1], [0, 1.0]]))] == [[0, 1, 3], [2]]


def test_hypervolume_by_hand() -> None:
    assert hypervolume(np.array([[1.0, 2.0], [2.0, 1.0]]), [3, 3]) == pytest.approx(3)
    assert hypervolume(np.array([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0], [0.0, 9.0]]), [3, 3]) == pytest.approx(3)
    assert hypervolume(np.array([[0.0, 0, 1], [1, 1, 0]]), [2, 2, 2]) == pytest.approx(4 + 2 - 1)
    assert hypervolume(np.array([[3.0, 3.0]]), [3, 3]) == hypervolume(np.zeros((0, 2)), [3, 3]) == 0


def test_spread_and_knee() -> None:
    line = np.array([[x, 10 - x] for x in range(11)], dtype=float)
    assert spread(line, 3) == [0, 10, 5]
    assert spread(line, 1, occupied=np.array([[0.0, 10.0]])) == [10]
    assert spread(line, 1, occupied=np.array([[0.0, 10.0], [10.0, 0.0]])) == [5]
    assert spread(np.array([[10.0], [20.0]]), 1, occupied=np.array([[10.5]])) == [1]
    assert spread(line[:2], 5) == [0, 1]
    assert knee(np.array([[0.0, 10], [1, 2], [10, 0]])) == 1


def test_front_of_evaluations() -> None:
    evaluations = [
        evaluation(1.0, 100),
        evaluation(0.9, 60),
        evaluation(0.8, 70),
        evaluation(0.5, 20),
        evaluation(float("nan"), 10),
        Evaluation(architecture(5), {"quality": 0.99, "parameters": 5}, full=False),
    ]
    sizes = [e.values["parameters"] for e in front(evaluations, [QUALITY, PARAMETERS])]
    assert sizes == [100, 60, 20]
    limits = [Constraint(PARAMETERS, maximum=60), Constraint(QUALITY, minimum=0.6)]
    within = front(evaluations, [QUALITY, PARAMETERS], limits)
    assert [e.values["parameters"] for e in within] == [60]
    assert costs(evaluations[:1], [QUALITY, PARAMETERS]).tolist() == [[-1, 100]]
    assert front([], [QUALITY, PARAMETERS]) == []


def test_constraints_measure_how_far() -> None:
    constraint = Constraint(PARAMETERS, maximum=50, minimum=10)
    assert violations([evaluation(1, p) for p in (100, 50, 10, 5)], [constraint])[:, 0].tolist() == [1, 0, 0, 0.5]
    assert str(constraint) == "parameters at least 10 and at most 50"
    for bounds in ({}, {"maximum": 1.0, "minimum": 2.0}):
        with pytest.raises(ValueError, match="parameters"):
            Constraint(PARAMETERS, **bounds)


MEASURED = [
    evaluation(1.00, 100, 100, 100, bytes=200, speedup=1.0),
    evaluation(0.995, 80, 100, 60, bytes=160, speedup=1.2),
    evaluation(0.97, 60, 60, 60, bytes=120, speedup=1.3),
    evaluation(0.98, 66, 90, 42, bytes=132, speedup=1.1),
    evaluation(0.60, 20, 20, 20, bytes=40, speedup=2.5),
]


@pytest.mark.parametrize(
    ("target", "size"),
    [
        (Target(max_params=67), 66),
        (Target(max_params=60), 60),
        (Target(max_bytes=130), 60),
        (Target(min_speedup=1.15), 80),
        (Target(min_speedup=1.15, max_params=67), 60),
        (Target(max_drop=0.01), 80),
        (Target(max_drop=0.05), 60),
        (Target(max_drop=0.0), 100),
        (Target(max_drop=0.03, min_speedup=1.25), 60),
        (Target(max_drop=0.5, max_params=90), 20),
    ],
)
def test_what_a_target_asks_for(target: Target, size: int) -> None:
    assert [e.values["parameters"] for e in contenders(MEASURED, target)] == [size]


def test_what_is_missed_is_a_share_of_each_bound() -> None:
    wanted = Target(max_params=1000, min_speedup=2.0, max_drop=0.1)
    assert wanted.misses(evaluation(0.8, 1100, speedup=1.5)) == pytest.approx(0.1 + 0.25 + 0.1)
    assert wanted.misses(evaluation(0.9, 1000, speedup=2.0)) == 0.0


def test_architectures_within_noise_of_the_best_all_contend() -> None:
    noisy = [replace(e, values=e.values | {"quality_stderr": 0.006}) for e in MEASURED]
    assert [e.values["parameters"] for e in contenders(noisy, Target(max_params=67))] == [66, 60]
    assert [e.values["parameters"] for e in contenders(noisy, Target(max_drop=0.05))] == [60]


def test_targets_out_of_reach_name_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"parameters at most 15; the nearest has quality 0.6, parameters 20"):
        contenders(MEASURED, Target(max_params=15))
    message = r"speedup at least 1.3 and quality at least 0.99; the nearest has .*speedup 1.[23]"
    with pytest.raises(ValueError, match=message):
        contenders(MEASURED, Target(min_speedup=1.3, max_drop=0.01))
    with pytest.raises(ValueError, match="needs at least one"):
        contenders(MEASURED, Target())
    with pytest.raises(ValueError, match="no measured architecture"):
        contenders([Evaluation(architecture(1), {"quality": 1, "parameters": 1}, full=False)], Target(max_params=5))


def test_objectives_by_name() -> None:
    known = computed(SMALL, scheme=StorageFormat(4, 32), context=3, speed={"decode_tps": lambda a: 100 / len(a.kept)})
    chosen = choose(["quality", "bytes", "decode_tps"], known, {"quality": "max", "blimp12:acc": "max", "loss": "min"})
    assert [(o.name, o.direction, o.kind) for o in chosen] == [
        ("quality", "max", "measured"),
        ("bytes", "min", "computed"),
        ("decode_tps", "max", "computed"),
    ]
    space = SearchSpace.preset("depth", SMALL)
    base = np.array([space.upper])
    assert Computer(space, known["bytes"])(base)[0] == SMALL.bytes(SMALL.base, StorageFormat(4, 32))
    assert Computer(space, known["macs"])(base)[0] == SMALL.macs(SMALL.base, 3)
    genomes = space.canonicalize(np.array([[0, 1, 1], [1, 1, 1]]))
    assert Computer(space, known["decode_tps"])(genomes).tolist() == [50, 100 / 3]
    with pytest.raises(ValueError, match="measured, not computed"):
        Computer(space, QUALITY)(base)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["quality", "flops"], "'flops' cannot be measured; valid objectives are quality, loss, parameters, bytes"),
        (["quality"], "two to four objectives, not 1"),
        (["quality", "loss", "parameters", "bytes", "macs"], "two to four objectives, not 5"),
        (["quality", "quality"], "named twice"),
        (["parameters", "bytes"], "add a measured objective"),
    ],
)
def test_objectives_that_cannot_be_searched(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(names, computed(SMALL), {"quality": "max", "loss": "min"})


def test_unknown_speed() -> None:
    with pytest.raises(ValueError, match="unknown speed 'tps'; valid are decode_tps"):
        computed(SMALL, speed={"tps": lambda a: 1.0})


def test_quality_by_formula_is_one_for_the_base_only() -> None:
    space = SearchSpace.preset("fine", SMALL, step=64)
    scores = [quality(SMALL, a) for a in space.architectures()]
    assert max(scores) == 1 and scores.count(1) == 1


def test_an_objective_without_extent_is_left_out_of_the_box() -> None:
    values = np.array([[1.0, 7.0, 3.0], [2.0, 7.0, 1.0]])
    best, worst = np.array([0.0, 7.0, 0.0]), np.array([4.0, 7.0, 4.0])
    assert hypervolume_in(values, best, worst) == pytest.approx((3 * 1 + 2 * 3 - 2 * 1) / 16)
    assert hypervolume_in(values, best, best) == 0.0
