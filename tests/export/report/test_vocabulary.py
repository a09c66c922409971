"""What the report says of a vocabulary that was cut."""

from __future__ import annotations

import pytest

from export.report.schema import validate_report
from export.report.verdict import verdict
from export.report.vocabulary import decode_ratio, text_speed, vocabulary_notes
from tests.support.report_helpers import card_of, minimal_report, speed


def test_a_cut_vocabulary_is_told_and_speed_is_one_of_text() -> None:
    data = minimal_report()
    record = {"rows": 640, "base_rows": 1000, "coverage": 0.999, "tasks_coverage": 0.98}
    data["packages"][0]["vocabulary"] = record | {"bytes_per_token": 4.0, "base_bytes_per_token": 5.0}
    data["base"]["bytes_per_token"] = 5.0
    for row, tps in ((data["base"], 100.0), (data["packages"][0], 150.0)):
        row["speed"] = speed(tps)
    report = validate_report(data)
    package = report.packages[0]
    assert [text_speed(row, report.base) for row in (report.base, package)] == [500.0, 600.0]
    in_few_bits = package.model_copy(update={"vocabulary": None})  # of the untouched base
    assert text_speed(in_few_bits, report.base) == 750.0
    assert decode_ratio(package, report.base) == pytest.approx(1.2)
    told = " ".join(vocabulary_notes(report))
    assert "640 of 1,000 tokens" in told and "tiny 500, best 600" in told
    assert any("generates text 1.20 times as fast" in sentence for sentence in verdict(report))
    assert "640 of 1,000 tokens" in str(card_of(data))


def test_nothing_is_told_where_all_tokens_stay() -> None:
    data = minimal_report()
    for row, tps in ((data["base"], 100.0), (data["packages"][0], 150.0)):
        row["speed"] = speed(tps)
    report = validate_report(data)
    assert vocabulary_notes(report) == []
    assert text_speed(report.base, report.base) is None
    assert decode_ratio(report.packages[0], report.base) == pytest.approx(1.5)
