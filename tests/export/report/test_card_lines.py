"""The lines by which a card says to load each layout, run as they stand on a package of that layout."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

from export.layouts.installed import EXTRAS
from export.package_record import read_record
from export.quantization.quantize import quantize_package
from tests.support.export_networks import EVEN, UNEVEN, cut, tiny_llama, write_tiny
from tests.support.report_helpers import card_of, code_block, minimal_report

PROMPT = "Anna gave the red ball"


@pytest.mark.parametrize(
    "layout", ["uneven", "uniform", "padded", "int8", "int4", "int4-auto-round", "gguf-q8_0", "onnx", "openvino"]
)
def test_the_cards_lines_load_the_package_and_write(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in EXTRAS.get(layout.partition("-")[0], ()):
        pytest.importorskip(module)
    architecture = EVEN if layout == "uniform" else UNEVEN
    quantized = layout.startswith("int")
    network = cut(tiny_llama(head_dim=32, max_position_embeddings=256), architecture)
    folder = tmp_path / "path/to/best"
    written = tmp_path / "source" if quantized else folder
    write_tiny(written, architecture, network, layout="uneven" if quantized else layout)
    if quantized:
        quantize_package(written, folder, layout, calibration=None, iterations=0)  # type: ignore[arg-type]
    entry = read_record(folder).entry
    data = minimal_report()
    data["packages"][0] |= entry.model_dump(exclude_unset=True, exclude={"verified", "path", "name"})
    data["base"]["architecture"] = {"hidden_size": 64, "layers": EVEN.to_dict()["layers"]}
    data["samples"] = [{"prompt": PROMPT, "continuations": {"base": "?"}}]
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code_block(card_of(data).text), {})
    assert len(printed.getvalue()) > 20
    if not layout.startswith("gguf"):  # llama.cpp's answer is without the prompt
        assert printed.getvalue().startswith(PROMPT)
    assert entry.layout == ("uneven" if quantized else layout.partition("-")[0])
