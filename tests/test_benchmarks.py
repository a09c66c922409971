"""The benchmarks: every one can be imported and says what it takes, and the small things that they compute hold."""

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

from tests.support import ROOT, tiny
from tests.support.report_helpers import minimal_report, score

LIBRARIES = {"memory"}
"""Modules that benchmarks share, without a command of their own."""
COMMANDS = [[file.stem] for file in sorted((ROOT / "benchmarks").glob("*.py")) if file.stem not in LIBRARIES]
PARTS = [["search", part] for part in ("space", "fine", "starts", "ranks", "overhead")]


def call(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    """`python -m benchmarks.NAME ARGUMENTS`, in this process."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", [f"benchmarks.{name}", *arguments])
    importlib.import_module(f"benchmarks.{name}").main()


@pytest.mark.parametrize("command", [*COMMANDS, *PARTS], ids=" ".join)
def test_help(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, *command, "--help")
    assert end.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_an_option_of_another_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "search", "overhead", "--plot", "curve.svg")
    assert end.value.code == 2


def test_cells_without_a_number_are_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = minimal_report()
    report["packages"][0]["tasks"]["sums"] = score(0.5, None)
    (tmp_path / "report.json").write_text(json.dumps(report))
    call(monkeypatch, "run_table", str(tmp_path))
    *_, base, best = capsys.readouterr().out.splitlines()
    assert base == "| base | 1,000,000 (1.000) | 4,000,000 (1.000) | 0.900 ± 0.010 |  | 1.000 |  |  |"
    assert best == "| best | 670,000 (0.670) | 2,680,000 (0.670) | 0.800 ± 0.010 | 0.500 | 0.889 |  |  |"


def test_markers_are_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    bits_per_byte = importlib.import_module("benchmarks.quantization").bits_per_byte
    vocabulary = 256

    def knows_nothing(ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*ids.shape, vocabulary + 3)

    tokenizer: Any = tiny.byte_tokenizer()
    texts = ["<s>" + "a" * 7, "<s>" + "b" * 7]  # two windows of eight tokens; of each, the first is not predicted
    assert bits_per_byte(knows_nothing, 8, tokenizer, texts) == pytest.approx(math.log2(vocabulary + 3))
    texts = ["aaaa<s>aaa"]  # one window: seven tokens are predicted, of which six stand for bytes
    assert bits_per_byte(knows_nothing, 8, tokenizer, texts) == pytest.approx(7 / 6 * math.log2(vocabulary + 3))


def test_peak_memory_is_that_of_the_process_alone() -> None:
    code = "from benchmarks.memory import resident; print(resident('VmHWM'))"
    held = bytearray(b"x") * 2**28
    peak = int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout)
    assert 0 < peak < len(held)
