"""Shapes that the baselines would cut: the same layers, the same widths, as far as the space has them."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from evals.baselines import PruningContext, as_batch, baselines, without
from evals.warm_starts.published import greedily, passes, published
from search.space import SearchSpace
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, LayerSizes
from tests.support import tiny

LAYERS = 5


@pytest.fixture
def model() -> PreTrainedModel:
    model = tiny.llama(num_hidden_layers=LAYERS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)  # random weights as small as they are do nothing at all
    return model


def text() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(2, 250, (4, 32), generator=generator),)


def proposed(model: PreTrainedModel, share: float, genes: dict[str, object] | None = None) -> list[Architecture]:
    supernet = SuperNetwork(model)
    space = SearchSpace.from_dict(genes or {"ffn.*": list(range(0, 65, 2)), "kv.*": [0, 1, 2]}, supernet.structure)
    size = round(share * supernet.structure.parameters(supernet.base))
    shapes = published(supernet, space, [as_batch(ids) for ids in text()], [size])
    assert all(shape in space and supernet.structure.parameters(shape) <= size for shape in shapes)
    assert supernet.current == supernet.base
    return shapes


@pytest.mark.parametrize("name", ["shortgpt", "late-block", "sleb"])
def test_the_layers_that_a_baseline_removes(name: str, model: PreTrainedModel) -> None:
    structure = SuperNetwork(model).structure
    size = round(0.62 * structure.parameters(structure.base))
    _, cut = baselines()[name].cut(PruningContext(model, structure, text(), size))
    removed = {i for i, layer in enumerate(cut.layers) if layer.removed}
    assert removed
    shapes = proposed(model, 0.62)
    near = [s for s in shapes if {i for i, layer in enumerate(s.layers) if layer.removed} == removed]
    # Of the same size and depth, the widths of what is left differ by no more than a step.
    widths = {layer.intermediate_size for layer in cut.layers if not layer.removed}
    found = [{layer.intermediate_size for layer in s.layers if not layer.removed} for s in near]
    assert any(max(abs(max(own) - max(widths)), abs(min(own) - min(widths))) <= 2 for own in found)


def test_the_width_baselines_shape(model: PreTrainedModel) -> None:
    structure = SuperNetwork(model).structure
    size = round(0.7 * structure.parameters(structure.base))
    _, cut = baselines()["wanda"].cut(PruningContext(model, structure, text(), size))
    shapes = [s for s in proposed(model, 0.7) if len(set(s.layers)) == 1]
    assert any(abs(s.layers[0].intermediate_size - cut.layers[0].intermediate_size) <= 2 for s in shapes)
    assert {s.layers[0].num_key_value_heads for s in shapes} >= {cut.layers[0].num_key_value_heads}


def test_a_residual_width_is_cut_where_the_space_has_one(model: PreTrainedModel) -> None:
    hidden = model.config.hidden_size
    step = model.config.num_attention_heads
    genes = {"hidden_size": list(range(step, hidden + 1, step)), "ffn": list(range(2, 65, 2))}
    narrow = [s for s in proposed(model, 0.7, genes) if s.hidden_size < hidden]
    (shape,) = narrow
    (width,) = {layer.intermediate_size for layer in shape.layers}
    assert abs(shape.hidden_size / hidden - width / 64) < 0.15


def test_what_a_space_does_not_have_is_not_proposed(model: PreTrainedModel) -> None:
    whole = [s for s in proposed(model, 0.7, {"ffn.*": [16, 32, 64]}) if any(layer.removed for layer in s.layers)]
    assert whole == []
    alike = proposed(model, 0.7, {"layer.1": [0, 1], "layer.2": [0, 1]})
    assert all({i for i, layer in enumerate(s.layers) if layer.removed} <= {1, 2} for s in alike)


def test_removing_one_after_another_measures_few_layers_of_each_step() -> None:
    base = Architecture(8, (LayerSizes(2, 2, 8),) * 8)
    harm = [0.5, 0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.6]
    asked: list[Architecture] = []

    def degradation(architecture: Architecture) -> float:
        asked.append(architecture)
        removed = [i for i, layer in enumerate(architecture.layers) if layer.removed]
        return sum(harm[i] for i in removed) + (2.0 if {1, 3} <= set(removed) else 0.0)  # the two need one another

    sets = greedily(degradation, base, harm, lambda removed: len(set(removed)) >= 3)
    assert sets == [{1}, {1, 5}, {1, 5, 0}]
    assert len(asked) == len(set(asked)) == 6 < passes(8)
    assert without(base, {1, 5}) in asked
