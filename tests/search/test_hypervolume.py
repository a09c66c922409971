"""Expected hypervolume improvement: exact where nothing is uncertain, and batches that do not crowd."""

from __future__ import annotations

import numpy as np
import pytest

from search.algorithms.hypervolume import most_improving, open_points
from search.pareto import hypervolume

FRONT = np.array([[0.0, 1.0], [0.4, 0.5], [1.0, 0.0], [1.0, 1.0]])


@pytest.mark.parametrize("candidate", [(0.2, 0.4), (0.1, 0.1), (0.5, 0.2), (0.35, 0.55), (0.7, 0.7)])
def test_what_is_certain_adds_its_hypervolume(candidate: tuple[float, float]) -> None:
    """The last one is dominated, and adds nothing."""
    points, volume = open_points(FRONT, np.zeros(2), seed=0)
    added = float((np.array(candidate) <= points).all(axis=1).sum() * volume)
    reference = [1.05, 1.05]
    exact = hypervolume(np.vstack([FRONT, candidate]), reference) - hypervolume(FRONT, reference)
    assert added == pytest.approx(exact, abs=0.01)


def test_three_objectives() -> None:
    measured = np.array([[0.0, 1, 1], [1, 0, 1], [1, 1, 0]])
    points, volume = open_points(measured, np.zeros(3), seed=1)
    added = float((np.full(3, 0.5) <= points).all(axis=1).sum() * volume)
    exact = hypervolume(np.vstack([measured, [[0.5] * 3]]), [1.05] * 3) - hypervolume(measured, [1.05] * 3)
    assert added == pytest.approx(exact, abs=0.02)


def test_a_batch_counts_what_its_members_share_once() -> None:
    """Of two that dominate the same three points, only one is taken; what is uncertain adds less."""
    dominates = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0.9, 0.9], [0, 0, 0, 0, 1.0]])
    assert most_improving(dominates, 3) == [0, 2, 3]  # adds 3, then 1.8, then 0.1 of what is left
    assert most_improving(dominates, 9) == [0, 2, 3, 1]
