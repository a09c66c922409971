"""What export leaves behind is used again: healed networks, packages, timings."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, OPTConfig, OPTForCausalLM

from compressor.checks import check_formats
from compressor.cli import run
from compressor.job import Job
from compressor.recipe import Recipe
from compressor.run import Run
from compressor.stages import picking
from compressor.stages.exporting import package_inputs
from compressor.stages.healing import network_inputs
from compressor.stages.subnet_files import Inputs, load_healed
from export.layouts import graphs
from export.package import write_package
from supernet.common.errors import NotHeldError, RequestError
from supernet.common.files import write_json
from supernet.families import describe
from supernet.streaming import StreamedNetwork
from tests.support import tiny
from tests.support.tiny_families import random_architecture, tiny_network


def inputs(tmp_path: Path, given: dict[str, Any]) -> tuple[Inputs, dict[str, Inputs]]:
    """What the network of a pick depends on, and each of its folders, in a run with these parts of a recipe."""
    parts: dict[str, Any] = {"dtype": "float32", "finetuning": {"batch_size": 4}}
    parts["healing"] = {"tokens": 640, "learning_rate": 1e-3}
    for key, value in given.items():
        parts[key] = parts.get(key, {}) | value if isinstance(value, dict) else value
    job = Job(Run(tmp_path), Recipe.model_validate({"model": "m", **parts}))
    config = LlamaConfig(**tiny.SIZES)
    job.base_fingerprint, job.checkpoint = "b", SimpleNamespace(config=config, structure=describe(config))
    blocks: Any = SimpleNamespace(fingerprint="d", length=parts["finetuning"].get("sequence_length", 32))
    network = network_inputs(job, "a", blocks)
    picked = {"name": "best", "architecture": job.structure.base.to_dict()}
    return network, {folder.name: read for folder, read in package_inputs(job, picked, network, blocks).items()}


def test_what_is_read_is_what_counts(tmp_path: Path) -> None:
    (tmp_path / "supernet").mkdir()
    write_json(tmp_path / "supernet" / "manifest.json", {"inputs": "", "weights": "w"})
    network, folders = inputs(tmp_path, {})
    assert folders == {"best": {"network": network}}
    healing: list[dict[str, Any]] = [
        {"finetuning": {"batch_size": 8}},
        {"finetuning": {"gradient_accumulation": 2}},
        {"finetuning": {"optimizer": "adamw-8bit"}},
        {"finetuning": {"sequence_length": 64}},
        {"healing": {"tokens": 1280}},
        {"healing": {"learning_rate": 1e-4}},
        {"dtype": "bfloat16"},
        {"seed": 1},
    ]
    for other in healing:
        assert inputs(tmp_path, other)[0] != network, other
        unhealed = other | {"healing": {"tokens": 0}}
        assert inputs(tmp_path, unhealed)[0] == {"weights": "w", "architecture": "a"}
    for other in ({"quantizing": {"schemes": ["int4"]}}, {"formats": ["uneven", "padded"]}):
        again, more = inputs(tmp_path, other)
        assert again == network and more["best"] == folders["best"] and len(more) == 2
    int4, longer = (
        inputs(tmp_path, {"quantizing": {"schemes": ["int4"], "iterations": n}})[1]["best-int4"] for n in (1, 2)
    )
    assert int4 != longer
    # By GPTQ, where earlier versions rounded otherwise; 8 bits are as they were.
    for scheme, marked in (("int4", True), ("int8", False)):
        settings = {"quantizing": {"schemes": [scheme], "iterations": 0}}
        assert (inputs(tmp_path, settings)[1][f"best-{scheme}"]["quantizing"].get("by") == "gptq") == marked


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


def job_of(family: str, formats: list[str]) -> Job:
    """A job on one of the tests' networks, as far as its formats are checked."""
    job = Job(Run(Path("nowhere")), Recipe.model_validate({"model": "m", "formats": formats}))
    config = tiny_network(family).config
    checkpoint: Any = SimpleNamespace(config=config, structure=describe(config))
    job.checkpoint = checkpoint
    return job


def test_a_family_that_a_layout_never_holds_is_refused_before_any_work() -> None:
    with pytest.raises(RequestError, match=r"--format padded does not hold olmo2 networks: .*q_norm"):
        check_formats(job_of("olmo2", ["uneven", "padded"]))
    check_formats(job_of("opt", ["uneven", "padded"]))  # which depends on what is picked


def training_free(folder: Path) -> tuple[Path, list[str]]:
    """The smallest job on `folder`'s model: where it runs, and its arguments."""
    recipe = {
        "space": {"ffn.*": [0, 64]},
        "targets": {"max_params": ["0.85"]},
        "finetuning": {"tokens": 0, "sequence_length": 32},
        "searching": {"evaluations": 4, "population": 4, "limit": 8},
        "healing": {"tokens": 0},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "run", [
        "compress", str(folder / "model"), "--recipe", str(folder / "recipe.yaml"), "--output", str(folder / "run"),
        "--data", str(tiny.data(folder / "data.jsonl", 300)), "--tasks", "tiny_choice",
        "--include-path", str(tiny.task(folder / "tasks", documents=40)), "--repair", "off",
    ]  # fmt: skip


def test_where_a_layout_does_not_hold_the_pick_the_others_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its sizes, or as only writing it shows; run again, it says so again and makes nothing anew."""
    sizes: dict[str, Any] = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": 3, "max_position_embeddings": 64}
    marks = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    model = OPTForCausalLM(OPTConfig(vocab_size=259, do_layer_norm_before=False, **sizes, **marks))
    model.save_pretrained(tmp_path / "model")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "model")

    def exported(*_: Any) -> None:
        raise NotHeldError("transformers' onnx exporter does not support this opt network: no")

    monkeypatch.setattr(graphs, "_exported", exported)
    run_folder, arguments = training_free(tmp_path)
    for _ in range(2):
        assert run([*arguments, "--format", "uneven,padded,onnx"]) == 2
        said = capsys.readouterr().err.replace("\n", " ")
        assert "best-padded is left out: the padded layout cannot hold this opt network" in said
        assert "best-onnx is left out: transformers' onnx exporter does not support" in said
        assert said.rstrip().endswith("; all other packages are made and proved")
        report = json.loads((run_folder / "report.json").read_text())
        assert [package["name"] for package in report["packages"] if package["verified"]] == ["best"]
        assert {*report["left_out"]} == {"best-padded", "best-onnx"}
        stamp = (run_folder / "packages" / "best" / "model.safetensors").stat().st_mtime_ns
    assert run([*arguments, "--format", "uneven"]) == 0
    assert (run_folder / "packages" / "best" / "model.safetensors").stat().st_mtime_ns == stamp
    assert not json.loads((run_folder / "report.json").read_text())["left_out"]


def test_where_nothing_alike_can_be_picked_the_others_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.checkpoint(tmp_path / "model")
    monkeypatch.setattr(picking, "fits_plain_class", lambda *_: False)  # of bases whose layers are of several kinds
    run_folder, arguments = training_free(tmp_path)
    arguments += ["--set", "space=fine"]
    for _ in range(2):
        assert run([*arguments, "--format", "uneven,uniform"]) == 2
        said = capsys.readouterr().err
        assert "best-uniform is left out: no measured network whose layers are alike meets what is asked for" in said
        report = json.loads((run_folder / "report.json").read_text())
        assert [package["name"] for package in report["packages"] if package["verified"]] == ["best"]
    assert run(["pick", str(run_folder)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "best-uniform is left out: --format uniform: none of the" in said and "use --space uniform" in said
    assert run(["export", str(run_folder), "--format", "uniform"]) == 2  # asked for by itself, it is all that counts
    assert "error: --format uniform: none of the" in " ".join(capsys.readouterr().err.split())
