"""Rounding that makes up for itself: by hand, against all codes and rounding to nearest, and in every family."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from export.probe import logits_of
from export.quantization.gptq import best_scale, gptq, round_in_sequence
from export.quantization.plan import linear_layers_in, plan_scheme
from export.quantization.round_to_nearest import round_network, round_to_nearest, values_of
from supernet.common.errors import RequestError
from tests.support.export_networks import probe_ids
from tests.support.tiny_families import CONFIGS

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}


def wide(name: str) -> AutoModelForCausalLM:
    """A tiny network of a family, of widths that groups of 32 divide."""
    config = CONFIGS[name]()
    known = {key: value for key, value in SIZES.items() if key in config.to_dict()}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict() | known)).eval()


def lost(weight: Tensor, rounded: tuple[Tensor, Tensor], second: Tensor) -> float:
    """Mean square by which the output of a layer moves."""
    gap = values_of(rounded) - weight
    return float(((gap @ second) * gap).sum())


def test_what_one_input_loses_another_says() -> None:
    """Two inputs that are always equal, and one that fixes the scale at 1: 0.4 + 0.4 is 1 and not 0."""
    weight = torch.tensor([[0.4, 0.4, -8.0]])
    second = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert round_to_nearest(weight, 4, 3)[0].tolist() == [[0, 0, -8]]
    codes, scale = gptq(weight, second, 4, 3)
    assert codes.tolist() == [[0, 1, -8]] and scale.tolist() == [[1.0]]
    # Across groups too: the second input is in a group of its own, with a scale of its own.
    apart = torch.tensor([[0.4, -8.0, 0.4, -8.0]])
    second = torch.eye(4) + torch.tensor([[0.0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    assert gptq(apart, second, 4, 2)[0].tolist() == [[0, -8, 1, -8]]


def test_the_best_codes_of_a_small_layer_are_hardly_better() -> None:
    """Three inputs and codes of 3 bits: all 512 are tried with the scale that was chosen."""
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(40):
        weight, inputs = torch.randn(1, 3, generator=generator), torch.randn(50, 3, generator=generator)
        inputs[:, 1] = inputs[:, 0] + 0.3 * inputs[:, 1]
        second = inputs.T @ inputs / 50
        codes, scale = gptq(weight, second, 3, 3)
        tried = [torch.tensor([each], dtype=torch.int8) for each in itertools.product(range(-4, 4), repeat=3)]
        best = min(lost(weight, (each, scale), second) for each in tried)
        nearest = (weight / scale.float()).round().clamp(-4, 3).to(torch.int8)
        assert lost(weight, (codes, scale), second) >= best - 1e-6
        ratios.append((lost(weight, (codes, scale), second) - best, lost(weight, (nearest, scale), second) - best))
    ours, to_nearest = (sum(gaps) for gaps in zip(*ratios, strict=True))
    assert ours < 0.5 * to_nearest


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_layer_loses_less_than_to_nearest(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(48, 96, generator=generator)
    inputs = torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    second = inputs.T @ inputs / 400
    codes, scales = gptq(weight, second, bits, 32)
    assert codes.dtype == torch.int8 and scales.dtype == torch.bfloat16 and scales.shape == (48, 3)
    assert -(2 ** (bits - 1)) <= int(codes.min()) and int(codes.max()) < 2 ** (bits - 1)
    assert lost(weight, (codes, scales), second) < 0.6 * lost(weight, round_to_nearest(weight, bits, 32), second)


def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_to_nearest() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    means = torch.rand(64, generator=torch.Generator().manual_seed(1))
    means[5] = 0  # never seen
    codes, scales = gptq(weight, torch.diag(means), 4, 32)
    for group in range(2):
        here = slice(32 * group, 32 * group + 32)
        scale = best_scale(weight[:, here], means[here], -8, torch.bfloat16)
        assert torch.equal(scales[:, group], scale)
        nearest = (weight[:, here] / scale.float()[:, None]).round().clamp(-8, 7)
        assert torch.equal(codes[:, here].float(), nearest)
    nothing = torch.zeros(64, 64)
    assert torch.equal(values_of(gptq(torch.zeros(8, 64), nothing, 4, 32)), torch.zeros(8, 64))
    assert gptq(weight, nothing, 4, 32)[0].abs().sum() > 0


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"gpt2", "mixtral", "qwen3_moe", "qwen3_moe-dense"}))
def test_blocks_of_every_family_say_more_of_what_they_said(name: str) -> None:
    """All blocks one after the other, on the text that they are rounded on."""
    ids = torch.randint(0, 101, (10, 24), generator=torch.Generator().manual_seed(0))
    network, nearest = wide(name), wide(name)
    linear = linear_layers_in(network)
    plan = plan_scheme(linear.widths, "int3")
    whole, done = logits_of(network, ids), []
    found = round_in_sequence(network, plan, linear, ids, lambda *position: done.append(position))
    assert found.keys() == linear.widths.keys() - set(plan.left_out)
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for module, rounded in found.items():
        assert torch.equal(network.get_parameter(f"{module}.weight"), values_of(rounded))
    round_network(nearest, plan, linear)
    gaps = [(logits_of(rounded, ids) - whole).square().mean() for rounded in (network, nearest)]
    assert gaps[0] < gaps[1]


def test_layers_that_read_the_same_are_rounded_as_each_alone() -> None:
    ids = torch.randint(0, 101, (10, 24), generator=torch.Generator().manual_seed(0))
    network, whole = wide("llama"), wide("llama")
    linear = linear_layers_in(network)
    plan = plan_scheme(linear.widths, "int3")
    found = round_in_sequence(network, plan, linear, ids)
    seconds: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2).double()
        seconds[name] = x.T @ x / len(x)

    first = [name for name in found if name.startswith("model.layers.0.")]
    assert {name.rpartition(".")[2] for name in first} >= {"q_proj", "o_proj", "gate_proj", "up_proj"}
    for name in first:
        whole.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: keep(name, inputs[0]))
    with torch.no_grad():
        whole(ids)
    for name in first:
        weight, second = whole.get_parameter(f"{name}.weight").detach(), seconds[name]
        alone = gptq(weight, second, *plan.format_of(name, linear.widths[name]))
        losses = [lost(weight.double(), one, second) for one in (found[name], alone)]
        assert losses[0] == pytest.approx(losses[1], rel=0.02), name


def test_a_network_that_breaks_on_the_text_is_refused() -> None:
    network = wide("llama")
    with torch.no_grad():
        network.get_parameter("model.layers.1.input_layernorm.weight").fill_(torch.inf)
    linear = linear_layers_in(network)
    with pytest.raises(RequestError, match=r"layers\.1\.self_attn\.q_proj: what it reads of the calibration text"):
        round_in_sequence(network, plan_scheme(linear.widths, "int4"), linear, probe_ids(101, 16))
