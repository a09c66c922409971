"""A checkpoint is what transformers loads of it: its files, its head, its parameters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressor.stages.finetuning import difference
from supernet.checkpoint import open_checkpoint
from supernet.common.errors import RequestError, VerificationError
from supernet.families import describe, family_named, family_of
from supernet.loading import checkpoint_folder
from supernet.slicing import extract
from tests.support import tiny
from tests.support.tiny_families import CONFIGS, assert_close, tiny_network

IDS = torch.arange(12).view(2, 6)
TIED = sorted(name for name in CONFIGS if tiny_network(name).config.tie_word_embeddings)


def head_of_its_own(folder: Path, noise: float) -> torch.nn.Module:
    """Give the tied checkpoint in `folder` a head, the embedding with noise; what transformers alone loads of it."""
    config = json.loads((folder / "config.json").read_text())
    family = family_named(config["model_type"])
    weights = load_file(folder / "model.safetensors")
    embedding = weights[family.embedding]
    weights[family.head] = embedding + noise * torch.randn(embedding.shape, generator=torch.manual_seed(0))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.checkpoint(tmp_path / "model")


@torch.no_grad()
def test_a_head_that_differs_from_the_embedding_is_a_head(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tied = open_checkpoint(str(folder)).structure
    own = head_of_its_own(folder, noise=0.3)
    checkpoint = open_checkpoint(str(folder))
    assert "lm_head.weight differs from the embedding" in capsys.readouterr().err
    rows, width = own.get_output_embeddings().weight.shape
    assert checkpoint.structure.parameters(tied.base) == tied.parameters(tied.base) + rows * width
    network = checkpoint.load_model(torch.float32, "cpu")
    cut = extract(network, checkpoint.structure, checkpoint.structure.base)
    assert_close(cut(IDS).logits, own(IDS).logits)
    assert not cut.config.tie_word_embeddings


def test_a_head_that_is_the_embedding_stays_tied(folder: Path) -> None:
    before = open_checkpoint(str(folder)).structure
    head_of_its_own(folder, noise=0)
    assert open_checkpoint(str(folder)).structure == before


@pytest.mark.parametrize("family", TIED)
def test_what_is_loaded_has_the_parameters_that_are_counted(family: str, tmp_path: Path) -> None:
    """In every family with a tied head, with one of its own too."""
    model = tiny_network(family)
    model.save_pretrained(tmp_path)
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = family_of(model.config)
    if name.embedding not in stored:
        pytest.skip("stored under other names")
    head_of_its_own(tmp_path, noise=0.3)
    checkpoint = open_checkpoint(str(tmp_path))
    loaded = checkpoint.load_model(torch.float32, "cpu")
    assert sum(p.numel() for p in loaded.parameters()) == checkpoint.structure.parameters(checkpoint.structure.base)
    assert checkpoint.structure != describe(model.config)


def test_structure_and_weights_that_part_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing before it finds the difference, the loaded network itself shows it."""
    head_of_its_own(folder, noise=0.3)
    monkeypatch.setattr("supernet.checkpoint._untie", lambda *_: None)
    with pytest.raises(RequestError, match=r"transformers loads lm_head\.weight as"):
        open_checkpoint(str(folder)).load_model(torch.float32, "cpu")


def test_networks_that_compute_otherwise_are_refused() -> None:
    own = torch.tensor([1.0, -2.0])
    assert difference("it", own + 1e-4, own, torch.float32) == pytest.approx(5e-5, rel=1e-2)
    with pytest.raises(VerificationError, match="it differs from the network"):
        difference("it", own + 0.01, own, torch.float32)
    with pytest.raises(VerificationError):
        difference("it", own * float("nan"), own, torch.bfloat16)


def test_only_the_files_that_transformers_loads_count(folder: Path) -> None:
    before = open_checkpoint(str(folder))
    bytes_before, fingerprint = before.weight_bytes, before.fingerprint()
    save_file({"x": torch.full((999,), float("nan"))}, folder / "consolidated.safetensors")
    after = open_checkpoint(str(folder))
    after.check_finite()
    assert (after.weight_bytes, after.fingerprint()) == (bytes_before, fingerprint)


def test_only_the_files_that_transformers_loads_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file, or the shards that the index names."""
    asked: list[list[str]] = []

    def fetch(name: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.append(allow_patterns)
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        return str(tmp_path)

    monkeypatch.setattr("supernet.loading.snapshot_download", fetch)
    assert checkpoint_folder("org/model", None) == tmp_path
    assert "model.safetensors" in asked[0] and not any("*.safetensors" in pattern for pattern in asked[0])
    assert asked[1] == ["model-1.safetensors", "model-2.safetensors"]
    (tmp_path / "model.safetensors").write_bytes(b"")
    checkpoint_folder("org/model", None)
    assert len(asked) == 3


def test_the_scale_of_weights_is_that_of_the_layers_matrices(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    last = max(int(name.split(".")[2]) for name in weights if ".layers." in name)
    for name, weight in weights.items():
        inside = ".layers." in name and weight.ndim > 1
        weight.fill_(0.5 if inside and f".{last}." in name else -0.25 if inside else 9.0)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    share = 1 / len({0, (last + 1) // 2, last})  # of the layers that are looked at
    expected = (share * 0.5**2 + (1 - share) * 0.25**2) ** 0.5
    assert open_checkpoint(str(folder)).weight_scale() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("[]", "config.json holds no settings by name"),
        ('{"quantization_config": "fp8"}', r"already quantized \(fp8\)"),
        ('{"architectures": "LlamaForCausalLM"}', "architectures is no list of names"),
    ],
)
def test_a_configuration_of_another_form_is_named(folder: Path, config: str, why: str) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(RequestError, match=why):
        open_checkpoint(str(folder))


def test_a_dtype_that_the_configuration_does_not_say_is_that_of_the_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(str(folder))
    base = checkpoint.structure.base
    assert checkpoint.structure.bytes(base) == 2 * checkpoint.structure.parameters(base)
