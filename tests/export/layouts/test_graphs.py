"""The onnx and openvino layouts, run by ONNX Runtime and OpenVINO themselves where they are installed."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.layouts import graphs
from export.layouts.graphs import FAMILIES, REFUSED, Graph, check_family, check_graph, measure_speed
from export.layouts.installed import EXTRAS
from export.package_record import PackageRecord, check_files, read_record
from export.verify import verify
from supernet.architecture import Architecture, LayerSizes
from supernet.common.errors import RequestError, VerificationError
from supernet.families import describe, families
from supernet.slicing import extract
from supernet.trust import load_tokenizer
from tests.support.export_networks import UNEVEN, cut, probe_ids, tiny_llama, tiny_tokenizer, write_tiny
from tests.support.tiny_families import assert_close, tiny_network

KEY_VALUE_HEADS, HEAD_DIM = [2, 1, 2], 16


@pytest.fixture(scope="module", params=["onnx", "openvino"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackageRecord:
    for module in EXTRAS[request.param]:
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("packages") / request.param
    return write_tiny(folder, UNEVEN, layout=request.param, dtype=torch.bfloat16, card="# A card\n")


@pytest.mark.parametrize(("number", "family"), enumerate(sorted({*FAMILIES, *REFUSED})))
def test_every_family(number: int, family: str, tmp_path: Path) -> None:
    """Two layers of other sizes, the second without its MLP where the family allows it; a graph takes seconds to make,
    so each family is run by one of the two runtimes unless COMPRESSOR_ALL_GRAPHS is set."""
    model = tiny_network(family)
    structure = describe(model.config)
    *_, first, last = structure.base.layers
    gone = LayerSizes(0, 0, 0)
    narrow = replace(first, intermediate_size=8)
    kept = narrow, replace(last, intermediate_size=0, num_experts=0)
    architecture = Architecture(structure.base.hidden_size, (gone,) * (len(structure.base.layers) - 2) + kept)
    network = extract(model, structure, architecture)
    layouts = ("onnx", "openvino") if "COMPRESSOR_ALL_GRAPHS" in os.environ else (("onnx", "openvino")[number % 2],)
    for layout in layouts:
        options = {"layout": layout, "probe_ids": None}  # random ids: its vocabulary is not the tests'
        if family in REFUSED:
            with pytest.raises(RequestError, match=f"--format {layout} does not hold {family} networks: "):
                write_tiny(tmp_path / layout, architecture, network, **options)
            continue
        claims = check_graph(write_tiny(tmp_path / layout, architecture, network, **options))
        assert claims["max_abs_logprob_difference"] <= claims["tolerance"] < 1e-3


def test_every_family_of_the_project_is_known() -> None:
    assert {*FAMILIES, *REFUSED} == set(families())
    with pytest.raises(RequestError, match="does not hold bloom networks: it is known to work for gemma2, "):
        check_family("onnx", "bloom")


def as_stored() -> Any:
    network = cut(tiny_llama(), UNEVEN)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return network


def test_a_fresh_process_proves_it(written: PackageRecord) -> None:
    folder, entry = written.folder, written.entry
    check_files(folder)
    graph = {"onnx": {"model.onnx", "model.onnx.data"}, "openvino": {"openvino_model.xml", "openvino_model.bin"}}
    files = {"export.json", "compression.json", "README.md"} | graph[entry.layout]
    assert {f.name for f in folder.iterdir() if not f.name.startswith(("tokenizer", "chat"))} == files
    assert entry.bytes > 4 * entry.params and entry.quantization is None
    assert (entry.cache.key_value_heads, entry.cache.head_dim) == (KEY_VALUE_HEADS, HEAD_DIM)
    claims = verify(folder, record=True)
    assert claims["max_abs_logprob_difference"] <= claims["tolerance"] < 1e-3
    assert claims["padding_equal"] and claims["cached_generation_equal"] and claims["tokenizer_equal"]
    assert claims["runtime"].startswith({"onnx": "onnxruntime (1.", "openvino": "openvino (20"}[entry.layout])
    assert load_tokenizer(folder)("Anna gave").input_ids == tiny_tokenizer()("Anna gave").input_ids


def test_any_batch_and_length(written: PackageRecord) -> None:
    network, graph = as_stored(), Graph(written)
    for batch, length in ((1, 1), (1, 7), (5, 2), (3, 40)):
        ids = torch.randint(320, (batch, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected = network(input_ids=ids).logits
        first, past = graph(ids[:, : length // 2]) if length > 1 else (expected[:, :0], None)
        second, _ = graph(ids[:, length // 2 :], past=past)
        assert_close(torch.cat([first, second], 1), expected)


def test_onnx_runtime_runs_it_by_names(tmp_path: Path, written: PackageRecord) -> None:
    """Without transformers: what another program would do."""
    if written.entry.layout != "onnx":
        pytest.skip("of the onnx layout")
    import onnxruntime

    session = onnxruntime.InferenceSession(written.folder / "model.onnx", providers=["CPUExecutionProvider"])
    ids = probe_ids()
    feed = {
        "input_ids": ids.numpy(),
        "attention_mask": np.ones(ids.shape, np.int64),
        "position_ids": np.arange(ids.shape[1])[None].repeat(len(ids), 0),
    }
    names = [value.name for value in session.get_inputs() if value.name not in feed]
    assert len(names) == 2 * len(KEY_VALUE_HEADS)
    for name, heads in zip(names, np.repeat(KEY_VALUE_HEADS, 2), strict=True):
        feed[name] = np.zeros((len(ids), heads, 0, HEAD_DIM), np.float32)
    logits = session.run(["logits"], feed)[0]
    with torch.no_grad():
        assert_close(torch.from_numpy(logits), as_stored()(input_ids=ids).logits)


def test_its_speed_is_measured_in_its_runtime(written: PackageRecord) -> None:
    speed = measure_speed(written, prompt=8, new=4, threads=1, vocabulary=5, repeats=1)
    assert speed.runtime == EXTRAS[written.entry.layout][-1] and speed.prefill_tps > 0 and speed.decode_tps > 0


def test_other_weights_are_found(tmp_path: Path, written: PackageRecord) -> None:
    package = shutil.copytree(written.folder, tmp_path / "package")
    (file,) = [*package.glob("*.data"), *package.glob("*.bin")]
    content = bytearray(file.read_bytes())
    floats = np.frombuffer(content, np.float32, len(content) // 8)
    floats *= 1.01
    file.write_bytes(content)
    with pytest.raises(VerificationError, match=file.name):
        check_files(package)
    # OpenVINO keeps sizes between the weights, and may not even start.
    with pytest.raises(VerificationError, match=r"log-probabilities differ by up to|openvino does not run it"):
        check_graph(read_record(package))


def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = cut(tiny_llama(), UNEVEN)

    def forward(self: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        """What it computes depends on the tokens themselves, not on their number: no graph can hold that."""
        return input_ids + 1 if input_ids.sum() > 5 else input_ids

    monkeypatch.setattr(type(network), "forward", forward)
    with pytest.raises(RequestError, match="onnx exporter does not support this uneven_llama network") as refused:
        graphs._exported("onnx", network, KEY_VALUE_HEADS)
    assert "\n" not in str(refused.value)
    monkeypatch.setitem(EXTRAS, "onnx", ("no_such_module",))
    with pytest.raises(RequestError, match=r"--format onnx needs the extra: pip install 'nas-compressor\[onnx\]'"):
        write_tiny(tmp_path / "p", UNEVEN, layout="onnx")
    assert not list(tmp_path.iterdir())
