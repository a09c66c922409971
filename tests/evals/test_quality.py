"""The one number that says what a network keeps."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evals.quality import QualityScale
from search.scores import Score
from supernet.common.errors import RequestError


def score(value: float, stderr: float = 0.01, *, chance: float | None = None, less: bool = False, n: int = 99) -> Score:
    return Score(metric="m", value=value, stderr=stderr, n=n, split="search", higher_is_better=not less, chance=chance)


BASE = {"choice": score(0.75, chance=0.5), "words": score(0.4), "bits": score(1.0, less=True)}


def test_a_guess_is_worth_nothing_and_the_base_one() -> None:
    scale = QualityScale(BASE)
    assert scale.quality(BASE) == 1.0 and scale.counted == list(BASE) and scale.remark == ""
    guesses = BASE | {"choice": score(0.5, chance=0.5)}
    assert scale.quality(guesses) == pytest.approx(2 / 3)
    halved = {"choice": score(0.625, chance=0.5), "words": score(0.2), "bits": score(2.0, less=True)}
    assert scale.quality(halved) == pytest.approx(0.5)
    better = {"choice": score(0.875, chance=0.5), "words": score(0.6), "bits": score(0.5, less=True)}
    assert scale.quality(better) == pytest.approx((1.5 + 1.5 + 2.0) / 3)
    assert scale.quality(better, capped=True) == 1.0


def test_what_is_above_the_base_makes_up_for_nothing_in_a_search() -> None:
    scale = QualityScale(BASE)
    mixed = {"choice": score(1.0, chance=0.5), "words": score(0.2), "bits": score(2.0, less=True)}
    assert scale.quality(mixed) == pytest.approx((2.0 + 0.5 + 0.5) / 3)
    assert scale.quality(mixed, capped=True) == pytest.approx((1.0 + 0.5 + 0.5) / 3)
    by_text = QualityScale({"choice": score(0.5, chance=0.5)}, base_loss=2.0)
    assert by_text.quality({}, 1.0, capped=True) == by_text.quality({}, 1.0) > 1  # there is nothing to make up for


def test_what_is_worse_than_a_guess_is_not_below_zero() -> None:
    scale = QualityScale({"choice": BASE["choice"]})
    assert scale.quality({"choice": score(0.2, chance=0.5)}) == 0.0
    both = QualityScale({"choice": BASE["choice"], "bits": BASE["bits"]})
    collapsed = {"choice": score(0.4, chance=0.5), "bits": score(math.inf, less=True)}
    assert both.quality(collapsed) == 0.0


@pytest.mark.parametrize(
    ("value", "stderr", "n", "counts"),
    [
        (0.75, 0.01, 99, True),
        (0.53, 0.02, 99, False),
        (0.55, 0.02, 99, True),
        (0.40, 0.02, 99, False),
        (1.0, 0.0, 1, False),  # one document, and right: 0.67 ± 0.27 with one more of each
        (1.0, 0.0, 8, True),
    ],
)
def test_a_task_counts_where_the_base_does_not_guess(value: float, stderr: float, n: int, counts: bool) -> None:
    scale = QualityScale({"coin": score(value, stderr, chance=0.5, n=n), "words": score(0.4)})
    assert scale.left_out == ([] if counts else ["coin"])
    assert ("coin" in scale.remark) != counts and not scale.by_text
    if not counts:
        kept = {"coin": score(0.9, chance=0.5), "words": score(0.3)}
        assert scale.quality(kept) == pytest.approx(0.75)


def test_where_no_task_counts_text_does_and_it_is_said() -> None:
    scale = QualityScale({"coin": score(0.5, 0.02, chance=0.5)}, base_loss=2.0)
    assert scale.by_text and "No task counts (coin)" in scale.remark and "held-out text" in scale.remark
    assert "\n" not in scale.remark
    assert scale.quality({"coin": score(0.9, chance=0.5)}, 2.5) == pytest.approx(math.exp(-0.5))
    assert scale.stderr({}, 2.5, 0.1) == pytest.approx(0.1 * math.exp(-0.5))
    with pytest.raises(ValueError, match=r"held-out loss .* is missing"):
        scale.quality({"coin": score(0.5)})


def test_nothing_is_measured_against_a_base_that_scores_nothing() -> None:
    with pytest.raises(RequestError, match="task words: the base scores 0"):
        QualityScale({"words": score(0.0)})
    with pytest.raises(RequestError, match="task bits: the base scores inf"):
        QualityScale({"bits": score(math.inf, less=True)})


def test_noise_of_the_quality_by_hand() -> None:
    scale = QualityScale(BASE)
    noisy = {"choice": score(0.6, 0.05, chance=0.5), "words": score(0.2, 0.04), "bits": score(2.0, 0.2, less=True)}
    assert scale.stderr(noisy) == pytest.approx((0.2**2 + 0.1**2 + 0.05**2) ** 0.5 / 3)


def test_every_resample_is_scored_as_a_network_is() -> None:
    scale = QualityScale(BASE)
    values = {"choice": [0.75, 0.5, 0.0, 0.3], "words": [0.4, 0.2, 0.0, 0.0], "bits": [1.0, 4.0, 8.0, np.nan]}
    drawn = scale.resampled({name: np.array(row) for name, row in values.items()})
    by_hand = [scale.quality({n: score(v[i], chance=BASE[n].chance) for n, v in values.items()}) for i in range(3)]
    assert by_hand[2] == 0.0  # below a guess
    assert np.allclose(drawn[:3], by_hand) and np.isnan(drawn[3])
