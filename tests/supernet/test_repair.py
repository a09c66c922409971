"""Repair: the closed form against least squares by hand, every family, memory, and what is wrong with the input."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, LayerSizes
from supernet.common.errors import RequestError
from supernet.hooks import Hooks
from supernet.layer_walk import LayerWalk, residual_scale
from supernet.least_squares import Sums, choose_ridge, factorised, prefix_weight, refit
from supernet.moments import Moments, gather, is_held_out, layer_file, load_moments, projections, save_moments
from supernet.repair import RepairedVariants, repair_in_sequence
from supernet.slicing import extract
from tests.support.tiny_families import CONFIGS, assert_close, logits, random_architecture, tiny_network

POST_NORM = {"gemma2", "gemma3_text", "olmo2", "opt-projected"}
"""Networks that norm what their half-blocks add to the residual."""


def text(rows: int = 12, length: int = 16) -> list[Tensor]:
    ids = torch.randint(3, 101, (rows, length), generator=torch.Generator().manual_seed(2))
    return list(ids.split(5))


def mixed(tokens: int, inputs: int, seed: int = 0) -> Tensor:
    """Inputs that say much about one another, in the same way for every number of tokens."""
    mixing = torch.randn(3, inputs, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(tokens)
    noise = 0.1 * torch.randn(tokens, inputs, generator=generator)
    return torch.randn(tokens, 3, generator=generator) @ mixing + noise


def sums(x: Tensor, t: Tensor | None = None) -> Sums:
    both = Sums(x.shape[1], 0 if t is None else t.shape[1])
    both.add(x, t)
    return both


def test_two_inputs_by_hand() -> None:
    """x₂ = x₁ / 2 on average: the first input takes over half of the second's weight."""
    second = torch.tensor([[4.0, 2.0], [2.0, 3.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 10.0]], dtype=torch.float64)
    factor = factorised(second, 0.0)
    assert_close(prefix_weight(weight @ factor, factor, 1), torch.tensor([[6.0]], dtype=torch.float64))
    assert_close(prefix_weight(weight @ factor, factor, 2), weight)


def test_every_prefix_is_the_least_squares_optimum() -> None:
    x = mixed(400, 10)
    weight = torch.randn(4, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    second = sums(x).moments(False)[0]
    second = second.tril() + second.tril(-1).T  # float32 products are not quite symmetric
    ridge = 1e-3
    factor = factorised(second, ridge)
    full = second + ridge * second.diagonal().mean() * torch.eye(10, dtype=torch.float64)
    for count in (1, 4, 9, 10):
        by_hand = torch.linalg.solve(full[:count, :count], full[:count] @ weight.T).T
        assert_close(prefix_weight(weight @ factor, factor, count), by_hand)


def test_a_large_ridge_is_the_plain_slice() -> None:
    x = mixed(50, 6)
    weight = torch.randn(2, 6, dtype=torch.float64)
    factor = factorised(sums(x).moments(False)[0], 1e9)
    assert torch.allclose(prefix_weight(weight @ factor, factor, 3), weight[:, :3], atol=1e-6)


def test_centred_moments_are_covariances() -> None:
    x, t = mixed(60, 3), mixed(60, 2, seed=1)
    xx, xt, tt = sums(x + 5, t).moments(True)
    both = torch.cov(torch.cat([x, t], 1).double().T, correction=0)
    assert torch.allclose(xx, both[:3, :3], atol=1e-4) and torch.allclose(xt, both[:3, 3:], atol=1e-4)
    assert tt == pytest.approx(float(both[3:, 3:].trace()), rel=1e-5)


def test_the_ridge_is_chosen_by_held_out_error() -> None:
    """Much text: a small one. Fewer tokens than inputs, of noise: none is better than the slice."""
    weight = torch.randn(4, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rich = choose_ridge(weight, sums(mixed(2000, 24)), sums(mixed(500, 24)), centred=False)
    assert rich <= 1e-2
    noise = [torch.randn(n, 24, generator=torch.Generator().manual_seed(n)) for n in (8, 400)]
    assert choose_ridge(weight, *map(sums, noise), centred=False) >= 1.0


def test_refit_finds_the_target_and_starts_from_the_slice() -> None:
    x = mixed(300, 5)
    true = torch.randn(3, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    target = x @ true.T.float() + 2
    weight, ridge = refit(torch.zeros(3, 5, dtype=torch.float64), sums(x, target), sums(x, target), centred=True)
    assert ridge == 1e-4 and (weight - true).abs().max() < 0.1
    noise = [(torch.randn(n, 5), torch.randn(n, 3)) for n in (4, 4)]
    start = torch.zeros(3, 5, dtype=torch.float64)
    weight, ridge = refit(start, sums(*noise[0]), sums(noise[1][0], -noise[1][1]), centred=False)
    assert math.isfinite(ridge) or torch.equal(weight, start)


def test_no_ridge_is_taken_where_the_plain_slice_is_better() -> None:
    """Inputs 2 and 3 are those in front of them in what is fitted to, and their negatives in what is held out: whatever
    is said with them is wrong there, and better only than what loses the means, which a bias carries."""
    first = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    fitted_to, held_out = torch.cat([first, first], 1), torch.cat([first, -first], 1)
    weight = torch.ones(1, 4, dtype=torch.float64)
    assert math.isinf(choose_ridge(weight, sums(fitted_to), sums(held_out), centred=False))
    assert math.isinf(choose_ridge(weight, sums(fitted_to), sums(held_out), centred=True))
    assert math.isfinite(choose_ridge(weight, sums(fitted_to + 5), sums(held_out + 5), centred=True))


def test_a_refit_that_is_worse_on_what_is_held_out_is_not_taken() -> None:
    x, start = torch.tensor([[1.0], [-1.0]]), torch.zeros(1, 1, dtype=torch.float64)
    weight, ridge = refit(start, sums(x, x), sums(x, -x), centred=False)
    assert torch.equal(weight, start) and math.isinf(ridge)


def provider(supernet: SuperNetwork, memory: int = 2**30) -> RepairedVariants:
    moments = dict(gather(supernet, text(), experts=True))
    return RepairedVariants(supernet, moments.__getitem__, memory)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_repaired_as_it_is_cut(family: str) -> None:
    """Activated, cut out and as the formula says, by moments and in sequence."""
    model = tiny_network(family)
    supernet = SuperNetwork(model)
    rng = random.Random(5)
    whole = logits(model)
    repaired = provider(supernet)
    assert torch.equal(logits(model), whole)
    for _ in range(3):
        architecture = random_architecture(supernet.base, rng)
        in_sequence = repair_in_sequence(supernet, architecture, text())
        assert torch.equal(logits(model), whole)
        for variants in (repaired, in_sequence):
            network = extract(model, supernet.structure, architecture, variants)
            assert all(torch.isfinite(p).all() for p in network.parameters())
            supernet.use(variants)
            with supernet.activated(architecture):
                assert_close(logits(model), logits(network))
            supernet.use(None)
    assert torch.equal(logits(model), whole)


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_added_to_the_residual_is_known(family: str) -> None:
    supernet = SuperNetwork(tiny_network(family))
    scale = residual_scale(supernet, text()[0])
    assert scale == (None if family in POST_NORM else 0.5 if family == "granite" else 1.0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "starcoder2", "phi3", "llama-rope-biases-tied"])
def test_half_blocks_come_nearer_to_the_uncut_ones(family: str) -> None:
    """Of the first layer, whose inputs are the same, on the text that it was fitted to."""
    supernet = SuperNetwork(tiny_network(family))
    full = supernet.base.layers[0]
    groups = max(1, full.num_key_value_heads // 2)
    heads = groups * full.num_attention_heads // full.num_key_value_heads
    cut = LayerSizes(heads, groups, full.intermediate_size // 2, full.num_experts)
    architecture = Architecture(supernet.base.hidden_size, (cut, *supernet.base.layers[1:]))
    rows = text(96, 16)
    uncut = torch.cat(LayerWalk.of(supernet, rows).outputs(0))

    def gap(variants: object) -> float:
        supernet.use(variants)  # type: ignore[arg-type]
        with supernet.activated(architecture):
            gap = torch.cat(LayerWalk.of(supernet, rows).outputs(0)) - uncut
        supernet.use(None)
        return float(gap.square().sum())

    moments = dict(gather(supernet, rows))
    plain, by_moments = gap(None), gap(RepairedVariants(supernet, moments.__getitem__, 2**30))
    assert by_moments < plain
    assert gap(repair_in_sequence(supernet, architecture, rows)) < plain


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "granite"])
@pytest.mark.parametrize("width", [1, 2])
def test_the_half_that_stays_says_what_the_other_said(family: str, width: int) -> None:
    """Without the attention of the first layer, its MLP, whole or of half its neurons, is the optimum of least squares
    for the sum of both; computed directly from what the whole network's layer reads and puts out."""
    supernet = SuperNetwork(tiny_network(family))
    full, rows = supernet.base.layers[0], text(96, 16)
    sizes = LayerSizes(0, 0, full.intermediate_size // width, full.num_experts)
    moments = dict(gather(supernet, rows))
    mine = moments[0]["mlp"]
    assert mine.other is not None and math.isfinite(mine.other.ridge)
    variants = RepairedVariants(supernet, moments.__getitem__, 2**20)
    projection = projections(supernet)[0, "mlp"]
    weight = variants.tensor(projection.weight_name, sizes)
    assert weight is not None

    read, said = [], []
    hooks = [
        projection.module.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].flatten(0, -2).double())),
        supernet.halves(0)["attention"].register_forward_hook(lambda _, __, out: said.append(out[0].flatten(0, -2))),
    ]
    with Hooks(hooks):
        LayerWalk.of(supernet, rows).outputs(0)
    x, other = torch.cat(read), torch.cat(said).double()
    target = x @ projection.weight().T + other
    biased = projection.bias() is not None
    if biased:
        shift = target.mean(0)
        x, target = x - x.mean(0), target - shift
    ridge = max(mine.ridge, mine.other.ridge) * x.square().sum(1).mean() / x.shape[1] * len(x)
    kept = projection.kept(sizes, full)
    eye = torch.eye(x.shape[1], dtype=torch.float64)[:, kept] * ridge  # towards the plain slice
    left = x[:, kept].T @ x[:, kept] + ridge * torch.eye(len(kept), dtype=torch.float64)
    by_hand = torch.linalg.solve(left, x[:, kept].T @ target + eye.T @ projection.weight().T).T
    assert (projection.stored(by_hand) - weight).abs().max() <= 1e-3 * by_hand.abs().max()
    assert variants.tensor(projection.weight_name, full) is None


def test_nothing_says_what_a_removed_last_mlp_said() -> None:
    """In sequence it is made up for by the layer behind it, so what a search scores must not count on more."""
    supernet, rows = SuperNetwork(tiny_network("llama")), text(96, 16)
    repaired = RepairedVariants(supernet, dict(gather(supernet, rows)).__getitem__, 2**30)
    full = supernet.base.layers
    for index in (0, len(full) - 1):
        last = index == len(full) - 1
        layers = [replace(sizes, intermediate_size=0) if n == index else sizes for n, sizes in enumerate(full)]
        architecture = Architecture(supernet.base.hidden_size, tuple(layers))
        name = projections(supernet)[index, "attention"].weight_name
        assert (repaired.tensor(name, layers[index]) is None) == last
        if last:
            in_sequence = repair_in_sequence(supernet, architecture, rows)
            cut = [extract(supernet.model, supernet.structure, architecture, each) for each in (repaired, in_sequence)]
            plain = extract(supernet.model, supernet.structure, architecture)
            for network in cut:
                assert_close(logits(network), logits(plain))


@pytest.mark.parametrize("family", sorted(POST_NORM))
def test_where_norms_stand_behind_half_blocks_nothing_is_carried(family: str) -> None:
    supernet = SuperNetwork(tiny_network(family))
    moments = dict(gather(supernet, text()))
    assert all(m.other is None for layer in moments.values() for m in layer.values())


def test_a_walk_sees_what_a_pass_sees() -> None:
    for family in ("llama", "gemma3_text", "gpt2", "qwen3_5_text"):
        model = tiny_network(family)
        supernet = SuperNetwork(model)
        architecture = random_architecture(supernet.base, random.Random(8))
        layers = supernet.family.layers.rpartition(".")[0]
        with supernet.activated(architecture), torch.no_grad():
            walk = LayerWalk.of(supernet, text())
            for index in range(len(supernet.layers)):
                walk.step(index)
            expected = [model.get_submodule(layers)(ids, use_cache=False).last_hidden_state for ids in text()]
            norm = next(m for name, m in model.get_submodule(layers).named_children() if name in NORMS)
            for states, last in zip(walk.states, expected, strict=True):
                assert_close(norm(states), last)


NORMS = ("norm", "ln_f", "final_layer_norm")


def test_what_is_dropped_is_made_again() -> None:
    supernet = SuperNetwork(tiny_network("llama"))
    roomy, tight = provider(supernet), provider(supernet, memory=0)
    sizes = LayerSizes(4, 2, 24)
    for name in roomy.names:
        one, again = roomy.tensor(name, sizes), tight.tensor(name, sizes)
        assert one is not None and again is not None
        assert roomy.tensor(name, sizes) is one and tight.tensor(name, sizes) is not again
        assert_close(again, one)
        assert roomy.tensor(name, supernet.base.layers[0]) is None  # whole
        assert roomy.tensor(name, LayerSizes(0, 0, 0)) is None


def test_fewer_query_heads_in_each_group() -> None:
    """Their inputs are no prefix: the optimum over the inputs that are kept, computed directly."""
    supernet = SuperNetwork(tiny_network("llama"))
    moments = dict(gather(supernet, text()))
    variants = RepairedVariants(supernet, moments.__getitem__, 2**20)
    projection = projections(supernet)[1, "attention"]
    sizes = LayerSizes(2, 2, 56)  # the first query head of the first two groups
    chosen = projection.kept(sizes, supernet.base.layers[1])
    assert chosen.tolist() == [*range(8), *range(16, 24)]
    second, ridge = moments[1]["attention"].of(False), moments[1]["attention"].ridge
    second = second + ridge * second.diagonal().mean() * torch.eye(len(second), dtype=torch.float64)
    by_hand = torch.linalg.solve(second[chosen][:, chosen], second[chosen] @ projection.weight().T).T
    assert_close(variants.tensor(projection.weight_name, sizes), by_hand.float())  # type: ignore[arg-type]


def test_moments_are_kept(tmp_path: Path) -> None:
    supernet = SuperNetwork(tiny_network("opt"))
    for index, moments in gather(supernet, text()):
        save_moments(moments, layer_file(tmp_path, index), "w")
        again = load_moments(layer_file(tmp_path, index), "w")
        assert again.keys() == moments.keys() == {"attention", "mlp"}
        for half, one in moments.items():
            assert torch.equal(again[half].second, one.second) and torch.equal(again[half].mean, one.mean)
            assert (again[half].tokens, again[half].ridge) == (one.tokens, one.ridge) and one.tokens == 192
            mine, other = again[half].other, one.other
            assert mine is not None and other is not None and mine.ridge == other.ridge
            assert torch.equal(mine.product, other.product) and torch.equal(mine.mean, other.mean)


def spoil_nothing(file: Path) -> None:
    pass


def spoil_values(file: Path) -> None:
    moments = Moments(torch.full((2, 2), math.nan), torch.zeros(2), 3, 0.1)
    save_moments({"mlp": moments}, file, "w")


def spoil_names(file: Path) -> None:
    save_file({"mlp.second": torch.ones(2, 2)}, file, {"of": "w"})


@pytest.mark.parametrize(
    ("spoil", "of", "words"),
    [
        (spoil_nothing, "other", "moments of other weights"),
        (spoil_values, "w", "not finite"),
        (spoil_names, "w", "not moments"),
        (lambda file: file.write_bytes(b"nonsense"), "w", "not moments"),
        (lambda file: file.unlink(), "w", "not moments"),
    ],
)
def test_a_file_of_something_else_is_one_line(
    spoil: Callable[[Path], object], of: str, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "layer-000.safetensors"
    save_moments({"mlp": Moments(torch.eye(2), torch.zeros(2), 3, 0.1)}, file, "w")
    spoil(file)
    with pytest.raises(RequestError, match=words) as caught:
        load_moments(file, of)
    assert "\n" not in str(caught.value)


def test_inputs_that_are_not_finite_are_one_line() -> None:
    model = tiny_network("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(math.inf)
    with pytest.raises(RequestError, match=r"model\.layers\.1\.mlp\.down_proj reads is not finite"):
        dict(gather(SuperNetwork(model), text()))


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_a_cut_network_that_is_not_finite_is_one_line(family: str, value: float) -> None:
    supernet = SuperNetwork(tiny_network(family))
    names = {
        "llama": "model.layers.1.mlp.up_proj.weight",
        "opt": "model.decoder.layers.1.fc1.weight",
        "mixtral": "model.layers.1.mlp.experts.gate_up_proj",
    }
    with torch.no_grad():
        supernet.model.get_parameter(names[family]).view(-1)[:1].fill_(value)
    layers = [replace(full, intermediate_size=full.intermediate_size // 2) for full in supernet.base.layers]
    with pytest.raises(RequestError, match="not finite on the calibration text"):
        repair_in_sequence(supernet, Architecture(supernet.base.hidden_size, tuple(layers)), text())


@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
def test_means_that_are_large_leave_the_moments_as_they_are(mean: float, tmp_path: Path) -> None:
    """They would leave little of how inputs vary in float32, in which products are taken and moments are kept."""
    x, t = mixed(400, 10), mixed(400, 4, seed=3)
    one, both = sums(x, t), sums(x + mean, t - mean)
    for mine, expected in zip(both.moments(True), one.moments(True), strict=True):
        expected = torch.as_tensor(expected)
        assert (torch.as_tensor(mine) - expected).abs().max() <= (1e-3 if mean > 100 else 1e-4) * expected.abs().max()
    raw = (x + mean).double()
    assert_close(both.moments(False)[0], raw.T @ raw / len(x))
    supernet = SuperNetwork(tiny_network("opt"))
    with torch.no_grad():
        supernet.model.get_parameter("model.decoder.layers.1.fc1.bias").add_(mean)
    for index, moments in gather(supernet, text()):
        save_moments(moments, layer_file(tmp_path, index), "w")
        kept = load_moments(layer_file(tmp_path, index), "w")["mlp"]
        factorised(kept.of(centred=True), 1e-4)  # it would not be positive definite
        assert_close(
            kept.of(centred=False) - torch.outer(kept.mean.double(), kept.mean.double()), kept.of(centred=True)
        )


def test_fewer_tokens_than_units_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    supernet = SuperNetwork(tiny_network("llama"))
    dict(gather(supernet, text()))
    assert "warning" not in capsys.readouterr().err
    dict(gather(supernet, text(4, 8)))
    assert "32 calibration tokens are fewer than the 56 inputs" in " ".join(capsys.readouterr().err.split())
    for _, moments in gather(supernet, text(1, 8)):  # nothing is held out to judge by
        assert all(math.isinf(m.ridge) for m in moments.values())
    assert "8 calibration tokens are too few to hold some out" in " ".join(capsys.readouterr().err.split())


def test_another_residual_width_is_not_repaired() -> None:
    supernet = SuperNetwork(tiny_network("llama"))
    with pytest.raises(ValueError, match="residual width"):
        repair_in_sequence(supernet, Architecture(24, supernet.base.layers), text())


def test_long_rows_are_held_out_in_parts() -> None:
    held = is_held_out(8192, 8192, 0)
    assert held.sum() == 2048 and held.view(-1, 1024)[:, 0].tolist() == [False, False, False, True] * 2
    rows = is_held_out(4 * 256, 256, 3)
    assert rows.view(4, 256).all(1).tolist() == [True, False, False, False]
