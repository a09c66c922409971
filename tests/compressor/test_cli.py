"""Commands that need no run, as they are typed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from compressor import cli
from compressor.cli import run
from evals.speed.table import SpeedTable
from export.package import write_package
from export.package_record import update_record
from supernet.families import describe
from tests.support import tiny
from tests.support.export_networks import EVEN, cut, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model")


def test_inspect_tells_and_leaves_nothing_behind(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in model.iterdir()}
    assert run(["inspect", str(model), "--space", "llama-nas", "--effort", "quick"]) == 0
    shown = capsys.readouterr()
    told = " ".join(shown.err.split())
    assert shown.out == "" and "search space 'llama-nas'" in told and "100,000" in told
    assert run(["inspect", str(model), "--space", "llama-nas", "--effort", "quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    structure = describe(AutoConfig.from_pretrained(model))
    assert found["parameters"] == structure.parameters(structure.base) == sum(found["by_part"].values())
    for name in ("seconds", "seconds_on_gpu", "disk"):
        assert found["all"][name] == pytest.approx(sum(stage[name] for stage in found["stages"]))
    assert found["space"]["size"] == 3 * 2**3 and found["budget"]["train_tokens"] == 100_000
    assert list(tmp_path.iterdir()) == [] and before == {file: file.stat().st_mtime_ns for file in model.iterdir()}


def test_push_says_what_it_would_upload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "best"
    entry = {"name": "best", "architecture": EVEN.to_dict()}
    write_package(cut(tiny_llama(), EVEN), package, tokenizer=tiny_tokenizer(), entry=entry, dtype=torch.float32)
    assert run(["push", str(package), "me/small", "--dry-run"]) == 2
    assert "not verified" in capsys.readouterr().err
    update_record(package, entry={"verified": {"padding_equal": True}})
    assert run(["push", str(package), "me/small", "--dry-run", "--json"]) == 0
    said = capsys.readouterr()
    assert "nothing was uploaded" in said.err
    files = {file["name"]: file["bytes"] for file in json.loads(said.out)["files"]}
    assert files == {file.name: file.stat().st_size for file in package.iterdir()}


def test_a_speed_table_is_measured_for_a_search_elsewhere(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "speed.json"
    assert run(["speed-table", str(model), str(file)]) == 0
    table = SpeedTable.load(file)
    structure = describe(AutoConfig.from_pretrained(model))
    assert table.fits(structure) and table.predict(structure.base)["decode_tps"] > 0
    assert run(["speed-table", str(tmp_path / "nowhere"), str(file)]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    tasks = ["--tasks", "tiny_choice", "--include-path", str(tiny.task(tmp_path / "tasks"))]
    assert run(["evaluate", str(model), *tasks, "--output", str(tmp_path)]) == 2
    assert f"error: --output {tmp_path}: is a folder; name a file" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run(["speed-table", str(model), str(tmp_path / "file" / "table.json")]) == 2
    assert "cannot be made a folder" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", read_only)
        assert run(["speed-table", str(model), str(tmp_path / "table.json")]) == 2
    assert f"table.json: nothing can be written to {tmp_path}: {os.strerror(errno.EROFS)}" in capsys.readouterr().err
    assert run(["evaluate", str(model), *tasks, "--output", str(tmp_path / "new" / "scores.json")]) == 0
    assert "tiny_choice" in json.loads((tmp_path / "new" / "scores.json").read_text())["results"]


def test_sigterm_interrupts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What a batch system sends ends as Ctrl-C does."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "app", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 130 and "what was done is kept" in capsys.readouterr().err


def test_weights_that_are_not_all_there_are_refused_before_anything_is_loaded(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with no weights at all may be inspected; one with a part of them is refused like everywhere else."""
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert run(["inspect", str(folder)]) == 0
    (folder / "pytorch_model.bin").touch()
    assert run(["inspect", str(folder)]) == 2
    assert "pytorch_model.bin is not read: save it anew, from transformers with save_pretrained" in (
        capsys.readouterr().err
    )
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (folder / shards[0]).touch()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", shards, strict=True))})
    )
    assert run(["inspect", str(folder)]) == 2
    assert f"the shard {shards[1]} is missing" in capsys.readouterr().err
