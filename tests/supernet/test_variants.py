"""A provider of variants: what is activated, cut out and streamed uses the same tensors, in every family."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, LayerSizes, Structure
from supernet.slicing import extract
from supernet.streaming import StreamedNetwork
from supernet.variants import FixedVariants, variant_of
from tests.support.tiny_families import CONFIGS, assert_close, logits, random_architecture, tiny_network


def drawn(structure: Structure, architecture: Architecture) -> dict[str, Tensor]:
    """Random tensors in the shapes of every second parameter of the layers that `architecture` keeps."""
    torch.manual_seed(1)
    shapes = {t.name: structure.shape(t, architecture) for t in structure.tensors if t.layer is not None}
    kept = {name: shape for name, shape in shapes.items() if shape is not None}
    return {name: 0.1 * torch.randn(shape) for name, shape in list(kept.items())[::2]}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_uses_them_alike(family: str, tmp_path: Path) -> None:
    model = tiny_network(family)
    whole = logits(model)
    model.save_pretrained(tmp_path, save_original_format=False)
    supernet = SuperNetwork(model)
    structure, rng = supernet.structure, random.Random(7)
    architecture = random_architecture(supernet.base, rng)
    variants = FixedVariants(drawn(structure, architecture))
    network, plain = extract(model, structure, architecture, variants), extract(model, structure, architecture)
    assert (logits(network) - logits(plain)).abs().max() > 1e-3
    # 1. Used before and after the sub-network is active, the same as cut out.
    supernet.use(variants)
    supernet.activate(architecture)
    assert_close(logits(model), logits(network))
    supernet.use(None)
    assert_close(logits(model), logits(plain))
    supernet.use(variants)
    assert_close(logits(model), logits(network))
    # 2. The same streamed.
    streamed = StreamedNetwork(tmp_path, model.config, structure, architecture, variants)
    for name, parameter in network.named_parameters():
        assert torch.equal(streamed.weight(name), parameter)
    # 3. Without them, the network is what it was.
    supernet.use(None)
    supernet.activate(supernet.base)
    assert torch.equal(logits(model), whole)


class Doubled:
    """The projections out of every MLP, doubled where neurons are missing."""

    def __init__(self, supernet: SuperNetwork) -> None:
        base = supernet.base.layers
        self.full = {f"model.layers.{i}.mlp.down_proj.weight": i for i in range(len(base))}
        self.supernet, self.asked = supernet, 0

    @property
    def names(self) -> set[str]:
        return set(self.full)

    def tensor(self, name: str, kept: LayerSizes) -> Tensor | None:
        self.asked += 1
        width = kept.intermediate_size
        if width in (0, self.supernet.base.layers[self.full[name]].intermediate_size):
            return None
        return 2 * self.supernet.model.state_dict()[name][:, :width]


def test_a_provider_is_asked_by_sizes_and_only_for_layers_that_change() -> None:
    model = tiny_network("llama")
    supernet = SuperNetwork(model)
    full = supernet.base.layers[0]
    provider = Doubled(supernet)
    supernet.use(provider)
    whole, provider.asked = logits(model), 0
    supernet.activate(supernet.base)
    assert provider.asked == 0  # nothing changed
    narrow = Architecture(supernet.base.hidden_size, (full, LayerSizes(6, 3, 8), LayerSizes(6, 3, 0), full))
    with supernet.activated(narrow):
        assert provider.asked == 2
        weight = model.get_submodule("model.layers.1.mlp.down_proj").weight
        assert torch.equal(weight, 2 * model.state_dict()["model.layers.1.mlp.down_proj.weight"][:, :8])
    assert torch.equal(logits(model), whole)


def test_another_residual_width_has_none() -> None:
    model = tiny_network("llama-rope-biases-tied")
    supernet = SuperNetwork(model)
    structure, base = supernet.structure, supernet.base
    name = "model.layers.0.mlp.down_proj.bias"
    variants = FixedVariants({name: torch.ones(base.hidden_size)})
    spec = next(tensor for tensor in structure.tensors if tensor.name == name)
    narrow = Architecture(24, base.layers)
    assert variant_of(variants, spec, narrow, base) is None and variant_of(None, spec, base, base) is None
    assert torch.equal(variant_of(variants, spec, base, base), torch.ones(base.hidden_size))  # type: ignore[arg-type]
    module, own = model.get_submodule(name.removesuffix(".bias")), model.state_dict()[name]
    supernet.use(variants)
    assert torch.equal(module.bias, torch.ones(base.hidden_size))
    supernet.activate(narrow)
    assert torch.equal(module.bias, own[:24])
    supernet.activate(base)
    assert torch.equal(module.bias, torch.ones(base.hidden_size))
