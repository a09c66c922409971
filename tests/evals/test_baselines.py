"""Pruning baselines: each criterion against a case worked out by hand, and all of them on tiny networks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from evals.baselines import PruningContext, baselines, depth, uniform_width, with_ffn, without
from evals.baselines.depth import angular_distance, calibration_loss, residuals
from evals.baselines.flap import compensate, fluctuation, moments, remaining, unit_scores, with_biases
from evals.baselines.slicegpt import covariance, fold_norms, norm_readers, principal_components, rotate, untied
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, LayerSizes
from supernet.common.errors import RequestError
from supernet.families import describe
from supernet.importance import activation
from supernet.ordering import output_projections
from tests.support import tiny
from tests.support.tiny_families import assert_close, tiny_network

IDS = torch.randint(67, (4, 16), generator=torch.Generator().manual_seed(3))


def llama(seed: int = 0, **sizes: object) -> PreTrainedModel:
    return tiny.llama(
        seed, **({"vocab_size": 67, "pad_token_id": None, "intermediate_size": 48, "num_hidden_layers": 5} | sizes)
    )


def context_of(
    model: PreTrainedModel, share: float, calibration: tuple[torch.Tensor, ...] = (IDS[:2], IDS[2:])
) -> PruningContext:
    """What methods are given to cut `model` to a share of its parameters."""
    structure = describe(model.config)
    return PruningContext(model, structure, calibration, int(share * structure.parameters(structure.base)))


def assert_same_function(network: PreTrainedModel, model: PreTrainedModel, atol: float = 1e-5) -> None:
    assert torch.allclose(network(IDS).logits, model(IDS).logits, atol=atol)


def silence(model: PreTrainedModel, *layers: int) -> None:
    """Make layers add nothing to the residual."""
    for index in layers:
        layer = model.model.layers[index]
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)


def test_angular_distance_by_hand() -> None:
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    after = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, math.sqrt(3)]])
    assert angular_distance(before, after).tolist() == pytest.approx([0.0, 0.5, 1.0, 1 / 3])


def test_residuals_are_transformers_hidden_states() -> None:
    model = llama()
    stream = residuals(SuperNetwork(model), IDS)
    expected = model(IDS, output_hidden_states=True).hidden_states
    assert len(stream) == len(expected) == 6
    for states, wanted in zip(stream[:-1], expected[:-1], strict=True):
        assert torch.equal(states, wanted)
    assert torch.allclose(model.model.norm(stream[-1]), expected[-1])  # transformers' last one is normed already


@pytest.mark.parametrize("method", ["shortgpt", "late-block", "sleb", "minitron-depth", "nemotron-depth"])
def test_layers_that_do_nothing_go_first(method: str) -> None:
    model = llama(tie_word_embeddings=False)
    silence(model, 2, 3)
    with torch.no_grad():
        model.lm_head.weight *= 30  # sure of itself, so that its own text has a low loss with every layer that matters
    text = model.generate(IDS[:, :2], max_new_tokens=14, do_sample=False, pad_token_id=0)
    context = context_of(model, 1.0, (text,))
    two_layers = 2 * sum(p.numel() for p in model.model.layers[0].parameters())
    network, architecture = baselines()[method].cut(replace(context, parameters=context.parameters - two_layers))
    assert architecture.kept == (0, 1, 4)
    assert_same_function(network, model)


def test_sleb_measures_again_after_each_layer_and_minitron_depth_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, layers 1 and 2 cost least; but once 1 is removed, 2 costs most and 4 least."""
    losses = {0: 5.0, 1: 1.0, 2: 1.5, 3: 4.0, 4: 3.0}
    asked: list[tuple[int, ...]] = []

    def loss(architecture: Architecture) -> float:
        removed = losses.keys() - set(architecture.kept)
        asked.append(architecture.kept)
        return max(losses[index] for index in removed) + 10 * ({1, 2} <= removed)

    monkeypatch.setattr(depth, "calibration_loss", lambda _: loss)
    context = context_of(llama(), 0.62)  # two layers and a little
    assert baselines()["minitron-depth"].cut(context)[1].kept == (0, 3, 4)
    assert len(asked) == 5
    asked.clear()
    assert baselines()["sleb"].cut(context)[1].kept == (0, 2, 3)
    assert len(asked) == 5 + 4  # no third layer can go


def test_the_loss_without_layers_is_that_of_the_network_without_them() -> None:
    context = context_of(llama(), 0.6)
    silenced = llama()
    silence(silenced, 1, 3)
    expected = silenced(IDS, labels=IDS).loss.item()
    loss, base = calibration_loss(context), context.structure.base
    assert loss(without(base, {1, 3})) == pytest.approx(expected, rel=1e-5)
    assert loss(without(base, {2})) != loss(without(base, {1, 3})) == pytest.approx(expected, rel=1e-5)  # from a cache


def test_no_pass_over_the_calibration_text_holds_the_logits_of_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].flatten(0, -2).shape[0]))
    monkeypatch.setattr("supernet.device.LOGITS", 8 * model.config.vocab_size)
    supernet = SuperNetwork(model)
    residuals(supernet, IDS)
    moments(supernet, output_projections(supernet), (IDS,))
    assert seen == []
    context = context_of(model, 0.75)
    calibration_loss(context)(without(context.structure.base, {1}))
    assert seen and max(seen) <= 8


def test_fluctuation_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 0.5]])
    assert fluctuation(torch.tensor([2.0, 4.0]), weight).tolist() == [2 * (1 + 9), 4 * (4 + 0.25)]


def test_moments_by_hand() -> None:
    supernet = SuperNetwork(llama())
    seen: list[torch.Tensor] = []
    module = supernet.model.get_submodule("model.layers.1.mlp.down_proj")
    with module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1).double())):
        means, variances = moments(supernet, output_projections(supernet), (IDS[:2], IDS[2:]))
    rows = torch.cat(seen)
    assert torch.allclose(means[1, "ffn"], rows.mean(0))
    assert torch.allclose(variances[1, "ffn"], rows.var(0))


def test_compensation_adds_the_mean_of_the_removed_units() -> None:
    reader = output_projections(SuperNetwork(with_biases(llama(hidden_size=8, num_attention_heads=2))))[1, "kv"]
    with torch.no_grad():
        reader.module.weight.copy_(torch.arange(64.0).view(8, 8))
    # Two units of four channels each; unit 1 is removed.
    means = torch.tensor([1.0, 1.0, 1.0, 1.0, 10.0, 100.0, 0.0, 0.0]).double()
    compensate(reader, means, torch.tensor([1]), units=2)
    assert reader.module.bias.tolist() == [10 * (8 * row + 4) + 100 * (8 * row + 5) for row in range(8)]


def test_biases_change_nothing_until_they_are_filled() -> None:
    model = llama()
    biased = with_biases(model)
    assert biased.model.layers[0].mlp.down_proj.bias is not None
    assert_close(biased(IDS).logits, model(IDS).logits)


def test_flap_ranks_units_of_all_layers_by_standardised_score() -> None:
    """Two of three neurons of layer 0 and one of three of layer 1 are far below their own layer's mean."""
    structure = describe(llama(num_hidden_layers=2, intermediate_size=32).config)
    scores: dict[Any, torch.Tensor] = {}
    for layer in (0, 1):
        scores[layer, "kv"] = torch.tensor([1.0, 1.0])
        scores[layer, "ffn"] = torch.full((32,), 100.0 ** (layer + 1))
    scores[0, "ffn"][[3, 7]] = 0.0
    scores[1, "ffn"][[5]] = 0.0
    architecture = remaining(structure.parameters(structure.base) - 3 * 3 * 32, structure, scores)
    assert [layer.intermediate_size for layer in architecture.layers] == [30, 31]
    assert [layer.num_key_value_heads for layer in architecture.layers] == [2, 2]


def test_flap_loses_nothing_where_the_removed_units_are_constant() -> None:
    """Half of the neurons see the same input for every token, so that their mean replaces them."""
    model = llama(num_hidden_layers=1)
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight[:24] = 0
            projection.weight[:24, 0] = 1
        embedding = model.model.embed_tokens.weight  # all of one length, and alike in channel 0
        embedding[:, 1:] /= embedding[:, 1:].norm(dim=1, keepdim=True)
        embedding[:, 0] = 0.5
    structure = describe(with_biases(model).config)
    size = structure.parameters(structure.base) - 24 * (3 * 32 + 2)
    network, architecture = baselines()["flap"].cut(PruningContext(model, structure, (IDS,), size))
    assert architecture.layers[0].intermediate_size == 24
    assert network.model.layers[0].mlp.down_proj.bias.abs().max().item() > 0
    assert_same_function(network, model)


def test_flap_scores_are_on_the_cpu_when_the_network_is_not() -> None:
    """`order_by` and `remaining` count there. Fake tensors take the place of an accelerator's."""
    projections = output_projections(SuperNetwork(llama(num_hidden_layers=1)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        variances = {units: torch.rand(r.module.in_features, device="cuda") for units, r in projections.items()}
        for reader in projections.values():
            reader.module.weight = torch.nn.Parameter(torch.rand(reader.module.weight.shape, device="cuda"))
        scores = unit_scores({(0, "kv"): 2, (0, "ffn"): 48}, variances, projections)
        assert {score.device.type for score in scores.values()} == {"cpu"}


def test_principal_components_by_hand() -> None:
    vectors = principal_components(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    assert vectors[:, 0].abs().tolist() == pytest.approx([math.sqrt(0.5)] * 2)  # eigenvalue 3: along (1, 1)
    assert float(vectors[0, 0] * vectors[1, 0]) > 0 > float(vectors[0, 1] * vectors[1, 1])


@pytest.mark.parametrize("tied", [True, False])
def test_a_rotated_network_is_the_same_function(tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 2.0)
    rotated = untied(model)
    supernet = SuperNetwork(rotated)
    rotation = principal_components(covariance(supernet, (IDS,)))
    fold_norms(supernet, norm_readers(supernet))
    rotate(supernet, supernet.structure, rotation)
    assert_same_function(rotated, model)


def test_slicegpt_deletes_directions_that_are_never_used_without_loss() -> None:
    """Everything that is added to the residual lies within 16 of its 32 directions, so half the width is enough."""
    model = llama(tie_word_embeddings=False)
    torch.manual_seed(1)
    inside = torch.linalg.qr(torch.randn(32, 16)).Q
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(50 * model.model.embed_tokens.weight @ inside @ inside.T)
        for layer in model.model.layers:
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                module.weight.copy_(inside @ inside.T @ module.weight)
    structure = describe(model.config)
    half = structure.parameters(type(structure.base)(16, structure.base.layers))
    network, architecture = baselines()["slicegpt"].cut(PruningContext(model, structure, (IDS,), half))
    assert architecture.hidden_size == 16
    assert_same_function(network, model, atol=1e-4)


def test_uniform_width_keeps_alike_shares() -> None:
    context = context_of(llama(num_key_value_heads=4), 0.6)
    architecture = uniform_width(context)
    (layer,) = set(architecture.layers)
    assert abs(layer.num_key_value_heads / 4 - layer.intermediate_size / 48) < 1 / 4
    assert context.structure.parameters(architecture) == pytest.approx(context.parameters, rel=0.01)


UNSUITABLE = {
    "slicegpt": ("gemma2", "phi3", "gpt2", "opt", "qwen3_5_text"),
    "minitron-width": ("gemma2", "phi3", "gpt2", "opt"),
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "gpt2", "opt", "qwen3_5_text"])
def test_every_method_meets_the_size_or_says_why_it_cannot(family: str) -> None:
    model = tiny_network(family)
    before = model(IDS).logits
    context = context_of(model, 0.75)
    for method, baseline in baselines().items():
        if family in UNSUITABLE.get(method, ()):
            with pytest.raises(RequestError, match=f"{method}: .* leave it out of --baselines"):
                baseline.cut(context)
            continue
        network, architecture = baseline.cut(context)
        assert sum(p.numel() for p in network.parameters()) == pytest.approx(context.parameters, rel=0.01), method
        assert architecture.fits(context.structure.base)
        assert torch.isfinite(network(IDS).logits).all()
    assert torch.equal(model(IDS).logits, before)


def test_experts_are_narrowed_together_in_steps_that_grouped_products_take() -> None:
    model = tiny_network("mixtral")
    structure = describe(model.config)
    context = PruningContext(model, structure, (IDS,), structure.parameters(with_ffn(structure.base, 36)))
    network, architecture = baselines()["shortgpt"].cut(context)
    assert not any(layer.intermediate_size % 4 for layer in architecture.layers)
    assert torch.isfinite(network(IDS).logits).all()
    with pytest.raises(RequestError, match="flap: not every half-block"):
        baselines()["flap"].cut(context)


def test_minitron_narrows_residual_and_neurons_alike_and_nothing_else() -> None:
    model = llama(hidden_size=64, intermediate_size=96)
    network, architecture = baselines()["minitron-width"].cut(context_of(model, 0.6, (IDS,)))
    assert {layer.num_attention_heads for layer in architecture.layers} == {4} and len(architecture.kept) == 5
    shares = architecture.hidden_size / 64, architecture.layers[0].intermediate_size / 96
    assert abs(shares[0] - shares[1]) < 0.1  # about a step of the residual and one of the FFN
    norms = activation(SuperNetwork(model), (IDS,))[None, "hidden"]
    kept = torch.argsort(norms, descending=True, stable=True)[: architecture.hidden_size]
    assert torch.equal(network.model.norm.weight, model.model.norm.weight[kept])


def test_a_size_out_of_reach_is_refused() -> None:
    for method in ("shortgpt", "magnitude"):
        with pytest.raises(RequestError, match="cannot be reached"):
            baselines()[method].cut(context_of(llama(), 0.1))


def test_removed_layers_are_gone_whole() -> None:
    _, architecture = baselines()["shortgpt"].cut(context_of(llama(), 0.6))
    assert LayerSizes(0, 0, 0) in architecture.layers
    assert all(not layer.skip or layer.removed for layer in architecture.layers)
