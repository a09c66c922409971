"""Elastic LoRA: what an adapter computes, what of it moves, and that nothing of it is left once it is merged."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from compressor.cli import run
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, LayerSizes
from supernet.common.errors import RequestError
from supernet.slicing import extract
from supernet.training.adapters import LORA_SCALE, ElasticLora, adapter_parameters
from supernet.training.data import Batch
from supernet.training.inactive import inactive_slices
from supernet.training.losses import Loss
from supernet.training.traces import trace
from tests.support import tiny
from tests.support.tiny_families import CONFIGS, IDS, assert_close, logits, random_architecture, tiny_network

SMALL = Architecture(32, (LayerSizes(2, 1, 32), LayerSizes(0, 0, 48), LayerSizes(4, 2, 64)))
RANK = 3


def disturbed(supernet: SuperNetwork) -> ElasticLora:
    """Adapters that do something: their B starts at zero."""
    adapters = ElasticLora(supernet, RANK, seed=1)
    with torch.no_grad():
        for factor in adapters.trained.values():
            factor.add_(0.1 * torch.randn_like(factor))
    return adapters


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith(("mixtral", "qwen3_moe"))])
def test_merged_equals_unmerged_in_every_family(name: str) -> None:
    supernet = SuperNetwork(tiny_network(name))
    rng = random.Random(3)
    chosen = [supernet.base, *(random_architecture(supernet.base, rng) for _ in range(4))]
    before = logits(supernet.model)
    adapters = disturbed(supernet)
    expected = []
    with adapters:
        for architecture in chosen:
            supernet.activate(architecture)
            expected.append(logits(supernet.model))
            with torch.no_grad(), adapters.frozen() as base:
                assert torch.equal(logits(base.model), before)
            assert supernet.current == architecture
        adapters.finish()
    for architecture, unmerged in zip(chosen, expected, strict=True):
        supernet.activate(architecture)
        assert_close(logits(supernet.model), unmerged)
        supernet.activate(supernet.base)
        assert_close(logits(extract(supernet.model, supernet.structure, architecture)), unmerged)
    assert (expected[0] - before).abs().max() > 0.1 * before.abs().max()
    assert all(parameter.requires_grad for parameter in supernet.model.parameters())
    counted = sum(factor.numel() for factor in adapters.trained.values())
    assert adapter_parameters(supernet.structure, RANK) == counted


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe-dense"])
def test_stacked_experts_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match="lora has no adapters for stacked experts"):
        ElasticLora(SuperNetwork(tiny_network(name)), RANK, seed=0)


def test_an_adapter_adds_the_slices_that_belong_to_the_units(network: PreTrainedModel) -> None:
    supernet = SuperNetwork(network)
    adapters = disturbed(supernet)
    name = "model.layers.0.mlp.down_proj"
    down, a, b = network.get_submodule(name), adapters.trained[f"{name}.lora_A"], adapters.trained[f"{name}.lora_B"]
    assert a.shape == (RANK, 64) and b.shape == (32, RANK)
    x = torch.randn(5, 32)
    with torch.no_grad(), adapters:
        supernet.activate(SMALL)
        expected = x @ down._parameters["weight"][:, :32].T + LORA_SCALE * (x @ a[:, :32].T) @ b.T
        assert torch.allclose(down(x), expected, atol=1e-6)
    assert torch.equal(down(x), x @ down.weight.T)


def test_a_gradient_reaches_only_the_slices_of_the_active_sub_network(network: PreTrainedModel) -> None:
    supernet = SuperNetwork(network)
    adapters = disturbed(supernet)
    batch = Batch(IDS, IDS, torch.arange(IDS.shape[1]).expand_as(IDS))
    with adapters:
        supernet.activate(SMALL)
        Loss({"ce": 1.0})(trace(network, batch), None).backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    reached = {name: None if factor.grad is None else (factor.grad != 0) for name, factor in adapters.trained.items()}
    layer = "model.layers.0."  # one of two groups of two heads of 8 channels, 32 of 64 neurons
    for part, rows in (("self_attn.q_proj", 16), ("self_attn.k_proj", 8), ("self_attn.v_proj", 8), ("mlp.up_proj", 32)):
        assert reached[f"{layer}{part}.lora_A"].all()
        assert reached[f"{layer}{part}.lora_B"][:rows].all() and not reached[f"{layer}{part}.lora_B"][rows:].any()
    for part, columns in (("self_attn.o_proj", 16), ("mlp.down_proj", 32)):
        assert reached[f"{layer}{part}.lora_A"][:, :columns].all()
        assert not reached[f"{layer}{part}.lora_A"][:, columns:].any()
        assert reached[f"{layer}{part}.lora_B"].all()
    assert all(reached[f"model.layers.1.self_attn.{part}_proj.lora_A"] is None for part in "qkvo")
    assert all(reached[f"model.layers.2.mlp.{part}_proj.lora_B"].all() for part in ("gate", "up", "down"))
    # And what took no part is what held_still will hold still.
    inactive = inactive_slices(adapters.structure, [SMALL])
    assert inactive["model.layers.1.self_attn.q_proj.lora_B"] is None
    assert [(d, i.tolist()) for d, i in inactive[f"{layer}mlp.down_proj.lora_A"]] == [(1, list(range(32, 64)))]
    assert [(d, i.tolist()) for d, i in inactive[f"{layer}mlp.up_proj.lora_B"]] == [(0, list(range(32, 64)))]
    assert f"{layer}mlp.up_proj.lora_A" not in inactive and "model.layers.2.mlp.up_proj.lora_B" not in inactive


def test_frozen_weights_may_be_halves_and_adapters_stay_whole(network: PreTrainedModel) -> None:
    supernet = SuperNetwork(network.to(torch.bfloat16))
    adapters = disturbed(supernet)
    batch = Batch(IDS, IDS, torch.arange(IDS.shape[1]).expand_as(IDS))
    with adapters:
        losses = []
        for mixed in (True, False):  # a step, and a point of the curve
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                losses.append(Loss({"ce": 1.0})(trace(network, batch), None))
        sum(losses).backward()
        assert {factor.dtype for factor in adapters.trained.values()} == {torch.float32}
        assert all(factor.grad is not None for factor in adapters.trained.values())
        adapters.finish()
    merged = Loss({"ce": 1.0})(trace(network, batch), None)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert all(abs(loss.item() - merged.item()) < 0.02 for loss in losses)


def test_gradient_checkpointing_changes_no_gradient(network: PreTrainedModel) -> None:
    batch = Batch(IDS, IDS, torch.arange(IDS.shape[1]).expand_as(IDS))
    gradients = []
    for model in (copy.deepcopy(network), network):
        supernet = SuperNetwork(model.train())
        if model is network:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        adapters = disturbed(supernet)
        with adapters:
            supernet.activate(SMALL)
            Loss({"ce": 1.0})(trace(model, batch), None).backward()
        gradients.append([factor.grad for factor in adapters.trained.values() if factor.grad is not None])
    assert len(gradients[0]) == 2 * (7 + 3 + 7)
    assert all(torch.allclose(*pair, atol=1e-7) for pair in zip(*gradients, strict=True))


def test_the_whole_job_with_adapters(tmp_path: Path) -> None:
    recipe = tiny.job_recipe(tmp_path) | {
        "finetuning": {"parameters": "lora", "lora_rank": 4, "tokens": 2560, "batch_size": 4, "sequence_length": 32},
        "searching": {"evaluations": 6, "population": 4, "limit": 8},
        "healing": {"tokens": 128},
        "space": {"ffn.*": [32, 64], "kv.*": [1, 2]},
        "targets": {"max_params": [0.8]},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    output = tmp_path / "run"
    assert run(["compress", "--recipe", str(tmp_path / "recipe.yaml"), "--output", str(output)]) == 0
    facts = json.loads((output / "supernet" / "manifest.json").read_text())["finetune"]
    assert facts["parameters"] == "lora" and facts["tokens"] == 2560
    assert facts["curve"][-1]["smallest"] < facts["curve"][0]["smallest"]
    before, after = (
        load_file(tmp_path / "m" / "model.safetensors"),
        load_file(output / "supernet" / "model.safetensors"),
    )
    assert after.keys() == before.keys()
    ordering = load_file(output / "supernet" / "ordering.safetensors")
    rows = ordering["0.ffn"]
    up, norm = "model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"
    moved = after[up] - before[up][rows]
    assert torch.linalg.matrix_rank(moved, rtol=1e-4) == 4
    assert torch.equal(after[norm], before[norm])
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert (output / "report.html").is_file() and (output / "packages" / "best" / "model.safetensors").is_file()
