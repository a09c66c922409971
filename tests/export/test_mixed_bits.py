"""Bits by architecture: every family computes with them as its package does, and bytes are known beforehand."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from compressor.stages.quantizing import bits_by_module
from export.probe import logits_of
from export.quantization.plan import linear_layers_in
from export.quantization.quantize import quantize_mixed
from export.quantization.round_to_nearest import round_network
from export.quantization.rounded_variants import RoundedVariants, in_groups
from export.quantization.schemes import SCHEMES, OuterBits, SchemePlan, bound_of
from export.shards import weight_bytes, weight_files
from export.verify import check
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, LayerSizes, StorageFormat, Structure
from supernet.common.files import read_json
from supernet.families import describe
from supernet.loading import load_network
from supernet.slicing import extract
from supernet.variants import FixedVariants
from tests.support.export_networks import UNEVEN, probe_ids, tiny_llama, write_tiny
from tests.support.tiny_families import CONFIGS, assert_close, logits, random_architecture, tiny_network

STORED = StorageFormat(16, 32, by_architecture=True)


def in_bits(architecture: Architecture, rng: random.Random, tied: bool) -> Architecture:
    """With random bits everywhere."""
    layers = tuple(
        replace(layer, attention_bits=rng.choice([0, 2, 3, 4, 8]), ffn_bits=rng.choice([0, 2, 3, 4, 8]))
        for layer in architecture.layers
    )
    return replace(
        architecture, layers=layers, embedding_bits=rng.choice([4, 8]), head_bits=0 if tied else rng.choice([4, 8])
    )


def plan_of(structure: Structure, model_config: object, architecture: Architecture) -> SchemePlan:
    bits = bits_by_module(structure, model_config, architecture, STORED)  # type: ignore[arg-type]
    return SchemePlan("mixed", 32, [], OuterBits(architecture.embedding_bits, architecture.head_bits or 16), bits)


@pytest.mark.parametrize(
    "family", [name for name in CONFIGS if name not in ("gpt2", "mixtral", "qwen3_moe", "qwen3_moe-dense")]
)
def test_every_family_computes_with_its_bits(family: str) -> None:
    model = tiny_network(family)
    whole = logits(model)
    supernet, rng = SuperNetwork(model), random.Random(11)
    supernet.use(RoundedVariants(supernet, None, partial(in_groups, group_size=32), 2**24))
    for _ in range(2):
        plain = random_architecture(supernet.base, rng)
        architecture = in_bits(plain, rng, supernet.structure.tied)
        supernet.activate(supernet.base)
        network, unrounded = (extract(model, supernet.structure, plain) for _ in range(2))
        round_network(network, plan_of(supernet.structure, model.config, architecture), linear_layers_in(network))
        supernet.activate(architecture)
        assert_close(logits(model), logits(network))
        # As stored again, in any order.
        supernet.activate(plain)
        assert_close(logits(model), logits(unrounded))
    supernet.activate(supernet.base)
    assert torch.equal(logits(model), whole)


def test_bits_are_never_left_out_in_silence() -> None:
    supernet = SuperNetwork(tiny_network("llama"))
    architecture = in_bits(supernet.base, random.Random(0), supernet.structure.tied)
    for variants in (None, FixedVariants({})):
        supernet.use(variants)
        with pytest.raises(ValueError, match="bits need a provider"):
            supernet.activate(architecture)
    supernet.use(RoundedVariants(supernet, None, partial(in_groups, group_size=32), 2**20))
    supernet.activate(architecture)
    with pytest.raises(ValueError, match="bits need a provider"):
        supernet.use(None)
    supernet.activate(supernet.base)
    with pytest.raises(ValueError, match="bits come when the network is packaged"):
        extract(supernet.model, supernet.structure, architecture)


def test_what_was_dropped_is_made_again() -> None:
    supernet = SuperNetwork(tiny_network("llama"))
    architecture = in_bits(supernet.base, random.Random(1), supernet.structure.tied)
    seen = []
    for memory in (0, 2**24):
        supernet.use(RoundedVariants(supernet, None, partial(in_groups, group_size=32), memory))
        supernet.activate(architecture)
        seen.append(logits(supernet.model))
        supernet.activate(supernet.base)
    assert torch.equal(*seen)


@pytest.mark.parametrize("seed", range(20))
def test_packages_hold_them_in_the_bytes_that_were_counted(seed: int, tmp_path: Path) -> None:
    model, rng = tiny_llama(head_dim=32), random.Random(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # what is not rounded is stored so
            parameter.copy_(parameter.to(torch.bfloat16))
    structure = describe(model.config)
    plain = UNEVEN if seed == 0 else random_architecture(structure.base, rng)
    architecture = in_bits(plain, rng, tied=False)
    network = extract(model, structure, plain)
    source = write_tiny(tmp_path / "best", plain, network).folder
    bits = bits_by_module(structure, model.config, architecture, STORED)
    record = quantize_mixed(source, tmp_path / "best-mixed", bits, architecture, 32)
    assert record.entry.quantization_report.bits == architecture and record.entry.architecture == plain
    headers = [int.from_bytes(file.read_bytes()[:8], "little") + 8 for file in weight_files(record.folder)]
    assert weight_bytes(record.folder) - sum(headers) == structure.bytes(architecture, STORED)
    round_network(network, plan_of(structure, model.config, architecture), linear_layers_in(network))
    package, _ = load_network(record.folder, torch.float32, True)
    assert_close(logits_of(package, probe_ids()), logits_of(network, probe_ids()))
    if seed == 0:
        claims = check(record.folder)
        assert claims["quantization"] == "mixed"


def test_tuned_packages_hold_the_same_bits_and_lose_less(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_llama(head_dim=32)
    structure = describe(model.config)
    of_layers = zip(UNEVEN.layers, (8, 4, 0, 3), (0, 2, 8, 0), strict=True)
    layers = [replace(layer, attention_bits=a, ffn_bits=f) for layer, a, f in of_layers]
    architecture = replace(UNEVEN, layers=tuple(layers), embedding_bits=8, head_bits=8)
    network = extract(model, structure, UNEVEN)
    source = write_tiny(tmp_path / "best", UNEVEN, network).folder
    bits = bits_by_module(structure, model.config, architecture, STORED)
    calibration = torch.randint(0, model.config.vocab_size, (16, 32), generator=torch.Generator().manual_seed(1))
    plain = quantize_mixed(source, tmp_path / "plain", bits, architecture, 32)
    tuned = quantize_mixed(source, tmp_path / "tuned", bits, architecture, 32, calibration=calibration, iterations=50)
    # 1. The same layers in the same bits, proved.
    config, same = (read_json(record.folder / "config.json")["quantization_config"] for record in (tuned, plain))
    assert config == same and weight_bytes(tuned.folder) == weight_bytes(plain.folder)
    assert tuned.entry.quantization_report.iterations == 50 and "auto-round" in tuned.lineage.quantizer
    assert check(tuned.folder)["quantization"] == "mixed"
    by_gptq = quantize_mixed(source, tmp_path / "gptq", bits, architecture, 32, calibration=calibration)
    assert check(by_gptq.folder)["quantization"] == "mixed" and "auto-round" not in by_gptq.lineage.quantizer
    # 2. On the calibration text they are nearer to what was rounded.
    with torch.no_grad():
        whole = logits_of(network, calibration).log_softmax(-1)
        off = []
        for record in (tuned, by_gptq, plain):
            package, _ = load_network(record.folder, torch.float32, True)
            rounded = logits_of(package, calibration).log_softmax(-1)
            off.append(float((whole.exp() * (whole - rounded)).sum(-1).mean()))
    assert max(off[:2]) < off[2]


def test_a_proof_allows_what_the_fewest_bits_cost() -> None:
    bits = Architecture(64, (LayerSizes(4, 2, 64, attention_bits=8, ffn_bits=3),), embedding_bits=4)
    assert bound_of("mixed", bits) == SCHEMES["int3"].bound
