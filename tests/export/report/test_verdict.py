"""One verdict: what was lost, and whether that is noise, without contradiction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evals.comparison import paired_interval
from export.report.schema import validate_report
from export.report.verdict import told_apart, verdict
from tests.support.report_helpers import minimal_report, score

NO_LOSS, HEAVY = "No loss is larger than the noise", "heavy loss"


def said(data: dict[str, Any]) -> str:
    return " ".join(verdict(validate_report(data)))


def smol(change: bool) -> dict[str, Any]:
    """SmolLM2-135M cut to 0.85 without training, on two tasks of 300 documents: of the documents that the base solves
    it loses some, and gains fewer."""
    data = minimal_report()
    rng = np.random.default_rng(0)
    changes = {}
    best = data["packages"][0]
    data["base"]["tasks"], best["tasks"] = {}, {}
    for task, before, after, chance in (("arc_easy", 0.474, 0.405, 0.25), ("piqa", 0.645, 0.593, 0.5)):
        solved = round(300 * before)
        lost = solved - round(300 * after) + 6
        base, cut = np.zeros(300), np.zeros(300)
        base[:solved] = 1
        cut[lost : solved + 6] = 1
        draws = rng.integers(0, 300, (1000, 300))
        low, high = paired_interval([cut[draws].mean(1)], [base[draws].mean(1)]) or (0.0, 0.0)
        changes[task] = {"value": float(cut.mean() - base.mean()), "low": low, "high": high}
        for row, values in ((data["base"], base), (best, cut)):
            stderr = float(values.std(ddof=1) / 300**0.5)
            row["tasks"][task] = score(float(values.mean()), stderr, chance)
    best["quality"] = validate_report(data).scale.quality(validate_report(data).packages[0].tasks)
    if change:
        best["change"] = {"tasks": changes, "quality": {"value": best["quality"] - 1, "low": -0.5, "high": -0.2}}
    return data


def test_losses_are_told_over_the_same_documents() -> None:
    text = said(smol(change=True))
    assert "It loses more than noise explains on arc_easy (0.473 → 0.407) and piqa (0.647 → 0.593)." in text
    assert HEAVY in text and NO_LOSS not in text


def test_an_earlier_run_contradicts_itself_neither() -> None:
    """Without scores by document the two errors are independent, and none of these losses stands out."""
    text = said(smol(change=False))
    assert "It loses" not in text and NO_LOSS not in text
    assert (HEAVY in text) == ("all tasks together do" in text)


@pytest.mark.parametrize(
    ("task", "quality", "kept", "expected", "heavy"),
    [
        ((-0.03, 0.01), (-0.05, 0.02), 0.97, NO_LOSS, False),
        ((-0.05, -0.01), (-0.10, -0.02), 0.95, "It loses more than noise explains on grammar", False),
        ((-0.03, 0.01), (-0.05, -0.02), 0.97, "all tasks together do", False),
        ((-0.03, 0.01), (-0.30, -0.02), 0.80, "all tasks together do", True),
        ((-0.03, 0.01), (-0.30, 0.02), 0.85, "these documents are too few", False),
        ((-0.05, -0.01), (-0.30, 0.02), 0.85, "It loses more than noise explains on grammar", True),
    ],
)
def test_one_verdict(
    task: tuple[float, float], quality: tuple[float, float], kept: float, expected: str, heavy: bool
) -> None:
    data = minimal_report()
    changes = [{"value": sum(ends) / 2, "low": ends[0], "high": ends[1]} for ends in (task, quality)]
    data["packages"][0] |= {"quality": kept, "change": {"tasks": {"grammar": changes[0]}, "quality": changes[1]}}
    text = said(data)
    statements = [NO_LOSS, "It loses more than noise", "all tasks together do", "these documents are too few"]
    assert [statement for statement in statements if statement in text] == [
        next(s for s in statements if s in expected)
    ]
    assert (HEAVY in text) == heavy


def test_two_numbers_that_differ_are_shown_so() -> None:
    shown = [told_apart(*two) for two in ((0.5, 0.25), (2.9004, 2.9031), (1.0, 1.0))]
    assert shown == ["0.5 → 0.25", "2.9 → 2.903", "1 → 1"]
