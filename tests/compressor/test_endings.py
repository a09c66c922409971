"""What a command says at its end, and that a further format is added to what a run has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from compressor.cli import run
from compressor.pipeline import added
from compressor.recipe import Recipe
from compressor.recipe_file import read_recipe
from compressor.run_status import run_status
from compressor.stages import healing
from export.package_record import read_record, update_record
from supernet.training.history import History
from supernet.training.supernet_training import heal
from tests.support import tiny
from tests.support.export_networks import edited, record_anew


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("endings")
    recipe = "searching: {population: 4, warm_start: [], objectives: [quality, parameters, held_out_loss]}\n"
    (folder / "recipe.yaml").write_text(recipe)
    command = [
        "compress", str(tiny.checkpoint(folder / "model")), "--recipe", str(folder / "recipe.yaml"),
        "--data", str(tiny.data(folder / "data.jsonl", 300)), "--tasks", "tiny_choice",
        "--include-path", str(tiny.task(folder / "tasks", documents=40, solved=True)), "--output", str(folder / "run"),
        "--train-tokens", "0", "--heal-tokens", "0", "--evaluations", "10", "--limit", "12", "--max-params", "0.8",
        "--repair", "off",
    ]  # fmt: skip
    assert run(command) == 0
    return folder / "run"


def test_a_further_format_is_added(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", str(made), "--format", "padded"]) == 0
    said = capsys.readouterr().err
    assert f"package: {made}/packages/best, " in said and f"package: {made}/packages/best-padded, " in said
    assert "quality" in said and f"next: compressor report {made}" in said
    assert run(["export", str(made), "--format", "uniform"]) == 0  # which nothing was picked for yet
    assert run(["report", str(made)]) == 0
    said = capsys.readouterr().err
    report = json.loads((made / "report.json").read_text())
    assert [row["name"] for row in report["packages"]] == ["best", "best-padded", "best-uniform"]
    assert (
        report["recipe"]["formats"] == read_recipe(made / "recipe.yaml", {}).formats == ["uneven", "padded", "uniform"]
    )
    assert f"next: compressor verify {made}/packages/best" in said


def test_what_an_earlier_pick_left_is_named(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(made, tmp_path / "run")
    assert run(["export", str(folder)]) == 0
    assert "earlier picks" not in capsys.readouterr().err
    shutil.copytree(folder / "packages" / "best", folder / "packages" / "best-int3")
    assert run(["export", str(folder)]) == 0
    assert "note: of earlier picks or settings, and not in the report: best-int3 in" in capsys.readouterr().err


def test_a_package_that_is_refused_is_said_and_the_others_are_kept(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(made, tmp_path / "run")
    assert run(["export", str(folder), "--quantize", "int8"]) == 0
    for name in ("best-int8", "base-int4"):
        package = folder / "packages" / name
        with edited(package / "config.json") as config:
            config["rms_norm_eps"] = 3.0
        record_anew(package, "config.json")
        update_record(package, entry={"verified": None})
    update_record(folder / "packages" / "best", entry={"verified": None})
    capsys.readouterr()
    assert run(["export", str(folder), "--quantize", "int8"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "best-int8: refused by its proof, do not ship it: log-probabilities differ by up to" in said
    assert "nor is base-int4 proved; all others are proved" in said and "); refused by its proof" in said
    assert "warning: " in said and run_status(folder)["refused"] == ["base-int4", "best-int8"]
    assert read_record(folder / "packages" / "best").entry.verified
    # 2. The report says it of both, and no sentence counts on them.
    assert run(["report", str(folder)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "Compressed INT8 was refused by its proof and is not to be shipped: log-prob" in said
    assert "Base INT4 was refused by its proof" in said and "The base INT4 takes" not in said
    page, card = (folder / "report.html").read_text(), (folder / "packages" / "best-int8" / "README.md").read_text()
    assert page.count("refused by its proof</span>") == 2 and "(this one, refused by its proof)" in card
    assert "proof: log-probabilities differ by up to" in card and str(folder) not in card
    assert "base INT4 was refused" not in (folder / "packages" / "best" / "README.md").read_text()
    (whole,) = (row for row in json.loads((folder / "report.json").read_text())["packages"] if row["name"] == "best")
    assert whole["verified"] and whole["refused"] is None
    # 3. The whole job ends with it too, behind its report.
    assert run(["compress", "--recipe", str(folder / "recipe.yaml"), "--output", str(folder), "--json"]) == 1
    shown = capsys.readouterr()
    assert "best-int8: refused by its proof" in " ".join(shown.err.split())
    assert {row["name"] for row in json.loads(shown.out)["packages"] if row["refused"]} == {"best-int8"}


def test_an_elastic_package_is_written_proved_scored_and_cut(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(made), "--format", "elastic"]) == 0
    assert run(["report", str(made)]) == 0
    elastic = made / "packages" / "best-elastic"
    (package,) = (p for p in json.loads((made / "report.json").read_text())["packages"] if p["name"] == "best-elastic")
    proved = package["verified"]["sizes"]
    assert len(proved) == min(3, len(package["sizes"])) and {"1.00", package["default_size"]} < set(proved)
    for size in package["sizes"]:
        assert (size["report_quality"] is not None) == (size["name"] in proved)
    by_name = {size["name"]: size for size in package["sizes"]}
    assert by_name["1.00"]["report_quality"] == 1.0  # untrained: the whole is the base
    assert by_name[package["default_size"]]["report_quality"] == package["quality"]
    assert "## Its sizes" in (elastic / "README.md").read_text()
    smallest = min(package["sizes"], key=lambda size: size["params"])
    capsys.readouterr()
    assert run(["slice", str(elastic), str(tmp_path / "cut"), "--max-params", str(smallest["params"])]) == 0
    assert f"package: {tmp_path / 'cut'}, " in capsys.readouterr().err
    assert run(["verify", str(tmp_path / "cut")]) == 0
    card = ModelCard.load(tmp_path / "cut" / "README.md")
    assert f"size {smallest['name']} of the elastic package best-elastic" in card.text
    assert "elastic" not in card.data.tags and card.data.eval_results is None
    assert run(["push", str(tmp_path / "cut"), "somebody/cut", "--dry-run"]) == 0
    assert run(["slice", str(elastic), str(tmp_path / "other"), "--max-params", "100"]) == 2
    assert "the smallest size" in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert run(["slice", str(made / "packages" / "best"), str(tmp_path / "other"), "--max-params", "0.5"]) == 2
    assert "--format elastic" in " ".join(capsys.readouterr().err.split())


def test_an_elastic_package_is_proved_beside_a_healed_pick(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds what was not healed, so it is not compared with what was."""
    folder = shutil.copytree(made, tmp_path / "run")

    def healed_much(network: Any, *args: Any, **options: Any) -> History:
        history = heal(network, *args, **options)
        with torch.no_grad():
            network.get_output_embeddings().weight.mul_(1.5)
        return history

    monkeypatch.setattr(healing, "heal", healed_much)
    assert run(["export", str(folder), "--format", "elastic", "--heal-tokens", "2000"]) == 0
    healed, elastic = (read_record(folder / "packages" / name).entry for name in ("best", "best-elastic"))
    assert healed.verified and elastic.verified and healed.held_out_loss != elastic.held_out_loss


def test_every_stage_says_where_its_work_is_and_what_is_next(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, here, following in (("search", "front.json", "pick"), ("pick", "picks.json", "export")):
        assert run([command, str(made)]) == 0
        lines = capsys.readouterr().err.splitlines()
        assert any(f"{made}/search/{here}" in line for line in lines)
        assert lines[-1].startswith(f"next: compressor {following} {made}")


def test_a_repair_and_an_elastic_package_exclude_one_another(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = made.parent
    command = [
        "compress", str(place / "model"), "--data", str(place / "data.jsonl"), "--tasks", "tiny_choice",
        "--include-path", str(place / "tasks"), "--output", str(tmp_path / "run"), "--format", "elastic",
    ]  # fmt: skip
    assert run([*command, "--repair", "on"]) == 2
    assert "--format elastic: holds one set of weights" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_what_is_named_twice_is_added_once() -> None:
    recipe = Recipe(model="m", formats=["uneven", "gguf"])
    assert added(recipe, {"formats": "padded,gguf"}) == {"formats": ["uneven", "gguf", "padded"]}
    assert added(recipe, {"quantizing.schemes": ["int8"], "seed": 1}) == {"quantizing.schemes": ["int8"], "seed": 1}
