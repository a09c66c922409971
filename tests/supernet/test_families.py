"""Parity for every family: the super-network is exact, and a view, what is cut from it and what is saved are one."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from compressor.cli import run
from export.package import write_package
from search.presets import PRESETS
from search.sampling import sample, uniform_members
from search.space import SearchSpace
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, LayerSizes
from supernet.common.errors import RequestError
from supernet.families import describe, families
from supernet.importance import IMPORTANCES
from supernet.ordering import apply_ordering, order_by, score_shapes
from supernet.slicing import extract, fits_plain_class, sliced
from tests.support import ROOT, tiny
from tests.support.export_networks import tiny_tokenizer
from tests.support.tiny_families import CONFIGS, IDS, assert_close, logits, random_architecture, tiny_network


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    yield tiny_network(request.param)


def stored_names(folder: Path) -> set[str]:
    """Names of the tensors in a file, whatever layer or expert they are of."""
    return {re.sub(r"\.\d+\.", ".N.", name) for name in load_file(folder / "model.safetensors")}


def test_every_family_is_tested() -> None:
    assert {name.partition("-")[0] for name in CONFIGS} == set(families())


def test_the_guide_shows_a_family_as_it_is() -> None:
    assert (ROOT / "supernet/families/starcoder2.py").read_text() in (ROOT / "docs/adding-a-family.md").read_text()


def test_full_architecture_is_the_original_bit_for_bit(model: PreTrainedModel) -> None:
    before = logits(model)
    settings = model.config.to_dict()
    supernet = SuperNetwork(model)
    rng = random.Random(1)
    for _ in range(5):
        supernet.activate(random_architecture(supernet.base, rng))
        logits(model)
    supernet.activate(supernet.base)
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == settings


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "taylor", "random"])
def test_ordering_leaves_the_function_unchanged(model: PreTrainedModel, criterion: str) -> None:
    before = logits(model)
    supernet = SuperNetwork(model)
    order = order_by(IMPORTANCES[criterion](supernet, [IDS]))
    assert order.keys() == score_shapes(supernet.structure).keys()
    assert any(not torch.equal(o, o.sort().values) for o in order.values())
    apply_ordering(supernet, order)
    assert_close(logits(model), before)
    if criterion == "random":
        return
    for units, score in IMPORTANCES[criterion](supernet, [IDS]).items():
        assert torch.all(score[..., :-1] >= score[..., 1:] - 1e-6 * score.max()), f"{units} is not in order"


def test_state_dict_never_shows_a_sub_network(model: PreTrainedModel) -> None:
    supernet = SuperNetwork(model)
    before = {name: value.shape for name, value in model.state_dict().items()}
    with supernet.activated(random_architecture(supernet.base, random.Random(4))):
        assert {name: value.shape for name, value in model.state_dict().items()} == before


def test_larger_than_the_base_is_refused(model: PreTrainedModel) -> None:
    supernet = SuperNetwork(model)
    full = supernet.base.layers[0]
    wide = replace(full, intermediate_size=full.intermediate_size + 8)
    with pytest.raises(ValueError, match="larger"):
        supernet.activate(Architecture(supernet.base.hidden_size, (wide, *supernet.base.layers[1:])))


def test_view_equals_extracted_and_counts_are_exact(model: PreTrainedModel) -> None:
    supernet = SuperNetwork(model)
    rng = random.Random(2)
    for _ in range(8):
        architecture = random_architecture(supernet.base, rng)
        standalone = extract(model, supernet.structure, architecture)
        with supernet.activated(architecture):
            assert_close(logits(standalone), logits(model))
        counted = sum(p.numel() for p in standalone.parameters())
        assert supernet.structure.parameters(architecture) == counted
        assert supernet.structure.bytes(architecture) == 4 * counted


def test_gradients_reach_the_full_weights_and_only_the_active_part(model: PreTrainedModel) -> None:
    supernet = SuperNetwork(model)
    architecture = random_architecture(supernet.base, random.Random(6))
    with supernet.activated(architecture):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for tensor in supernet.structure.tensors:
        gradient = model.get_parameter(tensor.name).grad
        if supernet.structure.shape(tensor, architecture) is None:
            assert gradient is None
        elif tensor.role in ("linear", "embedding", "head"):
            kept = sliced(tensor, gradient, supernet.structure, architecture)
            assert gradient.count_nonzero() == kept.count_nonzero() > 0, tensor.name


def test_macs_and_cache_are_those_of_the_extracted_network(model: PreTrainedModel) -> None:
    """One token behind seven others: matrix products as torch counts them, keys and values as the cache holds them."""
    supernet = SuperNetwork(model)
    structure, rng = supernet.structure, random.Random(3)
    for _ in range(4):
        architecture = random_architecture(supernet.base, rng)
        # State updates of linear attention are no part of the count.
        pairs = zip(architecture.layers, supernet.base.layers, strict=True)
        counted = tuple(sizes if full.num_key_value_heads else LayerSizes(0, 0, 0) for sizes, full in pairs)
        architecture = Architecture(architecture.hidden_size, counted)
        standalone = extract(model, structure, architecture)
        for module in standalone.modules():  # layers have configurations of their own
            if hasattr(module, "config"):
                module.config._attn_implementation = module.config._experts_implementation = "eager"
        cache = DynamicCache(config=standalone.config)
        with torch.no_grad():
            standalone(IDS[:1, :7], past_key_values=cache, use_cache=True)
            held = [tensor for layer in cache.layers if layer.keys is not None for tensor in (layer.keys, layer.values)]
            with FlopCounterMode(display=False) as counter:
                standalone(IDS[:1, 7:8], past_key_values=cache, use_cache=True)
        assert sum(tensor.nbytes for tensor in held) == structure.kv_cache_bytes(architecture, 7)
        assert counter.get_total_flops() == 2 * structure.macs(architecture, context=7)


def test_cache_padding_and_generation(model: PreTrainedModel) -> None:
    supernet = SuperNetwork(model)
    rng = random.Random(4)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    for _ in range(3):
        architecture = random_architecture(supernet.base, rng)
        standalone = extract(model, supernet.structure, architecture)
        with supernet.activated(architecture):
            assert_close(logits(standalone, attention_mask=mask)[:, 4:], logits(model, attention_mask=mask)[:, 4:])
            generated = model.generate(IDS[:1], max_new_tokens=6, do_sample=False, use_cache=True)
            uncached = model.generate(IDS[:1], max_new_tokens=6, do_sample=False, use_cache=False)
        assert torch.equal(generated, uncached)
        assert torch.equal(standalone.generate(IDS[:1], max_new_tokens=6, do_sample=False), generated)
        assert torch.equal(standalone.generate(IDS[:1], max_new_tokens=6, do_sample=False, use_cache=False), generated)
        both = standalone.generate(IDS, attention_mask=mask, max_new_tokens=6, do_sample=False)
        single = standalone.generate(IDS[1:], max_new_tokens=6, do_sample=False)
        assert torch.equal(both[1:, : single.shape[1]], single)


def test_saved_packages_reload_as_they_were(model: PreTrainedModel, tmp_path: Path) -> None:
    supernet = SuperNetwork(model)
    architecture = random_architecture(supernet.base, random.Random(5))
    halved = [
        LayerSizes(s.num_attention_heads, s.num_key_value_heads, s.intermediate_size // 2, (s.num_experts + 1) // 2)
        for s in supernet.base.layers[1:]
    ]
    uniform = Architecture(supernet.base.hidden_size, (LayerSizes(0, 0, 0), *halved))
    assert fits_plain_class(model.config, uniform) and not fits_plain_class(model.config, architecture)
    for name, chosen in (("uneven", architecture), ("uniform", uniform)):
        standalone = extract(model, supernet.structure, chosen)
        entry = {"name": name, "architecture": chosen.to_dict()}
        package = write_package(
            standalone, tmp_path / name, tokenizer=tiny_tokenizer(), entry=entry, dtype=torch.float32, probe_ids=IDS
        )
        assert package.entry.layout == name
        reloaded = AutoModelForCausalLM.from_pretrained(package.folder, trust_remote_code=name == "uneven").eval()
        assert_close(logits(reloaded), logits(standalone))
    model.save_pretrained(tmp_path / "base")
    assert stored_names(tmp_path / "uniform") == stored_names(tmp_path / "base")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_suits_every_family(model: PreTrainedModel, preset: str) -> None:
    structure = describe(model.config)
    widths = {layer.intermediate_size for layer in structure.base.layers}
    if preset == "uniform" and len(widths) > 1:
        with pytest.raises(ValueError, match=r"layers differ .* use ffn\.N for each layer"):
            SearchSpace.preset(preset, structure)
        return
    space = SearchSpace.preset(preset, structure)
    assert space.smallest().fits(structure.base) and space.decode(space.upper.tolist()) == structure.base
    assert structure.parameters(space.smallest()) < structure.parameters(structure.base)
    sparse = {f"experts.{i}" for i, layer in enumerate(structure.base.layers) if layer.num_experts}
    headless = {f"kv.{i}" for i, layer in enumerate(structure.base.layers) if not layer.num_key_value_heads}
    names = {gene.name for gene in space.genes}
    assert not names & headless and (preset != "fine" or sparse <= names)
    for architecture in space.decode_all(sample(space, np.random.default_rng(0), 3)):
        assert space.decode(space.encode(architecture)) == architecture
        standalone = extract(model, structure, architecture.without_bits())
        assert structure.parameters(architecture) == sum(p.numel() for p in standalone.parameters())
    members = uniform_members(space, 6)
    assert all(member.is_uniform_in(structure.base) for member in members)
    assert members or preset != "uniform"


def test_a_space_that_the_family_lacks_is_refused_in_one_line() -> None:
    mixed, dense = describe(CONFIGS["qwen3_5_text"]()), describe(CONFIGS["qwen3"]())
    assert [gene.name for gene in SearchSpace.from_dict({"kv.*": [1, 3]}, mixed).genes] == ["kv.1", "kv.3"]
    with pytest.raises(ValueError, match=r"kv\.0: layer 0 of the original has no attention heads"):
        SearchSpace.from_dict({"kv.0": [1, 3]}, mixed)
    with pytest.raises(ValueError, match=r"experts\.0: layer 0 of the original has no experts"):
        SearchSpace.from_dict({"experts.*": [1, 2]}, dense)


def test_what_a_family_refuses_is_said_with_the_reason() -> None:
    config = CONFIGS["gpt2"]()
    config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(RequestError, match="would change with the layers that are removed below it"):
        describe(config)


def test_quantization_that_the_family_lacks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    model = tiny_network("gpt2")
    model.resize_token_embeddings(259)
    model.save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    data = tiny.data(tmp_path / "data.jsonl")
    asked = ["--data", str(data), "--output", str(tmp_path / "run"), "--quantize", "int8", "--max-params", "0.9"]
    assert (
        run(["compress", str(folder), *asked, "--tasks", "tiny", "--include-path", str(tiny.task(tmp_path, "tiny"))])
        == 2
    )
    assert "gpt2 networks cannot be quantized" in capsys.readouterr().err


@pytest.mark.skipif("COMPRESSOR_ASSETS" not in os.environ, reason="COMPRESSOR_ASSETS is not set")
@pytest.mark.parametrize("name", ["stories260K", "babyllama-char361", "prose-7m"])
def test_real_checkpoints_are_exact(name: str) -> None:
    """50 random architectures each: the view is the extracted network, and the counts are its own."""
    folder = Path(os.environ["COMPRESSOR_ASSETS"]) / "checkpoints" / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    before = logits(model, input_ids=ids)
    supernet = SuperNetwork(model)
    with supernet.activated(random_architecture(supernet.base, random.Random(0))):
        assert not torch.equal(logits(model, input_ids=ids), before)
    assert torch.equal(logits(model, input_ids=ids), before)
    apply_ordering(supernet, order_by(IMPORTANCES["wanda"](supernet, [ids])))
    assert_close(logits(model, input_ids=ids), before)
    rng = random.Random(1)
    for _ in range(50):
        architecture = random_architecture(supernet.base, rng)
        standalone = extract(model, supernet.structure, architecture)
        assert supernet.structure.parameters(architecture) == sum(p.numel() for p in standalone.parameters())
        with supernet.activated(architecture):
            assert_close(logits(standalone, input_ids=ids), logits(model, input_ids=ids))
