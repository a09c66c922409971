"""The whole job on a tiny checkpoint: every step real, resumable, and visible on disk."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from compressor.cli import run
from supernet.common.errors import RequestError
from tests.support import tiny
from tests.support.export_networks import tiny_tokenizer

RECIPE = """
finetuning: {tokens: 1600, batch_size: 4, sequence_length: 32}
searching: {evaluations: 14, population: 7, limit: 12}
healing: {tokens: 640}
quantizing: {schemes: [int8, int4], bits: asked, iterations: 1, samples: 4}
space: {ffn.*: [32, 64], kv.*: [1, 2], layer.1: [0, 1]}
targets: {max_params: [0.8], max_bytes: 32kB}
formats: [uneven, padded, gguf-q8_0, onnx]
"""


class Made:
    """A finished run and how it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        marks = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        self.model = tiny.checkpoint(folder / "model", vocab_size=320, **marks)
        tiny_tokenizer().save_pretrained(self.model)  # of a kind that llama.cpp knows
        self.data = tiny.data(folder / "data.jsonl", 300)
        self.tasks = tiny.task(folder / "tasks", documents=40)
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(RECIPE)
        self.run = folder / "run"

    def arguments(self, *more: str) -> list[str]:
        return [
            "compress", str(self.model), "--recipe", str(self.recipe), "--data", str(self.data),
            "--tasks", "tiny_choice", "--include-path", str(self.tasks), "--output", str(self.run), *more,
        ]  # fmt: skip

    def report(self) -> dict[str, Any]:
        return json.loads((self.run / "report.json").read_text())

    def rows(self) -> int:
        return measurements(self.run)


def measurements(run_folder: Path) -> int:
    """How often the task was scored; losses on held-out text are in the same table."""
    with sqlite3.connect(run_folder / "search" / "evaluations.db") as database:
        return database.execute("select count(*) from evaluations where task like 'tiny_choice%'").fetchone()[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    bench = Made(tmp_path_factory.mktemp("job"))
    assert run(bench.arguments()) == 0
    return bench


def test_everything_is_where_it_should_be(made: Made) -> None:
    for name in (
        "recipe.yaml", "log.txt", "supernet/manifest.json", "supernet/model.safetensors",
        "supernet/ordering.safetensors", "speed.json", "search/evaluations.db", "search/front.json",
        "subnets/best/model.safetensors",
        "subnets/best-sliced/model.safetensors", "packages/best/config.json", "packages/best/README.md",
        "packages/best-int8/compression.json", "packages/best-int4/compression.json", "report.json", "report.html",
    ):  # fmt: skip
        assert (made.run / name).is_file(), name
    left = [path for path in made.run.rglob("*") if "partial" in path.name or path.suffix in (".tmp", ".bin", ".pt")]
    assert left == []


def test_what_was_trained_is_kept_whatever_is_picked_later(made: Made) -> None:
    share = yaml.safe_load((made.run / "recipe.yaml").read_text())["finetuning"]["smallest_share"]
    assert share == pytest.approx(0.85 * 0.8, rel=0.01)


def test_numbers_and_lines_of_the_run_are_kept(made: Made) -> None:
    rows = [json.loads(line) for line in (made.run / "metrics.jsonl").read_text().splitlines()]
    kinds = {row["kind"] for row in rows}
    assert {"fine-tuning", "fine-tuning held out", "healing", "candidate", "generation", "package"} <= kinds
    assert len([row for row in rows if row["kind"] == "candidate"]) == 14
    log = (made.run / "log.txt").read_text()
    assert "picked best:" in log and "held-out" in log and "\x1b" not in log
    assert (made.run / "debug.log").is_file() and "Traceback" not in log


def test_the_report_says_how_to_get_it_again(made: Made) -> None:
    again = made.report()["again"]
    assert again["command"].startswith(f"compressor compress {made.model} --data {made.data}")
    assert again["seconds"] > 0 and again["run"] == made.run.name
    card = (made.run / "packages" / "best" / "README.md").read_text()
    assert again["command"] in card and str(made.folder / "run") not in card
    before = (made.run / "report.json").stat().st_mtime_ns
    assert run(["report", str(made.run)]) == 0  # up to date: it is shown and not written again
    assert (made.run / "report.json").stat().st_mtime_ns == before


def test_the_report_says_what_is_on_disk(made: Made) -> None:
    report = made.report()
    names = ["best", "best-int8", "best-int4", "best-padded", "best-gguf-q8_0", "best-onnx"]
    assert [package["name"] for package in report["packages"]] == names
    best, int8, int4, padded, gguf, onnx = report["packages"]
    assert best["params"] <= 0.8 * report["base"]["params"]
    assert int4["bytes"] < int8["bytes"] < best["bytes"] < report["base"]["bytes"]
    for package in report["packages"]:
        folder = made.run / "packages" / package["name"]
        files = [file for pattern in ("*.safetensors", "*.gguf", "*.onnx", "*.data") for file in folder.glob(pattern)]
        assert package["bytes"] == sum(file.stat().st_size for file in files)
        assert package["tasks"]["tiny_choice"]["split"] == "report"
        assert package["speed"]["decode_tps"] > 0
    for package in (best, int8, int4, padded):
        assert package["verified"]["cached_equals_uncached"] is True
        assert package["verified"]["save_and_reload_equal"] is True
        scores = {task: score["value"] for task, score in package["tasks"].items()}
        assert package["verified"]["task_scores"] == pytest.approx(scores, abs=1 / 20)
    assert gguf["speed"]["runtime"] == "llama.cpp" and gguf["verified"]["tokenizer_equal"] >= 200
    assert onnx["speed"]["runtime"] == "onnxruntime" and onnx["verified"]["cached_generation_equal"] is True
    assert onnx["tasks"] == padded["tasks"] == best["tasks"]
    losses = {package["name"]: package["held_out_loss"] for package in report["packages"]}
    assert losses["best-padded"] == pytest.approx(losses["best"]) and losses["best-onnx"] == losses["best"]
    assert report["base"]["held_out_loss"] > 0 < losses["best"] != losses["best-int4"]
    assert report["search"]["evaluations"] == 14 == len({point["key"] for point in report["search"]["points"]})
    tuned, healed = report["finetune"], report["healing"]["best"]
    assert tuned["curve"][0]["step"] == 0 and {"largest", "middle", "smallest"} <= tuned["curve"][-1].keys()
    for training in (tuned, healed):
        assert training["kept"] in {point["step"] for point in training["curve"]}
        assert training["outcome"] in (made.run / "report.html").read_text().replace("&gt;", ">")
    kept = next(point["loss"] for point in healed["curve"] if point["step"] == healed["kept"])
    assert kept == min(point["loss"] for point in healed["curve"])
    assert not list(made.run.rglob("*training.safetensors*"))
    assert len(report["samples"]) == 3 and set(report["samples"][0]["continuations"]) >= {"base", "best"}
    assert "best-int4" in (made.run / "report.html").read_text()


def test_the_smallest_variants_weights_take_no_more_than_was_asked(made: Made) -> None:
    (picked,) = json.loads((made.run / "search" / "picks.json").read_text())
    sizes = {}
    for name in ("best-int4", "best-int8"):
        weights = load_file(made.run / "packages" / name / "model.safetensors")
        sizes[name] = sum(tensor.nbytes for tensor in weights.values())
    assert sizes["best-int4"] == picked["values"]["bytes"] <= 32_000
    assert sizes["best-int4"] < sizes["best-int8"]  # which of several equal networks is picked depends on their timing


def test_the_package_loads_in_transformers_and_is_the_searched_architecture(made: Made) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = made.run / "packages" / "best"
    entry = made.report()["packages"][0]
    (picked,) = json.loads((made.run / "search" / "picks.json").read_text())
    assert entry["architecture"] == picked["architecture"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=entry["layout"] == "uneven")
    assert sum(p.numel() for p in model.parameters()) == entry["params"]
    ids = AutoTokenizer.from_pretrained(folder)("the cat", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()


def test_run_again_it_does_nothing_anew(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    rows, before = made.rows(), (made.run / "packages" / "best" / "model.safetensors").stat().st_mtime_ns
    assert run(made.arguments("--json")) == 0
    assert json.loads(capsys.readouterr().out)["packages"] == made.report()["packages"]
    assert made.rows() == rows
    assert (made.run / "packages" / "best" / "model.safetensors").stat().st_mtime_ns == before


def test_another_format_adds_a_folder_and_leaves_the_others_alone(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressor.stages import healing

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("healed again")

    again = Made(tmp_path)
    shutil.copytree(made.run, again.run)
    left = again.run / "subnets" / f".best-{16 * '0'}.training.safetensors"
    left.write_bytes(b"of a run with another --heal-tokens")
    weights = [file for file in again.run.rglob("*") if file.suffix in (".safetensors", ".gguf", ".onnx")]
    stamps = {file: file.stat().st_mtime_ns for file in weights if file != left}
    monkeypatch.setattr(healing, "heal", refuse)
    assert run(["export", str(again.run), "--format", "uneven,padded,gguf-q8_0,onnx,gguf-f32"]) == 0
    assert run(["report", str(again.run)]) == 0
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    before = {package["name"]: package for package in made.report()["packages"]}
    *others, new = again.report()["packages"]
    assert new["name"] == "best-gguf-f32" and new["verified"]["tokenizer_equal"] >= 200
    assert {package["name"]: package["speed"] for package in others} == {n: p["speed"] for n, p in before.items()}
    assert again.report()["base"]["speed"] == made.report()["base"]["speed"]
    assert again.report()["samples"] == made.report()["samples"]
    assert not left.exists()


def test_verify_and_evaluate_agree_with_the_report(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    package = made.run / "packages" / "best"
    assert run(["verify", str(package), "--include-path", str(made.tasks), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["task_scores_equal"] is True and found["params"] == made.report()["packages"][0]["params"]
    output = made.folder / "scores.json"
    arguments = ["evaluate", str(package), "--tasks", "tiny_choice", "--include-path", str(made.tasks)]
    assert run([*arguments, "--output", str(output)]) == 0
    assert "tiny_choice" in capsys.readouterr().err
    scores = json.loads(output.read_text())
    assert scores["n-samples"]["tiny_choice"]["effective"] == 40
    assert 0 <= scores["results"]["tiny_choice"]["acc,none"] <= 1


def test_a_new_target_is_picked_exported_and_reported_without_searching(made: Made) -> None:
    folder = made.folder / "copy"
    shutil.copytree(made.run, folder)
    front, rows = (folder / "search" / "front.json").read_text(), measurements(folder)
    assert run(["pick", str(folder), "--max-params", "0.75"]) == 0
    assert measurements(folder) == rows
    (picked,) = json.loads((folder / "search" / "picks.json").read_text())
    assert picked["values"]["parameters"] <= 0.75 * made.report()["base"]["params"]
    assert run(["export", str(folder), "--quantize", "int8", "--format", "uneven"]) == 0
    assert run(["report", str(folder)]) == 0
    packages = json.loads((folder / "report.json").read_text())["packages"]  # those that the run had are made too
    assert [package["name"] for package in packages] == [package["name"] for package in made.report()["packages"]]
    for package in packages:
        assert package["architecture"] == picked["architecture"]
        if package["layout"] not in ("padded", "onnx"):  # the graph is of the padded one
            assert package["params"] == picked["values"]["parameters"]
    assert (folder / "search" / "front.json").read_text() == front


def test_picks_keep_the_speedup_and_the_quality_asked_for(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(made.run, folder)
    front = folder / "search" / "front.json"
    found = json.loads(front.read_text())
    for row in found["evaluations"]:  # timings of this machine would be no ground to stand on
        row["values"]["decode_tps"] = found["base_decode_tps"] * (1 + row["index"] / 10)
    front.write_text(json.dumps(found))

    def picked(*target: str) -> dict[str, float]:
        assert run(["pick", str(folder), *target]) == 0
        (pick,) = json.loads((folder / "search" / "picks.json").read_text())
        return pick["values"]

    assert picked("--min-speedup", "1.65")["speedup"] >= 1.65
    rows = [row["values"] for row in found["evaluations"]]
    smallest = min(values["parameters"] for values in rows if values["quality"] >= 0.9)
    assert picked("--max-drop", "10%")["parameters"] == smallest


def test_measured_work_is_not_thrown_away_unasked(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = (made.run / "recipe.yaml").read_text()
    assert run(made.arguments("--train-tokens", "3200")) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "--redo finetune" in error and re.search(r"\(finetuning.tokens \d+ → 3200\)", error)
    assert (made.run / "recipe.yaml").read_text() == recipe
    assert run(made.arguments()) == 0  # the run is as it was


def test_an_interrupted_search_goes_on_to_the_same_result(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from evals.scoring.scorer import Scorer

    again = Made(tmp_path)
    shutil.copytree(made.run, again.run)
    shutil.rmtree(again.run / "packages")
    for name in ("evaluations.db", "front.json", "picks.json"):
        (again.run / "search" / name).unlink()
    original, calls = Scorer.ask, 0

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    search = ["search", str(again.run), "--include-path", str(made.tasks)]
    monkeypatch.setattr(Scorer, "ask", killed)
    assert run(search) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert again.rows() == 6
    monkeypatch.setattr(Scorer, "ask", original)
    assert run(search) == 0
    first, second = (
        json.loads((bench.run / "search" / "front.json").read_text())["evaluations"] for bench in (made, again)
    )
    assert [row["key"] for row in first] == [row["key"] for row in second]
    assert [row["values"]["quality"] for row in first] == [row["values"]["quality"] for row in second]


def test_an_interrupted_measuring_times_no_package_twice(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressor.stages.measuring import PackageMeasurer

    again = Made(tmp_path)
    shutil.copytree(made.run, again.run)
    (again.run / "packages" / "base.json").unlink()  # nothing is known to be measured
    original, timed = PackageMeasurer.time, list[str]()

    def time(measurer: PackageMeasurer, record: Any, model: Any) -> Any:
        if len(timed) == 3:
            raise KeyboardInterrupt
        timed.append(record.entry.name)
        return original(measurer, record, model)

    monkeypatch.setattr(PackageMeasurer, "time", time)
    assert run(["export", str(again.run)]) == 130
    before, timed = timed, []
    monkeypatch.setattr(PackageMeasurer, "time", lambda *args: (timed.append(args[1].entry.name), original(*args))[1])
    assert run(["export", str(again.run)]) == 0
    everything = sorted(folder.parent.name for folder in again.run.glob("packages/*/compression.json"))
    assert len(before) == 3 and sorted(before + timed) == everything
    base = json.loads((again.run / "packages" / "base.json").read_text())
    for name in everything:
        lineage = json.loads((again.run / "packages" / name / "compression.json").read_text())["lineage"]
        assert lineage["base_speed"] == base["base"]["speed"]
    assert [file.name for file in (again.run / "packages").glob(".*")] == []


def test_training_free_uniform_and_by_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor import Recipe, Result, compress
    from supernet.streaming import StreamedNetwork

    def refuse(*_: Any) -> None:
        raise AssertionError("what is not healed is never in memory as a whole")

    monkeypatch.setattr(StreamedNetwork, "built", refuse)

    bench = Made(tmp_path)
    recipe = Recipe.model_validate(
        {
            "model": str(bench.model),
            "data": str(bench.data),
            "tasks": ["tiny_choice"],
            "include_path": str(bench.tasks),
            "space": {"ffn.*": [32, 64], "kv.*": [1, 2], "depth": {"values": [2, 3], "policy": "importance"}},
            "targets": {"max_params": ["0.85", "0.75"]},
            "finetuning": {"tokens": 0, "sequence_length": 32},
            "searching": {"evaluations": 12, "population": 6, "limit": 8},
            "healing": {"tokens": 0},
            "formats": ["uneven", "uniform"],
        }
    )
    result = compress(recipe, bench.run)
    report = result.report
    names = [package["name"] for package in report["packages"]]
    assert names == ["best-0.85", "best-0.85-uniform", "best-0.75", "best-0.75-uniform"]
    uniform = [package for package in report["packages"] if package["name"].endswith("uniform")]
    assert {package["layout"] for package in uniform} == {"uniform"}
    config = json.loads((bench.run / "packages" / "best-0.75-uniform" / "config.json").read_text())
    assert config["model_type"] == "llama" and "auto_map" not in config
    assert report["finetune"] is None
    assert {*names} < {*result.packages} and all(folder.is_dir() for folder in result.packages.values())
    sizes = [row["params"] for row in result.front]
    assert sizes == sorted(sizes) and len(sizes) == len(report["front"])
    network, tokenizer = result.load("best-0.75"), result.tokenizer("best-0.75")
    assert sum(p.numel() for p in network.parameters()) == report["packages"][2]["params"]
    assert network(**tokenizer("a b", return_tensors="pt")).logits.isfinite().all()
    axes = result.plot_front()
    assert len(axes.collections[0].get_offsets()) == len(report["search"]["points"])
    stairs = list(axes.lines[0].get_ydata())
    assert stairs == sorted(stairs) and stairs[-1] == max(row["quality"] for row in report["search"]["points"])
    assert Result(bench.run).report == report
    with pytest.raises(RequestError, match="package: 'bets' is unknown"):
        result.load("bets")
    manifest = json.loads((bench.run / "supernet" / "manifest.json").read_text())
    least = min(range(3), key=lambda layer: manifest["block_influence"][layer])
    searched = json.loads((bench.run / "search" / "front.json").read_text())["evaluations"]
    gone = {
        index
        for row in searched
        for index, layer in enumerate(row["architecture"]["layers"])
        if not layer["intermediate_size"]
    }
    assert gone == {least}


def test_an_unreachable_speedup_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    from compressor import Recipe, compress

    bench = Made(tmp_path)
    recipe = Recipe.model_validate(
        {
            "model": str(bench.model),
            "data": str(bench.data),
            "tasks": ["tiny_choice"],
            "include_path": str(bench.tasks),
            "targets": {"min_speedup": 500},
            "effort": "quick",
        }
    )
    with pytest.raises(RequestError, match="--min-speedup"):
        compress(recipe, bench.run)
    assert not (bench.run / "supernet").exists()


def test_a_search_for_another_device_uses_its_table(made: Made, tmp_path: Path) -> None:
    """A table that says that MLPs cost nothing there makes all sub-networks with equal attention equally fast."""
    elsewhere = json.loads((made.run / "speed.json").read_text()) | {"device": "elsewhere"}
    for part in ("prefill", "decode"):
        elsewhere[part]["mlp"] = [0.0 for _ in elsewhere[part]["mlp"]]
    table = tmp_path / "elsewhere.json"
    table.write_text(json.dumps(elsewhere))
    copied = tmp_path / "run"
    shutil.copytree(made.run, copied)
    recipe = copied / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("speed_table: null", f"speed_table: {table}"))
    rows, front = measurements(copied), copied / "search" / "front.json"
    before = {one["key"] for one in json.loads(front.read_text())["evaluations"]}
    assert run(["search", str(copied)]) == 0
    assert json.loads((copied / "speed.json").read_text())["device"] == "elsewhere"
    speeds: dict[Any, set[float]] = {}
    evaluations = json.loads(front.read_text())["evaluations"]
    for evaluation in evaluations:
        heads = tuple(layer["num_key_value_heads"] for layer in evaluation["architecture"]["layers"])
        speeds.setdefault(heads, set()).add(evaluation["values"]["decode_tps"])
    assert all(len(found) == 1 for found in speeds.values())
    assert measurements(copied) == rows + len({one["key"] for one in evaluations} - before)  # only what is new
