"""The report: its schema, what is said about the numbers, the table, and the page."""

from __future__ import annotations

import io
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from export.report.page import render_html, write_report
from export.report.schema import validate_report
from export.report.table import footnotes, terminal_table
from export.report.verdict import change, verdict
from search.scores import Score
from supernet.architecture import Architecture, LayerSizes
from tests.support.report_helpers import HOSTILE, full_report, minimal_report, score, speed


class Page(HTMLParser):
    """Fails on a tag that is not closed, or closed out of order; remembers the text and what the page refers to."""

    VOID = frozenset({"meta", "wbr", "br", "img", "link", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.references: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def terminal(data: dict[str, Any], width: int = 200) -> str:
    """What a terminal shows of a report."""
    report = validate_report(data)
    console = Console(width=width, record=True, file=io.StringIO())
    for part in (terminal_table(report), *footnotes(report)):
        console.print(part)
    return console.export_text()


def verdict_of(data: dict[str, Any]) -> str:
    return " ".join(verdict(validate_report(data)))


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (("base", "params"), "base.params is missing"),
        (("packages", 0, "verified"), "packages[0].verified is missing"),
        (("packages", 0, "tasks", "grammar", "n"), "packages[0].tasks.grammar.n is missing"),
        (("versions",), "versions is missing"),
    ],
)
def test_a_missing_key_is_named_in_one_line(path: tuple[Any, ...], named: str) -> None:
    data = inner = minimal_report()
    for part in path[:-1]:
        inner = inner[part]
    del inner[path[-1]]
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        validate_report(data)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_is_named_with_the_nearest() -> None:
    data = minimal_report()
    data["packages"][0]["sped"] = 1
    with pytest.raises(ValueError, match=r"packages\[0\]\.sped is an unknown key; did you mean .*speed"):
        validate_report(data)


def test_a_report_of_the_earlier_definition_of_quality_is_not_misread() -> None:
    data = minimal_report() | {"schema": 1}
    with pytest.raises(ValueError, match=r"schema is wrong: 1 is of another version, .* compressor report RUN"):
        validate_report(data)


def test_what_is_no_number_or_no_architecture_is_refused() -> None:
    data = minimal_report()
    data["base"]["tasks"]["grammar"]["value"] = float("nan")
    with pytest.raises(ValueError, match="the score of grammar is not finite"):
        validate_report(data)
    data = minimal_report()
    data["packages"][0]["architecture"]["layers"][0]["num_attention_heads"] = 3
    with pytest.raises(ValueError, match=r"packages\[0\]\.architecture is wrong: not an architecture"):
        validate_report(data)


def test_a_package_without_a_finite_score_still_has_a_report() -> None:
    """The perplexity of a network that is wrecked, say: the whole job would have no report for it."""
    data = minimal_report()
    data["packages"][0]["tasks"]["grammar"]["value"] = float("inf")
    report = validate_report(data)
    assert "grammar" not in report.packages[0].tasks and render_html(report)
    assert any("has no finite score on grammar" in sentence for sentence in verdict(report))


def test_what_a_search_could_not_measure_is_left_out() -> None:
    data = full_report()
    data["search"]["points"][2]["tasks"]["coin"]["value"] = float("inf")
    data["search"]["generations"][1]["predictor"] |= {"kendall": float("nan"), "mae": float("nan")}
    search = validate_report(data).search
    assert search is not None and search.generations[1].predictor is not None
    assert list(search.points[2].tasks) == ["grammar"]
    assert (search.generations[1].predictor.kendall, search.generations[1].predictor.spearman) == (None, 0.6)
    Page(render_html(validate_report(data)))


def test_report_json_holds_what_was_given(tmp_path: Path) -> None:
    data = full_report()
    page = write_report(validate_report(data), tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert validate_report(written) == validate_report(data)
    assert data["packages"][1]["speed"].items() <= written["packages"][1]["speed"].items()
    assert written["schema"] == 2
    assert page.read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(validate_report(minimal_report()), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_report(validate_report(full_report()), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("value", "stderr", "chance", "higher", "stamp"),
    [
        (0.51, 0.02, 0.5, True, "near chance"),
        (0.54, 0.02, 0.5, True, "near chance"),
        (0.46, 0.02, 0.5, True, "near chance"),
        (0.55, 0.02, 0.5, True, ""),
        (0.40, 0.02, 0.5, True, "below chance"),
        (0.0, 0.0, 0.0, True, "near chance"),
        (0.51, None, 0.5, True, ""),
        (0.51, 0.02, None, True, ""),
        (7.9, 0.1, 8.0, False, "near chance"),
        (7.0, 0.1, 8.0, False, ""),
    ],
)
def test_stamp(value: float, stderr: float | None, chance: float | None, higher: bool, stamp: str) -> None:
    assert Score.model_validate(score(value, stderr, chance, higher_is_better=higher)).stamp == stamp


def test_a_change_is_real_beyond_two_standard_errors_of_the_difference() -> None:
    base = Score.model_validate(score(0.90, 0.03))
    assert change(base, Score.model_validate(score(0.81, 0.04))).meaning == "unclear"  # errors add up to 0.05
    assert change(base, Score.model_validate(score(0.79, 0.04))).meaning == "worse"
    assert change(base, Score.model_validate(score(0.99, None))).meaning == "unknown"
    eight, seven = (
        Score.model_validate(score(value, 0.1, None, metric="perplexity", higher_is_better=False)) for value in (8, 7)
    )
    assert (change(eight, seven).text, change(eight, seven).meaning) == ("+1.000", "better")


def test_verdict_says_what_was_lost() -> None:
    said = " ".join(verdict(validate_report(full_report())))
    assert "67.0 % of the parameters of tiny (670 k of 1.00 M)" in said
    assert "takes 2.68 MB on disk instead of 4.00 MB" in said
    assert "generates tokens 1.40 times as fast (transformers, cpu, 1 thread, float32)" in said
    assert said.count("It loses more than noise explains on grammar (0.9 → 0.8).") == 1
    assert "It is not known how much of the loss is noise on words (1.5 → 1.6)." in said
    assert "measured by 2 tasks" in said  # those that count
    assert "Compressed INT4 takes 600 kB on disk (15.0 % of the base)" in said
    assert "Quantization loses" not in said
    assert "Quality does not count coin: the base is not above chance there by two standard errors." in said
    data = minimal_report()
    data["packages"][0] |= {"tasks": {"grammar": score(0.89, 0.01)}, "quality": 0.989}
    assert "No loss is larger than the noise of measuring" in verdict_of(data)
    data["packages"][0] |= {"tasks": {"grammar": score(0.51, 0.01)}, "quality": 0.57}
    said = verdict_of(data)
    assert "fallen to chance on grammar, which the base solves" in said and "heavy loss" in said
    data["packages"].append(data["packages"][0] | {"name": "best-int8", "quantization": "int8"})
    said = verdict_of(data)  # quantization lost nothing more
    assert said.count("fallen to chance") == said.count("heavy loss") == 1
    data["packages"][0] |= {"tasks": {"grammar": score(0.89, 0.01)}, "quality": 0.989}
    said = verdict_of(data)
    assert "on grammar, which the unquantized network solves" in said and said.count("heavy loss") == 1
    assert "Quantization loses more than noise explains on grammar (0.89 → 0.51)." in said
    data["packages"] = []
    assert verdict(validate_report(data)) == ["No package of tiny has been written yet."]


def test_verdict_says_what_tasks_do_not_show() -> None:
    data = minimal_report()
    assert "not trained on" not in verdict_of(data)
    data["base"]["held_out_loss"] = 1.5
    data["packages"][0]["held_out_loss"] = 1.62
    said = verdict_of(data)
    assert "its loss is 1.62 nats per token, the base's 1.5." in said and "half the probability" not in said
    data["packages"][0]["held_out_loss"] = 19.3
    assert "less than half the probability that the base gives it" in verdict_of(data)


def test_a_speed_measured_elsewhere_is_not_compared() -> None:
    data = full_report()
    data["packages"] = data["packages"][:1]
    data["packages"][0]["speed"] = speed(900.0, "llama.cpp")
    assert "fast" not in verdict_of(data)


def test_what_was_timed_at_other_work_is_named() -> None:
    data = full_report()
    data["packages"][1]["speed"] |= {"prompt": 24, "new": 24}
    line = next(note for note in footnotes(validate_report(data)) if note.startswith("Speed at"))
    others = "; of compressed INT8 at batch 1, prompt of 24, 24 new tokens."
    assert line == f"Speed at batch 1, prompt of 128, 128 new tokens{others}"


def test_terminal_rows() -> None:
    shown = terminal(full_report())
    lines = shown.splitlines()
    labels = ["base ", "compressed ", "compressed INT8", "compressed INT4"]
    first = [next(n for n, line in enumerate(lines) if line.strip().startswith(label)) for label in labels]
    assert first == sorted(first)
    values = [lines[n].split("  ") for n in first]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in values]
    assert cells == [
        ["base", "1.00 M", "4.00 MB", "0.900", "0.510", "1.500", "1,000 ¹", "100 ¹"],
        ["compressed", "670 k", "2.68 MB", "0.800", "0.480", "1.600", "1,400 ¹", "140 ¹"],
        ["compressed INT8", "670 k", "900 kB", "0.800", "0.480", "1.600", "1,390 ²", "139 ²"],
        ["compressed INT4", "670 k", "600 kB", "0.800", "0.480", "1.600", "1,390 ²", "139 ²"],
    ]
    below = lines[first[-1] + 1].split("  ")
    assert [cell.strip() for cell in below if cell.strip()] == ["67.0 %", "15.0 %", "± 0.010", "± 0.025"]
    assert shown.count("near chance") == 5  # four rows and the note
    assert "¹ transformers, cpu, 1 thread, float32\n" in re.sub(" +\n", "\n", shown)
    assert "² transformers (decompressed at load), cpu, 1 thread, float32 *" in shown
    assert "* Transformers unpacks compressed-tensors" in shown
    assert "byte ↓" in shown


def test_terminal_table_fits_80_columns() -> None:
    data = full_report()
    for row in [data["base"], *data["packages"]]:
        row["tasks"] = {f"world_{name}": score(0.9, 0.012) for name in ("grammar", "facts", "context", "sums")}
    shown = terminal(data, 80)
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    assert shown.count("± 0.012") == 16


def test_minimal_report_renders() -> None:
    page = Page(render_html(validate_report(minimal_report())))
    headings = {"Pareto front", "Samples", "Search", "Fine-tuning", "Comparison with other methods", "Fingerprints"}
    assert not [heading for heading in headings if heading in page.text]
    assert "not measured" in page.text
    assert page.tags.count("svg") == 1  # the architecture
    assert "transformers" not in terminal(minimal_report())


def test_full_page() -> None:
    html = render_html(validate_report(full_report()))
    page = Page(html)
    assert page.references == []
    outside = html.replace('"http://www.w3.org/2000/svg"', "")  # a name, which nothing loads
    assert not re.search(r"https?:|url\(|@import|<link|<iframe|import\(|fetch\(", outside)
    figures = re.findall('<figure data-name="([a-z0-9A-Z-]+)"><svg', html)
    assert figures == [
        *("front-size", "front-speed", "architecture-1", "compared-size", "compared-speed"),
        # what only research asks for stands last
        *("hypervolume", "training", "predictor", "predictor-error", "front-FFN-width", "front-KV-heads"),
    ]
    headings = re.findall("<h2>(.*?)</h2>", html)
    assert headings.index("How it went") == len(headings) - 1
    assert page.text.count("near chance") >= 5  # four rows and a baseline
    assert "set aside in generation 2" in page.text
    assert "model.layers.1.mlp.down_proj per-channel INT8" in page.text and "8.25 bits/weight" in page.text
    assert "layer 1: 1 of 2 KV heads (2 of 4 query heads), FFN width 128 of 256" in page.text
    assert "layer 2: removed" in page.text
    common = html.split("What the front has in common")[1]
    assert ">64</text>" in common  # declared, though the front does not use it
    assert "layer 1: 128 in 1 of 2" in page.text
    assert "fingerprints" in page.text and "model: model.safetensors" in page.text


def test_what_a_package_does_not_have_is_not_called_unchecked() -> None:
    data = full_report()
    for package in data["packages"]:
        package["verified"]["quantization"] = None if package["quantization"] is None else {"scheme": "int8"}
        package["verified"]["task_scores_equal"] = None
    text = Page(render_html(validate_report(data))).text
    proofs = text.split("Verification")[1].split("How to reproduce")[0]
    assert "quantization not checked" not in proofs and proofs.count("quantization: scheme int8") == 2
    assert proofs.count("task scores equal not checked") == 3


def test_one_value_is_no_plot() -> None:
    data = full_report()
    data["search"]["generations"] = data["search"]["generations"][:2]  # one with a predictor
    data["finetune"]["curve"] = data["finetune"]["curve"][:1]
    html = render_html(validate_report(data))
    assert 'data-name="hypervolume"' in html
    assert not re.search('data-name="(predictor|predictor-error|training)"', html)


def test_samples_that_are_alike_are_shown_once() -> None:
    text = Page(render_html(validate_report(full_report()))).text
    assert text.count("base one day best one dog best-int4 one") == 3
    data = full_report()
    data["samples"][0]["continuations"] = {"base": "one day", "best": " one day\n", "best-int4": "two"}
    assert "base, best one day best-int4 two" in Page(render_html(validate_report(data))).text


def test_hostile_text_is_escaped() -> None:
    def poison(data: Any) -> Any:
        if isinstance(data, dict):
            return {key: poison(value) for key, value in data.items()}
        if isinstance(data, list):
            return [poison(value) for value in data]
        return data + HOSTILE if isinstance(data, str) and data not in keep else data

    keep = {"uneven", "int8", "int4", "report", "search"}
    data = poison(full_report())
    for row in [data["base"], *data["packages"]]:
        row["tasks"][HOSTILE] = row["tasks"].pop("coin")
    page = Page(render_html(validate_report(data)))
    assert "img" not in page.tags and page.tags.count("script") == 2  # the data and the code
    assert page.text.count("""<img src=x onerror="alert('1')">&amp;""") > 20


@pytest.mark.parametrize(("depth", "measured"), [(32, 600), (80, 1500)])
def test_a_long_run_of_a_deep_model_stays_under_a_megabyte(depth: int, measured: int) -> None:
    rng = random.Random(0)

    def sizes(layer: int) -> LayerSizes:
        groups = rng.randint(layer % 2, 8)
        return LayerSizes(8 * groups, groups, 512 * rng.randint(0, 56))

    data = full_report()
    data["base"]["architecture"] = Architecture(8192, (LayerSizes(64, 8, 28672),) * depth).to_dict()
    data["search"]["points"] = []
    for n in range(measured):
        sub = Architecture(8192, tuple(sizes(layer) for layer in range(depth)))
        point = data["front"][0] | {"key": sub.key, "architecture": sub.to_dict(), "quality": 1 - n / 3000}
        data["search"]["points"].append(point | {"generation": 0, "on_front": n % 20 == 0})
    best = data["search"]["points"][::20]
    data["front"] = [data["front"][0] | {key: point[key] for key in ("key", "architecture")} for point in best]
    for package in data["packages"]:
        package["architecture"] = data["front"][0]["architecture"]
    html = render_html(validate_report(data))
    assert len(html.encode()) < 1_000_000
    data = json.loads(re.search('id="front-data">(.*?)</script>', html)[1])  # type: ignore[index]
    assert len(data["items"]) == measured + 3  # the base, and two of the comparison
    words = [row[data["columns"].index("layers")] for row in data["items"]]
    assert [len(word) for word in words if word] == [depth * data["digits"]] * (measured + 1)


def test_the_sizes_of_an_elastic_package_are_listed() -> None:
    report = full_report()
    packages = list(report["packages"])
    small = {"name": "0.50", "architecture": packages[0]["architecture"], "params": 1_500_000}
    measured = small | {"name": "0.67", "quality": 0.912, "quality_stderr": 0.02, "report_quality": 0.9}
    packages[0] = packages[0] | {"layout": "elastic", "sizes": [measured, small], "default_size": "0.67"}
    page = Page(render_html(validate_report(report | {"packages": packages})))
    assert f"Sizes of {packages[0]['name']}" in page.text
    rows = " ".join(page.text.split())
    assert re.search(r"0\.67 1\.50 M 91\.2 ?% ± 2\.0 90\.0 ?% . .", rows), rows[:3000]
    assert re.search(r"0\.50 1\.50 M . . . .", rows)
    assert "Sizes of" not in Page(render_html(validate_report(full_report()))).text
