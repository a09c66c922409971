"""Every criterion of importance against a computation by hand, and what is done with an ordering on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from supernet.activation import SuperNetwork
from supernet.common.errors import RequestError
from supernet.importance import (
    IMPORTANCES,
    activation,
    block_influence,
    importance_and_influence,
    magnitude,
    random,
    skipped_error,
    taylor,
    wanda,
)
from supernet.learned_masks import learn_masks, straight_through
from supernet.ordering import (
    Order,
    Units,
    apply_ordering,
    load_ordering,
    order_by,
    save_ordering,
    stored_influence,
)
from tests.support.tiny_families import tiny_network

HEADS, GROUPS, WIDTH, CHANNELS = 4, 2, 5, 8
HEAD_DIM = CHANNELS // HEADS
BATCHES = [torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([[7, 8, 9, 10, 1, 3]])]


@pytest.fixture
def supernet() -> SuperNetwork:
    """Two layers in float64, with biases, every weight random."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11, hidden_size=CHANNELS, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, attention_bias=True, mlp_bias=True, max_position_embeddings=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return SuperNetwork(model)


def test_no_pass_holds_the_logits_of_all_tokens(supernet: SuperNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = wanda(supernet, BATCHES)
    monkeypatch.setattr("supernet.device.LOGITS", 25)  # two tokens of a vocabulary of 11
    tokens: list[int] = []
    hook = supernet.model.lm_head.register_forward_hook(lambda _, __, out: tokens.append(out[..., 0].numel()))
    in_parts = wanda(supernet, BATCHES)
    assert tokens == [2] * 6 and whole.keys() == in_parts.keys()
    for units, value in whole.items():
        assert torch.allclose(value, in_parts[units], rtol=1e-6)
    tokens.clear()
    block_influence(supernet, BATCHES)
    assert tokens == []
    both = [torch.cat(BATCHES)]
    taylor(supernet, both)
    learn_masks(supernet, both, {(0, "ffn"): whole[0, "ffn"]}, epochs=1)
    hook.remove()
    assert tokens == [6] * (2 + 4)


def test_a_batchs_change_is_of_its_mean_loss(supernet: SuperNetwork) -> None:
    ids = torch.cat(BATCHES)
    down = supernet.model.get_submodule("model.layers.1.mlp.down_proj").weight
    supernet.model(input_ids=ids, labels=ids).loss.backward()
    change = (down * down.grad).sum(0)
    for name in ("gate_proj", "up_proj"):
        module = supernet.model.get_submodule(f"model.layers.1.mlp.{name}")
        change = change + (module.weight * module.weight.grad).sum(1) + module.bias * module.bias.grad
    supernet.model.zero_grad()
    assert torch.allclose(taylor(supernet, [ids])[1, "ffn"], change.abs())


def inputs_of(supernet: SuperNetwork, module: str) -> torch.Tensor:
    """What a module of layer 1 reads, all calibration tokens as rows."""
    seen: list[torch.Tensor] = []
    hook = supernet.model.get_submodule(f"model.layers.1.{module}").register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].flatten(0, -2))
    )
    with torch.no_grad():
        for ids in BATCHES:
            supernet.model(input_ids=ids)
    hook.remove()
    return torch.cat(seen)


def neuron(supernet: SuperNetwork, j: int) -> list[torch.Tensor]:
    """Views of all the weights of neuron j of layer 1."""
    mlp = supernet.model.model.layers[1].mlp
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    return [gate.weight[j], gate.bias[j], up.weight[j], up.bias[j], down.weight[:, j]]


def group(supernet: SuperNetwork, g: int) -> list[torch.Tensor]:
    """Views of all the weights of key-value group g of layer 1, with those of its two query heads."""
    attention = supernet.model.model.layers[1].self_attn
    query = slice(g * 2 * HEAD_DIM, (g + 1) * 2 * HEAD_DIM)
    kv = slice(g * HEAD_DIM, (g + 1) * HEAD_DIM)
    views = [attention.o_proj.weight[:, query]]
    for projection, rows in ((attention.q_proj, query), (attention.k_proj, kv), (attention.v_proj, kv)):
        views += [projection.weight[rows], projection.bias[rows]]
    return views


def head(supernet: SuperNetwork, h: int) -> list[torch.Tensor]:
    """Views of all the weights of query head h of layer 1 that are not its group's."""
    attention = supernet.model.model.layers[1].self_attn
    rows = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
    return [attention.q_proj.weight[rows], attention.q_proj.bias[rows], attention.o_proj.weight[:, rows]]


def channel(supernet: SuperNetwork, c: int) -> list[torch.Tensor]:
    """Views of all the weights of residual channel c, in the whole network."""
    network = supernet.model
    views = [network.model.embed_tokens.weight[:, c], network.lm_head.weight[:, c], network.model.norm.weight[c]]
    for layer in network.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        views += [layer.input_layernorm.weight[c], layer.post_attention_layernorm.weight[c]]
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            views.append(reader.weight[:, c])
        for writer in (attention.o_proj, mlp.down_proj):
            views += [writer.weight[c], writer.bias[c]]
    return views


WEIGHTS: dict[Units, tuple[int, Callable[[SuperNetwork, int], list[torch.Tensor]]]] = {
    (1, "ffn"): (WIDTH, neuron),
    (1, "kv"): (GROUPS, group),
    (1, "query"): (HEADS, head),
    (None, "hidden"): (CHANNELS, channel),
}


def test_magnitude_is_the_norm_of_all_weights_of_a_unit(supernet: SuperNetwork) -> None:
    scores = magnitude(supernet, [])
    for units, (count, weights) in WEIGHTS.items():
        expected = [torch.cat([w.flatten() for w in weights(supernet, i)]).norm() for i in range(count)]
        assert torch.allclose(scores[units].flatten(), torch.stack(expected))


def test_activation_and_wanda_are_norms_over_all_tokens(supernet: SuperNetwork) -> None:
    neurons, heads = inputs_of(supernet, "mlp.down_proj"), inputs_of(supernet, "self_attn.o_proj")
    assert len(neurons) == 12
    scores = activation(supernet, BATCHES)
    assert torch.allclose(scores[1, "ffn"], neurons.norm(dim=0))
    assert torch.allclose(scores[1, "kv"], heads.view(12, GROUPS, -1).norm(dim=(0, 2)))
    layer = supernet.model.model.layers[1]
    weighted = wanda(supernet, BATCHES)
    assert torch.allclose(weighted[1, "ffn"], neurons.norm(dim=0) * layer.mlp.down_proj.weight.norm(dim=0))
    channels = heads.norm(dim=0) * layer.self_attn.o_proj.weight.norm(dim=0)
    assert torch.allclose(weighted[1, "kv"], channels.view(GROUPS, -1).norm(dim=1))
    assert torch.allclose(weighted[1, "query"], channels.view(GROUPS, 2, -1).norm(dim=-1))


def test_residual_channels_are_scored_by_all_that_read_them(supernet: SuperNetwork) -> None:
    with torch.no_grad():  # silence all readers but two
        for module in supernet.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.zero_()
        gate, lm_head = supernet.model.model.layers[1].mlp.gate_proj, supernet.model.lm_head
        gate.weight.normal_()
        lm_head.weight.normal_()
    energy = inputs_of(supernet, "mlp.gate_proj").norm(dim=0).square() * gate.weight.norm(dim=0).square()
    seen: list[torch.Tensor] = []
    hook = lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
    scores = wanda(supernet, BATCHES)
    hook.remove()
    energy += torch.cat(seen).norm(dim=0).square() * lm_head.weight.norm(dim=0).square()
    assert torch.allclose(scores[None, "hidden"], energy.sqrt())


def test_experts_are_scored_by_what_the_router_gives_them() -> None:
    supernet = SuperNetwork(tiny_network("mixtral"))
    layer = supernet.model.model.layers[2].mlp
    with torch.no_grad():  # constant inputs of 1 make the router's logits its row sums
        norm = supernet.model.model.layers[2].post_attention_layernorm
        hook = norm.register_forward_hook(lambda _, __, output: torch.ones_like(output))
        layer.gate.weight.copy_(torch.tensor([1.0, 3.0, 0.0, 2.0])[:, None] / layer.gate.weight.shape[1])
    scores, weighted = activation(supernet, BATCHES), wanda(supernet, BATCHES)
    hook.remove()
    high, low = torch.tensor([3.0, 2.0]).softmax(0).double()  # two experts for each of 12 tokens
    expected = torch.stack([0 * low, high, 0 * low, low]) * 12**0.5
    assert torch.allclose(scores[2, "experts"], expected)
    outputs = layer.experts.down_proj.double().flatten(1).norm(dim=1)
    assert torch.allclose(weighted[2, "experts"], expected * outputs)
    assert torch.equal(scores[2, "ffn"], magnitude(supernet, [])[2, "ffn"])


def test_taylor_is_the_slope_of_the_loss_as_a_unit_shrinks(supernet: SuperNetwork) -> None:
    scores = taylor(supernet, BATCHES)
    step = 1e-3  # transformers' norms and loss are in float32, so a smaller one would measure their rounding
    for units, (count, weights) in WEIGHTS.items():
        for unit in range(count):
            views = weights(supernet, unit)
            expected = 0.0
            for ids in BATCHES:
                losses = []
                for scale in (1 + step, 1 - step):
                    with torch.no_grad():
                        kept = [view.clone() for view in views]
                        for view in views:
                            view.mul_(scale)
                        logits = supernet.model(input_ids=ids).logits
                        losses.append(float(F.cross_entropy(logits[0, :-1], ids[0, 1:])))
                        for view, before in zip(views, kept, strict=True):
                            view.copy_(before)
                expected += abs(losses[0] - losses[1]) / (2 * step)
            assert scores[units].flatten()[unit] == pytest.approx(expected, rel=1e-2, abs=1e-3)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in supernet.model.parameters())


def test_masks_pass_gradients_straight_to_the_scores() -> None:
    scores = torch.tensor([0.2, 0.9, 0.5, 0.7], requires_grad=True)
    mask = straight_through(scores, 0.5)
    assert mask.tolist() == [0, 1, 0, 1] and straight_through(scores, 0.01).tolist() == [0, 1, 0, 0]
    (mask * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == [1, 2, 3, 4]


def test_learned_masks_repair_a_bad_order_and_leave_the_weights_alone(supernet: SuperNetwork) -> None:
    with torch.no_grad():  # neurons 0 and 3 read, but nothing reads them; the first order puts them on top
        supernet.model.model.layers[1].mlp.down_proj.weight[:, [0, 3]] = 0.0
    before = {name: value.clone() for name, value in supernet.model.state_dict().items()}
    wrong = {units: torch.arange(count, 0, -1) for units, count in {(1, "ffn"): WIDTH}.items()}
    scores = learn_masks(supernet, BATCHES, wrong, epochs=40)

    def divergence(kept: torch.Tensor) -> float:
        """KL divergence from the full network to the one with only these neurons in layer 1."""
        down = supernet.model.model.layers[1].mlp.down_proj.weight
        gone = [j for j in range(WIDTH) if j not in kept]
        with torch.no_grad():
            full = torch.cat([supernet.model(input_ids=ids).logits for ids in BATCHES]).log_softmax(-1)
            weights = down.clone()
            down[:, gone] = 0.0
            cut = torch.cat([supernet.model(input_ids=ids).logits for ids in BATCHES]).log_softmax(-1)
            down.copy_(weights)
        return float(F.kl_div(cut, full, log_target=True, reduction="sum"))

    assert divergence(order_by(scores)[1, "ffn"][:3]) < divergence(order_by(wrong)[1, "ffn"][:3])
    assert all(torch.equal(value, before[name]) for name, value in supernet.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in supernet.model.parameters())


def test_random_is_a_matter_of_the_seed(supernet: SuperNetwork) -> None:
    one, same, other = random(supernet, []), random(supernet, []), random(supernet, [], seed=1)
    assert all(torch.equal(one[units], same[units]) for units in one)
    assert not any(torch.equal(one[units], other[units]) for units in one)


def test_all_criteria_score_the_same_units(supernet: SuperNetwork) -> None:
    expected = {(layer, "kv"): (GROUPS,) for layer in (0, 1)} | {(layer, "ffn"): (WIDTH,) for layer in (0, 1)}
    expected |= {(layer, "query"): (GROUPS, HEADS // GROUPS) for layer in (0, 1)} | {(None, "hidden"): (CHANNELS,)}
    for name, criterion in IMPORTANCES.items():
        scores = criterion(supernet, BATCHES)
        assert {units: tuple(score.shape) for units, score in scores.items()} == expected, name


@pytest.mark.parametrize("name", ["activation", "wanda", "taylor", "learned"])
def test_no_calibration_data_is_an_error(supernet: SuperNetwork, name: str) -> None:
    with pytest.raises(ValueError, match="calibration"):
        IMPORTANCES[name](supernet, [])


def silence_layer_0(supernet: SuperNetwork) -> None:
    """Let layer 0 add nothing."""
    layer = supernet.model.model.layers[0]
    with torch.no_grad():
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.zero_()
            projection.bias.zero_()


def test_block_influence_is_one_minus_the_mean_cosine(supernet: SuperNetwork) -> None:
    silence_layer_0(supernet)
    influence = block_influence(supernet, BATCHES)
    assert influence[0] == pytest.approx(0.0, abs=1e-12)
    before = torch.cat([supernet.model.model.embed_tokens(ids)[0].detach() for ids in BATCHES])
    after = inputs_of_norm(supernet)
    assert influence[1] == pytest.approx(1 - float(F.cosine_similarity(before, after, dim=-1).mean()))


def test_skipped_error_is_how_far_the_last_states_move(supernet: SuperNetwork) -> None:
    silence_layer_0(supernet)
    errors = skipped_error(supernet, BATCHES)
    assert errors[0] == pytest.approx(0.0, abs=1e-12)
    full = torch.cat([supernet.model.model(ids).last_hidden_state for ids in BATCHES]).detach()
    embedded = torch.cat(
        [supernet.model.model.norm(supernet.model.model.embed_tokens(ids)) for ids in BATCHES]
    ).detach()
    assert errors[1] == pytest.approx(float((full - embedded).square().sum() / full.square().sum()), rel=1e-5)
    with pytest.raises(ValueError, match="calibration"):
        skipped_error(supernet, [])


@pytest.mark.parametrize("name", ["wanda", "magnitude"])
def test_influence_comes_with_the_scores(name: str, supernet: SuperNetwork) -> None:
    scores, influence = importance_and_influence(name, supernet, iter(BATCHES))
    alone = IMPORTANCES[name](supernet, BATCHES)
    assert scores.keys() == alone.keys() and all(torch.equal(scores[units], alone[units]) for units in alone)
    assert influence == block_influence(supernet, BATCHES)
    assert not any(layer._forward_hooks for layer in supernet.layers)


def test_activations_are_read_once_for_both(supernet: SuperNetwork) -> None:
    passes: list[int] = []
    hook = supernet.layers[0].register_forward_hook(lambda *_: passes.append(1))
    importance_and_influence("wanda", supernet, BATCHES)
    hook.remove()
    assert len(passes) == len(BATCHES)


def inputs_of_norm(supernet: SuperNetwork) -> torch.Tensor:
    """The residual stream behind the last layer, all calibration tokens as rows."""
    seen: list[torch.Tensor] = []
    hook = supernet.model.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for ids in BATCHES:
            supernet.model(input_ids=ids)
    hook.remove()
    return torch.cat(seen)


@pytest.fixture
def order(supernet: SuperNetwork) -> Order:
    return order_by(magnitude(supernet, []))


def test_an_ordering_can_be_used_again(supernet: SuperNetwork, order: Order, tmp_path: Path) -> None:
    file = tmp_path / "ordering.safetensors"
    save_ordering(order, [0.5, 0.25], file, "magnitude")
    assert stored_influence(file) == [0.5, 0.25]
    read = load_ordering(file, supernet.structure)
    assert read.keys() == order.keys() and all(torch.equal(read[units], order[units]) for units in order)
    del read[None, "hidden"]  # which would move a neuron's own entries too
    first = [weight.clone() for weight in neuron(supernet, int(order[1, "ffn"][0]))]
    apply_ordering(supernet, read)
    assert all(torch.equal(a, b) for a, b in zip(neuron(supernet, 0), first, strict=True))


def test_an_ordering_of_another_model_is_refused(supernet: SuperNetwork, order: Order, tmp_path: Path) -> None:
    file = tmp_path / "ordering.safetensors"
    for broken, said in (
        (order | {(1, "ffn"): torch.arange(WIDTH + 1)}, "1.ffn"),
        (order | {(1, "ffn"): torch.zeros(WIDTH, dtype=torch.int64)}, "1.ffn"),
        (order | {(1, "query"): order[1, "query"].roll(2)}, "1.query"),
        (order | {(2, "ffn"): order[1, "ffn"].clone()}, "another model"),
    ):
        save_ordering(broken, [0.5, 0.25], file, "magnitude")
        with pytest.raises(RequestError, match=said):
            load_ordering(file, supernet.structure)
    with pytest.raises(RequestError, match="not an ordering"):
        load_ordering(tmp_path / "none.safetensors", supernet.structure)
    file.write_text("no tensors")
    with pytest.raises(RequestError, match="not an ordering"):
        load_ordering(file, supernet.structure)
