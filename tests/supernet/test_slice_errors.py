"""Closed-form errors of cut half-blocks are what the half-blocks' outputs really move by."""

from __future__ import annotations

import pytest
import torch

from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, Half, LayerSizes
from supernet.hooks import Hooks
from supernet.slice_errors import slice_errors
from tests.support.tiny_families import tiny_network

BATCHES = list(torch.randint(3, 101, (4, 16), generator=torch.Generator().manual_seed(0)).split(2))


def cuts_of(full: LayerSizes) -> dict[Half, list[LayerSizes]]:
    heads, groups, width = full.num_attention_heads, full.num_key_value_heads, full.intermediate_size
    return {
        "attention": [LayerSizes(heads // groups, 1, width), LayerSizes(0, 0, width)],
        "mlp": [LayerSizes(heads, groups, width // 2), LayerSizes(heads, groups, 0)],
    }


def output_of(supernet: SuperNetwork, layer: int, half: Half, architecture: Architecture) -> torch.Tensor:
    """What a half-block puts out over all batches, [tokens, hidden]; zero where it is removed."""
    name = supernet.family.attention if half == "attention" else supernet.family.mlp
    module, seen = supernet.layers[layer].get_submodule(name), list[torch.Tensor]()

    def keep(_: object, __: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        seen.append((output if isinstance(output, torch.Tensor) else output[0]).flatten(0, -2))

    hooks = Hooks([module.register_forward_hook(keep)])
    with torch.no_grad(), hooks, supernet.activated(architecture) as model:
        for ids in BATCHES:
            model(input_ids=ids, use_cache=False)
    return torch.cat(seen) if seen else torch.zeros(1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_errors_are_what_outputs_move_by(name: str) -> None:
    supernet = SuperNetwork(tiny_network(name))
    base = supernet.base
    cuts = {(1, half): sizes for half, sizes in cuts_of(base.layers[1]).items()}
    errors = slice_errors(supernet, cuts, BATCHES)
    assert len(errors) == 4
    for (layer, half, sizes), error in errors.items():
        cut = Architecture(base.hidden_size, (base.layers[0], sizes, *base.layers[2:]))
        whole, moved = (output_of(supernet, layer, half, architecture) for architecture in (base, cut))
        assert error == pytest.approx(float((whole - moved).square().sum(1).mean()), rel=1e-3)


class OneSize:
    """A variant of a parameter in layers of one size."""

    def __init__(self, name: str, sizes: LayerSizes, tensor: torch.Tensor) -> None:
        self.names = [name]
        self.sizes, self._tensor = sizes, tensor

    def tensor(self, name: str, kept: LayerSizes) -> torch.Tensor | None:
        return self._tensor if kept == self.sizes else None


def test_a_repaired_weight_has_its_own_error() -> None:
    supernet = SuperNetwork(tiny_network("llama"))
    full = supernet.base.layers[0]
    cuts: dict[tuple[int, Half], list[LayerSizes]] = {(0, "mlp"): cuts_of(full)["mlp"][:1]}
    name = "model.layers.0.mlp.down_proj.weight"
    weight = supernet.model.get_parameter(name).detach()[:, : full.intermediate_size // 2] * 1.3
    supernet.use(OneSize(name, cuts[0, "mlp"][0], weight))
    ((key, error),) = slice_errors(supernet, cuts, BATCHES).items()
    cut = Architecture(supernet.base.hidden_size, (key[2], *supernet.base.layers[1:]))
    whole, moved = (output_of(supernet, 0, "mlp", architecture) for architecture in (supernet.base, cut))
    assert error == pytest.approx(float((whole - moved).square().sum(1).mean()), rel=1e-3)


def test_what_ends_in_no_linear_module_is_left_out() -> None:
    supernet = SuperNetwork(tiny_network("mixtral"))
    full = supernet.base.layers[0]
    cut = LayerSizes(full.num_attention_heads, full.num_key_value_heads, full.intermediate_size, 1)
    assert slice_errors(supernet, {(0, "mlp"): [cut]}, BATCHES) == {}
