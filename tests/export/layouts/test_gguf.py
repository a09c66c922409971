"""The gguf layout, proved by llama.cpp itself where its wheel is installed."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from compressor.checks import check_formats
from export.layouts.gguf.checks import check_family, table_of
from export.layouts.gguf.families import DECI, FAMILIES, Stored
from export.layouts.gguf.file import FileSize, kinds_of, take_stored_weights, weight_file
from export.layouts.gguf.layout import input_squares
from export.layouts.gguf.runtime import check_gguf, measure_speed
from export.layouts.gguf.server import LlamaCpp
from export.layouts.gguf.types import QUANTIZED, TYPES, VALUES, blocks_of, stored_bytes, type_by_bits
from export.layouts.table import copies_hold, needs_uniform
from export.package_record import PackageRecord, check_files
from export.verify import verify
from supernet.architecture import Architecture, LayerSizes
from supernet.common.errors import RequestError, VerificationError
from supernet.families import describe, families
from supernet.slicing import extract
from tests.support import ROOT, tiny
from tests.support.export_networks import EVEN, TEXTS, UNEVEN, cut, probe_ids, tiny_llama, tiny_tokenizer, write_tiny
from tests.support.tiny_families import CONFIGS, LLAMA3_ROPE

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

write = partial(write_tiny, layout="gguf", gguf_type="f32")


def proved(package: PackageRecord, limit: float = 1e-2) -> dict[str, Any]:
    """What llama.cpp proves of an unquantized file, within its tolerance and a limit."""
    claims = check_gguf(package)
    assert claims["max_abs_logprob_difference"] <= claims["tolerance"] < limit
    return claims


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
# Every pitfall in one: the first layer has no attention, the last no MLP, the others differ in all sizes.
AWKWARD = Architecture(
    64, (LayerSizes(0, 0, 96), LayerSizes(2, 1, 32), LayerSizes(0, 0, 0), LayerSizes(4, 2, 0), LayerSizes(4, 2, 64))
)


@pytest.mark.parametrize("name", ["even", "uneven", "awkward"])
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=5 if name == "awkward" else 4)
    architecture = {"even": EVEN, "uneven": UNEVEN, "awkward": AWKWARD}[name]
    package = write(tmp_path / "p", architecture, cut(model, architecture), texts=TEXTS)
    assert (package.entry.layout, package.entry.quantization) == ("gguf", None)
    check_files(package.folder)
    result = proved(package, 1e-3)
    assert result["tokenizer_equal"] == 200 + len(TEXTS) and result["greedy_equal"] > 0


def tiny_member(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random network of one of `CONFIGS` with rows of whole blocks of 32 and the vocabulary of the tests' tokenizer.

    Settings that llama.cpp has defaults for have other values.
    """
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    config.vocab_size, config.hidden_size = 320, 96
    others = {"rms_norm_eps": 0.01, "layer_norm_eps": 0.01, "layer_norm_epsilon": 0.01, "norm_epsilon": 0.01}
    others |= {"head_dim": 16, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0}
    for name, value in others.items():
        if getattr(config, name, None):
            setattr(config, name, value)
    if "rope_theta" in (getattr(config, "rope_parameters", None) or {}):
        config.rope_parameters["rope_theta"] = 500.0
    for name, value in (HELD.get(family, {}) | changes).items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


# What llama.cpp takes for granted, where the tiny configuration says otherwise.
HELD: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "qwen3_5_text": {"rms_norm_eps": 1e-6},
    "gpt_neox-serial": {"attention_bias": True, "tie_word_embeddings": False},
}
REFUSED = {
    "smollm3-windows": "rotary positions in every fourth layer",
    "qwen3_moe-dense": "have no model.layers.1.mlp.gate_proj.weight",
    "opt": "does not know opt networks; it writes llama, mistral,",
    "opt-projected": "does not know opt",
}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_written_or_refused(family: str, tmp_path: Path) -> None:
    """The base, and a cut with thinner FFNs, fewer experts and a layer less; fewer heads where the plain class can."""
    model = tiny_member(family)
    structure = describe(model.config)
    if family in REFUSED:
        with pytest.raises(RequestError, match=REFUSED[family]):
            write(tmp_path / "p", structure.base, extract(model, structure, structure.base))
        assert not list(tmp_path.iterdir())
        return
    whole = families()[model.config.model_type].head_width_follows or family in ("olmo2", "starcoder2")

    def thinner(full: LayerSizes) -> LayerSizes:
        groups, share = full.num_key_value_heads, full.num_attention_heads // max(1, full.num_key_value_heads)
        groups = groups if whole else groups * 2 // 3 or groups
        while not whole and groups and 96 % (groups * share):
            groups -= 1
        return LayerSizes(groups * share, groups, 16 if full.num_experts else 32, max(0, full.num_experts - 1))

    cut_down = Architecture(96, (*map(thinner, structure.base.layers[:3]), LayerSizes(0, 0, 0)))
    for gguf_type, architecture in (("f32", structure.base), ("f32", cut_down), ("q8_0", structure.base)):
        network = extract(model, structure, architecture)
        package = write(tmp_path / f"{gguf_type}-{architecture.key}", architecture, network, gguf_type=gguf_type)
        if gguf_type == "f32":
            assert proved(package)["greedy_equal"] > 0
        else:
            assert check_gguf(package)["mean_abs_logprob_difference"] <= 0.03
            assert measure_speed(package, prompt=1, new=2, threads=1, vocabulary=64, repeats=1).decode_tps > 0
        stored = take_stored_weights(copy.deepcopy(network), package.folder)
        for name, parameter in stored.named_parameters():
            original = network.get_parameter(name)
            assert (parameter - original).norm() <= {"f32": 1e-6, "q8_0": 0.01}[gguf_type] * original.norm()


BIG = {"num_hidden_layers": 46, "head_dim": 8, "layer_types": ["full_attention"] * 46}
SLIDING, FULL = "sliding_attention", "full_attention"
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [2.0, 3.0, 4.0, 6.0],
    "original_max_position_embeddings": 512,
}
LOCAL = {
    "full_attention": LINEAR | {"rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e2},
}


@pytest.mark.parametrize(
    ("family", "changes", "context"),
    [
        ("gemma2", {"layer_types": [SLIDING, SLIDING, FULL, SLIDING]}, 64),
        ("gemma2", {"layer_types": [FULL] * 4}, 64),
        ("gemma2", BIG, 64),
        ("gemma2", {"layer_types": [FULL, SLIDING, SLIDING, SLIDING], "sliding_window": 20}, 20),
        ("gemma3_text", {"layer_types": [SLIDING, SLIDING, FULL, SLIDING], "rope_parameters": LOCAL}, 64),
        ("gemma3_text", {"layer_types": [SLIDING] * 4}, 64),
        (
            "phi3",
            {"rope_parameters": LONG, "max_position_embeddings": 2048, "original_max_position_embeddings": 512},
            512,
        ),
        ("granite", {"rope_parameters": LLAMA3_ROPE, "mlp_bias": True}, 64),
        ("mixtral", {"rope_parameters": LLAMA3_ROPE, "sliding_window": 32}, 32),
        ("olmo2", {"rope_parameters": LINEAR}, 64),
    ],
)
def test_windows_and_rotary_embeddings(family: str, changes: dict[str, Any], context: int, tmp_path: Path) -> None:
    """`context` is as far as llama.cpp computes what transformers does."""
    model = tiny_member(family, **changes)
    proved(write(tmp_path / "p", describe(model.config).base, model))
    header = gguf.GGUFReader(tmp_path / "p" / "model-f32.gguf").fields
    (length,) = (field.contents() for name, field in header.items() if name.endswith(".context_length"))
    assert length == context


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "have no activation 'gelu'; known are: silu"),
        ("llama", {"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}}, "rotate whole heads"),
        ("qwen3", {"attention_bias": True}, "qwen3 networks have no model.layers.0.self_attn.q_proj.bias"),
        (
            "qwen3",
            {"rope_parameters": LLAMA3_ROPE},
            "no rotary embeddings of type 'llama3'; known are: default, linear",
        ),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "leave out rotary positions in every fourth layer"),
        ("olmo2", {"tie_word_embeddings": True}, "a separate weight as their output head"),
        ("olmo2", {"head_dim": 32}, "query heads that are together as wide as the residual"),
        ("qwen3_moe", {"norm_topk_prob": False}, "shares of the chosen experts add up to 1"),
        ("gemma2", {"query_pre_attn_scalar": 10}, "have a query_pre_attn_scalar of 16 at this depth"),
        # The depth of the largest model: there, and there only, the scale is not the width of a head.
        ("gemma2", BIG | {"query_pre_attn_scalar": 8}, "scalar of 16 at this depth"),
        ("gemma2", {"attn_logit_softcapping": None}, "cap attention scores and logits"),
        ("gemma2", {"tie_word_embeddings": False}, "the embedding as their output head"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "cap neither attention scores nor logits"),
        ("gemma3_text", {"layer_types": [FULL, SLIDING, SLIDING, FULL]}, "have windows in all layers but"),
        ("gemma3_text", {"layer_types": [FULL] * 4}, "have windows in all layers but"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LINEAR}},
            "scale no rotary positions within windows",
        ),
        ("qwen3_5_text", {"linear_value_head_dim": 16}, "keys and values of the same width in linear attention"),
        ("qwen3_5_text", {"rms_norm_eps": 1e-5}, "have a rms_norm_eps of at most 1e-6"),
        ("gpt2", {"scale_attn_weights": False}, "scale attention scores by the width of a head"),
        ("starcoder2", {"use_bias": False}, "need model.layers.0.self_attn.q_proj.bias"),
        ("gpt_neox", {"hidden_act": "relu"}, "have no activation 'relu'"),
        ("gpt_neox", {"attention_bias": False}, "need gpt_neox.layers.0.attention.query_key_value.bias"),
        ("gpt_neox", {"tie_word_embeddings": True}, "a separate weight as their output head"),
    ],
)
def test_what_llama_cpp_takes_for_granted(family: str, changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    model = tiny_member(family, **changes)
    with pytest.raises(RequestError, match=reason):
        write(tmp_path / "p", describe(model.config).base, model)
    assert not list(tmp_path.iterdir())


def test_the_base_is_refused_only_for_what_no_cut_mends() -> None:
    def look(family: str, **changes: Any) -> None:
        config = tiny_member(family, **changes).config
        check_family(config, {tensor.name for tensor in describe(config).tensors})

    look("smollm3", no_rope_layers=[1, 0, 1, 1])
    look("gemma3_text", layer_types=[FULL, SLIDING, SLIDING, FULL])
    with pytest.raises(RequestError, match="shares of the chosen experts"):
        look("qwen3_moe", norm_topk_prob=False)
    with pytest.raises(RequestError, match="does not know opt"):
        look("opt")


def test_a_job_writes_the_sub_network_whose_layers_are_alike() -> None:
    """Where llama.cpp holds no other; that one is picked must be asked for, and is said before any work is done."""

    def job(family: str, *formats: str) -> Any:
        config = tiny_member(family).config
        return SimpleNamespace(
            recipe=SimpleNamespace(
                formats=formats,
                quantizing=SimpleNamespace(schemes=[], bits=None, embedding=None),
                targets=SimpleNamespace(max_bytes=None),
            ),
            checkpoint=SimpleNamespace(config=config),
            structure=describe(config),
            declared_space=SimpleNamespace(bits=False),
            tokenizer=tiny_tokenizer(),
        )

    check_formats(job("llama", "uneven", "gguf"))
    check_formats(job("gemma2", "uneven", "uniform", "gguf"))
    with pytest.raises(RequestError, match=r"gemma2 networks only where all layers are alike.*--format uniform,gguf"):
        check_formats(job("gemma2", "uneven", "gguf"))
    asked = job("llama", "uneven", "gguf-mixed")
    with pytest.raises(RequestError, match="gguf-mixed: its types are those that fit a number of bytes; name it with"):
        check_formats(asked)
    asked.recipe.targets.max_bytes, asked.quantizable = "1MB", False
    with pytest.raises(RequestError, match="gguf-mixed: is for networks whose weights are in linear layers"):
        check_formats(asked)
    gemma, llama = job("gemma2").checkpoint.config, job("llama").checkpoint.config
    assert needs_uniform("gguf-q8_0", gemma)
    assert not needs_uniform("onnx", gemma) and not needs_uniform("gguf", llama)


def test_what_llama_cpp_would_refuse_is_not_picked_for_it() -> None:
    """SmolLM3 without its second layer: rotary positions are left out where llama.cpp has them."""
    config = tiny_member("smollm3").config
    full = describe(config).base
    thin = replace(full, layers=tuple(replace(layer, intermediate_size=32) for layer in full.layers))
    without = replace(thin, layers=(thin.layers[0], LayerSizes(0, 0, 0), *thin.layers[2:]))
    assert copies_hold(thin, config, ["uniform", "gguf"])
    assert copies_hold(without, config, ["uniform"]) and not copies_hold(without, config, ["uniform", "gguf"])


@pytest.mark.parametrize("family", ["gemma2", "phi3", "mixtral", "olmo2", "granite", "smollm3", "gpt2"])
def test_only_llamas_blocks_may_be_uneven(family: str, tmp_path: Path) -> None:
    model = tiny_member(family)
    structure = describe(model.config)
    full = structure.base.layers[0]
    thin = LayerSizes(full.num_attention_heads, full.num_key_value_heads, 32, full.num_experts)
    uneven = Architecture(96, (full, thin, full, full))
    with pytest.raises(RequestError, match=f"no architecture for uneven {family} networks; let one"):
        write(tmp_path / "p", uneven, extract(model, structure, uneven))


def test_linear_attention_may_miss_any_layer(tmp_path: Path) -> None:
    model = tiny_member("qwen3_5_text")
    structure = describe(model.config)
    rest = Architecture(96, (LayerSizes(0, 0, 0), *structure.base.layers[1:]))
    proved(write(tmp_path / "p", rest, extract(model, structure, rest)), 1e-3)


def test_a_layer_that_is_missing_moves_the_others(tmp_path: Path) -> None:
    model = tiny_member("smollm3")
    structure = describe(model.config)
    full = structure.base.layers[0]
    rest = Architecture(96, (LayerSizes(0, 0, 0), full, full, full))
    with pytest.raises(RequestError, match="every fourth layer, and in no other; with the layers that are left"):
        write(tmp_path / "p", rest, extract(model, structure, rest))


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_the_report_of_other_layouts(family: str, tmp_path: Path) -> None:
    """Stacked experts and a router that stays exact; matrices that are stored transposed."""
    model = tiny_member(family)
    report = write(tmp_path / "p", describe(model.config).base, model, gguf_type="q4_0").entry.quantization_report
    layers = [f"blk.{i}" for i in range(4)]
    if family == "mixtral":  # four experts of 56 neurons
        expected = {f"{layer}.ffn_gate_inp": "f32" for layer in layers} | {"token_embd": "q8_0", "output": "q8_0"}
        expected |= {f"{layer}.ffn_down_exps": "f16" for layer in layers}
        four, rare, exact = 3 * 96 * 96 + 4 * 2 * 56 * 96, 4 * 56 * 96, 4 * 96
    else:
        expected = {f"{layer}.ffn_down": "f16" for layer in layers} | {"token_embd": "q8_0", "position_embd": "q8_0"}
        four, rare, exact = 4 * 96 * 96 + 56 * 96, 56 * 96, 0
    assert report.exceptions == expected
    bits = (4.5 * four + 16 * rare + 32 * exact) / (four + rare + exact)
    assert report.bits_per_weight == pytest.approx(bits)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt2", "starcoder2", "gpt_neox"])
def test_gelu_is_all_that_is_less_exact(family: str, tmp_path: Path) -> None:
    """Without what comes out of the MLP, a float32 file is as exact as that of other families."""
    model = tiny_member(family)
    last = ("mlp.down_proj.weight", "mlp.c_proj.weight", "mlp.dense_4h_to_h.weight")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(last):
                parameter.zero_()
    assert check_gguf(write(tmp_path / "p", describe(model.config).base, model))["max_abs_logprob_difference"] < 1e-5


@pytest.mark.parametrize("family", ["llama-rope-biases-tied", "llama-mha", "mistral", "qwen2"])
def test_uneven_families(family: str, tmp_path: Path) -> None:
    model = tiny_member(family)
    structure = describe(model.config)
    heads = (6, 6) if family == "llama-mha" else (4, 2)
    sizes = [LayerSizes(6, structure.base.layers[0].num_key_value_heads, 56), LayerSizes(*heads, 40)]
    uneven = Architecture(96, (sizes[0], sizes[1], LayerSizes(0, 0, 24), sizes[0]))
    proved(write(tmp_path / "p", uneven, extract(model, structure, uneven)), 1e-3)


def test_inputs_are_weighed_in_the_order_of_the_file() -> None:
    """More value heads than keys: llama.cpp reads the inputs of the output projection in another order."""
    model = tiny_member("qwen3_5_text")
    moved = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and ".layers." in name and not name.endswith("conv1d.weight"):
            stored, inputs = table_of(model.config).stored(name), torch.arange(parameter.shape[1]).float()
            for values in stored.to_file(inputs.expand_as(parameter), model.config).values():
                assert torch.equal(values, stored.inputs_to_file(inputs, model.config).expand_as(values)), name
            moved += not torch.equal(stored.inputs_to_file(inputs, model.config), inputs)
    assert moved == model.config.layer_types.count("linear_attention") == 2


def test_every_sequence_of_the_calibration_weighs_the_same() -> None:
    """Also those of the last batch, which may hold few."""
    network, ids = tiny_llama(), torch.cat([probe_ids()] * 3 + [probe_ids(vocabulary=2)[:1]])
    whole = input_squares(network, ids)
    each = [input_squares(network, row[None]) for row in ids]
    for name, squares in whole.items():
        assert torch.allclose(squares, torch.stack([one[name] for one in each]).mean(0), rtol=1e-4), name


@pytest.mark.parametrize("gguf_type", TYPES)
def test_types(gguf_type: str, tmp_path: Path) -> None:
    """Every type in llama.cpp, where its blocks divide rows of 256 and 512 and not those of 320 and 80."""
    layers = (LayerSizes(4, 2, 512), LayerSizes(4, 2, 80), LayerSizes(0, 0, 320))
    architecture = Architecture(256, layers)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "head_dim": 64}
    network = cut(tiny_llama(**sizes), architecture)
    package = write(tmp_path / "p", architecture, network, gguf_type=gguf_type, calibration=probe_ids())
    report = package.entry.quantization_report
    header = gguf.GGUFReader(package.folder / package.entry.file).data_offset
    expected = FileSize(tiny_llama(**sizes).config, architecture)
    assert package.entry.bytes - header == expected.tensors(kinds_of(gguf_type, None, None))
    if gguf_type not in QUANTIZED:
        assert proved(package, 1) and report is None
        return
    result = check_gguf(package)
    assert result["mean_abs_logprob_difference"] <= result["bound"]
    instead = TYPES[gguf_type].instead if TYPES[gguf_type].block == 256 else gguf_type
    expected = {"blk.1.ffn_down": "f16", "blk.2.ffn_down": instead, "token_embd": "q8_0", "output": "q8_0"}
    assert package.entry.quantization == report.scheme == gguf_type
    assert report.exceptions == {name: kind for name, kind in expected.items() if kind != gguf_type}
    total = sum(p.numel() for n, p in network.named_parameters() if "proj" in n)
    odd, less = 256 * 80, 256 * 320
    bits = TYPES[gguf_type].bits * (total - odd - less) + 16 * odd + TYPES[instead].bits * less
    assert report.bits_per_weight == pytest.approx(bits / total)
    modelfile = (package.folder / "Modelfile").read_text()
    assert modelfile.startswith(f"FROM ./model-{gguf_type}.gguf\n")


@pytest.mark.parametrize("tied", [True, False])
def test_every_half_block_has_the_type_of_its_bits(tied: bool, tmp_path: Path) -> None:
    layers = (
        LayerSizes(4, 2, 512, attention_bits=8, ffn_bits=2),
        LayerSizes(4, 2, 256, ffn_bits=3),
        LayerSizes(0, 0, 320, ffn_bits=3),
    )
    head = {} if tied else {"head_bits": 8}
    bits = Architecture(256, layers, embedding_bits=4, **head)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "head_dim": 64}
    model = tiny_llama(**sizes, tie_word_embeddings=tied)
    network = cut(model, bits.without_bits())
    given = {"gguf_type": "mixed", "calibration": probe_ids()}
    with pytest.raises(RequestError, match="needs the bits"):
        write(tmp_path / "none", bits.without_bits(), network, **given)
    package = write(tmp_path / "p", bits.without_bits(), network, **given, bits=bits)
    reader = gguf.GGUFReader(package.folder / package.entry.file)
    kinds = {tensor.name.removesuffix(".weight"): tensor.tensor_type.name for tensor in reader.tensors}
    assert [kinds[f"blk.{layer}.attn_output"] for layer in (0, 1)] == ["Q8_0", "F16"]
    assert [kinds[f"blk.{layer}.ffn_down"] for layer in (0, 1, 2)] == ["Q2_K", "Q3_K", "IQ4_NL"]
    assert kinds["token_embd"] == "IQ4_NL" and kinds.get("output") == (None if tied else "Q8_0")
    # What it takes is known exactly before it is written, header and all.
    size = FileSize(model.config, bits.without_bits())
    header = size.header(tiny_tokenizer(), package.entry.name)
    assert header == reader.data_offset
    assert header + size.tensors(partial(type_by_bits, bits=bits)) == package.entry.bytes
    report = package.entry.quantization_report
    assert package.entry.quantization == "mixed" and report.bits == bits and report.group_size == 32
    assert report.exceptions == {"blk.2.ffn_down": "iq4_nl for q3_k"}
    result = check_gguf(package)
    assert result["mean_abs_logprob_difference"] <= result["bound"] == TYPES["q2_k"].bound


@pytest.mark.parametrize(("embedding", "kind"), [(16, "F16"), (None, "Q8_0"), (8, "Q8_0"), (4, "IQ4_NL")])
def test_the_embedding_has_the_bits_that_were_asked_for(embedding: int | None, kind: str, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    package = write(tmp_path / "p", EVEN, cut(model, EVEN), gguf_type="q4_0", embedding=embedding)
    reader = gguf.GGUFReader(package.folder / package.entry.file)
    assert {t.name: t.tensor_type.name for t in reader.tensors}["token_embd.weight"] == kind
    expected = FileSize(model.config, EVEN).tensors(kinds_of("q4_0", embedding, None))
    assert package.entry.bytes - reader.data_offset == expected
    bits = {"F16": 16, "Q8_0": 8.5, "IQ4_NL": 4.5}[kind]
    assert (package.entry.quantization_report.embedding, package.entry.quantization_report.head) == (bits, bits)
    check_gguf(package)


@pytest.mark.parametrize("gguf_type", [name for name, kind in TYPES.items() if kind.searched])
def test_searched_blocks(gguf_type: str) -> None:
    """The reader of the gguf package finds the values within the error of the type, and what counts more is nearer."""
    torch.manual_seed(0)
    weight, kind = torch.randn(8, 512) * torch.rand(8, 1), TYPES[gguf_type]
    # The mean squared error of a normal weight, a little above that of the best quantizer with so many levels.
    limits = {"q6_k": 4e-4, "q5_k": 2e-3, "q5_1": 2e-3, "q4_k": 7e-3, "iq4_nl": 7e-3, "q4_0": 9e-3, "q3_k": 0.03}
    limits["q2_k"] = 0.1
    important = torch.ones(512)
    important[::7] = 1000.0

    def errors(importance: torch.Tensor | None) -> torch.Tensor:
        blocks = blocks_of(weight, gguf_type, importance)
        assert blocks.nbytes == stored_bytes((8, 512), gguf_type) == 8 * 512 * kind.bits / 8
        read = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[gguf_type.upper()])
        return (torch.from_numpy(read) - weight).square()

    plain = errors(None)
    assert plain.mean() <= limits[gguf_type] * weight.square().mean()
    assert errors(important)[:, ::7].mean() < 0.9 * plain[:, ::7].mean()
    if gguf_type == "q5_1":  # the only one of these whose offset has a sign: weights may lie above zero
        above = 1 + 0.1 * torch.rand(8, 512)
        read = gguf.quants.dequantize(blocks_of(above, gguf_type), gguf.GGMLQuantizationType.Q5_1)
        assert (torch.from_numpy(read) - above).abs().max() <= 0.1 / 31
    nothing = blocks_of(torch.zeros(2, 256), gguf_type)
    assert not gguf.quants.dequantize(nothing, gguf.GGMLQuantizationType[gguf_type.upper()]).any()


@pytest.mark.parametrize(("gguf_type", "codes"), [("iq4_nl", VALUES[1:]), ("q4_0", range(-7, 8))])
def test_a_block_whose_largest_weight_is_at_the_shorter_end_is_held_exactly(
    gguf_type: str, codes: Sequence[int]
) -> None:
    """The codes reach further on one side. Such weights are multiples of the other end's scale."""
    held = 0.5 * torch.tensor([*codes, *codes, *codes][:32], dtype=torch.float32).repeat(2, 1)
    for weight in (held, -held):
        read = gguf.quants.dequantize(blocks_of(weight, gguf_type), gguf.GGMLQuantizationType[gguf_type.upper()])
        assert torch.equal(torch.from_numpy(read), weight)


@pytest.mark.parametrize("gguf_type", ["bf16", "f16"])
@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_moe", "mixtral"])
def test_networks_that_amplify_rounding_are_proved(family: str, gguf_type: str, tmp_path: Path) -> None:
    """Linear attention and routers, with weights of several seeds; the bound stays far below what a fault makes."""
    for seed in range(3):
        model = tiny_member(family, seed=seed)
        structure = describe(model.config)
        network = extract(model, structure, structure.base)
        package = write(tmp_path / f"{seed}", structure.base, network, gguf_type=gguf_type)
        claims = proved(package, 0.3)
        assert claims["tolerance"] >= package.probe.rounding > 0


@pytest.mark.parametrize("gguf_type", ["f32", "q8_0", "q4_0"])
def test_the_files_weights_can_be_scored_and_its_speed_measured(gguf_type: str, tmp_path: Path) -> None:
    """The network with the file's weights says what llama.cpp says of the file."""
    model = tiny_llama(num_hidden_layers=5)
    network = cut(model, AWKWARD)
    package = write(tmp_path / "p", AWKWARD, network, gguf_type=gguf_type)
    stored = take_stored_weights(copy.deepcopy(network), package.folder)
    for name, parameter in stored.named_parameters():
        original = network.get_parameter(name)
        error = (parameter - original).norm() / original.norm()
        assert error <= {"f32": 0, "q8_0": 0.01, "q4_0": 0.15}[gguf_type]
    ids = probe_ids()
    mine = stored(input_ids=ids[:1]).logits[0].log_softmax(-1)
    runtime = LlamaCpp(package.folder / f"model-{gguf_type}.gguf", 64)
    for position in (3, 11, 23):
        theirs = runtime.log_probabilities(ids[0, : position + 1].tolist(), 5)
        for token, value in theirs.items():
            assert abs(mine[position, token] - value) <= (1e-3 if gguf_type == "f32" else 0.05)
    speed = measure_speed(package, prompt=16, new=8, threads=1, vocabulary=320, repeats=1)
    assert speed.runtime == "llama.cpp" and speed.dtype == gguf_type
    assert speed.prefill_tps > 0 and speed.decode_tps > 0


def test_no_more_is_timed_than_the_files_context_holds(tmp_path: Path) -> None:
    """The base reads more at once than a file whose context is a window of its attention."""
    model = tiny_member("mixtral", sliding_window=24)
    package = write(tmp_path / "p", describe(model.config).base, model)
    speed = measure_speed(package, prompt=128, new=128, threads=1, vocabulary=64, repeats=1)
    assert (speed.prompt, speed.new) == (12, 12) and speed.prefill_tps > 0
    server = LlamaCpp(weight_file(package.folder)[0], 264)
    reply = server.complete([1] * speed.prompt, speed.new, ignore_eos=True)
    assert reply["timings"]["predicted_n"] == speed.new  # as many as are said to be timed
    with pytest.raises(RuntimeError, match=r"with 400: .*exceeds the available context size"):
        server.timed([1] * 128, 128)


def test_timing_is_in_a_process_without_torch_and_its_failure_is_one_line(tmp_path: Path) -> None:
    """Where torch has computed on several threads, llama.cpp on several is slowed down by a tenfold."""
    code = "import sys, export.layouts.gguf.speed_child; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    package = write(tmp_path / "good", UNEVEN)
    weight_file(package.folder)[0].write_bytes(b"GGUF and nothing else")
    with pytest.raises(RuntimeError, match=r"timing it in llama\.cpp failed: .+") as caught:
        measure_speed(package, prompt=4, new=2, threads=1)
    assert "\n" not in str(caught.value)


def test_a_wrong_tensor_is_found_in_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write(tmp_path / "good", UNEVEN)
    assert verify(good.folder, record=True)["greedy_equal"] == 12
    as_it_is = {**DECI.layer, "self_attn.q_proj.weight": Stored(("attn_q.weight",))}
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], uneven=replace(DECI, layer=as_it_is)))
    bad = write(tmp_path / "bad", UNEVEN)
    with pytest.raises(VerificationError, match="log-probabilities differ by up to"):
        verify(bad.folder)


def test_the_file_is_the_whole_package(tmp_path: Path) -> None:
    entry = write(tmp_path / "p", EVEN, gguf_type="f16", card="# A card\n").entry
    assert {p.name for p in (tmp_path / "p").iterdir()} == {
        "model-f16.gguf",
        "compression.json",
        "README.md",
        "Modelfile",
    }
    assert entry.file == "model-f16.gguf" and entry.bytes == (tmp_path / "p" / entry.file).stat().st_size
    assert 0 < entry.bytes - 2 * entry.params < 60_000


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


@pytest.mark.parametrize("rope", [LINEAR, LLAMA3_ROPE], ids=lambda rope: str(rope["rope_type"]))
def test_scaled_rotary_embeddings(rope: dict[str, Any], tmp_path: Path) -> None:
    proved(write(tmp_path / "p", UNEVEN, cut(tiny_llama(rope_parameters=rope), UNEVEN)))


@pytest.mark.skipif("COMPRESSOR_ASSETS" not in os.environ, reason="COMPRESSOR_ASSETS is not set")
@pytest.mark.parametrize("checkpoint", ["stories260K", "babyllama-char361", "prose-7m"])
def test_real_checkpoints(checkpoint: str, tmp_path: Path) -> None:
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
        options = {"tokenizer": base, "gguf_type": gguf_type, "texts": texts}
        package = write(tmp_path / gguf_type, uneven, network, **options)
        assert check_gguf(package)["tokenizer_equal"] == 400
        if gguf_type == "f32":
            assert proved(package)["greedy_equal"] == 12
    runtime = LlamaCpp(tmp_path / "f32" / "model-f32.gguf", 64)
    assert len(runtime.greedy(probe_ids()[0, :4].tolist(), 3)) == 3
