"""The benchmarks: every one can be imported and shows its help, and the small things that they compute hold."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import Measurements, make_parser, mean_spread, median_range
from tests.support import ROOT, tiny, tiny_tokenizers
from tests.support.report_helpers import full_report, minimal_report, score

SHARED = {"auto_scheme", "common", "jobs"}
"""Modules without a command, which benchmarks use."""
COMMANDS = [[file.stem] for file in sorted((ROOT / "benchmarks").glob("*.py")) if file.stem not in SHARED]
PARTS = [["search", part] for part in ("space", "fine", "starts", "ranks", "overhead")]


def call(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    """`python -m benchmarks.NAME ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", [f"benchmarks.{name}", *arguments])
    importlib.import_module(f"benchmarks.{name}").main()


@pytest.mark.parametrize("command", [*COMMANDS, *PARTS], ids=" ".join)
def test_help(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, *command, "--help")
    assert end.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_docstrings_name_their_command() -> None:
    for (name,) in COMMANDS:
        assert f"python -m benchmarks.{name}" in str(importlib.import_module(f"benchmarks.{name}").__doc__)


def test_an_option_of_another_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "search", "overhead", "--plot", "curve.svg")
    assert end.value.code == 2


def test_a_default_decides_the_type_of_an_option() -> None:
    parser = make_parser("What it measures.", "data", count=(3, "help"), share=0.5, names=["a"], fast=False)
    defaults = vars(parser.parse_args([]))
    assert defaults == {"data": None, "count": 3, "share": 0.5, "names": ["a"], "fast": False}
    words = ["--data", "x", "--count", "4", "--share", "1", "--names", "b", "c", "--fast"]
    chosen = vars(parser.parse_args(words))
    assert chosen == {"data": "x", "count": 4, "share": 1.0, "names": ["b", "c"], "fast": True}


def test_spreads() -> None:
    assert mean_spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000"
    assert mean_spread([0.01, 0.03], "+.1%") == "+2.0% ± 1.4%"
    assert mean_spread([1.5], ".1f") == "1.5"
    assert median_range([3.0, 1.0, 2.0], ".0f") == "2 (1 to 3)"


def test_a_seed_that_never_gets_there_counts_as_infinitely_many_evaluations() -> None:
    search = importlib.import_module("benchmarks.search")
    curve = [(1, 0.5), (2.25, 0.96), (3, 0.97)]
    assert [search.first_at(curve, level) for level in (0.9, 0.95, 0.99)] == [2.25, 2.25, math.inf]
    assert search.reached_cell([5, 3, 4]) == "4 (3 to 5)"
    assert search.reached_cell([5, math.inf, 4]) == "5 (4 to never (1 of 3))"
    assert search.reached_cell([math.inf, math.inf, 4]) == "never (4 to never (2 of 3))"
    assert search.reached_cell([math.inf]) == "never"


def test_what_was_measured_is_kept_and_not_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    for value in (1, 2):
        measurements = Measurements(file, minutes=1)
        results = measurements.by_settings.setdefault("two threads", {})
        measurements.measure(results, "a", lambda value=value: value)  # type: ignore[misc]
        assert results == {"a": 1}
    late = Measurements(file, minutes=-1)
    late.measure(late.by_settings["two threads"], "b", lambda: 3)
    assert late.by_settings == json.loads(file.read_text()) == {"two threads": {"a": 1}}


def test_cells_without_a_number_are_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = minimal_report()
    report["packages"][0]["tasks"]["sums"] = score(0.5, None)
    (tmp_path / "report.json").write_text(json.dumps(report))
    call(monkeypatch, "report_table", str(tmp_path))
    *_, base, best = capsys.readouterr().out.splitlines()
    assert base == "| base | 1,000,000 (1.000) | 4,000,000 (1.000) | 0.900 ± 0.010 |  | 1.000 |  |  |"
    assert best == "| best | 670,000 (0.670) | 2,680,000 (0.670) | 0.800 ± 0.010 | 0.500 | 0.889 |  |  |"


def test_methods_stand_below_the_packages_of_a_run_that_was_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.json").write_text(json.dumps(full_report()))
    call(monkeypatch, "report_table", str(tmp_path))
    *_, sentence, _, header, rule, ours, other = capsys.readouterr().out.splitlines()
    assert sentence.startswith("At 0.67 ours is best")
    assert header.startswith("| method | seeds | parameters |") and header.count("|") == rule.count("|")
    assert ours.startswith("| **ours** | 1 | 672,000 |  | 0.850 ± 0.010 |  |") and ours.endswith("| 1.20 |")
    assert other.startswith("| shortgpt | 1 | 672,000 |  | 0.800 ± 0.010 | +5.0 (+3.0, +7.0) * |")


def test_markers_are_no_bytes() -> None:
    bits_per_byte = importlib.import_module("benchmarks.quantization").bits_per_byte
    vocabulary = 256

    def knows_nothing(ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*ids.shape, vocabulary + 3)

    tokenizer: Any = tiny.byte_tokenizer()
    texts = ["<s>" + "a" * 7, "<s>" + "b" * 7]  # two windows of eight tokens; of each, the first is not predicted
    assert bits_per_byte(knows_nothing, 8, tokenizer, texts) == pytest.approx(math.log2(vocabulary + 3))
    texts = ["aaaa<s>aaa"]  # one window: seven tokens are predicted, of which six stand for bytes
    assert bits_per_byte(knows_nothing, 8, tokenizer, texts) == pytest.approx(7 / 6 * math.log2(vocabulary + 3))
    read: list[int] = []

    def counting(ids: torch.Tensor) -> torch.Tensor:
        read.append(ids.shape[1])
        return knows_nothing(ids)

    bits_per_byte(counting, 8, tokenizer, ["aaa", "b" * 13])  # no text is the context of another
    assert read == [3, 8, 5]


def test_the_speed_of_writing_is_a_row_for_each_number_of_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, "generated", "--rows", "1", "2", "--length", "16")
    header, rule, one, two = capsys.readouterr().out.splitlines()
    assert header.count("|") == rule.count("|") == two.count("|")
    assert one.startswith("| 1 |") and two.startswith("| 2 |")


def test_peak_memory_is_that_of_the_process_alone() -> None:
    code = "from benchmarks.common import resident; print(resident('VmHWM'))"
    held = bytearray(b"x") * 2**28
    peak = int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout)
    assert 0 < peak < len(held)


def test_safe_training_has_a_row_for_every_checkpoint_and_number_of_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(tiny.checkpoint(tmp_path / name, seed)) for seed, name in enumerate(("a", "b"))]
    data = str(tiny.data(tmp_path / "d.jsonl", 400))
    options = ["--tokens", "1000", "2000", "--data", data, "--heal", "--rate-factor", "0.5"]
    call(monkeypatch, "safe_training", "--checkpoints", *names, *options)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[name, tokens] for name in "ab" for tokens in ("1,000", "2,000")]
    for row in rows:
        assert len(row) == 14 and all("\N{RIGHTWARDS ARROW}" in row[cell] for cell in (4, 5, 6, 12))


def test_a_vocabulary_has_a_row_for_each_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    tokenizer = tiny_tokenizers.fast(tiny_tokenizers.KINDS["byte-level"]())
    tiny.checkpoint(folder, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=3)
    tokenizer.save_pretrained(folder)
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_tokenizers.texts(1600, 5, odd=0.02)))
    options = ["--checkpoint", str(folder), "--data", str(data)]
    call(monkeypatch, "vocabulary", *options, "--sizes", "1", "0.8", "--documents", "3")
    header, rule, whole, cut = capsys.readouterr().out.splitlines()[-4:]
    assert header.count("|") == rule.count("|") == cut.count("|")
    assert whole.startswith(f"| 1 | {len(tokenizer)} |") and cut.startswith("| 0.8 | 384 |")
    call(monkeypatch, "vocabulary", *options, "--priors", "0", "1", "--sizes", "0.8")
    *_, least, most = capsys.readouterr().out.splitlines()
    assert least.startswith("| 0 | ") and most.startswith("| 1 | ")


def test_methods_are_made_once_and_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of ours and a baseline in a worker process; a second call makes only what is missing."""
    model, tasks = tiny.checkpoint(tmp_path / "model"), tiny.task(tmp_path / "tasks", documents=40, solved=True)
    scored = ["--checkpoint", str(model), "--include-path", str(tasks), "--tasks", "tiny_choice", "--bits", ""]
    budgets = ["--sizes", "0.85", "--heal-tokens", "512", "--evaluations", "8", "--limit", "8", "--batch", "2"]
    made = ["make", str(tmp_path / "made"), *scored, *budgets, "--data", str(tiny.data(tmp_path / "text.jsonl", 200))]
    call(monkeypatch, "methods", *made, "--methods", "base,ours,flap")
    assert "flap at 0.85" in capsys.readouterr().out
    rows = sorted((tmp_path / "made" / "rows").iterdir())
    assert [row.name for row in rows] == ["0.85-flap.json", "0.85-ours.json", "1-base.json"]
    times = [row.stat().st_mtime_ns for row in rows]
    call(monkeypatch, "methods", "table", str(tmp_path / "made"), *scored)
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in table] == ["| network", "| 1: base", "| **0.85: ours**", "| 0.85: flap"]
    assert float(table[2][1]) <= 0.85 and float(table[3][1]) <= 0.86
    monkeypatch.setattr("benchmarks.methods.ProcessPoolExecutor", NoWorker)
    call(monkeypatch, "methods", *made, "--methods", "base,ours")
    assert [row.stat().st_mtime_ns for row in rows] == times


class NoWorker:
    """A pool that nothing may be given to."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> NoWorker:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, *work: object) -> None:
        raise AssertionError(f"made again: {work}")


def test_published_ways_and_ours_are_jobs_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tasks = tiny.checkpoint(tmp_path / "model"), tiny.task(tmp_path / "tasks", documents=40, solved=True)
    work = ["--checkpoint", str(model), "--include-path", str(tasks), "--tasks", "tiny_choice", "--size", "0.85"]
    work += ["--data", str(tiny.data(tmp_path / "text.jsonl", 200)), "--tokens", "2048", "--evaluations", "10"]
    call(monkeypatch, "published", str(tmp_path / "made"), *work, "--limit", "8", "--ways", "llama-nas,ours")
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in table] == ["| way", "| llama-nas", "| ours"]
    assert all(float(row[1].rstrip("x")) >= 1 / 0.86 for row in table[1:])
    recipes = [
        json.loads((tmp_path / "made" / way / "report.json").read_text())["recipe"] for way in ("llama-nas", "ours")
    ]
    budgets = [(recipe["finetuning"]["tokens"], recipe["healing"]["tokens"], recipe["space"]) for recipe in recipes]
    assert budgets == [(2048, 0, "llama-nas"), (0, 2048, "fine")]
