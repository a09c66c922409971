"""A search beside chance: on landscapes by formula where the truth is known, and the distance correlation by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from search.control import (
    distance_correlation,
    likeness,
    measured_control,
    predicted_control,
    random_genomes,
    within_bounds,
)
from search.control_records import Control, Likeness
from search.objectives import Constraint, Evaluation, Objective, computed
from search.sampling import sample, sample_sizes
from search.space import SearchSpace
from supernet.architecture import Architecture, Structure
from tests.support.search_helpers import SMALL, quality

SPACE = SearchSpace.from_dict({"ffn.*": [32, 64, 96, 128], "kv.*": [1, 2], "layer.*": [0, 1]}, SMALL)
QUALITY, LOSS = Objective("quality", "max"), Objective("loss", "min")
PARAMETERS = computed(SMALL)["parameters"]
SMALLER = Constraint(PARAMETERS, maximum=0.7 * SMALL.parameters(SMALL.base))


def evaluated(
    architectures: list[Architecture], score: Callable[[Structure, Architecture], float] = quality
) -> list[Evaluation]:
    parameters = SMALL.parameters
    scores = [score(SMALL, a) for a in architectures]
    return [
        Evaluation(a, {"quality": s, "loss": -s, "parameters": parameters(a)}, index=i)
        for i, (a, s) in enumerate(zip(architectures, scores, strict=True))
    ]


def drawn(count: int, seed: int) -> list[Architecture]:
    rng = np.random.default_rng(seed)
    rows = np.vstack([sample(SPACE, rng, count // 2), sample_sizes(SPACE, rng, count - count // 2)])
    return list(dict.fromkeys(SPACE.decode_all(rows)))


def test_distance_correlation_by_its_definition() -> None:
    """The squared covariance is S1 + S2 - 2 S3 of the two matrices of distances (Székely et al., section 2)."""
    x, y = np.array([0.0, 1, 3, 7]), np.array([2.0, 2, 5, 1])
    a, b = (np.abs(v[:, None] - v[None]) for v in (x, y))

    def covariance(a: np.ndarray, b: np.ndarray) -> float:
        n = len(a)
        s3 = sum(a[k, i] * b[k, j] for k, i, j in itertools.product(range(n), repeat=3)) / n**3
        return float((a * b).mean() + a.mean() * b.mean() - 2 * s3)

    by_hand = np.sqrt(covariance(a, b) / np.sqrt(covariance(a, a) * covariance(b, b)))
    assert distance_correlation(a, b) == pytest.approx(by_hand)
    assert distance_correlation(a, 3 * a) == pytest.approx(1.0)
    assert distance_correlation(a, np.zeros((4, 4))) == 0.0


def best_tenth(evaluations: list[Evaluation]) -> float:
    values = sorted((e.values["quality"] for e in evaluations), reverse=True)
    return float(np.mean(values[: max(3, len(values) // 10)]))


def test_what_is_predicted_of_random_searches_is_what_they_find() -> None:
    """Of a listed space all is known, so what searches of as many random networks find can be drawn."""
    smaller = within_bounds(SPACE, evaluated(list(SPACE.architectures())), QUALITY, [SMALLER])
    best = sorted(smaller, key=lambda e: -e.values["quality"])[:5]
    control = predicted_control(SPACE, best + evaluated(drawn(40, seed=2)), QUALITY, [SMALLER])
    assert control is not None and control.way == "predicted" and 20 < control.evaluations < 45
    draws = (random_genomes(SPACE, [SMALLER], control.evaluations, seed=seed) for seed in range(40))
    found = [best_tenth(evaluated(SPACE.decode_all(rows))) for rows in draws]
    assert control.random == pytest.approx(np.median(found), abs=0.03)
    assert control.found == best_tenth(best) and control.best == max(3, control.evaluations // 10)
    assert control.difference == pytest.approx(control.found - control.random)
    assert 0 < control.low < control.difference < control.high


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.01, 0.03, "; better, +0.02"), (-0.03, -0.01, "; worse"), (-0.1, 0.1, "not told apart")]
)
def test_the_sentence_says_what_the_interval_means(low: float, high: float, said: str) -> None:
    numbers = {"found": 0.9, "random": 0.88, "difference": (low + high) / 2, "low": low, "high": high}
    assert said in Control(way="measured", objective="quality", evaluations=60, best=6, **numbers).text


def test_random_searches_do_not_beat_one_another() -> None:
    """Of forty pairs a few may be told apart by chance; single bests would always be."""
    controls = [
        measured_control(SPACE, evaluated(drawn(60, seed)), evaluated(drawn(60, 100 + seed)), QUALITY, [SMALLER])
        for seed in range(40)
    ]
    told = [control for control in controls if control is not None and (control.low > 0 or control.high < 0)]
    assert len(controls) == 40 and None not in controls and len(told) <= 8


def test_a_search_that_found_better_ones_beats_random_draws() -> None:
    smaller = within_bounds(SPACE, evaluated(list(SPACE.architectures())), QUALITY, [SMALLER])
    best = sorted(smaller, key=lambda e: -e.values["quality"])[:30]
    control = measured_control(SPACE, best, evaluated(drawn(60, 1)), QUALITY, [SMALLER])
    assert control is not None and control.low > 0


def test_less_is_better_where_the_objective_says_so() -> None:
    own, others = evaluated(drawn(60, 0)), evaluated(drawn(8, 1))
    by_quality, by_loss = (measured_control(SPACE, own, others, objective) for objective in (QUALITY, LOSS))
    assert by_quality is not None and by_loss is not None
    assert by_loss.found == pytest.approx(-by_quality.found)
    assert by_loss.difference == pytest.approx(by_quality.difference)


def test_where_only_quality_is_bounded_there_is_nothing_to_say() -> None:
    """The base would be the best of every search."""
    good = Constraint(QUALITY, minimum=0.5)
    assert predicted_control(SPACE, evaluated(drawn(60, 0)), QUALITY, [good]) is None
    base = evaluated([SPACE.base])
    assert within_bounds(SPACE, base + evaluated(drawn(20, 0)), QUALITY, [good]) == [
        e for e in evaluated(drawn(20, 0)) if e.architecture != SPACE.base
    ]


def test_what_an_earlier_phase_did_not_record_is_computed_and_what_failed_is_left_out() -> None:
    rows = evaluated(drawn(40, 0))
    bare = [Evaluation(e.architecture, {"quality": e.values["quality"]}) for e in rows]
    assert len(within_bounds(SPACE, bare, QUALITY, [SMALLER])) == len(within_bounds(SPACE, rows, QUALITY, [SMALLER]))
    failed: list[float | None] = [float("nan"), float("inf"), None]
    broken = [Evaluation(e.architecture, {"quality": v}) for e, v in zip(rows, failed, strict=False)]  # type: ignore[dict-item]
    assert within_bounds(SPACE, broken, QUALITY, []) == []
    assert predicted_control(SPACE, [*broken, *bare[3:]], QUALITY, [SMALLER]) is not None
    assert likeness(SPACE, [*broken, *bare[3:]], QUALITY) is not None


def test_bounds_that_nothing_meets() -> None:
    tiny = Constraint(PARAMETERS, maximum=1)
    assert random_genomes(SPACE, [tiny], 20, seed=0).shape == (0, len(SPACE.genes))
    assert random_genomes(SPACE, [tiny], 0, seed=0).shape == (0, len(SPACE.genes))
    assert predicted_control(SPACE, evaluated(drawn(40, 0)), QUALITY, [tiny]) is None


def test_random_genomes_stay_within_the_bounds_and_do_not_repeat() -> None:
    rows = random_genomes(SPACE, [SMALLER], 200, seed=0)
    assert len({tuple(row) for row in rows.tolist()}) == len(rows) > 100
    assert all(SMALL.parameters(a) <= (SMALLER.maximum or 0) for a in SPACE.decode_all(rows))


def test_what_was_screened_or_lies_outside_does_not_count() -> None:
    full = evaluated(drawn(20, 0))
    screened = [Evaluation(e.architecture, e.values, full=False) for e in full]
    full = [e for e in full if e.architecture != SPACE.base]
    assert within_bounds(SPACE, [*full, *screened], QUALITY, []) == full
    assert {e.architecture for e in within_bounds(SPACE, full, QUALITY, [SMALLER])} == {
        e.architecture for e in full if e.values["parameters"] <= (SMALLER.maximum or 0)
    }


def test_scores_that_follow_sizes_of_layers_can_be_learned_and_noise_cannot() -> None:
    architectures = drawn(80, 3)

    def first_layer_counts(structure: Structure, architecture: Architecture) -> float:
        return float(architecture.layers[0].intermediate_size)

    noise = np.random.default_rng(0)
    learnable = likeness(SPACE, evaluated(architectures, first_layer_counts), QUALITY)
    unlearnable = likeness(SPACE, evaluated(architectures, lambda *_: float(noise.standard_normal())), QUALITY)
    by_size = likeness(SPACE, evaluated(architectures, lambda s, a: float(s.parameters(a))), QUALITY)
    assert learnable is not None and learnable.learnable and learnable.chance < 0.01
    assert unlearnable is not None and not unlearnable.learnable and "nothing to learn" in unlearnable.text
    assert by_size is None, "what the number of parameters explains is no likeness of genomes"


def test_what_lies_beyond_all_that_was_measured_within_the_bounds_is_no_finding() -> None:
    """Scores that fall off a cliff at the bound: what lies above it pulls what is predicted below it up."""

    def cliff(structure: Structure, architecture: Architecture) -> float:
        return 0.9 if SMALLER.violation(np.array([structure.parameters(architecture)], float))[0] else 0.01

    above = [e for e in evaluated(drawn(120, 4), cliff) if e.values["quality"] > 0.5][:40]
    below = [e for e in evaluated(drawn(120, 4), cliff) if e.values["quality"] < 0.5]
    smallest = sorted(below, key=lambda e: e.values["parameters"])[:5]
    assert predicted_control(SPACE, [*above, *smallest], QUALITY, [SMALLER]) is None
    assert predicted_control(SPACE, [*above, *below], QUALITY, [SMALLER]) is not None


def test_too_little_was_measured() -> None:
    few = evaluated(drawn(6, 0))[:4]
    assert predicted_control(SPACE, few, QUALITY, [SMALLER]) is None and likeness(SPACE, few, QUALITY) is None
    assert measured_control(SPACE, few, [], QUALITY) is None


def test_both_are_kept_and_read_as_json() -> None:
    control = measured_control(SPACE, evaluated(drawn(30, 0)), evaluated(drawn(30, 1)), QUALITY)
    found = likeness(SPACE, evaluated(drawn(30, 0)), QUALITY)
    assert control is not None and found is not None
    assert Control.model_validate_json(control.model_dump_json()) == control
    assert Likeness.model_validate_json(found.model_dump_json()) == found
