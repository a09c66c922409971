"""What export leaves behind is used again: healed networks, packages, timings."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny
import torch
from tiny_families import random_architecture, tiny_network

from compressor.elastic.streaming import StreamedNetwork
from compressor.families import describe
from compressor.stages.exporting import load_healed
from export.package import write_package


@pytest.mark.parametrize("uneven", [False, True], ids=["plain", "uneven"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "gpt2"])
def test_a_healed_network_is_read_back_as_it_was(family: str, uneven: bool, tmp_path: Path) -> None:
    """Experts have other names in a plain package than in memory."""
    model = tiny_network(family)
    model.save_pretrained(tmp_path / "supernet", save_original_format=False)
    structure = describe(model.config)
    architecture = random_architecture(structure.base, random.Random(3)) if uneven else structure.base
    cut = StreamedNetwork(tmp_path / "supernet", model.config, structure, architecture)
    healed = cut.built(torch.float32, torch.device("cpu"))
    with torch.no_grad():
        for parameter in healed.parameters():
            parameter.add_(1.0)
    write_package(
        healed,
        tmp_path / "healed",
        tokenizer=tiny.byte_tokenizer(),
        entry={"name": "best", "architecture": architecture.to_dict()},
        dtype=torch.float32,
    )
    again = load_healed(cut, tmp_path / "healed", torch.float32)
    expected = dict(healed.named_parameters())
    assert [name for name, _ in again.named_parameters()] == list(expected)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, expected[name]), name
