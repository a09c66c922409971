"""Which of several networks that are as good as equal is taken."""

from __future__ import annotations

from search.preference import equals, preferred, shortlist

LOSSES = [1.30, 1.00, 1.02, 1.04, 1.06, 1.50]
STDERRS = [0.03] * 6
SPEEDS = [300.0, 100.0, 110.0, 180.0, 200.0, 900.0]


def test_equals_lie_within_two_standard_errors_of_the_lowest() -> None:
    assert equals(LOSSES, STDERRS) == [1, 2, 3, 4]
    assert equals(LOSSES, [0.0] * 6) == [1]
    assert equals(LOSSES, [9.0, 0.01, 9.0, 9.0, 9.0, 9.0]) == [1, 2]  # the lowest's own error counts


def test_preferences_by_hand() -> None:
    assert preferred(LOSSES, STDERRS, SPEEDS) == {"quality": 1, "speed": 4, "balanced": 3}
    # (loss, speed) as shares of the range: (0, 0), (1/3, 0.1), (2/3, 0.8), (1, 1): the third loses 2/3 - 0.8.
    assert preferred([1.0, 1.1], [0.2, 0.2], [5.0, 5.0]) == {"quality": 0, "speed": 0, "balanced": 0}
    assert preferred([1.0, 1.1], [0.2, 0.2], [5.0, 9.0]) == {"quality": 0, "speed": 1, "balanced": 0}
    # One that is slower than the best in loss is no middle of anything.
    assert preferred([1.0, 1.01, 1.1], [0.2] * 3, [5.0, 1.0, 9.0])["balanced"] == 0


def test_the_shortlist_has_the_best_and_the_fastest_of_the_equals() -> None:
    assert shortlist(LOSSES, STDERRS, SPEEDS, 2) == [1, 2, 4]
    assert shortlist(LOSSES, STDERRS, SPEEDS, 9) == [1, 2, 3, 4, 0, 5]
