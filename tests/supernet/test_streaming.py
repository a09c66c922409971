"""Sub-networks that are never built: files, logits and packages equal to those of networks cut out in memory."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.package import write_package
from export.package_record import check_files
from export.verify import check
from supernet.families import describe
from supernet.slicing import extract
from supernet.streaming import StreamedNetwork, WeightFiles
from tests.support.export_networks import UNEVEN, cut, probe_ids, tiny_llama, tiny_tokenizer
from tests.support.tiny_families import CONFIGS, IDS, assert_close, logits, random_architecture, tiny_network


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_streams(family: str, tmp_path: Path) -> None:
    model = tiny_network(family)
    model.save_pretrained(tmp_path, save_original_format=False)  # as the fine-tuning stage saves it
    structure = describe(model.config)
    rng = random.Random(3)
    for architecture in (structure.base, random_architecture(structure.base, rng)):
        network = extract(model, structure, architecture)
        streamed = StreamedNetwork(tmp_path, model.config, structure, architecture)
        assert all(parameter.is_meta for parameter in streamed.model.parameters())
        built = streamed.built(torch.float32, torch.device("cpu"))
        assert type(built) is type(network)
        assert_close(logits(built), logits(network))
        for name, parameter in network.named_parameters():
            assert torch.equal(streamed.weight(name), parameter)
        assert_close(streamed.logits(IDS, torch.float32), logits(network))
        assert all(parameter.is_meta for parameter in streamed.model.parameters())


def test_logits_are_those_of_weights_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    model = tiny_network("llama")
    model.save_pretrained(tmp_path, save_original_format=False)
    structure = describe(model.config)
    streamed = StreamedNetwork(tmp_path, model.config, structure, structure.base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    assert_close(streamed.logits(IDS, torch.bfloat16), logits(model))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_streamed_package_is_the_same_package(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True).to(torch.bfloat16)
    model.generation_config.repetition_penalty = 1.1
    model.save_pretrained(tmp_path / "base", max_shard_size="50KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    structure = describe(model.config)
    streamed = StreamedNetwork(tmp_path / "base", model.config, structure, UNEVEN)
    packages = {}
    for name, network in (("built", cut(model.float(), UNEVEN)), ("streamed", streamed)):
        package = write_package(
            network,
            tmp_path / name,
            tokenizer=tiny_tokenizer(),
            entry={"name": "best", "architecture": UNEVEN.to_dict()},
            dtype=torch.bfloat16,
            probe_ids=probe_ids(),
            reference=tmp_path / f"{name}.safetensors",
            max_shard_bytes=60_000,
        )
        check_files(package.folder)
        packages[name] = package
    assert packages["built"].entry.bytes == pytest.approx(packages["streamed"].entry.bytes, abs=200)  # headers
    for name, tensor in weights_of(packages["built"].folder).items():
        assert torch.equal(weights_of(packages["streamed"].folder)[name], tensor)
    others = [
        {name: file for name, file in package.files.items() if "safetensors" not in name}
        for package in packages.values()
    ]
    assert others[0] == others[1] and len(others[0]) > 5
    built, other = (load_file(tmp_path / f"{name}.safetensors")["logits"] for name in packages)
    assert_close(other, built)
    # Not only the same: the streamed one is proved, by logits that no built network had a part in.
    result = check(packages["streamed"].folder, tmp_path / "streamed.safetensors")
    assert result["max_abs_logit_difference"] <= result["tolerance"]
    assert packages["streamed"].entry.params == structure.parameters(UNEVEN)


def test_one_layer_at_a_time_has_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it runs, no more than one layer of the network has weights; the next one's are read meanwhile."""
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    streamed = StreamedNetwork(tmp_path, model.config, describe(model.config), UNEVEN)
    read: list[str] = []
    present: list[int] = []
    original = WeightFiles.read

    def listed(self: WeightFiles, name: str) -> torch.Tensor:
        read.append(name)
        return original(self, name)

    def counted(*_: Any) -> None:
        present.append(sum(not p.is_meta for p in streamed.model.parameters()))

    monkeypatch.setattr(WeightFiles, "read", listed)
    for module in streamed.model.modules():
        module.register_forward_hook(counted)  # before its weights are dropped
    streamed.logits(probe_ids(), torch.float32)
    assert len(read) == len(list(streamed.model.parameters()))
    assert max(present) == max(len(list(layer.parameters())) for layer in streamed.model.model.layers)


def test_files_that_name_their_tensors_otherwise_are_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["decoder.norm.weight"] = weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LookupError, match=r"no tensor named model\.norm\.weight"):
        StreamedNetwork(tmp_path, model.config, describe(model.config), UNEVEN)
