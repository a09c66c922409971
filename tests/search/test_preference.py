"""Which of several networks that scores do not tell apart is taken."""

from __future__ import annotations

from search.preference import faster, near, ordered, preferred, shortlist

LOSSES = [1.30, 1.00, 1.02, 1.04, 1.06, 1.50]
STDERRS = [0.03] * 6
SPEEDS = [300.0, 100.0, 110.0, 180.0, 200.0, 900.0]
BASE = 0.96
"""Half of what the lowest loses is less than two standard errors."""


def test_near_ones_lie_within_two_standard_errors_of_the_lowest() -> None:
    assert near(LOSSES, STDERRS, BASE) == [1, 2, 3, 4]
    assert near(LOSSES, [0.0] * 6, 1.0) == [1]
    assert near(LOSSES, [9.0, 0.01, 9.0, 9.0, 9.0, 9.0], BASE) == [
        1,
        2,
    ]  # the lowest's own error counts


def test_near_ones_lose_at_most_half_as_much_again() -> None:
    assert near(LOSSES, [0.0] * 6, 0.92) == [1, 2, 3]  # up to 1.04
    assert near(LOSSES, [0.0] * 6, 0.40) == [1, 2, 3, 4]  # would be up to 1.30, but 0.2 nats are the most
    assert near(LOSSES, [0.0] * 6, 0.40, most=0.3) == [1, 2, 3, 4, 0]
    assert near(LOSSES, [0.0] * 6, 1.10) == [1]  # better than the base: nothing is a share of that
    assert preferred(LOSSES, [0.0] * 6, SPEEDS, 0.40)["speed"] == 4


def test_what_will_be_healed_may_lose_a_number_of_nats_more() -> None:
    assert near(LOSSES, [0.0] * 6, 0.92) == [1, 2, 3]
    assert near(LOSSES, [0.0] * 6, 0.92, healed=True) == [1, 2, 3, 4]
    assert near(LOSSES, [0.0] * 6, 0.92, healed=True, most=0.31) == [1, 2, 3, 4, 0]
    assert preferred(LOSSES, [0.0] * 6, SPEEDS, 0.92, healed=True)["speed"] == 4
    assert shortlist(LOSSES, [0.0] * 6, SPEEDS, 0.92, 1, healed=True) == [1]
    assert shortlist(LOSSES, [0.0] * 6, SPEEDS, 0.92, 2, healed=True) == [1, 2, 4]


def test_preferences_by_hand() -> None:
    assert preferred(LOSSES, STDERRS, SPEEDS, BASE) == {"quality": 1, "speed": 4, "balanced": 3}
    # (loss, speed) as shares of the range: (0, 0), (1/3, 0.1), (2/3, 0.8), (1, 1): the third loses 2/3 - 0.8.
    assert preferred([1.0, 1.1], [0.2, 0.2], [5.0, 5.0], BASE) == {"quality": 0, "speed": 0, "balanced": 0}
    assert preferred([1.0, 1.1], [0.2, 0.2], [5.0, 9.0], BASE) == {"quality": 0, "speed": 1, "balanced": 0}
    # One that is slower than the best in loss is no middle of anything.
    assert preferred([1.0, 1.01, 1.1], [0.2] * 3, [5.0, 1.0, 9.0], BASE)["balanced"] == 0


def test_the_shortlist_has_the_best_and_the_fastest_of_the_near_ones() -> None:
    assert shortlist(LOSSES, STDERRS, SPEEDS, BASE, 2) == [1, 2, 4]
    assert shortlist(LOSSES, STDERRS, SPEEDS, BASE, 9) == [1, 2, 3, 4, 0, 5]


def test_what_goes_on_by_each_preference() -> None:
    losses, speeds = [1.20, 1.00, 1.04, 1.05], [400.0, 100.0, 300.0, 200.0]
    assert ordered("quality", losses, speeds, 0.80) == [1, 2, 3, 0]
    assert ordered("speed", losses, speeds, 0.90) == [2, 3, 1, 0]  # near: up to 1.05
    assert ordered("balanced", losses, speeds, 0.90) == [1, 2, 3, 0]  # nothing lies between 1 and 2
    assert ordered("speed", losses, speeds, 0.60) == [2, 3, 1, 0]  # would be up to 1.20; healing leaves 0.06
    assert ordered("balanced", [1.00, 1.01, 1.03, 1.2], [1.0, 9.0, 10.0, 99.0], 0.90)[0] == 1


def test_what_is_faster_and_may_come_near() -> None:
    losses = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
    speeds = [100.0, 103.0, 120.0, 110.0, 124.0, 180.0]
    # 103 is no 5 % faster than 100, 110 is slower than 120 and worse, and 124 is no 5 % faster than 120.
    assert faster(losses, speeds, 0, 3) == [2, 5]
    assert faster(losses, speeds, 0, 1) == [2]
    assert faster(losses, speeds, 5, 3) == []
