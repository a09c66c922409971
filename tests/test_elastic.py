"""What the super-network promises beside parity, which is for tests/test_families.py."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from compressor.architecture import Architecture, LayerSizes
from compressor.elastic.importance import wanda
from compressor.elastic.ordering import apply_ordering, order_by
from compressor.elastic.supernet import SuperNetwork

SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-biases-tied": lambda: LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=12
    ),
    "llama-mha": lambda: LlamaConfig(**SIZES | {"num_key_value_heads": 6}),
    "llama-mqa": lambda: LlamaConfig(**SIZES | {"num_key_value_heads": 1}),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(CONFIGS[request.param]()).eval()
    with torch.no_grad():  # biases and norms start at constants, which would hide a wrong permutation
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    yield network


def random_architecture(base: Architecture, rng: random.Random) -> Architecture:
    full = base.layers[0]
    per_group = full.num_attention_heads // full.num_key_value_heads
    layers = []
    for _ in base.layers:
        groups = rng.randint(0, full.num_key_value_heads)
        layers.append(LayerSizes(groups * per_group, groups, rng.choice([0, 8, 24, 40, full.intermediate_size])))
    if not any(layer.num_key_value_heads for layer in layers):
        layers[-1] = full
    return Architecture(base.hidden_size, tuple(layers))


IDS = torch.tensor([[1, 5, 9, 17, 33, 65, 2, 7, 100, 3], [1, 88, 7, 6, 5, 4, 3, 2, 9, 11]])


def logits(network: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return network(**({"input_ids": IDS} | inputs)).logits


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_ordering_leaves_the_function_unchanged(model: PreTrainedModel) -> None:
    before = logits(model)
    supernet = SuperNetwork(model)
    scores = wanda(supernet, [IDS])
    order = order_by(scores)
    assert any(not torch.equal(o, o.sort().values) for o in order.values())
    apply_ordering(supernet, order)
    assert_close(logits(model), before)
    again = wanda(supernet, [IDS])
    for key, value in again.items():
        assert torch.all(value[..., :-1] >= value[..., 1:] - 1e-6 * value.max()), f"{key} is not in order of importance"


def test_state_dict_never_shows_a_sub_network(model: PreTrainedModel) -> None:
    supernet = SuperNetwork(model)
    before = {name: value.shape for name, value in model.state_dict().items()}
    with supernet.activated(random_architecture(supernet.base, random.Random(4))):
        assert {name: value.shape for name, value in model.state_dict().items()} == before


def test_larger_than_the_base_is_refused(model: PreTrainedModel) -> None:
    supernet = SuperNetwork(model)
    full = supernet.base.layers[0]
    wide = LayerSizes(full.num_attention_heads, full.num_key_value_heads, full.intermediate_size + 8)
    with pytest.raises(ValueError, match="larger"):
        supernet.activate(Architecture(supernet.base.hidden_size, (wide, *supernet.base.layers[1:])))
