"""A narrower residual stream, and fewer query heads in a group: views, what is cut from them, and what is refused."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from export.package import write_package
from search.space import SearchSpace
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, LayerSizes
from supernet.slicing import extract
from supernet.training.data import Batch
from supernet.training.inactive import inactive_slices
from supernet.training.losses import Loss
from supernet.training.traces import Recorder, trace
from tests.support.export_networks import tiny_tokenizer
from tests.support.tiny_families import CONFIGS, IDS, assert_close, logits, random_architecture, tiny_network


@pytest.mark.parametrize("name", CONFIGS)
def test_a_narrower_residual_is_exact_or_refused(name: str, tmp_path: Path) -> None:
    model = tiny_network(name)
    supernet = SuperNetwork(model)
    before = logits(model)
    rng = random.Random(1)
    if supernet.structure.fixed_hidden:
        with pytest.raises(ValueError, match="residual width cannot change"):
            supernet.activate(replace(supernet.base, hidden_size=24))
        with pytest.raises(ValueError, match="hidden_size: cannot change here"):
            SearchSpace.from_dict({"hidden_size": [24, 48]}, supernet.structure)
        return
    for number, hidden in enumerate((24, 36, 48, 12)):
        architecture = replace(random_architecture(supernet.base, rng), hidden_size=hidden)
        standalone = extract(model, supernet.structure, architecture)
        with supernet.activated(architecture):
            assert_close(logits(standalone), logits(model))
            generated = model.generate(IDS[:1], max_new_tokens=5, do_sample=False)
        assert torch.equal(standalone.generate(IDS[:1], max_new_tokens=5, do_sample=False), generated)
        assert supernet.structure.parameters(architecture) == sum(p.numel() for p in standalone.parameters())
        if number == 0:
            entry = {"name": "narrow", "architecture": architecture.to_dict()}
            write_package(
                standalone, tmp_path / "narrow", tokenizer=tiny_tokenizer(), entry=entry, dtype=torch.float32,
                probe_ids=IDS,
            )  # fmt: skip
            reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", trust_remote_code=True).eval()
            assert_close(logits(reloaded), logits(standalone))
    assert torch.equal(logits(model), before)


def test_all_layers_alike_and_narrow_fit_the_plain_class() -> None:
    model = tiny_network("llama")
    supernet = SuperNetwork(model)
    standalone = extract(model, supernet.structure, replace(supernet.base, hidden_size=24))
    assert type(standalone) is type(model) and standalone.config.hidden_size == 24
    assert standalone.config.head_dim == 8


def test_fewer_query_heads_are_the_first_of_every_group() -> None:
    model = tiny_network("llama")  # 3 groups of 2 query heads, 8 wide
    supernet = SuperNetwork(model)
    one_each = Architecture(48, (LayerSizes(2, 2, 56), *supernet.base.layers[1:]))
    projection = model.model.layers[0].self_attn.q_proj
    with supernet.activated(one_each):
        rows = [*range(8), *range(16, 24)]  # head 0 of group 0 and head 2, the first of group 1
        assert torch.equal(projection.weight, projection._parameters["weight"][rows])
        assert model.model.layers[0].self_attn.num_key_value_groups == 1
        model(input_ids=IDS, labels=IDS).loss.backward()
    gradient = projection._parameters["weight"].grad
    others = [row for row in range(48) if row not in rows]
    assert gradient[rows].abs().sum() > 0 and gradient[others].abs().sum() == 0
    inactive = inactive_slices(supernet.structure, [one_each])
    assert [(d, i.tolist()) for d, i in inactive["model.layers.0.self_attn.q_proj.weight"]] == [(0, others)]


def test_gradients_of_a_narrow_residual_reach_its_channels_only() -> None:
    model = tiny_network("llama-rope-biases-tied")
    supernet = SuperNetwork(model)
    with supernet.activated(replace(supernet.base, hidden_size=24)):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.gate_proj.weight"):
        gradient = model.get_parameter(name).grad
        assert gradient[:, :24].abs().sum() > 0 and gradient[:, 24:].abs().sum() == 0


def test_a_narrower_student_learns_from_the_whole_network() -> None:
    model = tiny_network("llama")
    supernet = SuperNetwork(model)
    batch = Batch(IDS, IDS, torch.arange(IDS.shape[1]).expand_as(IDS))
    with Recorder(supernet, layers=True, attention=True) as recorder:
        full = logits(model)[:, :-1].log_softmax(-1)
        teacher = trace(model, batch, recorder).detached()
        with supernet.activated(replace(supernet.base, hidden_size=24)):
            student = trace(model, batch, recorder)
            narrow = model(input_ids=IDS).logits[:, :-1].log_softmax(-1)
            expected = F.kl_div(narrow, full, log_target=True, reduction="sum") / narrow[..., 0].numel()
            loss = Loss({"kl": 1.0})(student, teacher)
            assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
            loss.backward()
            assert torch.isfinite(Loss({"relations": 1.0, "hidden": 1.0})(student, teacher))
    assert model.lm_head.weight.grad[:, :24].abs().sum() > 0 and model.lm_head.weight.grad[:, 24:].abs().sum() == 0
    assert "weight" not in model.lm_head.__dict__


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    structure = SuperNetwork(tiny_network("llama")).structure
    with pytest.raises(ValueError, match="valid are the multiples of 6 up to 48"):
        SearchSpace.from_dict({"hidden_size": [32, 48]}, structure)
