"""Routed weights: the formula by hand, every family, what learns, what is stored, and what cannot have them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from compressor.cli import run
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, LayerSizes
from supernet.common.errors import RequestError
from supernet.routed import EXPERTS, RoutedDeltas, check_routed, check_stored, routed_parameters
from supernet.slicing import extract
from supernet.training.adapters import RoutedWeights
from supernet.training.data import Batch
from supernet.training.losses import Loss
from supernet.training.traces import trace
from tests.support import tiny
from tests.support.tiny_families import CONFIGS, IDS, assert_close, logits, random_architecture, tiny_network

SMALL = Architecture(32, (LayerSizes(2, 1, 32), LayerSizes(0, 0, 48), LayerSizes(4, 2, 64)))
RANK = 8
DENSE = [name for name in CONFIGS if not name.startswith(("mixtral", "qwen3_moe"))]


@pytest.fixture
def network(tmp_path: Path) -> PreTrainedModel:
    """Three layers of width 32: four query heads in two groups, 64 neurons."""
    return AutoModelForCausalLM.from_pretrained(tiny.checkpoint(tmp_path / "m"), dtype=torch.float32)


def disturbed(supernet: SuperNetwork) -> RoutedDeltas:
    """Changes that do something: their B starts at zero."""
    deltas = RoutedDeltas(supernet, RANK, seed=1)
    with torch.no_grad():
        for name, parameter in deltas.parameters.items():
            if name.endswith("routed_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return deltas


@pytest.mark.parametrize("name", DENSE)
def test_every_family_is_sliced_as_it_is_activated(name: str) -> None:
    supernet = SuperNetwork(tiny_network(name))
    rng, before = random.Random(3), logits(supernet.model)
    deltas = disturbed(supernet)
    moved = []
    for architecture in [random_architecture(supernet.base, rng) for _ in range(4)]:
        supernet.use(None)
        supernet.activate(architecture)
        plain = logits(supernet.model)
        supernet.use(deltas)
        active = logits(supernet.model)
        supernet.activate(supernet.base)
        assert torch.equal(logits(supernet.model), before)
        with torch.no_grad():
            assert_close(logits(extract(supernet.model, supernet.structure, architecture, deltas)), active)
        moved.append(float((active - plain).abs().max()))
    assert max(moved) > 1e-3
    assert routed_parameters(supernet.structure, RANK) == sum(p.numel() for p in deltas.parameters.values())


def test_the_formula_by_hand(network: PreTrainedModel) -> None:
    supernet = SuperNetwork(network)
    deltas = disturbed(supernet)
    name, sizes = "model.layers.0.mlp.down_proj.weight", LayerSizes(2, 1, 32)
    weight = network.get_parameter(name)
    a, b = deltas.parameters[f"{name}.routed_A"], deltas.parameters[f"{name}.routed_B"]
    assert a.shape == (RANK, 64) and b.shape == (32, RANK)
    u, v = deltas.parameters["router.0.U"], deltas.parameters["router.0.V"]

    def shares(*sizes: float) -> torch.Tensor:
        return torch.softmax(v @ torch.relu(u @ torch.tensor(sizes)), 0)

    gaps = shares(0.5, 0.5, 0.5) - shares(1.0, 1.0, 1.0)  # of 4 heads, 2 groups, 64 neurons
    expected = weight[:, :32].clone()
    for i in range(EXPERTS):
        expert = slice(2 * i, 2 * i + 2)
        expected = expected + gaps[i] * b[:, expert] @ a[expert, :32]
    found = deltas.tensor(name, sizes)
    assert found is not None and torch.allclose(found, expected, atol=1e-6)
    assert deltas.tensor(name, supernet.base.layers[0]) is None and deltas.tensor(name, LayerSizes(2, 1, 0)) is None


def test_weights_changes_and_routers_learn_and_the_base_learns_none_of_the_changes(network: PreTrainedModel) -> None:
    supernet = SuperNetwork(network)
    parameters = RoutedWeights(supernet, None, RANK, seed=0)
    with torch.no_grad():
        for name, parameter in parameters.trained.items():
            if name.endswith("routed_B"):
                parameter.normal_()
    batch = Batch(IDS, IDS, torch.arange(IDS.shape[1]).expand_as(IDS))
    own = [name for name in parameters.trained if "routed_" in name or name.startswith("router.")]

    def reached(architecture: Architecture) -> set[str]:
        for parameter in parameters.trained.values():
            parameter.grad = None
        supernet.activate(architecture)
        Loss({"ce": 1.0})(trace(network, batch), None).backward()
        return {name for name, p in parameters.trained.items() if p.grad is not None and bool(p.grad.any())}

    with parameters:
        assert reached(supernet.base).isdisjoint(own)
        of_small = reached(SMALL)
    assert {name for name in own if ".0." in name or ".1." in name} <= of_small
    # What took no part is held still, also where the base is among the members.
    inactive = parameters.inactive([supernet.base, SMALL])
    assert {name for name in inactive if inactive[name] is None} == {name for name in own if ".2." in name}
    (used,) = inactive["model.layers.0.mlp.up_proj.weight.routed_B"] or ()
    assert used[0] == 0 and used[1].tolist() == list(range(32, 64))
    assert "model.layers.0.mlp.up_proj.weight" not in inactive
    assert all(name not in of_small for name in own if ".2." in name)  # that layer is whole
    assert "model.layers.0.mlp.down_proj.weight" in of_small
    assert parameters.trained["model.layers.0.mlp.up_proj.weight.routed_B"].grad[32:].count_nonzero() == 0  # type: ignore[index]


def test_what_is_stored_comes_back(network: PreTrainedModel) -> None:
    supernet = SuperNetwork(network)
    deltas = disturbed(supernet)
    again = RoutedDeltas.stored(supernet, deltas.tensors(torch.float32))
    for name in deltas.names:
        one, other = deltas.tensor(name, SMALL.layers[0]), again.tensor(name, SMALL.layers[0])
        assert one is not None and other is not None and torch.equal(one, other)
    check_stored(supernet.structure, deltas.tensors(torch.float32))
    for wrong in ({}, dict(list(deltas.tensors(torch.float32).items())[:2])):
        with pytest.raises(ValueError, match="routed changes"):
            check_stored(supernet.structure, wrong)


@pytest.mark.parametrize(
    ("name", "rank", "message"), [("mixtral", 8, "FFNs made of linear layers"), ("llama", 6, "multiple")]
)
def test_what_cannot_be_routed(name: str, rank: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_routed(SuperNetwork(tiny_network(name)).structure, rank)


def test_the_whole_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The package is what was searched, with the changes of its sizes in its weights; a repair is refused."""
    recipe = tiny.job_recipe(tmp_path) | {
        "finetuning": {"parameters": "routed", "lora_rank": 4, "tokens": 2560, "batch_size": 4, "sequence_length": 32},
        "searching": {"evaluations": 6, "population": 4, "limit": 8},
        "healing": {"tokens": 0},
        "space": {"ffn.*": [32, 64], "kv.*": [1, 2]},
        "targets": {"max_params": [0.8]},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    output, asked = tmp_path / "run", ["compress", "--recipe", str(tmp_path / "recipe.yaml"), "--output"]
    assert run([*asked, str(tmp_path / "no"), "--repair", "on"]) == 2
    assert "say --repair off" in capsys.readouterr().err.replace("\n", " ")
    assert run([*asked, str(output)]) == 0
    capsys.readouterr()
    for more in (["--format", "elastic"], ["--repair", "on"]):
        assert run(["export", str(output), *more]) == 2
        assert "routed gives sizes weights of their own" in capsys.readouterr().err.replace("\n", " ")
    report = json.loads((output / "report.json").read_text())
    (best,) = report["packages"]
    packaged = load_file(output / "packages" / "best" / "model.safetensors")
    stored = load_file(output / "supernet" / "model.safetensors")
    whole = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    changed, cut = [], []
    for layer, sizes in enumerate(best["architecture"]["layers"]):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        prefix = stored[name][:, : sizes["intermediate_size"]]
        changed.append(not torch.equal(packaged[name], prefix.to(packaged[name])))
        cut.append(not whole.items() <= sizes.items())
    assert changed == cut and any(cut)
