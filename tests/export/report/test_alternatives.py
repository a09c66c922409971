"""What the other preferences would have picked, as the terminal and the page say it."""

from __future__ import annotations

from export.report.alternatives import alternatives
from export.report.page import render_html
from export.report.schema import validate_report
from tests.support.report_helpers import HOSTILE, minimal_report

OTHER = {
    "name": "best",
    "prefer": "speed",
    "key": "0123456789abcdef",
    "params": 50_000,
    "quality": 0.951,
    "speedup": 1.4,
    "command": "compressor pick runs/mine --prefer speed, then compressor export runs/mine",
}


def test_the_other_picks_are_named_with_what_makes_them() -> None:
    (line,) = alternatives(validate_report(minimal_report() | {"alternatives": [OTHER]}))
    assert line.startswith("Preferred for speed, best would be another: 50.0 k parameters")
    assert "quality 0.951" in line and "1.40 times" in line and OTHER["command"] in line and "loss" not in line
    (line,) = alternatives(validate_report(minimal_report() | {"alternatives": [OTHER | {"held_out_loss": 1.25}]}))
    assert "held-out loss 1.250" in line
    assert alternatives(validate_report(minimal_report())) == []


def test_the_page_shows_them_escaped() -> None:
    page = render_html(validate_report(minimal_report() | {"alternatives": [OTHER | {"command": HOSTILE}]}))
    assert "Preferred for speed" in page and "<img src=x" not in page
