"""Bands of sizes: each has a super-network of its own, and what is cut out comes from that of its size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from compressor.cli import run
from compressor.job import Job
from compressor.recipe_file import read_recipe
from compressor.run import Run
from compressor.sizing import band_limits, training_range
from supernet.architecture import Architecture
from supernet.common.errors import RequestError
from tests.support import tiny


def job_of(folder: Path, **finetuning: Any) -> Job:
    model = tiny.checkpoint(folder / "model", num_hidden_layers=8)
    keys = {f"finetuning.{key}": value for key, value in finetuning.items()}
    return Job(Run(folder), read_recipe(None, {"model": str(model), "device": "cpu", "space": "uniform", **keys}))


def test_bands_share_the_range_evenly(tmp_path: Path) -> None:
    job = job_of(tmp_path, bands=3, smallest_share=0.4)
    full = job.structure.parameters(job.structure.base)
    assert band_limits(job) == pytest.approx([0.8 * full, 0.6 * full])
    ranges = [training_range(job, band) for band in range(3)]
    parameters = job.structure.parameters
    # What is drawn in each is what is cut out of it: bands meet at the limits, whatever uniform cuts are near them.
    assert [ranges[0].sizes[0], ranges[1].sizes[0]] == [ranges[1].sizes[1], ranges[2].sizes[1]] == band_limits(job)
    rng = np.random.default_rng(0)
    for band, range_ in enumerate(ranges):
        low, high = range_.sizes
        drawn = [parameters(range_.uniform(rng)) for _ in range(8)]
        assert low < high and all(size >= low or band == 2 for size in drawn)
    assert ranges[0].largest == job.structure.base and parameters(ranges[2].least) < 0.5 * full
    assert [parameters(r.least) / full for r in ranges] == pytest.approx([0.8, 0.6, 0.4], abs=0.06)


def test_the_largest_size_that_is_trained(tmp_path: Path) -> None:
    job = job_of(tmp_path, largest_share=0.7, smallest_share=0.4)
    full, parameters = job.structure.parameters(job.structure.base), job.structure.parameters
    range_ = training_range(job)
    assert parameters(range_.largest) == pytest.approx(0.7 * full, rel=0.08)
    assert range_.sizes[1] < parameters(range_.largest)
    job.recipe.finetuning.largest_share = 0.4
    with pytest.raises(RequestError, match="largest_share: must be above the smallest"):
        training_range(job)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--set", "finetuning.parameters=routed"], "not together with finetuning.parameters: routed"),
        (["--train-tokens", "0"], "nothing is trained"),
        (["--repair", "on"], "finetuning.bands: 2 gives sizes weights of their own; say --repair off"),
        (["--format", "elastic"], "say no --format elastic"),
        (["--set", "finetuning.largest_share=0.2"], "largest_share: must be above the smallest"),
    ],
)
def test_what_bands_are_not_together_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    model, data = tiny.checkpoint(tmp_path / "m"), tiny.data(tmp_path / "d.jsonl")
    tasks = ["--tasks", "tiny_choice", "--include-path", str(tiny.task(tmp_path / "tasks", documents=40))]
    asked = ["compress", str(model), "--data", str(data), *tasks, "--output", str(tmp_path / "run")]
    assert run([*asked, "--max-params", "0.8", "--set", "finetuning.bands=2", *more]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_the_whole_job(tmp_path: Path) -> None:
    """Two sizes, each cut bit for bit out of the super-network of its band; the search scored them there."""
    recipe = tiny.job_recipe(tmp_path) | {
        "finetuning": {"bands": 2, "tokens": 2560, "batch_size": 4, "sequence_length": 32, "smallest_share": 0.5},
        "searching": {"evaluations": 8, "population": 4, "limit": 8, "objectives": ["held_out_loss", "parameters"]},
        "healing": {"tokens": 0},
        "space": {"ffn.*": [0, 16, 32, 64], "kv.*": [1, 2]},
        "targets": {"max_params": ["0.9", "0.6"]},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    output = tmp_path / "run"
    assert run(["compress", "--recipe", str(tmp_path / "recipe.yaml"), "--output", str(output)]) == 0
    job = Job(Run(output), Run(output).recipe())
    above, below = (
        load_file(folder / "model.safetensors") for folder in (output / "supernet", output / "supernet/band-1")
    )
    names = [name for name in above if name.endswith("down_proj.weight")]
    assert any(not torch.equal(above[name], below[name]) for name in names)  # each learnt by itself
    made = json.loads((output / "supernet" / "manifest.json").read_text())
    assert len(made["bands"]) == 1 and made["bands"][0]["tokens"] == made["finetune"]["tokens"] == 2560 / 2
    report = json.loads((output / "report.json").read_text())
    assert [band["tokens"] for band in report["finetune"]["bands"]] == [1280] and report["finetune"]["tokens"] == 2560
    folders = {}
    for package in report["packages"]:
        architecture = Architecture.from_dict(package["architecture"])
        folders[package["name"]] = job.supernet_folder(architecture).name
        source = {"supernet": above, "band-1": below}[folders[package["name"]]]
        packaged = load_file(output / "packages" / package["name"] / "model.safetensors")
        for layer, sizes in enumerate(architecture.layers):
            name = f"model.layers.{layer}.mlp.down_proj.weight"
            if sizes.intermediate_size:
                assert torch.equal(packaged[name], source[name][:, : sizes.intermediate_size])
    assert folders == {"best-0.9": "supernet", "best-0.6": "band-1"}
    before = {file: file.stat().st_mtime_ns for file in output.glob("supernet/**/*.safetensors")}
    assert (
        len(before) == 3 and run(["compress", "--recipe", str(tmp_path / "recipe.yaml"), "--output", str(output)]) == 0
    )
    assert {file: file.stat().st_mtime_ns for file in output.glob("supernet/**/*.safetensors")} == before
