"""Verification: a fresh process proves what a package claims, and every claim that does not hold is said."""

from __future__ import annotations

import gc
import shutil
import subprocess
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
from export.network_check import NetworkCheck, TaskFiles
from export.package import write_package
from export.package_record import read_record, update_record
from export.push import push
from export.verify import check, prove_all, verify, verify_all
from supernet.common.errors import RequestError, VerificationError
from supernet.common.files import read_json
from supernet.families import base_architecture
from tests.support import tiny
from tests.support.export_networks import EVEN, UNEVEN, edited, record_anew, write_tiny

NETWORKS = {"even": EVEN, "uneven": UNEVEN}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    for name, architecture in NETWORKS.items():
        write_tiny(folder / name, architecture, dtype=torch.bfloat16, reference=folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def package(tmp_path: Path, packages: Path) -> Path:
    return shutil.copytree(packages / "uneven", tmp_path / "uneven")


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
        assert result["params"] == read_record(packages / name).entry.params
        assert result["remote_code"] is (name == "uneven")
    assert [r["compared_with"].split()[0] for r in results] == ["full", "full", "the"]
    assert read_record(copies[1]).entry.verified == results[2]
    assert read_record(packages / "even").entry.verified is None
    assert verify(copies[1]) == results[2]
    assert log.exists()


def test_a_padding_token_that_the_network_has_no_row_for_is_no_fault(package: Path) -> None:
    with edited(package / "config.json") as config:
        config["pad_token_id"] = -1  # as of checkpoints that were never padded
    record_anew(package, "config.json")
    assert verify(package)["padding_equal"] is True


def test_faults_reach_the_caller_from_the_fresh_process(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with edited(package / "config.json") as config:
        config["rms_norm_eps"] = 0.3
    record_anew(package, "config.json")
    assert run(["verify", str(package)]) == 2
    assert "uneven: log-probabilities differ by up to" in " ".join(capsys.readouterr().err.split())
    (package / "config.json").unlink()
    with pytest.raises(VerificationError, match=r"config\.json: the file is missing"):
        verify(package)
    with pytest.raises(RequestError, match="not a package"):
        verify(package.parent)


def test_the_others_are_proved_where_one_is_refused(packages: Path, tmp_path: Path) -> None:
    even, uneven = (shutil.copytree(packages / name, tmp_path / name) for name in NETWORKS)
    with edited(even / "config.json") as config:
        config["rms_norm_eps"] = 0.3
    record_anew(even, "config.json")
    refusal, claims = prove_all([(even, None), (uneven, None)], record=True)
    assert isinstance(refusal, VerificationError) and str(refusal).startswith(f"{even}: log-probabilities differ")
    refused, proved = read_record(even).entry, read_record(uneven).entry
    assert refused.verified is None and f"{even}: {refused.refused}" == str(refusal)
    assert proved.verified == claims and proved.refused is None
    with pytest.raises(RequestError, match="even: refused by its proof, and so not to be published: log-prob"):
        push(even, "you/model", dry_run=True)
    with edited(even / "config.json") as config:  # once it is mended, its proof holds
        config["rms_norm_eps"] = read_json(uneven / "config.json")["rms_norm_eps"]
    record_anew(even, "config.json")
    verify(even, record=True)
    assert read_record(even).entry.refused is None and read_record(even).entry.verified


def test_what_was_proved_before_the_process_died_is_kept(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    even, uneven = (shutil.copytree(packages / name, tmp_path / name) for name in NETWORKS)
    # The process ends itself, as the system ends one that takes too much memory, at its second package.
    dying = (
        "import os, export.verify as v; whole = v.check\n"
        "v.check = lambda p, *more: whole(p, *more) if p.name == 'even' else os.kill(os.getpid(), 9)\n"
        "import sys; v._main(v.Path(sys.argv[1]), v.Path(sys.argv[2]))"
    )
    started = subprocess.Popen
    monkeypatch.setattr(
        "export.verify.subprocess.Popen",
        lambda command, **options: started([command[0], "-c", dying, *command[-2:]], **options),
    )
    again = shutil.copytree(packages / "even", tmp_path / "again" / "even")
    _, dead, last = prove_all([(even, None), (uneven, None), (again, None)], record=True)
    assert str(dead) == f"{uneven}: not proved: the checking process was killed (signal 9); too little memory, perhaps"
    assert read_record(even).entry.verified and read_record(again).entry.verified == last
    assert read_record(uneven).entry.verified is None and read_record(uneven).entry.refused is None


def test_no_second_network_is_in_memory(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Any]] = []
    original = NetworkCheck.load

    def load(self: NetworkCheck, folder: Path) -> Any:
        gc.collect()
        assert not [network for network in loaded if network() is not None]
        network = original(self, folder)
        loaded.append(weakref.ref(network))
        return network

    monkeypatch.setattr(NetworkCheck, "load", load)
    check(package)
    assert len(loaded) == 2  # and saved by transformers and loaded again


def test_changed_weights_are_found(package: Path, packages: Path) -> None:
    weights = load_file(package / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][5] *= 1.05
    save_file(weights, package / "model.safetensors", {"format": "pt"})
    record_anew(package, "model.safetensors")
    with pytest.raises(VerificationError, match="log-probabilities differ"):
        check(package)
    with pytest.raises(VerificationError, match="logits differ by up to"):
        check(package, packages / "uneven.safetensors")


def test_another_probability_of_a_top_token_is_found(package: Path) -> None:
    with edited(package / "compression.json") as record:
        record["probe"]["top_logprob"][1][3][2] += 1e-3
    with pytest.raises(VerificationError, match="log-probabilities differ"):
        check(package)


def test_missing_and_unknown_weights_are_found(package: Path) -> None:
    weights = load_file(package / "model.safetensors")
    moved = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, package / "model.safetensors", {"format": "pt"})
    record_anew(package, "model.safetensors")
    with pytest.raises(VerificationError, match=r"missing keys on loading: model\.layers\.1\.mlp\.up_proj\.weight"):
        check(package)
    weights["model.layers.1.mlp.up_proj.weight"], weights["model.layers.9.mlp.up_proj.weight"] = moved, moved.clone()
    save_file(weights, package / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match=r"unexpected keys on loading: model\.layers\.9"):
        check(package)


def test_a_configuration_of_another_size_is_found(package: Path) -> None:
    with edited(package / "config.json") as config:
        config["intermediate_size"] = 64
    with pytest.raises(VerificationError, match=r"loading fails|mismatched keys"):
        check(package)


def test_a_wrong_parameter_count_is_found(package: Path) -> None:
    with edited(package / "compression.json") as record:
        record["entry"]["params"] += 1
    with pytest.raises(VerificationError, match=r"parameters where compression\.json says"):
        check(package)


def test_bytes_that_are_not_those_of_the_files_are_found(package: Path) -> None:
    with edited(package / "compression.json") as record:
        record["entry"]["bytes"] += 1
    with pytest.raises(VerificationError, match=r"compression\.json: it says [\d,]+ bytes of weights, where there are"):
        verify(package)


def test_a_probe_of_nothing_is_said(package: Path) -> None:
    with edited(package / "compression.json") as record:
        record["probe"]["ids"] = []
    with pytest.raises(RequestError, match=r"probe\.ids"):
        verify(package)


def test_a_quantization_of_another_layout_is_said(package: Path) -> None:
    with edited(package / "compression.json") as record:
        record["entry"]["quantization"] = "q8_0"
    with pytest.raises(VerificationError, match="transformers loads no package of the quantization q8_0"):
        check(package)


def test_another_tokenizer_is_found(package: Path) -> None:
    with edited(package / "tokenizer.json") as content:
        del content["model"]["merges"][-30:]
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
    claims = verify(package, record=True, tasks=TaskFiles("tasks"))
    assert claims["task_scores"] == {"tiny_choice": score.value} and claims["task_scores_equal"] is True
    assert read_record(package).entry.verified == claims and "task_scores" not in check(package)

    entry["tasks"]["tiny_choice"]["value"] += 1.5 / score.n  # type: ignore[index]
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
