"""The gguf layout, proved by llama.cpp itself where its wheel is installed."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from export_networks import EVEN, TEXTS, UNEVEN, cut, probe_ids, tiny_llama, tiny_tokenizer
from tiny_families import CONFIGS
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from compressor.architecture import Architecture, LayerSizes
from compressor.elastic.slicing import extract
from compressor.errors import RequestError, VerificationError
from compressor.families import describe
from export.gguf_families import DECI, FAMILIES, Stored
from export.gguf_layout import TYPES, take_stored_weights
from export.gguf_tokenizer import sample_texts, tokenizer_kind
from export.layouts import write_layout
from export.llama_cpp import LlamaCpp, check_gguf, measure_speed
from export.package import PackageInfo, check_files, read_record
from export.verify import verify

pytest.importorskip("gguf")


def write(destination: Path, architecture: Architecture, model: Any = None, **options: Any) -> PackageInfo:
    values: dict[str, Any] = {
        "tokenizer": tiny_tokenizer(),
        "entry": {"name": "best", "architecture": architecture.to_dict()},
        "probe_ids": probe_ids(),
        "gguf_type": "f32",
    }
    return write_layout("gguf", model or cut(tiny_llama(), architecture), architecture, destination, **values | options)


# Every pitfall in one: the first layer has no attention, the last no MLP, the others differ in all sizes.
AWKWARD = Architecture(
    64, (LayerSizes(0, 0, 96), LayerSizes(2, 1, 32), LayerSizes(0, 0, 0), LayerSizes(4, 2, 0), LayerSizes(4, 2, 64))
)


@pytest.mark.parametrize("name", ["even", "uneven", "awkward"])
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    model = tiny_llama(num_hidden_layers=5 if name == "awkward" else 4)
    architecture = {"even": EVEN, "uneven": UNEVEN, "awkward": AWKWARD}[name]
    info = write(tmp_path / "p", architecture, cut(model, architecture), texts=TEXTS)
    assert (info.layout, info.quantization) == ("gguf", None)
    check_files(info.path)
    result = check_gguf(info.path, read_record(info.path))
    assert result["max_abs_logprob_difference"] <= result["tolerance"] < 1e-3
    assert result["tokenizer_equal"] == 200 + len(TEXTS) and result["greedy_equal"] > 0


@pytest.mark.parametrize("family", ["llama", "llama-rope-biases-tied", "llama-mha", "mistral", "qwen2", "qwen3"])
def test_families(family: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.vocab_size = 320
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    structure = describe(model.config)
    heads = (6, 6) if family == "llama-mha" else (4, 2)
    sizes = [LayerSizes(6, structure.base.layers[0].num_key_value_heads, 56), LayerSizes(*heads, 40)]
    uneven = Architecture(48, (sizes[0], sizes[1], LayerSizes(0, 0, 24), sizes[0]))
    for number, architecture in enumerate((structure.base, uneven)):
        network = extract(model, structure, architecture)
        if family == "qwen3" and number:
            with pytest.raises(RequestError, match="no architecture for uneven qwen3"):
                write(tmp_path / str(number), architecture, network)
            continue
        info = write(tmp_path / str(number), architecture, network)
        result = check_gguf(info.path, read_record(info.path))
        assert result["max_abs_logprob_difference"] <= result["tolerance"] < 1e-3


@pytest.mark.parametrize("gguf_type", TYPES)
def test_types(gguf_type: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    # Rows of 80 are no multiple of 32.
    layers = (LayerSizes(4, 2, 96), LayerSizes(2, 1, 80), LayerSizes(0, 0, 96), LayerSizes(4, 2, 32))
    architecture = Architecture(64, layers)
    info = write(tmp_path / "p", architecture, cut(tiny_llama(head_dim=32), architecture), gguf_type=gguf_type)
    result = check_gguf(info.path, read_record(info.path))
    report = read_record(info.path)["entry"].get("quantization_report")
    if gguf_type in ("q8_0", "q4_0"):
        assert result["mean_abs_logprob_difference"] <= result["bound"]
        expected = {"blk.1.ffn_down": "f16"}
        if gguf_type == "q4_0":
            expected |= {"token_embd": "q8_0", "output": "q8_0"}
        assert info.quantization == report["scheme"] == gguf_type and report["exceptions"] == expected
        bits, rare = {"q8_0": (8.5, 16), "q4_0": (4.5, 16)}[gguf_type]
        total = sum(p.numel() for n, p in cut(tiny_llama(head_dim=32), architecture).named_parameters() if "proj" in n)
        assert report["bits_per_weight"] == pytest.approx((bits * (total - 64 * 80) + rare * 64 * 80) / total)
    else:
        assert result["max_abs_logprob_difference"] <= result["tolerance"] and report is None


@pytest.mark.parametrize("gguf_type", ["f32", "q8_0", "q4_0"])
def test_the_files_weights_can_be_scored_and_its_speed_measured(gguf_type: str, tmp_path: Path) -> None:
    """The network with the file's weights says what llama.cpp says of the file."""
    pytest.importorskip("xllamacpp")
    model = tiny_llama(num_hidden_layers=5)
    network = cut(model, AWKWARD)
    info = write(tmp_path / "p", AWKWARD, network, gguf_type=gguf_type)
    stored = take_stored_weights(copy.deepcopy(network), info.path)
    for name, parameter in stored.named_parameters():
        original = network.get_parameter(name)
        error = (parameter - original).norm() / original.norm()
        assert error <= {"f32": 0, "q8_0": 0.01, "q4_0": 0.15}[gguf_type]
    ids = probe_ids()
    mine = stored(input_ids=ids[:1]).logits[0].log_softmax(-1)
    runtime = LlamaCpp(info.path / f"model-{gguf_type}.gguf", 64)
    for position in (3, 11, 23):
        theirs = runtime.log_probabilities(ids[0, : position + 1].tolist(), 5)
        for token, value in theirs.items():
            assert abs(mine[position, token] - value) <= (1e-3 if gguf_type == "f32" else 0.05)
    speed = measure_speed(info.path, prompt=16, new=8, threads=1, repeats=1)
    assert speed["runtime"] == "llama.cpp" and speed["dtype"] == gguf_type
    assert speed["prefill_tps"] > 0 and speed["decode_tps"] > 0


def test_a_wrong_tensor_is_found_in_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    good = write(tmp_path / "good", UNEVEN)
    assert verify(good.path, record=True)["greedy_equal"] == 12
    as_it_is = {**DECI.layer, "self_attn.q_proj.weight": Stored(("attn_q.weight",))}
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], uneven=replace(DECI, layer=as_it_is)))
    bad = write(tmp_path / "bad", UNEVEN)
    with pytest.raises(VerificationError, match="log-probabilities differ by up to"):
        verify(bad.path)


def test_another_tokenization_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr("export.gguf_tokenizer.tokenizer_kind", lambda described: ("gpt2", "smollm"))
    info = write(tmp_path / "p", EVEN, tokenizer=tiny_tokenizer(["in 2024 and 1999 "] * 50), texts=["it was 1999"])
    with pytest.raises(VerificationError, match=r"llama\.cpp tokenizes"):
        check_gguf(info.path, read_record(info.path))


def test_the_file_is_the_whole_package(tmp_path: Path) -> None:
    info = write(tmp_path / "p", EVEN, gguf_type="f16", card="# A card\n")
    assert {p.name for p in info.path.iterdir()} == {"model-f16.gguf", "compression.json", "README.md"}
    assert info.bytes == (info.path / "model-f16.gguf").stat().st_size
    assert 0 < info.bytes - 2 * info.params < 60_000


def test_kinds_of_tokenizers() -> None:
    def described(pre: Any, normalizer: Any = None, **options: Any) -> dict[str, Any]:
        tokenizer = Tokenizer(models.BPE(**options))
        if pre is not None:
            tokenizer.pre_tokenizer = pre
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        return json.loads(tokenizer.to_str())

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    assert tokenizer_kind(described(byte_level)) == ("gpt2", "gpt-2")
    assert tokenizer_kind(described(pre_tokenizers.Sequence([digits, byte_level]))) == ("gpt2", "smollm")
    sentence_piece = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    assert tokenizer_kind(described(None, sentence_piece, byte_fallback=True)) == ("llama", "default")
    for pre, normalizer, named in (
        (pre_tokenizers.Whitespace(), None, "Whitespace"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None, "ByteLevel"),
        (byte_level, normalizers.Lowercase(), "Lowercase"),
        (None, None, "none"),
    ):
        with pytest.raises(RequestError, match=named):
            tokenizer_kind(described(pre, normalizer))
    with pytest.raises(RequestError, match="WordLevel"):
        tokenizer_kind(json.loads(Tokenizer(models.WordLevel({"a": 0}, "a")).to_str()))


def test_what_llama_cpp_does_not_know_leaves_nothing(tmp_path: Path) -> None:
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(RequestError, match="pre-tokenizer"):
        write(tmp_path / "p", EVEN, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words))
    with pytest.raises(RequestError, match="without merges"):
        write(tmp_path / "p", EVEN, tokenizer=tiny.byte_tokenizer())
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    with pytest.raises(RequestError, match="rotary embeddings of type 'yarn'"):
        write(tmp_path / "p", EVEN, cut(tiny_llama(rope_parameters=rope), EVEN))
    with pytest.raises(RequestError, match="unknown gguf type 'q3'"):
        write(tmp_path / "p", EVEN, gguf_type="q3")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_scaled_rotary_embeddings(rope: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    info = write(tmp_path / "p", UNEVEN, cut(tiny_llama(rope_parameters=rope), UNEVEN))
    result = check_gguf(info.path, read_record(info.path))
    assert result["max_abs_logprob_difference"] <= result["tolerance"]


def test_sample_texts_are_the_same_everywhere() -> None:
    texts = sample_texts()
    assert texts == sample_texts() and len(texts) == 200 and len(set(texts)) > 190


@pytest.mark.skipif("COMPRESSOR_ASSETS" not in os.environ, reason="COMPRESSOR_ASSETS is not set")
@pytest.mark.parametrize("checkpoint", ["stories260K", "babyllama-char361", "prose-7m"])
def test_real_checkpoints(checkpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    assets = Path(os.environ["COMPRESSOR_ASSETS"])
    base = assets / "checkpoints" / checkpoint
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    rows = (assets / "data/tinystories/train.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    texts = [json.loads(row)["text"][:200] for row in rows]
    structure = describe(model.config)
    layers = list(structure.base.layers)
    full = layers[0]
    layers[1] = LayerSizes(full.num_attention_heads // 2, full.num_key_value_heads // 2, 64)
    layers[2] = LayerSizes(0, 0, full.intermediate_size)
    layers[3] = LayerSizes(full.num_attention_heads, full.num_key_value_heads, 0)
    uneven = Architecture(structure.base.hidden_size, tuple(layers))
    network = extract(model, structure, uneven)
    for gguf_type in ("f32", "q8_0"):
        info = write(tmp_path / gguf_type, uneven, network, tokenizer=base, gguf_type=gguf_type, texts=texts)
        result = check_gguf(info.path, read_record(info.path))
        assert result["tokenizer_equal"] == 400
        if gguf_type == "f32":
            assert result["max_abs_logprob_difference"] <= result["tolerance"] and result["greedy_equal"] == 12
    runtime = LlamaCpp(tmp_path / "f32" / "model-f32.gguf", 64)
    assert len(runtime.greedy(probe_ids()[0, :4].tolist(), 3)) == 3
