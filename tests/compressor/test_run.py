"""A run directory that is killed at a bad moment, or whose disk is full, loses nothing that was finished."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from compressor import pipeline
from compressor.inputs import few_inputs
from compressor.job import Job
from compressor.recipe_file import read_recipe
from compressor.run import Run
from compressor.stages.finetuning import finetuning_inputs
from supernet.common.errors import RequestError
from supernet.common.files import read_json, write_json
from tests.support import tiny


def fill(run: Run, inputs: str, text: str) -> None:
    with run.stage(run.supernet, inputs) as (folder, facts):
        (folder / "weights").write_text(text)
        facts["weights"] = text


@pytest.mark.parametrize("dies_at", ["rmtree", "replace"])
def test_a_kill_while_the_old_folder_makes_room_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: str
) -> None:
    run = Run(tmp_path)
    fill(run, "old inputs", "old")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    rename = Path.replace

    def killed_between(self: Path, target: Path) -> Path:
        if target == run.supernet:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(*((shutil, "rmtree", killed) if dies_at == "rmtree" else (Path, "replace", killed_between)))
        fill(run, "new inputs", "hours of training")
    run.settle()
    assert run.whole(run.supernet, "new inputs")
    assert (run.supernet / "weights").read_text() == "hours of training"
    assert [path.name for path in tmp_path.iterdir()] == ["supernet"]


def test_a_run_is_free_again_once_it_is_unlocked(tmp_path: Path) -> None:
    run = Run(tmp_path)
    asked = f"from pathlib import Path; from compressor.run import Run; Run(Path({str(tmp_path)!r})).lock()"
    other = [sys.executable, "-c", asked]
    run.lock()
    run.lock()  # by the same job
    assert "works in this run" in subprocess.run(other, capture_output=True, text=True, check=False).stderr
    with ThreadPoolExecutor(1) as pool, pytest.raises(RequestError, match="another thread of this process works in"):
        pool.submit(Run(tmp_path).lock).result()
    run.unlock()
    run.unlock()
    subprocess.run(other, check=True)


def test_who_looks_at_a_run_for_a_moment_keeps_nobody_out(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.lock_file.open("w") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.2, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        run.lock()
    assert "process" in run.lock_file.read_text()


@pytest.mark.parametrize("left", [".lock", "paths.json", ".paths.json.tmp-999999", ".recipe.yaml.tmp-999999"])
def test_a_run_that_was_killed_in_its_first_moment_goes_on(tmp_path: Path, left: str) -> None:
    (tmp_path / left).touch()
    Run(tmp_path).check_free()
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(RequestError, match="the folder holds something else"):
        Run(tmp_path).check_free()


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"by": 1})
    other = f"from compressor.run import write_json; write_json(Path({str(tmp_path / 'a.json')!r}), {{'by': 2}})"
    renamed = Path.replace

    def meanwhile(self: Path, target: Path) -> Path:
        subprocess.run([sys.executable, "-c", f"from pathlib import Path; {other}"], check=True)
        return renamed(self, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "replace", meanwhile)
        write_json(tmp_path / "a.json", {"by": 3})
    assert read_json(tmp_path / "a.json") == {"by": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_of_several_processes_only_the_first_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others may be ahead of it, and it refuses a folder that holds something else."""
    recipe = read_recipe(None, tiny.job_recipe(tmp_path) | {"finetuning": {"tokens": 0}, "healing": {"tokens": 0}})
    monkeypatch.setattr("compressor.run.is_main", lambda: False)
    job = pipeline.start(recipe, tmp_path / "run", tasks_needed=False)
    assert job.recipe.tasks and not (tmp_path / "run").exists()
    monkeypatch.undo()
    pipeline.start(recipe, tmp_path / "run", tasks_needed=False)
    assert (tmp_path / "run" / "requests").is_dir()


def test_a_class_that_the_checkpoint_brings_stays_the_super_networks(tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path / "model")
    (model / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass Own(LlamaForCausalLM):\n    pass\n"
    )
    config = model / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}})
    )
    given = {
        "model": str(model),
        "trust_remote_code": True,
        "data": str(tiny.data(tmp_path / "data.jsonl", 300)),
        "space": {"ffn.*": [32, 64]},
        "finetuning": {"tokens": 0, "sequence_length": 32},
        "device": "cpu",
    }
    job = pipeline.start(read_recipe(None, given), tmp_path / "run", tasks_needed=False)
    pipeline.finetune(job)
    assert type(job.load_base()).__name__ == type(job.load_supernet().model).__name__ == "Own"


def test_a_full_disk_while_the_super_network_is_saved_costs_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "model": str(tiny.checkpoint(tmp_path / "model")),
        "data": str(tiny.data(tmp_path / "data.jsonl", 300)),
        "space": {"ffn.*": [32, 64]},
        "finetuning": {"tokens": 640, "sequence_length": 32, "batch_size": 4},
        "device": "cpu",
    }
    settings = Job.train_settings
    monkeypatch.setattr(
        Job, "train_settings", lambda *given: replace(settings(*given), checkpoint_seconds=0.0)
    )  # as in a training of more than a minute

    def job() -> Job:
        return pipeline.start(read_recipe(None, given), tmp_path / "run", tasks_needed=False)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(LlamaForCausalLM, "save_pretrained", full)
        pipeline.finetune(job())
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):  # and at the last file
        patched.setattr("compressor.run.follow_umask", full)
        pipeline.finetune(job())
    steps = []
    monkeypatch.setattr("supernet.training.loop._gradients", lambda *given: steps.append(given))
    manifest = pipeline.finetune(job())
    assert steps == [] and manifest["finetune"]["tokens"] == 640
    assert json.loads((tmp_path / "run" / "supernet" / "manifest.json").read_text()) == manifest
    assert not (tmp_path / "run" / "supernet" / "training.safetensors").exists()


def test_sizes_that_are_asked_for_are_watched_and_decide_which_state_is_kept(tmp_path: Path) -> None:
    given = {
        "model": str(tiny.checkpoint(tmp_path / "model")),
        "data": str(tiny.data(tmp_path / "data.jsonl", 300)),
        "space": {"ffn.*": [32, 48, 64]},
        "targets": {"max_params": ["0.8", "0.9"]},
        "finetuning": {"tokens": 640, "sequence_length": 32, "batch_size": 4, "learning_rate": 1e3},
        "device": "cpu",
    }
    job = pipeline.start(read_recipe(None, given), tmp_path / "run", tasks_needed=False)
    training = pipeline.finetune(job)["finetune"]
    assert {"largest", "middle", "smallest", "asked"} <= training["curve"][0].keys()
    assert training["kept"] == 0 and training["halved"]  # at that rate the untrained network is the better one
    ours, base = job.load_supernet().model.state_dict(), job.load_base().state_dict()
    name = "model.embed_tokens.weight"
    assert torch.equal(ours[name], base[name])
    assert {file.name for file in (tmp_path / "run" / "supernet").iterdir() if "training" in file.name} == set()


def test_what_trains_follows_the_width_and_stays_what_a_run_began_with(tmp_path: Path) -> None:
    data = str(tiny.data(tmp_path / "data.jsonl", 40))
    wide = {"hidden_size": 1056, "num_attention_heads": 4, "num_key_value_heads": 2}

    def job(folder: str, base: Path, **keys: object) -> Job:
        given = {"model": str(base), "data": data, "device": "cpu"} | keys
        job = Job(Run(tmp_path / folder), read_recipe(None, given).resolved())
        job.fill_in()
        return job

    narrow = tiny.checkpoint(tmp_path / "narrow")
    assert job("a", narrow).recipe.finetuning.optimizer == "muon"
    assert job("a", tiny.checkpoint(tmp_path / "wide", **wide)).recipe.finetuning.optimizer == "adamw"
    other = job("a", narrow, **{"finetuning.optimizer": "adamw"})
    assert other.train_settings(other.recipe.healing, 32, 0).optimizer == "adamw"
    begun = Run.create(tmp_path / "b", other.given, {}, {})
    assert job("b", narrow).optimizer == "muon"  # nothing was made of it yet
    fill(begun, "inputs", "trained")
    assert job("b", narrow).optimizer == "adamw"
    assert job("b", narrow, **{"finetuning.optimizer": "muon"}).optimizer == "muon"


def test_what_is_read_at_another_length_is_ordered_anew(tmp_path: Path) -> None:
    given = {
        "model": str(tiny.checkpoint(tmp_path / "model")),
        "data": str(tiny.data(tmp_path / "data.jsonl", 300)),
        "finetuning": {"tokens": 0},
        "device": "cpu",
    }
    inputs = []
    for length in (256, 32, 64):
        recipe = read_recipe(None, given | {"finetuning": {"tokens": 0, "sequence_length": length}})
        job = pipeline.start(recipe, tmp_path / f"run-{length}", tasks_needed=False)
        inputs.append(finetuning_inputs(job))
        assert few_inputs(job)[1:] == ([] if length == 256 else [length])
    assert "length" not in inputs[0] and inputs[1] != inputs[2]


def test_a_base_that_changed_in_its_place_is_refused(tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path / "model")
    given = {
        "model": str(model),
        "data": str(tiny.data(tmp_path / "data.jsonl", 300)),
        "finetuning": {"tokens": 0, "sequence_length": 32},
        "device": "cpu",
    }
    job = pipeline.start(read_recipe(None, given), tmp_path / "run", tasks_needed=False)
    pipeline.finetune(job)
    pipeline.resume(tmp_path / "run", {})
    shutil.rmtree(model)
    tiny.checkpoint(model, seed=1)
    with pytest.raises(RequestError, match=r"the weights of .*model changed since its super-network was made"):
        pipeline.resume(tmp_path / "run", {})
    with pytest.raises(RequestError, match=r"the weights of .*model changed"):
        pipeline.start(read_recipe(None, given), tmp_path / "run", tasks_needed=False)
    pipeline.start(read_recipe(None, given), tmp_path / "run", tasks_needed=False, redo="finetune")
