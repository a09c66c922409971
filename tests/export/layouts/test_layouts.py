"""The padded layout: uneven networks of every family made uniform, the logits unchanged."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export.layouts import padded as padding
from export.layouts.padded import pad, padded_sizes
from export.verify import check
from supernet import families
from supernet.architecture import Architecture, LayerSizes
from supernet.common.errors import RequestError
from supernet.slicing import extract
from tests.support.export_networks import UNEVEN, cut, probe_ids, tiny_llama, write_tiny
from tests.support.tiny_families import CONFIGS, IDS, assert_close, logits, random_architecture, tiny_network


def test_padded_sizes_by_hand() -> None:
    # 4/2 and 2/1 heads share 2 to 1, and 4 divides 64.
    assert padded_sizes(UNEVEN, 4) == LayerSizes(4, 2, 96)
    # Shared 3 to 1 and 1 to 1: every query head gets a key-value head of its own.
    mixed = Architecture(48, (LayerSizes(6, 2, 8), LayerSizes(3, 3, 16)))
    assert padded_sizes(mixed, 6) == LayerSizes(6, 6, 16)
    # 5 heads do not divide 64, so 8 are made.
    assert padded_sizes(Architecture(64, (LayerSizes(5, 5, 8), LayerSizes(3, 3, 0))), 8) == LayerSizes(8, 8, 8)


REFUSED = {
    "olmo2": "averages over all heads",
    "opt-projected": "a removed half-block's norm would remain",
    "mixtral": "removed experts",
    "qwen3_moe": "removed experts",
    "qwen3_moe-dense": "removed experts|some of its layers have experts",
}


@pytest.mark.parametrize("family", CONFIGS)
def test_padded_networks_compute_the_same_in_the_plain_class(family: str) -> None:
    model = tiny_network(family)
    structure = families.describe(model.config)
    rng, refused = random.Random(7), 0
    for _ in range(4):
        architecture = random_architecture(structure.base, rng)
        uneven = extract(model, structure, architecture)
        try:
            padded = pad(uneven, architecture)
        except RequestError as reason:
            assert re.search(REFUSED[family], str(reason))
            refused += 1
            continue
        assert type(padded) is type(model)
        mask = torch.ones_like(IDS)
        mask[0, :3] = 0
        assert_close(logits(padded), logits(uneven))
        assert_close(logits(padded, attention_mask=mask)[:, 3:], logits(uneven, attention_mask=mask)[:, 3:])
    assert bool(refused) == (family in REFUSED)


def test_experts_are_padded_where_none_is_gone() -> None:
    model = tiny_network("qwen3_moe")
    structure = families.describe(model.config)
    full = structure.base.layers[0]
    layers = (replace(full, intermediate_size=8), full, LayerSizes(0, 0, 24, full.num_experts), LayerSizes(4, 2, 0))
    architecture = Architecture(48, layers)
    uneven = extract(model, structure, architecture)
    assert_close(logits(pad(uneven, architecture)), logits(uneven))


def test_narrow_key_value_heads_are_repeated() -> None:
    model = tiny_llama()
    layers = (LayerSizes(4, 2, 96), LayerSizes(2, 2, 32), LayerSizes(1, 1, 96), LayerSizes(4, 2, 0))
    architecture = Architecture(64, layers)
    uneven = cut(model, architecture)
    padded = pad(uneven, architecture)
    assert padded.config.num_key_value_heads == 4
    assert_close(padded(probe_ids()).logits, uneven(probe_ids()).logits)


def test_a_padded_package_equals_the_uneven_network(tmp_path: Path) -> None:
    network = cut(tiny_llama(), UNEVEN)
    entry = {"name": "best", "architecture": UNEVEN.to_dict(), "params": sum(p.numel() for p in network.parameters())}
    options = {"entry": entry, "dtype": torch.bfloat16, "reference": tmp_path / "reference.safetensors"}
    package = write_tiny(tmp_path / "best-padded", UNEVEN, network, layout="padded", **options)
    assert (package.entry.layout, package.entry.architecture) == ("padded", UNEVEN)
    assert package.entry.params > entry["params"] and not list(package.folder.glob("*.py"))
    result = check(package.folder, tmp_path / "reference.safetensors")
    assert result["max_abs_logit_difference"] <= result["tolerance"] and not result["remote_code"]


def test_padding_that_would_change_the_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = Architecture(64, (LayerSizes(4, 2, 96, 3), *UNEVEN.layers[1:]))
    with pytest.raises(RequestError, match="experts"):
        pad(cut(tiny_llama(), UNEVEN), experts)
    llama = families.families()["llama"]
    over_all = replace(llama, layer={**llama.layer, "self_attn.q_norm.weight": ("query",)})
    monkeypatch.setattr(padding, "family_of_standalone", lambda config: over_all)
    with pytest.raises(RequestError, match=r"self_attn\.q_norm\.weight averages over all heads"):
        pad(cut(tiny_llama(), UNEVEN), UNEVEN)
