"""Several processes: two train like one with the whole batch; and what an engine would ignore is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from supernet.common.errors import RequestError
from supernet.training.accelerator import make_accelerator
from tests.support import ROOT, tiny
from tests.support.sharded import KINDS


def finetune(folder: Path, processes: int, shard: bool = False) -> Path:
    """Run `compressor finetune` under torchrun; `folder` holds the checkpoint and the data."""
    output = folder / f"run-{processes}{'-sharded' if shard else ''}"
    section = {"tokens": 2048, "batch_size": 4, "sequence_length": 32, "draw": "shift", "learning_rate": 1e-3}
    recipe: dict[str, Any] = {"finetuning": section | {"shard": shard}, "device": "cpu"}
    recipe |= {"model": str(folder / "m"), "data": str(folder / "d.jsonl")}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    (folder / "start.py").write_text("from compressor.cli import main; main()")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), folder / "start.py"]
    done = subprocess.run(
        [sys.executable, *command, "finetune", "--recipe", folder / "recipe.yaml", "--output", output],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return output


def test_two_processes_train_like_one_with_twice_the_batch(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "m")
    tiny.data(tmp_path / "d.jsonl")
    one, two, sharded = finetune(tmp_path, 1), finetune(tmp_path, 2), finetune(tmp_path, 2, shard=True)
    facts = [json.loads((run / "supernet" / "manifest.json").read_text())["finetune"] for run in (one, two, sharded)]
    assert [fact["processes"] for fact in facts] == [1, 2, 2]
    assert [fact["tokens"] for fact in facts] == [2048, 2048, 2048]
    theirs = load_file(one / "supernet" / "model.safetensors")
    start = load_file(tmp_path / "m" / "model.safetensors")
    embedding = "model.embed_tokens.weight"
    for run in (two, sharded):
        ours = load_file(run / "supernet" / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert (ours[embedding] - start[embedding]).abs().max() > 1e-3
        for name, weight in ours.items():
            assert torch.allclose(weight, theirs[name], atol=2e-5), name
        assert not list(run.glob(".*partial"))


def test_a_killed_run_of_sharded_layers_ends_at_the_same_weights_and_adapters_are_merged(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.support.sharded", tmp_path],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for kind in map("-".join, KINDS):
        plain, whole, resumed = (load_file(tmp_path / f"{kind}-{how}") for how in ("plain", "whole", "resumed"))
        assert any((plain[name] - value).abs().max() > 1e-3 for name, value in load_file(tmp_path / "start").items())
        for name, value in plain.items():
            assert torch.equal(whole[name], resumed[name]), name
            assert torch.allclose(value, whole[name], atol=2e-5), name
    start = load_file(tmp_path / "start")
    for lost in ("lost-plain", "lost-whole"):
        assert all(torch.equal(value, start[name]) for name, value in load_file(tmp_path / lost).items())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ACCELERATE_USE_FSDP", "true", "accelerate ignores them on a CPU"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "would be ignored; say --dtype"),
        ("WORLD_SIZE", "2", "ACCELERATE_USE_CPU=true"),
    ],
)
def test_what_would_be_ignored_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match=said):
        make_accelerator("cpu", "auto")


def test_half_precision_needs_a_gpu_and_bfloat16_does_not() -> None:
    with pytest.raises(RequestError, match="not on a CPU"):
        make_accelerator("cpu", "float16")
    # In a process of its own: accelerate's state is one for all accelerators of a process.
    code = (
        "import torch; from supernet.training.accelerator import make_accelerator as make\n"
        "with make('cpu', 'bfloat16').autocast(): print(torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "torch.bfloat16", done.stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"finetuning": {"batch_size": 3, "gradient_accumulation": 2}},
            "3 sequences cannot be shared evenly by 1 process(es) in 2 part(s)",
        ),
        (
            {"finetuning": {"strong_teacher": 0.5}, "space": {"hidden_size": [16, 32]}},
            "the largest sub-network cannot teach in place",
        ),
        ({"finetuning": {"shard": True}}, "there is one process only"),
        (
            {"finetuning": {"shard": True}, "space": {"hidden_size": [16, 32]}},
            "not together with a space",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict[str, Any], said: str
) -> None:
    from compressor.cli import run

    recipe = {"model": str(tiny.checkpoint(tmp_path / "m")), "data": str(tiny.data(tmp_path / "d.jsonl"))}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | more))
    assert run(["finetune", "--recipe", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run")]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
