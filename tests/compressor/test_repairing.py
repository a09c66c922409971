"""A whole run with repair: what the search scored, what a pick ships, and what is done again when it is switched."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor import pipeline
from compressor.cli import run
from compressor.job import Job
from compressor.recipe_file import read_recipe
from compressor.run import Run
from compressor.stages.comparison_methods import methods
from compressor.stages.repairing import (
    pick_variants,
    repair_file,
    repair_inputs,
    repaired_on,
    search_variants,
    searched_weights,
)
from supernet.architecture import Architecture
from supernet.common.errors import RequestError
from supernet.slicing import extract
from supernet.training.settings import TrainSettings
from tests.support import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with repair, with nothing trained or healed."""
    path = tmp_path_factory.mktemp("repair")
    tiny.checkpoint(path / "base")
    tiny.data(path / "data.jsonl", 400)
    tiny.task(path / "tasks")
    arguments = ["compress", str(path / "base"), "--data", str(path / "data.jsonl"), "--output", str(path / "run")]
    arguments += ["--tasks", "tiny_choice", "--include-path", str(path / "tasks"), "--max-params", "0.8"]
    arguments += ["--train-tokens", "0", "--heal-tokens", "0", "--evaluations", "8", "--repair", "on"]
    recipe = path / "recipe.yaml"
    recipe.write_text("finetuning: {sequence_length: 32}\nrepair: {tokens: 1024}\nsearching: {population: 4}\n")
    assert run([*arguments, "--recipe", str(recipe)]) == 0
    return path / "run"


def opened(folder: Path) -> Job:
    here = Run(folder)
    return Job(here, here.recipe())


def test_a_pick_ships_what_was_repaired_and_is_proved(folder: Path) -> None:
    job = opened(folder)
    (pick,) = json.loads((folder / "search" / "picks.json").read_text())
    architecture = Architecture.from_dict(pick["architecture"])
    variants = pick_variants(job, architecture)
    assert variants is not None and len(variants.names) > 0
    record = json.loads((folder / "packages" / "best" / "compression.json").read_text())
    assert record["entry"]["verified"]
    card = (folder / "packages" / "best" / "README.md").read_text()
    assert "output projections refitted by least squares on 1.02 k tokens" in card
    shipped = load_file(folder / "packages" / "best" / "model.safetensors")
    repaired = load_file(next((folder / "repair").glob("*.safetensors")))
    held = [tensor for tensor in shipped.values() for one in repaired.values() if torch.equal(tensor, one)]
    assert len(held) >= len(repaired)


def test_what_is_scored_is_named_after_its_repair(folder: Path) -> None:
    job = opened(folder)
    assert searched_weights(job) != job.run.supernet_weights
    moments = sorted(file.name for file in (folder / "moments").glob("*.safetensors"))
    assert moments == [f"layer-{index:03d}.safetensors" for index in range(3)]
    before = {file: file.stat().st_mtime_ns for file in (folder / "moments").iterdir()}
    supernet = job.load_supernet()
    assert search_variants(job, supernet) is not None
    assert {file: file.stat().st_mtime_ns for file in (folder / "moments").iterdir()} == before
    job.recipe.repair.enabled = False
    assert repair_inputs(job) == {} and search_variants(job, supernet) is None
    assert searched_weights(job) == job.run.supernet_weights


def healing_settings(job: Job) -> TrainSettings:
    return job.train_settings(job.recipe.healing, 32, 0)


def test_switched_off_the_package_is_made_again(folder: Path) -> None:
    shipped = load_file(folder / "packages" / "best" / "model.safetensors")
    settings = healing_settings(opened(folder))
    assert run(["export", str(folder), "--repair", "off"]) == 0
    plain = load_file(folder / "packages" / "best" / "model.safetensors")
    # It is healed as a plain slice, and the search is shown with the scores that it had.
    plainly = replace(settings, warmup_share=0.03, learning_rate=2 * settings.learning_rate)
    assert healing_settings(opened(folder)) == plainly
    assert run(["report", str(folder)]) == 0
    points = json.loads((folder / "report.json").read_text())["search"]["points"]
    assert points and all(point["tasks"] for point in points)
    assert shipped.keys() == plain.keys() and any(not torch.equal(shipped[name], plain[name]) for name in shipped)


def test_what_was_kept_is_read_with_care(folder: Path) -> None:
    job = opened(folder)
    job.recipe.repair.enabled = True
    (pick,) = json.loads((folder / "search" / "picks.json").read_text())
    architecture = Architecture.from_dict(pick["architecture"])
    assert repaired_on(job, architecture) == 1024 and repaired_on(job, job.structure.base) == 0
    file = repair_file(job, architecture)
    kept = file.read_bytes()
    try:
        save_file({}, file)
        assert repaired_on(job, architecture) == 0
        file.write_bytes(kept[:-5])
        for read in (repaired_on, pick_variants):
            with pytest.raises(RequestError, match=r"damaged; remove it to repair again"):
                read(job, architecture)
    finally:
        file.write_bytes(kept)


def test_without_text_it_is_sliced_plainly(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = opened(folder)
    job.recipe.repair.enabled, job.recipe.data = True, None
    assert pick_variants(job, job.structure.base) is None
    assert "no text to fit to (--data)" in " ".join(capsys.readouterr().err.split())


def test_a_comparison_tells_what_comes_from_the_repair(folder: Path, tmp_path: Path) -> None:
    """Ours without it is the plain slice; a baseline with it keeps the same units and differs in what was refitted."""
    folder = shutil.copytree(folder, tmp_path / "run")
    base = pipeline.resume(folder, {"repair.enabled": True}).structure.base  # another test may have switched it off
    half = replace(base, layers=tuple(replace(layer, intermediate_size=32) for layer in base.layers))
    (pick,) = json.loads((folder / "search" / "picks.json").read_text())
    pick |= {"architecture": half.to_dict(), "key": half.key}
    (folder / "search" / "picks.json").write_text(json.dumps([pick]))
    names = ["ours-unrepaired", "wanda", "wanda-repaired", "flap", "flap-repaired", "random"]
    assert run(["compare", str(folder), "--baselines", ",".join(names)]) == 0
    rows = {row["method"]: row for row in json.loads((folder / "report.json").read_text())["comparison"]}
    assert set(rows) == {"ours", *names}

    def weights(method: str) -> dict[str, torch.Tensor]:
        return load_file(folder / rows[method]["path"] / "model.safetensors")

    job = pipeline.resume(folder, {})
    drawn = Architecture.from_dict(rows["random"]["architecture"])
    sliced = extract(job.load_supernet().model, job.structure, drawn).state_dict()
    pairs = {"ours": weights("ours-unrepaired"), "wanda-repaired": weights("wanda"), "random": sliced}
    for refitted, before in (pairs | {"flap-repaired": weights("flap")}).items():
        after = weights(refitted)
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        projections = ("o_proj.weight", "down_proj.weight", *(["o_proj.bias", "down_proj.bias"] * ("flap" in refitted)))
        assert changed and all(name.endswith(projections) for name in changed)
    for plain, refitted in (("ours-unrepaired", "ours"), ("wanda", "wanda-repaired"), ("flap", "flap-repaired")):
        assert rows[plain]["architecture"] == rows[refitted]["architecture"]


def test_without_repair_nothing_is_compared_with_it() -> None:
    assert {"ours-unrepaired", "wanda-repaired"} <= set(methods(repair=True)) - set(methods())


def test_what_is_trained_little_is_repaired(tmp_path: Path) -> None:
    """By the tokens for each parameter, where nothing else is said; a run stays as its super-network was made."""
    base, data = str(tiny.checkpoint(tmp_path / "base")), str(tiny.data(tmp_path / "data.jsonl", 40))

    def job(folder: str, **keys: object) -> Job:
        given = {"model": base, "data": data, "finetuning.tokens": 0, "healing.tokens": 0} | keys
        job = Job(Run(tmp_path / folder), read_recipe(None, given).resolved())
        job.fill_in()
        return job

    little, size = job("a"), job("a").structure.parameters(job("a").structure.base)
    assert little.recipe.repair.enabled and little.recipe.finetuning.ordering == "surgeon"
    much = job("a", **{"healing.tokens": size // 100 + 1})
    assert much.recipe.repair.enabled is False and much.recipe.finetuning.ordering == "wanda"
    rates = [healing_settings(one).learning_rate for one in (little, much)]
    assert rates[0] == rates[1] / 2
    assert healing_settings(job("a", **{"healing.learning_rate": 1e-4})).learning_rate == 1e-4
    assert not job("a", **{"finetuning.tokens": size // 100 + 1}).recipe.repair.enabled
    assert not job("a", data=None).recipe.repair.enabled
    assert job("a", **{"repair.enabled": True, "healing.tokens": size}).recipe.finetuning.ordering == "surgeon"
    assert not job("a", **{"repair.enabled": False}).recipe.repair.enabled
    assert job("a", **{"finetuning.ordering": "taylor"}).ordering == "taylor"
    begun = Run.create(tmp_path / "b", much.given, {}, {})
    assert job("b").recipe.repair.enabled  # nothing was made of it yet
    begun.supernet.mkdir()
    (begun.supernet / "manifest.json").write_text("{}")
    assert not job("b").recipe.repair.enabled
