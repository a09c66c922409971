"""Whether pruning gained anything, in words."""

from __future__ import annotations

import copy
from typing import Any

from export.report.card import render_card
from export.report.quantized_base import better_base, quantized_base_sentences
from export.report.schema import Report, validate_report
from export.report.table import measured_in, notes, terminal_table
from export.report.verdict import verdict
from tests.support.report_helpers import full_report


def with_base(**values: Any) -> Report:
    """The full report, and the base in INT4 with these values."""
    data = full_report()
    int4 = copy.deepcopy(data["packages"][2])
    int4 |= {"name": "base-int4", "path": "packages/base-int4", "architecture": data["base"]["architecture"]}
    int4 |= {"params": data["base"]["params"], "bytes": 800_000, "quality": 0.97, "held_out_loss": 1.0}
    data["quantized_base"] = [int4 | values]
    for package in data["packages"]:
        package["held_out_loss"] = 1.2
    return validate_report(data)


def test_a_base_in_few_bits_that_is_better_at_equal_bytes_is_named() -> None:
    report = with_base()
    beaten = {package.name for package in report.packages if better_base(report, package)}
    assert beaten == {"best", "best-int8"}  # best-int4 has 600,000 bytes, less than the base in INT4
    sentences = quantized_base_sentences(report)
    assert len(sentences) == 2 and verdict(report)[-2:] == sentences
    assert sentences[1] == (
        "The base INT4 takes 800 kB on disk, no more than compressed INT8 (900 kB), and keeps 97.0 % of the quality "
        "instead of 88.9 %: at these bytes, pruning gained nothing."
    )


def test_a_package_that_no_base_beats_is_not_blamed() -> None:
    for values in ({"quality": 0.5}, {"bytes": 3_000_000}, {"held_out_loss": 1.5}):
        report = with_base(**values)
        assert quantized_base_sentences(report) == [
            "No package is beaten by the base itself in few bits at equal bytes."
        ]
    assert quantized_base_sentences(validate_report(full_report())) == []


def test_a_star_of_the_base_has_its_note_where_no_package_is_quantized() -> None:
    report = with_base()
    unquantized = report.model_copy(update={"packages": report.packages[:1]})
    (base,) = unquantized.quantized_base
    assert measured_in(base).endswith("*") and not measured_in(unquantized.packages[0]).endswith("*")
    assert any(note.startswith("* ") for note in notes(unquantized))


def test_it_is_a_row_of_every_table() -> None:
    report = with_base()
    assert [row.name for row in report.rows][1] == "base-int4"
    assert terminal_table(report).row_count == len(report.rows) == 5
    assert "| base INT4 |" in render_card(report, "best")
