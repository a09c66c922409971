"""The front as the report shows it: what is drawn, what the script is told, and what the table lists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import astuple
from typing import Any

import pytest

from export.report.front_view import FrontView, front_view
from export.report.page import render_html
from export.report.plots import Dot, lines, scatter, shades, times_tick
from export.report.plots import Line as Curve
from export.report.schema import validate_report
from supernet.architecture import Architecture
from tests.support import ROOT
from tests.support.report_helpers import BASE, CUT, HOSTILE, THIN, full_report, minimal_report

SCRIPT = ROOT / "export" / "report" / "templates" / "report.js"


def view(data: dict[str, Any]) -> FrontView:
    shown = front_view(validate_report(data))
    assert shown is not None
    return shown


def items_of(told: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(told["columns"], row, strict=True)) for row in told["items"]]


def without_comparison() -> dict[str, Any]:
    return full_report() | {"comparison": []}


def points(*measured: tuple[float, float, float]) -> dict[str, Any]:
    """A report of a search that measured these (share of the parameters, quality, multiple of the base's speed)."""
    data = without_comparison()
    like = data["search"]["points"][0] | {"on_front": False}
    data["search"]["points"] = [
        like
        | {"key": f"{n:016x}", "architecture": THIN.to_dict(), "quality": q}
        | {"params": int(share * 1e6), "decode_tps": 100 * speed}
        for n, (share, q, speed) in enumerate(measured)
    ]
    data["front"] = []
    return data


def test_without_a_search_there_is_no_front() -> None:
    assert front_view(validate_report(minimal_report())) is None
    assert 'id="front-data"' not in render_html(validate_report(minimal_report()))


def test_each_plot_has_the_front_of_its_own_axes() -> None:
    """The second is smaller and worse than the first, the third larger and worse, but faster than both."""
    shown = view(points((0.5, 0.9, 1.1), (0.4, 0.8, 1.0), (0.6, 0.85, 1.5), (0.6, 0.7, 1.2)))

    def on_front(plot: str) -> list[str]:
        return re.findall(r'class="front[^"]*" data-i="(\d+)"', shown.plots[plot])

    assert on_front("params") == ["1", "2"]
    assert on_front("speed") == ["1", "3"]
    assert [number for number, _ in shown.rows] == [2, 1, 3, 0]  # by size; what is on neither front is not listed


def test_the_base_is_in_every_plot_and_picks_have_their_names() -> None:
    shown = view(full_report())
    for plot in shown.plots.values():
        assert plot.count('class="base"') == 1 and ">base</text>" in plot
        assert plot.count('class="chosen"') == 1 and ">best</text>" in plot
        assert (
            re.findall('class="(?:other|ours)" data-i', plot) == ['class="ours" data-i', 'class="other" data-i'][::-1]
        )
        assert "shortgpt</text>" in plot
    assert re.findall("asked for: at most ([0-9.]+ %)", shown.plots["params"]) == ["67 %", "80 %"]  # 50 % lies outside


def test_methods_of_other_documents_make_no_front() -> None:
    """Ours, healed, lies above everything that the search measured at its size, on the documents of the report."""
    data = points((0.67, 0.8, 1.1), (0.5, 0.7, 1.2))
    data["comparison"] = full_report()["comparison"]
    data["comparison"][0]["quality"] = 0.99

    def stairs(plot: str) -> str:
        return re.findall('class="stairs" points="(.*?)"', plot)[0]

    shown = view(data)
    assert stairs(shown.plots["params"]).count(" ") == 4  # three networks with the base, and a corner between each two
    data["comparison"] = []
    assert stairs(view(data).plots["params"]).count(" ") == 4


def test_screened_networks_are_hollow_and_take_no_part_in_the_front() -> None:
    data = points((0.5, 0.9, 1.1), (0.4, 0.95, 1.2))
    data["search"]["points"][1]["full"] = False
    shown = view(data)
    assert re.findall(r'class="screened[^"]*" data-i="(\d+)"', shown.plots["params"]) == ["2"]
    assert [number for number, _ in shown.rows] == [1, 0]


def test_networks_that_do_not_work_leave_room_to_those_that_do() -> None:
    data = points((0.5, 0.9, 1.1), (0.1, 0.2, 5.0), (0.67, 0.95, 1.2))
    data["search"]["points"][2] |= {"key": CUT.key, "architecture": CUT.to_dict()}  # the package is made of it
    shown = view(data)
    assert (shown.below, shown.floor) == (1, pytest.approx(0.70))
    assert 'data-i="2"' not in shown.plots["params"] and 'data-i="2"' not in shown.plots["speed"]
    assert "1 below 70.0 % are not drawn" in render_html(validate_report(data))
    assert 2 in [number for number, _ in shown.rows]  # the table has it


def test_without_speed_there_is_one_plot_without_colours() -> None:
    data = without_comparison()
    for point in [*data["front"], *data["search"]["points"]]:
        point["decode_tps"] = None
    data["search"]["base_decode_tps"] = None
    shown = view(data)
    assert list(shown.plots) == ["params"] and not re.search(r'class="\w+ s\d', shown.plots["params"])
    assert "decode speed</th>" not in render_html(validate_report(data))


def test_the_script_is_told_everything_of_every_network() -> None:
    html = render_html(validate_report(full_report()))
    told = json.loads(re.search('id="front-data">(.*?)</script>', html)[1])  # type: ignore[index]
    told["items"] = items_of(told)

    def layers(item: dict[str, Any]) -> list[list[int]]:
        digits = told["digits"]
        words = [item["layers"][at : at + digits] for at in range(0, len(item["layers"]), digits)]
        return [told["sizes"][int(word, 36)] for word in words]

    assert [item["kind"] for item in told["items"]] == ["base", "chosen", "point", "screened", "ours", "other"]
    for item, sizes in zip(told["items"], (BASE, CUT, BASE, THIN), strict=False):
        assert [tuple(layer) for layer in layers(item)] == [astuple(layer) for layer in sizes.layers]
    best = told["items"][1]
    assert best["key"] == CUT.key and best["params"] == [670_000, "670 k"]
    assert best["speed"] == "1.40\N{MULTIPLICATION SIGN}, 140 tokens/s"
    assert dict(zip(told["tasks"], best["tasks"], strict=True))["grammar"] == "0.810 ± 0.010"
    assert "packaged with quality 88.9 % on the report split" in best["about"]
    assert told["items"][3]["further"] == [0.25] and told["further"] == ["kl_to_base"]
    numbers = {int(number) for number in re.findall(r'data-i="(\d+)"', html)}
    assert numbers == set(range(len(told["items"])))


def test_many_different_layers_need_more_digits() -> None:
    data = without_comparison()
    like = data["search"]["points"][0]
    sizes = [BASE.to_dict() for _ in range(40)]
    for n, each in enumerate(sizes):
        each["layers"][0]["intermediate_size"] = n + 1
    data["search"]["points"] = [
        like | {"key": Architecture.from_dict(each).key, "architecture": each}
        for each in sizes  # type: ignore[arg-type]
    ]
    told = view(data).data
    assert told["digits"] == 2 and len(told["sizes"]) > 36
    assert [told["sizes"][int(item["layers"][:2], 36)][2] for item in items_of(told)[1:]] == list(range(1, 41))


def test_hostile_names_cannot_leave_the_data() -> None:
    data = full_report()
    data["search"]["points"][0]["further"] = {HOSTILE: 1.0}
    html = render_html(validate_report(data))
    told = re.search('id="front-data">(.*?)</script>', html)
    assert told and HOSTILE in json.loads(told[1])["further"]
    assert "<img" not in html


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_is_one() -> None:
    checked = subprocess.run(["node", "--check", str(SCRIPT)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_the_script_sets_text_as_text_only() -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", SCRIPT.read_text())


def test_shades_are_not_taken_by_a_few_far_values() -> None:
    values = [1 + 0.01 * n for n in range(100)] + [50.0]
    colours, ramp = shades(values, "speed", times_tick)
    assert ramp is not None and ramp.high.startswith("≥") and ramp.low.startswith("≤")
    assert {colours.count(shade) > 5 for shade in range(1, 8)} == {True}
    assert shades([2.0, 2.0, None], "speed", times_tick) == ([None, None, None], None)
    assert shades([], "speed", times_tick) == ([], None)


def test_labels_do_not_cover_one_another() -> None:
    dots = [Dot(0.5 + 0.001 * n, 0.9, kind="other", label=f"method-{n}") for n in range(5)]
    plot = scatter([*dots, Dot(1.0, 1.0, kind="base", label="base")], "size", "quality", less_is_better=True)
    places = re.findall(r'<text class="label" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([\w-]+)</text>', plot)
    boxes = []
    for x, y, anchor, text in places:
        width = 7 * len(text)
        left = float(x) - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        boxes.append((left, float(y) - 9, left + width, float(y)))
    assert len(boxes) >= 4 and all(left >= 0 and right <= 400 for left, _, right, _ in boxes)
    assert not [
        (a, b)
        for n, a in enumerate(boxes)
        for b in boxes[:n]
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    ]


def test_one_place_on_an_axis_is_not_drawn() -> None:
    assert scatter([Dot(1.0, 0.5), Dot(1.0, 0.9)], "size", "quality", less_is_better=True) == ""
    assert lines([Curve("one", [(3, 0.5)])], "generation", "tau") == ""
    assert "<svg" in lines([Curve("one", [(3, 0.5), (4, 0.6)])], "generation", "tau")
