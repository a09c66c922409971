"""Quantized packages: what is stored, what it costs, what fell back, and that plain transformers loads it."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from compressor import demo
from export.package import write_tokenizer
from export.package_record import PackageRecord, check_files, read_record
from export.probe import default_ids, logits_of, next_log_probabilities
from export.quantization import tuning
from export.quantization.cost import step_seconds
from export.quantization.gptq import round_in_sequence
from export.quantization.plan import linear_layers, linear_layers_in, linear_layers_of, plan_scheme
from export.quantization.quantize import quantize_package, quantize_packages
from export.quantization.round_to_nearest import (
    packed,
    packed_by_auto_round,
    round_network,
    round_to_nearest,
    values_of,
)
from export.quantization.schemes import SCHEMES, EmbeddingBits, OuterBits, SchemeName, outer_bits
from export.quantization.tuning import pack_texts, position
from export.shards import header_bytes, weight_bytes, weight_files
from export.verify import check, verify_all
from supernet.architecture import Architecture, LayerSizes
from supernet.common.errors import RequestError, VerificationError
from supernet.common.files import sha256
from supernet.families import describe
from supernet.loading import load_network, stop_rounding
from supernet.trust import check_code
from tests.support.export_networks import (
    EVEN,
    FULL,
    TEXTS,
    UNEVEN,
    cut,
    probe_ids,
    record_anew,
    tiny_llama,
    tiny_tokenizer,
    write_tiny,
)
from tests.support.report_helpers import card_of, code_block, full_report
from tests.support.tiny_families import CONFIGS, tiny_network

# The second layer's FFN width of 80 is no multiple of 32; the third has no attention, the fourth no MLP.
LAYERS = (LayerSizes(4, 2, 96), LayerSizes(4, 2, 80), LayerSizes(0, 0, 64), LayerSizes(2, 1, 0))
ARCHITECTURE = Architecture(64, LAYERS)
HEAD_DIM = 32
ODD = [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    return write_tiny(
        folder / "best",
        ARCHITECTURE,
        cut(tiny_llama(head_dim=HEAD_DIM), ARCHITECTURE),
        entry={"name": "best", "architecture": ARCHITECTURE.to_dict(), "quality": 0.9},
        reference=folder / "reference.safetensors",
        lineage={"base": "tiny"},
        card="# About the unquantized package\n",
    ).folder


@pytest.fixture(scope="module")
def quantized(source: Path) -> dict[str, PackageRecord]:
    """All schemes, tuned for two iterations in one child process, and verified in another."""
    seen: list[tuple[float, int, str]] = []
    packages = quantize_packages(
        source,
        {scheme: source.with_name(f"best-{scheme}") for scheme in SCHEMES},
        calibration=probe_ids(length=32),
        iterations=2,
        seed=1,
        log=source.with_name("log.txt"),
        progress=lambda *position: seen.append(position),
    )
    reference = source.with_name("reference.safetensors")
    verify_all([(package.folder, reference) for package in packages], record=True)
    assert seen[-1][1] == 4 * len(SCHEMES) and all(0 <= done <= total for done, total, _ in seen)
    assert [position[0] for position in seen] == sorted(position[0] for position in seen)
    log = source.with_name("log.txt").read_text()
    assert "AutoRound" in log and "-- step" not in log  # what is for the bar alone is not for people
    return {scheme: read_record(package.folder) for scheme, package in zip(SCHEMES, packages, strict=True)}


def test_a_card_that_is_too_small_to_tune_on_is_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = "Traceback\n\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n"
    monkeypatch.setattr(tuning, "_run_child", lambda *_: lost)
    with pytest.raises(RequestError, match=r"out of memory \(.*2\.00 GiB\); --rounding-steps 0 needs less"):
        quantize_package(source, tmp_path / "int4", "int4", calibration=probe_ids(length=32), iterations=2)
    assert not (tmp_path / "int4").exists()


def test_named_chat_templates_come_along(source: Path, tmp_path: Path) -> None:
    package = shutil.copytree(source, tmp_path / "best")
    template = package / "additional_chat_templates" / "tool_use.jinja"
    template.parent.mkdir()
    template.write_text("{{ messages }}")
    record_anew(package, str(template.relative_to(package)))
    made = quantize_package(package, tmp_path / "int8", "int8", calibration=probe_ids(length=32), iterations=0)
    assert (made.folder / template.relative_to(package)).read_text() == "{{ messages }}"
    write_tokenizer(package, tmp_path)
    assert (tmp_path / template.relative_to(package)).read_text() == "{{ messages }}"


def test_the_display_moves_with_every_step() -> None:
    log = "\n== int8\nQuantizing model.layers.1: 50%|##  | 2/4 [00:09<00:09]\n-- step 25\n"
    assert position("loading", 4, 2, 10) == (0, 8, "starting")
    assert position(log, 4, 2, 10) == (2.5, 8, "int8")
    assert position(log + "\n-- step 38\n", 4, 2, 10) == (3.8, 8, "int8")
    assert position(log + "\n== int4\n", 4, 2, 10) == (4, 8, "int4")
    assert position(log + "\n== int4\n\n-- step 3\n", 4, 2, 10)[0] == 4.3
    assert position(log, 4, 2, 0) == (2, 8, "int8")  # nothing is tuned


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3"])
def test_a_step_is_timed_on_a_network_that_stays_as_it_is(name: str) -> None:
    network = tiny_network(name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.no_grad():
        assert step_seconds(network, length=16, sequences=2) > 0
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_pre_hooks for module in network.modules())


def dequantized(tensors: dict[str, Tensor], module: str, bits: int) -> tuple[Tensor, Tensor]:
    """A linear layer's weight and its step sizes, both [out, in]. AutoRound makes some scales negative: 4-bit codes
    reach from -8 to 7, and the longer side goes to the larger weights."""
    if f"{module}.qweight" in tensors:
        scale = tensors[f"{module}.scales"].float()
        codes = fields(tensors[f"{module}.qweight"], bits)
        zeros = fields(tensors[f"{module}.qzeros"].t(), bits).t() + 1
        steps = scale.repeat_interleave(len(codes) // len(scale), 0)
        return ((codes - zeros.repeat_interleave(len(codes) // len(zeros), 0)) * steps).t(), steps.t().abs()
    scale = tensors[f"{module}.weight_scale"].float()
    if f"{module}.weight" in tensors:
        codes = tensors[f"{module}.weight"]
        assert codes.dtype == torch.int8
    else:
        shape = torch.Size(tensors[f"{module}.weight_shape"].tolist())
        codes = unpack_from_int32(tensors[f"{module}.weight_packed"], bits, shape)
    steps = scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)
    return codes.float() * steps, steps.abs()


def data_bytes(package: Path) -> int:
    """Bytes of a package's weight files less their headers."""
    headers = [int.from_bytes(file.read_bytes()[:8], "little") + 8 for file in weight_files(package)]
    return weight_bytes(package) - sum(headers)


def fields(words: Tensor, bits: int) -> Tensor:
    """The unsigned numbers [32 / bits * n, m] in words of 32 bits [n, m]."""
    return torch.stack([words >> shift & 2**bits - 1 for shift in range(0, 32, bits)], 1).flatten(0, 1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_stored_weights_are_the_originals_within_a_step(
    source: Path, quantized: dict[str, PackageRecord], scheme: SchemeName
) -> None:
    form = SCHEMES[scheme]
    original = load_file(source / "model.safetensors")
    stored = load_file(quantized[scheme].folder / "model.safetensors")
    for module in linear_layers_of(source).widths:
        if form.auto_round and module in ODD:
            assert torch.equal(stored[f"{module}.weight"], original[f"{module}.weight"].to(torch.bfloat16))
            continue
        bits = 8 if module in ODD else form.bits
        value, step = dequantized(stored, module, bits)
        error = (value - original[f"{module}.weight"]).abs()
        # Tuned rounding goes up or down, tuned clipping shortens the range a little: never more than a step and a bit.
        assert (error <= 1.5 * step).float().mean() > 0.99
        assert error.norm() <= {8: 0.012, 4: 0.2, 3: 0.4, 2: 0.9}[bits] * original[f"{module}.weight"].norm()
        name, dtype = ("scales", torch.float16) if form.auto_round else ("weight_scale", torch.bfloat16)
        assert stored[f"{module}.{name}"].dtype == dtype
    for name in ("model.embed_tokens", "lm_head"):
        if form.auto_round:
            assert torch.equal(stored[f"{name}.weight"], original[f"{name}.weight"].to(torch.bfloat16))
        else:
            value, step = dequantized(stored, name, 8)
            assert ((value - original[f"{name}.weight"]).abs() <= 0.51 * step).all()
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(stored[norm], original[norm].to(torch.bfloat16))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_it_costs_is_what_is_on_disk(
    source: Path, quantized: dict[str, PackageRecord], scheme: SchemeName
) -> None:
    entry, form = quantized[scheme].entry, SCHEMES[scheme]
    report = entry.quantization_report
    widths = linear_layers_of(source).widths
    total = sum(rows * columns for rows, columns in widths.values())
    bits = 0
    for module, (rows, columns) in widths.items():
        if form.auto_round and module in ODD:
            bits += 16 * rows * columns
            continue
        low = form.bits < 8 and module not in ODD
        codes = rows * columns * (form.bits if low else 8)
        groups = rows * (columns // 32 if low else 1)
        shape = 0 if form.dynamic or form.auto_round else 2 * 64
        bits += codes + groups * (16 + form.bits * form.auto_round) + shape
    assert report.bits_per_weight == pytest.approx(bits / total)
    assert (report.scheme, report.group_size, report.iterations) == (scheme, 32 if form.bits < 8 else -1, 2)
    assert entry.bytes == weight_bytes(quantized[scheme].folder)
    assert report.bits_per_parameter == 8 * entry.bytes / entry.params
    outer = OuterBits() if form.auto_round else OuterBits(8, 8)
    assert (report.embedding, report.head) == (outer.embedding, outer.head)
    counted = describe(tiny_llama(head_dim=HEAD_DIM).config).bytes(ARCHITECTURE, form.storage_format(outer=outer))
    assert counted == data_bytes(quantized[scheme].folder)
    left = {"model.embed_tokens", "lm_head"}
    assert set(report.exceptions) == (left if scheme == "int8-dynamic" else left | set(ODD))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_package_is_whole_and_proved(source: Path, quantized: dict[str, PackageRecord], scheme: str) -> None:
    path = quantized[scheme].folder
    record = check_files(path)
    entry = record.entry
    assert (entry.name, entry.layout, entry.params) == (f"best-{scheme}", "uneven", read_record(source).entry.params)
    assert (entry.architecture, entry.quantization, entry.quality) == (ARCHITECTURE, scheme, None)
    assert entry.verified["mean_abs_logprob_difference"] <= entry.verified["bound"]
    for claim in ("padding_equal", "cached_equals_uncached", "tokenizer_equal", "save_and_reload_equal"):
        assert entry.verified[claim] is True
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "modeling_uneven_llama.py"):
        assert (path / name).read_bytes() == (source / name).read_bytes()
    assert not (path / "README.md").exists()  # the other package's card
    lineage = record.lineage.model_dump()
    assert lineage["base"] == "tiny"
    assert lineage["quantized_from"]["record_sha256"] == sha256(source / "compression.json")
    again = check(path)
    assert again["max_abs_logprob_difference_from_export"] <= 1e-4


def test_misread_scales_are_found(quantized: dict[str, PackageRecord], tmp_path: Path) -> None:
    package = shutil.copytree(quantized["int4"].folder, tmp_path / "package")
    weights = load_file(package / "model.safetensors")
    weights["model.layers.0.self_attn.v_proj.weight_scale"] *= 2
    save_file(weights, package / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match="from those at export"):
        check(package)


def test_the_configuration_names_what_is_where(quantized: dict[str, PackageRecord]) -> None:
    # Embedding and head have a group each.
    for scheme, groups in (("int8", 3), ("int8-dynamic", 3), ("int4", 4)):
        config = json.loads((quantized[scheme].folder / "config.json").read_text())
        written: dict[str, Any] = config["quantization_config"]
        assert written["quant_method"] == "compressed-tensors" and written["ignore"] == []
        assert len(written["config_groups"]) == groups and config["dtype"] == "bfloat16"
        assert config["per_layer_config"] and config["auto_map"]
    assert sorted(written["config_groups"]["group_1"]["targets"]) == sorted(ODD)


SOURCES: dict[str, dict[str, Any]] = {"tied": {"tie_word_embeddings": True}, "untied": {"tie_word_embeddings": False}}


@pytest.mark.parametrize("sizes", SOURCES)
@pytest.mark.parametrize("architecture", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("asked", [None, 16, 8, 4])
def test_the_embedding_is_quantized_where_the_package_can_hold_it(
    sizes: str, architecture: Architecture, asked: Literal[16, 8, 4] | None, tmp_path: Path
) -> None:
    tied, uneven = sizes == "tied", architecture is UNEVEN
    model = tiny_llama(**SOURCES[sizes])
    source = write_tiny(tmp_path / "best", architecture, cut(model, architecture))
    package = quantize_package(source.folder, tmp_path / "p", "int3", calibration=None, iterations=0, embedding=asked)
    report = package.entry.quantization_report
    code = uneven or asked in (8, 4)
    expected = (asked or 8) if code else 16, 16 if tied else asked or 8
    assert (report.embedding, report.head) == expected
    assert package.entry.layout == ("uneven" if code else "uniform") and package.entry.params == source.entry.params
    outer = OuterBits(*expected)
    assert outer_bits(SCHEMES["int3"], tied=tied, code=code, asked=asked) == outer
    storage = SCHEMES["int3"].storage_format(outer=outer)
    assert data_bytes(package.folder) == describe(model.config).bytes(architecture, storage)
    claims = check(package.folder)
    assert claims["save_and_reload_equal"] and claims["params"] == source.entry.params
    # What runs is what a network in memory says whose weights are rounded.
    rounded_network = cut(model, architecture)
    linear = linear_layers_in(rounded_network)
    round_network(rounded_network, replace(plan_scheme(linear.widths, "int3"), outer=outer), linear)
    with torch.no_grad():
        mine = rounded_network(input_ids=probe_ids()).logits
        loaded, _ = load_network(package.folder, torch.float32, check_code(package.folder))
        loaded.eval()(input_ids=probe_ids())
        stop_rounding(loaded)
        theirs = loaded(input_ids=probe_ids()).logits
    # Norms are stored in bfloat16.
    assert (mine - theirs).abs().max() <= 0.02 * mine.abs().max()


def rounds_again(model: Any) -> bool:
    """Whether a module of compressed-tensors rounds its weight at every call, or moves what it reads."""
    return any(hasattr(module, "quantization_scheme") and "forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_an_uneven_package_rounds_its_unpacked_weights_once(quantized: dict[str, PackageRecord]) -> None:
    folder, ids = quantized["int4"].folder, probe_ids()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    first = model(input_ids=ids).logits
    assert not rounds_again(model)
    assert torch.allclose(model(input_ids=ids).logits, first, atol=1e-5)


@torch.no_grad()
def test_the_lines_in_the_card_of_a_plain_class_stop_the_rounding(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "best", EVEN, cut(tiny_llama(), EVEN))
    package = quantize_package(source.folder, tmp_path / "int8", "int8", calibration=None, iterations=0, code=False)
    report = full_report()
    report["packages"][1]["layout"] = "uniform"
    lines = code_block(card_of(report, "best-int8").text)
    shown: dict[str, Any] = {}
    exec(lines.replace('"path/to/best-int8"', repr(str(package.folder))), shown)
    assert "remove_dispatch" in lines and not rounds_again(shown["model"])
    as_loaded = AutoModelForCausalLM.from_pretrained(package.folder).eval()
    expected = as_loaded(input_ids=probe_ids()).logits
    assert rounds_again(as_loaded)
    assert torch.allclose(shown["model"](input_ids=probe_ids()).logits, expected, atol=1e-5)


def test_a_plain_class_stays_plain_where_code_is_not_wanted(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    write_tiny(tmp_path / "best", EVEN, cut(model, EVEN))
    options: dict[str, Any] = {"calibration": None, "iterations": 0, "embedding": 4, "code": False}
    package = quantize_package(tmp_path / "best", tmp_path / "p", "int4", **options)
    assert package.entry.layout == "uniform" and package.entry.quantization_report.embedding == 16
    assert not list(package.folder.glob("*.py"))


@pytest.mark.parametrize("seed", range(20))
def test_bytes_are_known_before_anything_is_written(seed: int, tmp_path: Path) -> None:
    """Random architectures, odd widths among them, a random scheme and embedding each; both forms, also of bfloat16."""
    rng = random.Random(seed)
    model = tiny_llama(tie_word_embeddings=rng.random() < 0.5, head_dim=32, hidden_size=rng.choice([64, 72, 128]))
    layers = []
    for _ in range(4):
        heads = rng.choice([0, 1, 2])
        layers.append(LayerSizes(2 * heads, heads, rng.choice([0, 32, 64, 80, 96])))
    if all(layer.removed for layer in layers) or not any(layer.intermediate_size % 32 == 0 for layer in layers):
        layers[0] = FULL
    architecture = Architecture(model.config.hidden_size, tuple(layers))
    scheme: SchemeName = rng.choice(["int8", "int8-dynamic"] if model.config.hidden_size == 72 else list(SCHEMES))
    asked = rng.choice([None, 16, 8, 4])
    source = write_tiny(tmp_path / "best", architecture, cut(model, architecture))
    package = quantize_package(source.folder, tmp_path / "p", scheme, calibration=None, iterations=0, embedding=asked)
    report = package.entry.quantization_report
    storage = SCHEMES[scheme].storage_format(outer=OuterBits(report.embedding, report.head))
    assert data_bytes(package.folder) == describe(model.config).bytes(architecture, storage)


QUANTIZABLE = sorted(CONFIGS.keys() - {"gpt2", "mixtral", "qwen3_moe", "qwen3_moe-dense"})
"""Those of linear layers (`test_networks_without_linear_layers_are_refused`)."""


@pytest.mark.parametrize("embedding", [8, None])
@pytest.mark.parametrize("name", QUANTIZABLE)
def test_every_family_loads_as_it_was_rounded(name: str, embedding: EmbeddingBits | None, tmp_path: Path) -> None:
    """The whole network of every family, from files named as the hub names them; with a code file and without."""
    network = tiny_network(name)
    structure = describe(network.config)
    source = write_tiny(tmp_path / "base", structure.base, network, probe_ids=probe_ids(vocabulary=101)).folder
    package = quantize_package(
        source, tmp_path / "p", "int8", calibration=None, iterations=0, embedding=embedding, code=embedding is not None
    )
    report = package.entry.quantization_report
    assert (report.embedding, report.head) == (embedding or 16, 16 if structure.tied else 8)
    assert check(package.folder)["mean_abs_logprob_difference"] < SCHEMES["int8"].bound / 5
    storage = SCHEMES["int8"].storage_format(outer=OuterBits(report.embedding, report.head))
    assert data_bytes(package.folder) == structure.bytes(structure.base, storage)
    header = weight_bytes(package.folder) - data_bytes(package.folder)
    if not any(tensor.role == "experts" for tensor in structure.tensors):
        assert header <= header_bytes(structure, structure.base, storage) < 1.1 * header


@pytest.mark.parametrize("name", ["gpt_neox", "qwen3_5_text"])
def test_autoround_takes_other_names_and_kinds_of_layers(name: str, tmp_path: Path) -> None:
    """A head that files name otherwise, and layers that no mask of the first one's kind suits."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    config = CONFIGS[name]()
    known = {key: value for key, value in sizes.items() if key in config.to_dict()}
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict() | known)).eval()
    base = describe(network.config).base
    source = write_tiny(tmp_path / "base", base, network, probe_ids=probe_ids(vocabulary=101)).folder
    destinations: dict[SchemeName, Path] = {scheme: tmp_path / scheme for scheme in ("int8", "int4")}
    quantize_packages(source, destinations, calibration=probe_ids(101, 32), iterations=1, embedding=8)
    for scheme, folder in destinations.items():
        assert check(folder)["mean_abs_logprob_difference"] < SCHEMES[scheme].bound / 5


def test_the_same_seed_gives_the_same_weights(
    source: Path, quantized: dict[str, PackageRecord], tmp_path: Path
) -> None:
    """Also when the scheme is made alone, and not after two others in one process."""
    alone = quantize_package(source, tmp_path / "p", "int4", calibration=probe_ids(length=32), iterations=2, seed=1)
    assert alone.files["model.safetensors"] == quantized["int4"].files["model.safetensors"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_data_weights_are_rounded_to_nearest(
    source: Path,
    quantized: dict[str, PackageRecord],
    scheme: SchemeName,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*args: object) -> str:
        raise AssertionError("a child process was started where none is needed")

    monkeypatch.setattr(tuning, "_run_child", never)
    quantize_package(source, tmp_path / "p", scheme, calibration=None, iterations=0)
    stored = load_file(tmp_path / "p" / "model.safetensors")
    tuned = load_file(quantized[scheme].folder / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in stored.items()} == {n: (t.shape, t.dtype) for n, t in tuned.items()}
    assert check(tmp_path / "p")["mean_abs_logprob_difference"] <= SCHEMES[scheme].bound / 2
    original = load_file(source / "model.safetensors")
    for module in linear_layers_of(source).widths:
        if SCHEMES[scheme].auto_round and module in ODD:
            continue
        value, step = dequantized(stored, module, 8 if module in ODD else SCHEMES[scheme].bits)
        # Half a step, but for a group's largest weight: it may fall off the end of the codes by one.
        error = (value - original[f"{module}.weight"]).abs()
        assert (error <= 1.05 * step).all() and (error <= 0.51 * step).float().mean() > 0.95


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_tuning_fewer_than_eight_bits_are_rounded_by_gptq(
    source: Path, scheme: SchemeName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object) -> str:
        raise AssertionError("a child process was started where nothing is tuned")

    monkeypatch.setattr(tuning, "_run_child", never)
    seen: list[tuple[float, int, str]] = []
    ids = probe_ids(length=32)
    package = quantize_package(
        source, tmp_path / "p", scheme, calibration=ids, iterations=0, progress=lambda *at: seen.append(at)
    )
    assert check(package.folder)["quantization"] == scheme and "auto-round" not in package.lineage.quantizer
    bits, stored = SCHEMES[scheme].bits, load_file(package.folder / "model.safetensors")
    if bits == 8:  # as without text
        quantize_package(source, tmp_path / "nearest", scheme, calibration=None, iterations=0)
        nearest = load_file(tmp_path / "nearest" / "model.safetensors")
        assert seen == [] and all(torch.equal(stored[name], nearest[name]) for name in stored | nearest)
        return
    assert seen == [(done, 4, scheme) for done in (1, 2, 3, 4)]
    network, _ = load_network(source, torch.float32, True)
    linear = linear_layers_of(source)
    found = round_in_sequence(network, plan_scheme(linear.widths, scheme), linear, ids)
    assert found.keys() == linear.widths.keys() - set(ODD)
    for module, rounded in found.items():
        assert_close(dequantized(stored, module, bits)[0], values_of(rounded))


def test_networks_without_linear_layers_are_refused() -> None:
    with pytest.raises(RequestError, match="gpt2 networks cannot be quantized: most of their weights are not in"):
        linear_layers(CONFIGS["gpt2"]())
    few_experts = CONFIGS["qwen3_moe-dense"]()
    few_experts.mlp_only_layers = [0, 1, 2]
    for config in (CONFIGS["qwen3_moe"](), few_experts):
        with pytest.raises(RequestError, match="qwen3_moe networks with experts cannot be quantized: weights of"):
            linear_layers(config)
    for name, outside in (("gpt_neox", 1), ("gemma3_text", 1), ("llama", 1), ("opt-projected", 3)):
        assert len(linear_layers(CONFIGS[name]()).outside) == outside  # the head; OPT's projections around its layers
    assert len(linear_layers(CONFIGS["phi3"]()).widths) == 4 * 4


def test_group_sizes() -> None:
    def plan_groups(*arguments: Any) -> tuple[int, list[str]]:
        plan = plan_scheme(*arguments)
        return plan.group_size, plan.left_out

    widths = {"a": (256, 128), "b": (64, 384), "c": (96, 256)}
    assert plan_groups(widths, "int4") == (128, [])
    assert plan_groups(widths | {"d": (64, 192)}, "int4") == (64, [])
    assert plan_groups(widths | {"d": (64, 96)}, "int4") == (32, [])
    assert plan_groups(widths | {"d": (64, 172), "e": (172, 64)}, "int4") == (128, ["d", "e"])
    assert plan_groups(widths | {"d": (64, 172)}, "int8") == (-1, ["d"])
    assert plan_groups(widths | {"d": (64, 172)}, "int8-dynamic") == (-1, [])
    assert plan_groups(widths, "int4", 32) == (32, [])
    assert plan_groups(widths | {"d": (64, 172)}, "int8-auto-round") == (-1, ["d"])
    odd = {"d": (48, 64), "e": (64, 48)}
    for layers, scheme, group_size, reason in (
        (widths, "int4", 256, "256 does not divide the width 128; valid sizes here are 128, 64, 32"),
        (widths | {"d": (64, 192)}, "int4", 128, "128 does not divide the width 192; valid sizes here are 64, 32"),
        (widths | {"d": (64, 172)}, "int4", 32, "32 does not divide the width 172; no group size divides them all"),
        (widths, "int4", 16, "not a multiple of 32"),
        (odd, "int4", None, "multiples of 32, and no layer has; ask for int8"),
        (odd, "int8-auto-round", None, "int8-auto-round needs widths that are multiples of 32, and no layer has"),
        (widths, "int8", 64, "one scale for each channel"),
    ):
        with pytest.raises(RequestError, match=reason):
            plan_groups(layers, scheme, group_size)


def test_rounding_by_hand() -> None:
    weight = torch.tensor([[1.27, -0.5, 0.0, 0.013, 0.4, -0.64], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    codes, scale = round_to_nearest(weight, 8, -1)
    step = scale[0].item()
    assert 0.01 <= step <= 0.01 * (1 + 2**-7)
    assert codes[0].tolist() == [round(w / step) for w in weight[0].tolist()] and not codes[1].any()
    codes, scale = round_to_nearest(weight, 4, 3)
    assert codes[0].tolist() == [-8, 3, 0, 0, 5, -8] and scale.shape == (2, 2)
    assert scale[0, 0] < 0 < scale[0, 1]
    _, largest_kept = round_to_nearest(torch.tensor([[127.19, 1.0]]), 8, -1)  # 1.0015 would be stored as 1
    assert 127.19 <= 127 * largest_kept.item() <= 127.19 * (1 + 2**-7)
    # 8.012 / 8 is stored as 1: 3.502 is nearer to 4 steps of that, and to 3 of what it was before.
    codes_of_stored, stored_scale = round_to_nearest(torch.tensor([[-8.012, 3.502]]), 4, 2)
    assert codes_of_stored.tolist() == [[-8, 4]] and stored_scale.item() == 1
    stored = packed(weight, 4, 3)
    assert torch.equal(unpack_from_int32(stored["weight_packed"], 4, weight.shape), codes)
    assert stored["weight_shape"].tolist() == [2, 6] and torch.equal(stored["weight_scale"], scale)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    codes, scale = round_to_nearest(weight, 4, 32, torch.float16)
    stored = packed_by_auto_round((codes, scale), 4)
    assert stored["qweight"].shape == (8, 32) and stored["qzeros"].shape == (2, 4) and stored["scales"].shape == (2, 32)
    value, _ = dequantized({f"m.{name}": tensor for name, tensor in stored.items()}, "m", 4)
    assert torch.equal(value, codes * scale.float().repeat_interleave(32, 1))


def test_bad_requests_compute_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> str:
        raise AssertionError("the child process was started")

    monkeypatch.setattr(tuning, "_run_child", never)
    ids = probe_ids()
    for scheme, calibration, group_size, reason in (
        ("int4", ids, 64, "64 does not divide the width"),
        ("int5", ids, None, "unknown quantization 'int5'"),
        ("int4", None, None, "needs calibration data"),
        ("int4", [""], None, "holds no text"),
    ):
        options = {"calibration": calibration, "group_size": group_size}
        with pytest.raises(RequestError, match=reason):
            quantize_package(source, tmp_path / "p", scheme, iterations=1, **options)  # type: ignore[arg-type]
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "thesis.txt").touch()
    with pytest.raises(RequestError, match="holds something else"):
        quantize_package(source, tmp_path / "p", "int4", calibration=ids, iterations=1)


def test_a_network_of_odd_widths_is_int8_throughout(tmp_path: Path) -> None:
    model = tiny_llama(hidden_size=40, intermediate_size=56, head_dim=10, num_hidden_layers=2)
    architecture = Architecture(40, (LayerSizes(4, 2, 56), LayerSizes(4, 2, 40)))
    write_tiny(tmp_path / "best", architecture, cut(model, architecture))
    package = quantize_package(tmp_path / "best", tmp_path / "int8", "int8", calibration=probe_ids(), iterations=1)
    report = package.entry.quantization_report
    assert len([what for what in report.exceptions.values() if "INT8" in what]) == 14 and report.bits_per_weight < 9
    assert check(package.folder)["mean_abs_logprob_difference"] <= 0.05


def test_a_quantized_package_is_not_quantized_again(quantized: dict[str, PackageRecord], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="already quantized"):
        quantize_package(quantized["int8"].folder, tmp_path / "p", "int4", calibration=probe_ids(), iterations=0)


def test_a_failing_child_says_why(source: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(source, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}")  # only the child opens it
    with pytest.raises(RuntimeError, match="broken failed: "):
        quantize_package(broken, tmp_path / "p", "int8", calibration=probe_ids(), iterations=1)
    assert not (tmp_path / "p").exists()


def test_texts_are_packed_within_the_context(source: Path) -> None:
    ids = pack_texts(source, TEXTS * 10)
    assert ids.shape[1] == 64
    joined = [token for text in TEXTS * 10 for token in tiny_tokenizer()(text).input_ids]
    assert ids.flatten().tolist() == joined[: ids.numel()] and len(joined) - ids.numel() < 64
    assert pack_texts(source, ["Tom"]).shape[0] == 1


@pytest.mark.skipif("COMPRESSOR_ASSETS" not in os.environ, reason="COMPRESSOR_ASSETS is not set")
@pytest.mark.parametrize("checkpoint", ["stories260K", "prose-7m"])
def test_real_checkpoints(checkpoint: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from supernet.families import base_architecture

    assets = Path(os.environ["COMPRESSOR_ASSETS"])
    base = assets / "checkpoints" / checkpoint
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    rows = (assets / "data/tinystories/train.jsonl").read_text(encoding="utf-8").splitlines()[:64]
    texts = [json.loads(row)["text"] for row in rows]
    ids = AutoTokenizer.from_pretrained(base)(texts[-1]).input_ids[:96]
    dtype = torch.bfloat16 if checkpoint == "prose-7m" else torch.float32
    source, reference = tmp_path / "base", tmp_path / "reference.safetensors"
    options = {"tokenizer": base, "dtype": dtype, "probe_ids": torch.tensor(ids).view(3, 32), "reference": reference}
    write_tiny(source, base_architecture(model.config), model, **options)
    quantized = quantize_packages(
        source,
        {scheme: tmp_path / scheme for scheme in ("int8", "int4")},
        calibration=pack_texts(source, texts, 128)[:8],
        iterations=0,
    )
    results = verify_all([(source, reference), *((package.folder, reference) for package in quantized)])
    assert results[0]["max_abs_logit_difference"] <= results[0]["tolerance"]
    for result, limit in zip(results[1:], (0.05, 0.3), strict=True):
        assert result["mean_abs_logprob_difference"] < limit
    int8, int4 = (package.entry for package in quantized)
    fallen = [name for name, what in int4.quantization_report.exceptions.items() if "INT8" in what]
    assert len(fallen) == (15 if checkpoint == "stories260K" else 0)
    if not fallen:
        assert int8.bytes < 0.32 * 4 * int8.params
        assert int4.bytes < 0.23 * 4 * int4.params


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_bound_lies_between_rounding_and_misreading(scheme: SchemeName) -> None:
    """On the bundled network: rounded, and with every two codes exchanged, as a wrong order of bits would have it."""
    network = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float32).eval()
    ids = default_ids(network.config)
    expected = next_log_probabilities(logits_of(network, ids), ids)
    linear = linear_layers_in(network)
    round_network(network, plan_scheme(linear.widths, scheme, None), linear)

    def off() -> float:
        return float((next_log_probabilities(logits_of(network, ids), ids) - expected).abs().mean())

    rounded = off()
    for name in linear.widths:
        weight = network.get_submodule(name).weight
        weight.data = weight.data.unflatten(1, (-1, 2)).flip(2).flatten(1)
    assert 3 * rounded < SCHEMES[scheme].bound < off() / 2
