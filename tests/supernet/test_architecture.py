"""Canonical form and exact accounting, against hand counts and published numbers."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig

from supernet.architecture import Architecture, LayerSizes, StorageFormat
from supernet.families import describe

FULL = LayerSizes(32, 32, 11008)


def uniform(layers: int, width: int, of: int = 32) -> Architecture:
    kept = LayerSizes(32, 32, width)
    return Architecture(4096, (kept,) * layers + (LayerSizes(0, 0, 0),) * (of - layers))


def test_sizes_without_effect_vanish() -> None:
    assert LayerSizes(8, 0, 64) == LayerSizes(0, 4, 64) == LayerSizes(0, 0, 64)
    assert LayerSizes(8, 4, 0, num_experts=8) == LayerSizes(8, 4, 0)
    assert LayerSizes(0, 0, 64).skip == ["attention"] and not LayerSizes(0, 0, 64).removed
    assert LayerSizes(0, 0, 0).removed


def test_one_network_has_one_key_and_survives_json() -> None:
    one = Architecture(64, (LayerSizes(8, 0, 64), FULL))
    other = Architecture(64, (LayerSizes(0, 2, 64), FULL))
    assert one.key == other.key and len(one.key) == 16
    assert Architecture.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert one.key != Architecture(64, (FULL, LayerSizes(8, 0, 64))).key


def test_uniform_means_kept_layers_alike_and_whole() -> None:
    gone = LayerSizes(0, 0, 0)
    two, three = Architecture(64, (FULL,) * 2), Architecture(64, (FULL,) * 3)
    assert Architecture(64, (FULL, gone, FULL)).is_uniform_in(three)
    assert not Architecture(64, (FULL, LayerSizes(32, 32, 5504))).is_uniform_in(two)
    assert not Architecture(64, (LayerSizes(32, 32, 0),) * 2).is_uniform_in(two)
    assert not Architecture(64, (gone, gone)).is_uniform_in(two)


def test_query_heads_that_cannot_be_shared_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match="evenly"):
        LayerSizes(7, 2, 64)


# (layers, FFN width, billions of parameters) of LLaMA-NAS's search space on Llama-2-7B, to the three digits known.
LLAMA2 = [(32, 11008, 6.738), (32, 5504, 4.574), (28, 11008, 5.929), (24, 11008, 5.119), (24, 5504, 3.496)]


@pytest.mark.parametrize(("layers", "width", "billions"), LLAMA2)
def test_llama2_7b_counts(layers: int, width: int, billions: float) -> None:
    structure = describe(
        LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, dtype="bfloat16")
    )
    architecture = uniform(layers, width)
    parameters = 2 * 32000 * 4096 + layers * (4 * 4096**2 + 3 * 4096 * width + 2 * 4096) + 4096
    assert structure.parameters(architecture) == parameters
    assert round(parameters / 1e9, 3) == billions
    assert structure.bytes(architecture) == 2 * parameters
    linear = layers * (4 * 4096**2 + 3 * 4096 * width)
    assert structure.macs(architecture) == linear + 32000 * 4096 + layers * 2 * 4096
    assert structure.kv_cache_bytes(architecture, tokens=10) == 10 * layers * 2 * 4096 * 2


def test_bytes_under_a_scheme_by_hand() -> None:
    config = LlamaConfig(
        vocab_size=10, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    structure = describe(config)
    other = 2 * (10 * 32 + 3 * 32)  # embedding and three norms at 16 bits
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    int8 = sum(o * i + 2 * o + 16 for o, i in shapes)  # with the shape of each, two numbers of 64 bits
    assert structure.bytes(structure.base, StorageFormat(8, -1)) == other + int8
    # k and v have 16 outputs, no multiple of 32, and the last layer's 48 inputs hold no whole number of groups:
    # these three fall back to 8 bits by channel
    whole = [(32, 32), (32, 32)]
    int4 = sum(o * i // 2 + 2 * o * (i // 32) + 16 for o, i in whole)
    int4 += sum(o * i + 2 * o + 16 for o, i in shapes if (o, i) not in whole)
    assert structure.bytes(structure.base, StorageFormat(4, 32)) == other + int4
    assert structure.bytes(structure.base, StorageFormat(4, None)) == other + int4  # 32 is all that divides
    embedding = 10 * 32 // 2 + 2 * 10 + 16
    assert structure.bytes(structure.base, StorageFormat(4, 32, embedding=4)) == other + int4 - 2 * 10 * 32 + embedding
    # Codes of 3 bits fill words of 32 bits: 48 of them take 160 bits.
    assert StorageFormat(3, -1).rows_bytes(5, 48, 3, -1) == 5 * (160 // 8 + 2) + 16
    left_out = [(16, 32), (16, 32), (48, 32), (48, 32), (32, 48)]  # with a width that is no multiple of 32
    kept = sum(o * i + 2 * o + 16 for o, i in whole) + sum(2 * o * i for o, i in left_out)
    assert structure.bytes(structure.base, StorageFormat(8, -1, fallback=16)) == other + kept
