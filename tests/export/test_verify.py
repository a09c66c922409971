"""Verification: a fresh process proves what a package claims, and every claim that does not hold is said."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from compressor.cli import run
from evals.scoring.encoding import Encoder
from evals.scoring.lm import NetworkLM
from evals.scoring.scorer import Scorer
from evals.scoring.tasks import TaskSet
from export.package import write_package
from export.package_record import read_package, update_record
from export.verify import TaskFiles, _Checker, check, verify, verify_all
from supernet.architecture import Architecture
from supernet.common.errors import RequestError, VerificationError
from supernet.common.files import sha256
from supernet.families import base_architecture
from tests.support import tiny
from tests.support.export_networks import EVEN, UNEVEN, cut, probe_ids, tiny_llama, tiny_tokenizer

NETWORKS = {"even": EVEN, "uneven": UNEVEN}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    for name, architecture in NETWORKS.items():
        write(architecture, folder / name, folder / f"{name}.safetensors")
    return folder


def write(architecture: Architecture, destination: Path, reference: Path) -> None:
    write_package(
        cut(tiny_llama(), architecture),
        destination,
        tokenizer=tiny_tokenizer(),
        entry={"name": destination.name, "architecture": architecture.to_dict()},
        dtype=torch.bfloat16,
        probe_ids=probe_ids(),
        reference=reference,
    )


@pytest.fixture
def package(tmp_path: Path, packages: Path) -> Path:
    return shutil.copytree(packages / "uneven", tmp_path / "uneven")


def edit(package: Path, name: str, **values: Any) -> None:
    """Change a JSON file of the package, and the recorded hash with it: only the contents can give it away."""
    content = json.loads((package / name).read_text())
    (package / name).write_text(json.dumps(content | values))
    forgive(package, name)


def forgive(package: Path, name: str) -> None:
    record = json.loads((package / "compression.json").read_text())
    record["files"][name] = {"sha256": sha256(package / name), "bytes": (package / name).stat().st_size}
    (package / "compression.json").write_text(json.dumps(record))


def test_a_fresh_process_proves_good_packages(packages: Path, tmp_path: Path) -> None:
    copies = [shutil.copytree(packages / name, tmp_path / name) for name in NETWORKS]
    log = tmp_path / "log.txt"
    results = verify_all(
        [(copies[0], packages / "even.safetensors"), (copies[1], packages / "uneven.safetensors"), (copies[1], None)],
        record=True,
        log=log,
    )
    for result in results:
        for claim in ("padding_equal", "cached_equals_uncached", "tokenizer_equal", "save_and_reload_equal"):
            assert result[claim] is True
    for result, name in zip(results, [*NETWORKS, "uneven"], strict=True):
        assert result["params"] == read_package(packages / name).params
        assert result["remote_code"] is (name == "uneven")
    assert [r["compared_with"].split()[0] for r in results] == ["full", "full", "the"]
    assert read_package(copies[1]).verified == results[2]
    assert read_package(packages / "even").verified is None
    assert verify(copies[1]) == results[2]
    assert log.exists()


def test_faults_reach_the_caller_from_the_fresh_process(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(package, "config.json", rms_norm_eps=0.3)
    assert run(["verify", str(package)]) == 1
    assert "uneven: log-probabilities differ by up to" in " ".join(capsys.readouterr().err.split())
    (package / "config.json").unlink()
    with pytest.raises(VerificationError, match=r"config\.json: the file is missing"):
        verify(package)
    with pytest.raises(RequestError, match="not a package"):
        verify(package.parent)


def test_no_second_network_is_in_memory(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Any]] = []
    original = _Checker.load

    def load(self: _Checker, folder: Path) -> Any:
        gc.collect()
        assert not [network for network in loaded if network() is not None]
        network = original(self, folder)
        loaded.append(weakref.ref(network))
        return network

    monkeypatch.setattr(_Checker, "load", load)
    check(package)
    assert len(loaded) == 2  # and saved by transformers and loaded again


def test_changed_weights_are_found(package: Path, packages: Path) -> None:
    weights = load_file(package / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][5] *= 1.05
    save_file(weights, package / "model.safetensors", {"format": "pt"})
    forgive(package, "model.safetensors")
    with pytest.raises(VerificationError, match="log-probabilities differ"):
        check(package)
    with pytest.raises(VerificationError, match="logits differ by up to"):
        check(package, packages / "uneven.safetensors")


def test_missing_and_unknown_weights_are_found(package: Path) -> None:
    weights = load_file(package / "model.safetensors")
    moved = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, package / "model.safetensors", {"format": "pt"})
    forgive(package, "model.safetensors")
    with pytest.raises(VerificationError, match=r"missing keys on loading: model\.layers\.1\.mlp\.up_proj\.weight"):
        check(package)
    weights["model.layers.1.mlp.up_proj.weight"], weights["model.layers.9.mlp.up_proj.weight"] = moved, moved.clone()
    save_file(weights, package / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match=r"unexpected keys on loading: model\.layers\.9"):
        check(package)


def test_a_configuration_of_another_size_is_found(package: Path) -> None:
    edit(package, "config.json", intermediate_size=64)
    with pytest.raises(VerificationError, match=r"loading fails|mismatched keys"):
        check(package)


def test_a_wrong_parameter_count_is_found(package: Path) -> None:
    record = json.loads((package / "compression.json").read_text())
    record["entry"]["params"] += 1
    (package / "compression.json").write_text(json.dumps(record))
    with pytest.raises(VerificationError, match=r"parameters where compression\.json says"):
        check(package)


def test_an_unknown_quantization_is_said(package: Path) -> None:
    record = json.loads((package / "compression.json").read_text())
    record["entry"]["quantization"] = "int3"
    (package / "compression.json").write_text(json.dumps(record))
    with pytest.raises(VerificationError, match="its quantization is unknown: int3"):
        check(package)


def test_another_tokenizer_is_found(package: Path) -> None:
    content = json.loads((package / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-30]
    (package / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(VerificationError, match="the tokenizer gives"):
        check(package)


def test_reported_scores_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a fresh process that finds the same documents; another score or other documents are said."""
    files = tiny.task(tmp_path / "tasks")
    model = LlamaForCausalLM.from_pretrained(tiny.checkpoint(tmp_path / "base")).eval()
    tokenizer = tiny.byte_tokenizer()
    encoder = Encoder(tokenizer, model.config)
    tasks = TaskSet.load(["tiny_choice"], encoder=encoder, include_path=[files])
    score = Scorer(tasks, NetworkLM(model, encoder)).score("report")["tiny_choice"]
    entry = {
        "name": "best",
        "architecture": base_architecture(model.config).to_dict(),
        "tasks": {
            "tiny_choice": {"metric": "acc", "value": score.value, "stderr": 0.1, "n": score.n, "split": "report"}
        },
    }
    documents = {"task_documents": {"tiny_choice": tasks.fingerprint("tiny_choice", "report")}}
    package = tmp_path / "best"
    write_package(model, package, tokenizer=tokenizer, entry=entry, dtype=torch.float32, lineage=documents)
    config = files / "tiny_choice.yaml"
    config.write_text(config.read_text().replace(str(tmp_path), "."))  # as seen from where the user is
    monkeypatch.chdir(tmp_path)
    found = verify(package, record=True, tasks=TaskFiles("tasks"))
    assert found["task_scores"] == {"tiny_choice": score.value} and found["task_scores_equal"] is True
    assert read_package(package).verified == found and "task_scores" not in check(package)

    entry["tasks"]["tiny_choice"]["value"] += 2 / score.n  # type: ignore[index]
    update_record(package, entry=entry)
    with pytest.raises(VerificationError, match=r"task tiny_choice scores 0\.\d+, the report says"):
        check(package, tasks=TaskFiles(str(files)))
    tiny.task(tmp_path / "tasks", documents=30)
    with pytest.raises(VerificationError, match="the documents of task tiny_choice at hand are not those"):
        check(package, tasks=TaskFiles(str(files)))


def test_a_broken_cache_is_found(package: Path, packages: Path, tmp_path: Path) -> None:
    """All layers in one cache slot: the pitfall that re-numbering `layer_idx` is about."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaAttention, "layer_idx", property(lambda self: 0, lambda self, value: None), raising=False)
        with pytest.raises(VerificationError, match="greedy generation with the cache"):
            check(shutil.copytree(packages / "even", tmp_path / "even"))
        with pytest.raises(VerificationError, match="generation fails: RuntimeError: Sizes of tensors"):
            check(package)
