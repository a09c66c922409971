"""Predictors learn what can be learnt, say how well they rank, and are set aside where they rank noise."""

from __future__ import annotations

import numpy as np
import pytest

from search.predictors import FEWEST, KINDS, Predictor, Scale, judge


def smooth(rng: np.random.Generator, n: int, genes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    x = rng.random((n, genes))
    return x, 3 - 2 * x[:, 0] - x[:, 1] ** 2 + x[:, 2] * x[:, 3]


def test_report_by_hand() -> None:
    judged = judge(np.array([1.0, 2, 3, 4]), np.array([1.5, 2, 4, 3]))
    assert judged.kendall == pytest.approx(4 / 6) and judged.spearman == pytest.approx(0.8)
    assert judged.mae == pytest.approx(2.5 / 4) and judged.n == 4
    assert judged.chance == pytest.approx(4 / 24)  # orders of four with at most one inversion
    assert judge(np.array([1.0, 2, 3, 4, 5]), np.arange(5.0)).chance == pytest.approx(1 / 120)


def test_useful_means_better_than_chance() -> None:
    truth = np.arange(8.0)
    assert judge(truth, truth**3).useful
    assert not judge(truth, -truth).useful
    assert not judge(truth, np.ones(8)).useful
    assert not judge(np.array([0.0, 1, 2, 3]), np.array([1.0, 0, 3, 2])).useful
    assert judge(truth[:3], -truth[:3]).useful, "three measurements are too few to judge by"


def test_all_kinds_learn_a_smooth_function_and_one_is_chosen() -> None:
    rng = np.random.default_rng(0)
    x, y = smooth(rng, 100)
    new_x, new_y = smooth(rng, 60)
    predictor = Predictor(ordinals=6)
    predictor.fit(x, 100 + 50 * y)
    newest = {kind: judge(100 + 50 * new_y, costs) for kind, costs in predictor.predictions(new_x).items()}
    assert tuple(newest) == tuple(predictor.scores) == KINDS
    assert all(judged.kendall > 0.7 and judged.useful for judged in newest.values())
    assert predictor.scores[predictor.chosen].kendall == max(s.kendall for s in predictor.scores.values())
    assert newest[predictor.chosen].kendall > 0.85
    assert judge(100 + 50 * new_y, predictor.predict(new_x)) == newest[predictor.chosen]
    known, far = predictor.probability(np.vstack([x[:1], x[:1] + 5]), 100 + 50 * (y[0] + np.array([-0.5, 0.5])))
    assert known[0] < 0.01 and known[1] > 0.99 and far[1] - far[0] < 0.5


def test_a_bent_scale_by_hand() -> None:
    """Costs 1, 2 and 11: log(0.1), log(0.2), log(1.1), then standardised."""
    costs = np.array([1.0, 2.0, 11.0])
    scale = Scale.of(costs, 0.1)
    bent = np.log([0.1, 0.2, 1.1])
    assert scale.trained(costs) == pytest.approx((bent - bent.mean()) / bent.std())
    assert scale.costs(scale.trained(costs)) == pytest.approx(costs)
    assert scale.trained(np.array([0.0]))[0] == -np.inf and scale.costs(np.array([-np.inf]))[0] == pytest.approx(0.0)
    plain = Scale.of(costs, None)
    assert plain.trained(costs) == pytest.approx((costs - costs.mean()) / costs.std())
    assert plain.costs(plain.trained(costs)) == pytest.approx(costs)


def test_losses_that_grow_exponentially_are_learnt_on_the_bent_scale() -> None:
    rng = np.random.default_rng(0)
    (x, y), (new_x, new_y) = smooth(rng, 40), smooth(rng, 200)
    predictor = Predictor(ordinals=6)
    predictor.fit(x, np.exp(3 * y))
    assert predictor.scale.bend is not None
    assert judge(np.exp(3 * new_y), predictor.predict(new_x)).kendall > 0.8


def test_kinds_that_are_set_aside_are_not_chosen() -> None:
    x, y = smooth(np.random.default_rng(1), 50)
    predictor = Predictor(ordinals=6)
    predictor.fit(x, y)
    first = predictor.chosen
    predictor.fit(x, y, set_aside=[first])
    assert predictor.chosen in set(KINDS) - {first}
    predictor.fit(x, y, set_aside=KINDS)
    assert predictor.chosen is None and tuple(predictor.scores) == KINDS
    with pytest.raises(ValueError, match="no predictor"):
        predictor.predict(x)


def test_noise_ranks_no_better_than_chance() -> None:
    rng = np.random.default_rng(2)
    judged = []
    for _ in range(5):
        predictor = Predictor(ordinals=6)
        predictor.fit(rng.random((60, 6)), rng.random(60))
        new_x, new_y = rng.random((40, 6)), rng.random(40)
        judged += [judge(new_y, costs) for costs in predictor.predictions(new_x).values()]
    assert sum(each.useful for each in judged) < len(judged) / 2
    assert abs(np.mean([each.kendall for each in judged])) < 0.1


def test_too_little_to_learn_from() -> None:
    x, y = smooth(np.random.default_rng(3), FEWEST)
    predictor = Predictor(ordinals=6)
    for features, target in ((x[:-1], y[:-1]), (x, np.ones(FEWEST))):
        predictor.fit(features, target)
        assert predictor.chosen is None and predictor.predictions(x) == {}
    predictor.fit(x, y)
    assert predictor.chosen is not None


def test_the_same_samples_give_the_same_predictions() -> None:
    x, y = smooth(np.random.default_rng(4), 40)
    predictions = []
    for _ in range(2):
        predictor = Predictor(ordinals=6, seed=5)
        predictor.fit(x, y)
        predictions.append(predictor.predict(x).tobytes())
        np.random.default_rng().random(3)
    assert predictions[0] == predictions[1]
