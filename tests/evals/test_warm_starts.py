"""Warm starts on a tiny network: the best is assembled, and what degrades least goes first."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from transformers import AutoModelForCausalLM, PreTrainedModel

from compressor.stages.warm_start import layer_variants
from evals.warm_starts import WarmStart, warm_starts
from evals.warm_starts.blockwise import blockwise, degradation_in, halves_of, refined
from evals.warm_starts.router import Router, exchanged, gumbel_softmax, restored, with_its_head
from evals.warm_starts.superposition import superposition
from search.layer_options import HalfSizes, assemble, half_sizes, options, with_layer
from search.space import SearchSpace
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, Half, LayerSizes
from supernet.common.errors import RequestError
from supernet.training.data import Batch
from supernet.training.traces import LayerCache, trace
from tests.support import tiny
from tests.support.search_helpers import SMALL
from tests.support.tiny_families import CONFIGS, assert_close, random_architecture, tiny_network


def test_assembling_finds_what_brute_force_finds() -> None:
    space = SearchSpace.from_dict({"ffn.*": [32, 64, 128], "kv.*": [0, 1, 2], "layer.1": [0, 1]}, SMALL)
    rng = np.random.default_rng(0)
    choices = options(SMALL, {variant: float(rng.random()) for variant in layer_variants(space)})
    everything = []
    for combination in product(*choices):
        if any(option.sizes.num_key_value_heads for option in combination):
            architecture = Architecture(SMALL.base.hidden_size, tuple(option.sizes for option in combination))
            everything.append((SMALL.parameters(architecture), sum(option.degradation for option in combination)))
    path = assemble(SMALL, choices)
    assert [parameters for parameters, _ in path] == [SMALL.parameters(a) for _, a in path]
    slack = SMALL.parameters(SMALL.base) / 500  # sizes are rounded
    for parameters, architecture in path:
        rows = zip(choices, architecture.layers, strict=True)
        degradation = sum(option.degradation for row, sizes in rows for option in row if option.sizes == sizes)
        others = (other for size, other in everything if size <= parameters - slack or size == parameters)
        assert degradation <= min(others) + 1e-9
    assert path[-1][1] == SMALL.base and all(architecture in space for _, architecture in path)


def test_variants_are_the_spaces_own() -> None:
    space = SearchSpace.from_dict(
        {"ffn.0": [32, 128], "kv.2": [0, 1, 2], "depth": {"keep": [[0, 2], [0, 1, 2]]}}, SMALL
    )
    full = SMALL.base.layers[0]
    assert set(layer_variants(space)) == {
        (0, LayerSizes(4, 2, 32)),
        (2, LayerSizes(0, 0, full.intermediate_size)),
        (2, LayerSizes(2, 1, full.intermediate_size)),
        (1, LayerSizes(0, 0, 0)),
    }
    assert layer_variants(SearchSpace.from_dict({"ffn": [64, 128]}, SMALL)) == []


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(tiny.checkpoint(tmp_path / "model")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)  # random weights as small as they are do nothing at all
    return model


def test_a_few_sizes_tell_the_others() -> None:
    sizes = [LayerSizes(4, 2, width) for width in range(128, -1, -16)]
    moved = [float(2**i - 1) for i in range(9)]
    half = HalfSizes(sizes, moved)
    assert half.anchors == [0, 3, 5, 8] and half.to_measure(0) == [3, 5, 8]
    assert half.to_measure(4) == [3, 5, 8] and half.to_measure(8) == [7] and half.to_measure(1) == [0, 2, 3]
    # Around the base a degradation is a power of the error; here of the power 2.
    true = [3 * x**2 for x in moved]
    known = half.rescaled({i: true[i] for i in half.to_measure(0)})
    assert known.sizes == sizes and known.scale is not None
    assert known.scale[3:] == pytest.approx(true[3:])
    assert known.scale[:3] == pytest.approx([true[3] * x / moved[3] for x in moved[:3]])  # below, in proportion
    # Elsewhere it follows that of the base, here four times as steeply.
    for at in range(1, 9):
        measured = {i: 4 * (known.scale[i] - known.scale[at]) for i in known.to_measure(at)}
        expected = [4 * (value - known.scale[at]) for value in known.scale]
        assert known.degradations(at, measured) == pytest.approx(expected)


def test_of_what_no_error_is_known_every_size_is_measured() -> None:
    sizes = [LayerSizes(4, 2, width) for width in (128, 96, 64, 32, 0)]
    unknown = HalfSizes(sizes, None)
    assert unknown.to_measure(1) == [0, 2, 3, 4]
    assert unknown.degradations(1, {0: -1.0, 2: 1.0, 3: 5.0, 4: 2.0}) == [-1.0, 0.0, 1.0, 5.0, 2.0]
    known = unknown.rescaled({1: 1.0, 2: 3.0, 3: 2.0, 4: 5.0})
    assert known.scale == [0.0, 1.0, 2.0, 3.0, 5.0]
    assert [row.intermediate_size for row in known.sizes] == [128, 96, 32, 64, 0]


def test_half_blocks_are_told_by_their_errors() -> None:
    variants = layer_variants(SearchSpace.from_dict({"ffn.0": [0, 32, 64, 128], "kv.1": [0, 1, 2]}, SMALL))
    moved: dict[tuple[int, Half, LayerSizes], float] = {
        (0, "mlp", sizes): 100.0 - sizes.intermediate_size for layer, sizes in variants if layer == 0
    }
    moved[0, "mlp", LayerSizes(4, 2, 0)] = 1.0  # less than for the others: a removed half-block stays the last
    halves = half_sizes(SMALL, variants, moved)
    assert [sizes.intermediate_size for sizes in halves[0, "mlp"].sizes] == [128, 64, 32, 0]
    assert halves[0, "mlp"].scale == [0.0, 36.0, 68.0, 68.0]
    assert halves[1, "attention"].scale is None and len(halves[1, "attention"].sizes) == 3


def test_estimates_order_variants_as_measurements_do(model: PreTrainedModel) -> None:
    supernet = SuperNetwork(model)
    variants = layer_variants(
        SearchSpace.from_dict({"ffn.*": [0, 16, 32, 48, 64], "kv.*": [0, 1, 2]}, supernet.structure)
    )
    batches = batches_of(4, 32, 0, 256)
    degradation = degradation_in(supernet, batches)
    halves = halves_of(supernet, variants, batches)
    estimated, measured = [], []
    for (layer, _), own in halves.items():
        each = [degradation(with_layer(supernet.base, layer, sizes)) for sizes in own.sizes]
        measured += each[1:]
        estimated += (own.rescaled({i: each[i] for i in own.to_measure(0)}).scale or [])[1:]
    assert len(measured) == len(variants)
    assert kendalltau(estimated, measured).statistic > 0.9


def test_few_tokens_stand_for_all_where_the_vocabulary_is_large(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    supernet, batches = SuperNetwork(model), batches_of(8, 32, 0, 256)
    cut = with_layer(supernet.base, 1, LayerSizes(0, 0, 64))
    tokens: list[int] = []
    hook = supernet.model.get_output_embeddings().register_forward_hook(lambda _, __, out: tokens.append(out.shape[-2]))
    on_all = degradation_in(supernet, batches)(cut)
    vocabulary, all_tokens = supernet.model.config.vocab_size, sum(tokens)
    monkeypatch.setattr("evals.warm_starts.blockwise.LOGITS", 70 * vocabulary)
    tokens.clear()
    on_some = degradation_in(supernet, batches)(cut)
    hook.remove()
    assert all_tokens == 2 * 8 * 31 and sum(tokens) == 2 * 4 * 16  # every fourth of 62 in a batch
    assert on_some == pytest.approx(on_all, rel=0.5) and on_some != on_all


def batches_of(rows: int, length: int, low: int, high: int, size: int = 2) -> list[Batch]:
    """Random tokens from `low` to `high` in batches of `size` rows."""
    ids = torch.randint(low, high, (rows, length), generator=torch.Generator().manual_seed(0))
    return Batch(ids, ids, torch.arange(length).expand(rows, length)).split(size)


def test_refining_improves_what_single_blocks_suggest(model: PreTrainedModel) -> None:
    supernet = SuperNetwork(model)
    variants = layer_variants(SearchSpace.from_dict({"ffn.*": [0, 32, 64], "kv.*": [0, 1, 2]}, supernet.structure))
    batches = batches_of(4, 32, 0, 256)
    whole = supernet.structure.parameters(supernet.base)
    sizes = [int(share * whole) for share in (0.9, 0.7, 0.6, 0.5, 0.4)]
    degradation, path = degradation_in(supernet, batches), blockwise(supernet, variants, batches).path
    starts = [[a for parameters, a in path if parameters <= size][-1] for size in sizes]
    improved = refined(supernet, variants, batches, path, [*sizes, 1])
    assert degradation(supernet.base) == pytest.approx(0, abs=1e-6) and supernet.current == supernet.base
    assert all(supernet.structure.parameters(a) == parameters for parameters, a in improved)
    assert all(parameters <= size for (parameters, _), size in zip(improved, sizes, strict=True))  # none is within 1
    gained = [degradation(start) - degradation(a) for start, (_, a) in zip(starts, improved, strict=True)]
    assert min(gained) >= 0 and max(gained) > 0.01


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pass_that_begins_where_architectures_differ_is_the_whole_pass(name: str) -> None:
    supernet = SuperNetwork(tiny_network(name))
    base, last = supernet.base, len(supernet.base.layers) - 1
    batches = batches_of(4, 16, 3, 101)
    some = random_architecture(base, random.Random(1))
    near = [with_layer(some, index, base.layers[index]) for index in range(last, -1, -1)]
    passes = LayerCache(supernet)
    for architecture in (base, some, *near, near[-1], base):
        with torch.no_grad(), supernet.activated(architecture) as model:
            for number, batch in enumerate(batches):
                assert_close(passes.trace(number, batch).hidden, trace(model, batch).hidden)


def test_leading_layers_are_computed_once() -> None:
    supernet = SuperNetwork(tiny_network("llama"))
    base, calls = supernet.base, []
    for index, layer in enumerate(supernet.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
    degradation = degradation_in(supernet, batches_of(2, 16, 3, 101))
    assert calls == [0, 1, 2, 3]
    calls.clear()
    cut = LayerSizes(base.layers[0].num_attention_heads, base.layers[0].num_key_value_heads, 8)
    assert degradation(with_layer(base, 2, cut)) > 0 and calls == [2, 3]
    calls.clear()
    assert degradation(with_layer(base, 1, cut)) > 0 and calls == [1, 2, 3]


def test_what_superposition_cannot_mix_is_refused() -> None:
    supernet = SuperNetwork(tiny_network("mixtral"))
    space = SearchSpace.preset("fine", supernet.structure)
    with pytest.raises(RequestError, match=r"superposition: .* use blockwise or greedy"):
        superposition(supernet, layer_variants(space), [])


@pytest.mark.parametrize("name", [name for name, method in warm_starts().items() if isinstance(method, WarmStart)])
def test_a_layer_that_does_nothing_goes_first(name: str, model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    supernet = SuperNetwork(model)
    space = SearchSpace.from_dict({"ffn.*": [0, 32, 64], "kv.*": [0, 1, 2]}, supernet.structure)
    batches = batches_of(4, 32, 0, 256)
    method = warm_starts()[name]
    assert isinstance(method, WarmStart) and method.passes(3) > 0
    path, again = (method.propose(supernet, layer_variants(space), batches).path for _ in range(2))
    assert path == again and len(path) > 4 and all(architecture in space for _, architecture in path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters()) and supernet.current == supernet.base
    whole = supernet.structure.parameters(supernet.base)
    layer_share = 1 / 3 * (1 - 259 * 32 / whole)
    sizes = [(parameters / whole, architecture) for parameters, architecture in path]
    largest = [a for share, a in sizes if share <= 1 - layer_share][-1]
    if name == "router":  # the weights learn along, so the layer does something in the end: it is cut first
        for share, architecture in sizes:
            left = [layer.num_key_value_heads + layer.intermediate_size / 32 for layer in architecture.layers]
            assert share < 0.8 or left[1] < min(left[0], left[2])
        return
    assert largest.layers[1].removed and not largest.layers[0].removed and not largest.layers[2].removed


def test_a_gumbel_sample_is_a_choice_at_a_low_temperature() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.tensor([1.0, 0.0, -1.0]).log_softmax(0)
    samples = torch.stack([gumbel_softmax(logits, 0.01, generator) for _ in range(4000)])
    assert (samples.sum(-1) - 1).abs().max() < 1e-5 and (samples.max(-1).values > 0.99).float().mean() > 0.95
    # Equation 2 of Jang et al.: at a temperature of zero a sample is distributed as the softmax of the logits.
    assert samples.mean(0).tolist() == pytest.approx(logits.exp().tolist(), abs=0.02)
    soft = gumbel_softmax(logits, 100.0, generator)
    assert soft.tolist() == pytest.approx([1 / 3] * 3, abs=0.05)


def test_a_teacher_keeps_its_head_while_the_weights_learn(model: PreTrainedModel) -> None:
    supernet = SuperNetwork(model)
    (batch,) = batches_of(2, 16, 0, 256)
    weights = list(model.parameters())
    with restored(weights) as base:
        with torch.no_grad(), exchanged(weights, base):
            taught = with_its_head(supernet, trace(model, batch))
            before = taught.head(taught.hidden)
            unbound = trace(model, batch)
        with torch.no_grad():
            for weight in weights:
                weight.mul_(1.1)
        assert torch.equal(taught.head(taught.hidden), before)
        assert not torch.equal(unbound.head(unbound.hidden), before)  # what it would have said without
    assert all(torch.equal(weight, value) for weight, value in zip(weights, base, strict=True))


def test_a_router_gives_every_budget_its_logits() -> None:
    start = [torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])]
    routed = Router(4, start, torch.Generator().manual_seed(0))
    logits = [routed(budget) for budget in range(4)]
    assert [len(of_choice) for of_choice in logits[0]] == [2, 3]
    for budget in range(4):  # they begin near the start, each a little elsewhere
        for given, of_choice in zip(start, logits[budget], strict=True):
            assert (of_choice - given).abs().max() < 0.5
    assert not torch.equal(logits[0][0], logits[1][0])
