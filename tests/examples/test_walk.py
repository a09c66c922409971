"""The pictures of the walk through one run: what they show, and that they load nothing."""

from __future__ import annotations

import re
from xml.dom.minidom import parseString

import pytest

from examples.walk import FIGURES, figure, stages, style, terminal
from export.report.page import render_html
from export.report.schema import validate_report
from tests.support.report_helpers import full_report


def test_a_terminal_shows_the_command_and_what_it_printed() -> None:
    picture = terminal("compressor inspect x", "\x1b[31mfirst\x1b[0m line\n<second> & last\n")
    text = " ".join(node.data for tag in parseString(picture).getElementsByTagName("text") for node in tag.childNodes)
    assert "$\N{NO-BREAK SPACE}compressor" in text and "first" in text and "<second>" in text
    assert "font-face" not in picture and not re.search("url\\(.?http", picture)


def test_figures_of_a_report_stand_alone() -> None:
    page = render_html(validate_report(full_report()))
    for name in FIGURES:
        svg = parseString(figure(page, name)).documentElement
        assert svg.tagName == "svg" and svg.getAttribute("viewBox").startswith("0 0 400")
        used = {word for tag in svg.getElementsByTagName("*") for word in tag.getAttribute("class").split()}
        assert used - {word for word in used if f".{word}" in style()} <= {"panel"}
    with pytest.raises(KeyError, match="no figure front-depth"):
        figure(page, "front-depth")


def test_both_colour_schemes_define_what_is_used() -> None:
    light, dark = style().split("@media (prefers-color-scheme: dark)")
    used = set(re.findall(r"var\((--\w+)\)", style()))
    assert used and all(f"{name}:" in light and f"{name}:" in dark for name in used)


def test_of_the_demo_only_its_stages_are_told() -> None:
    output = "\n".join(
        [
            "measuring how fast",
            "[2 of 11] ordering; about 3 min left",
            "fine-tuning ... about 3 min 0 s left of the run",
            "fine-tuning: after 2 of 34 steps held-out loss 1.1",
            "",
            "fine-tuning: 34 of 34 in 28 s",
            "       world_  world_",
            "base",
        ]
    )
    assert stages(output) == "[2 of 11] ordering; about 3 min left\nfine-tuning: 34 of 34 in 28 s"
