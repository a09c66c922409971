"""The search of a run: what it can measure, on part of the documents, in other processes, and from a warm start."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from compressor import cli, pipeline
from compressor.front_table import front_rows
from compressor.inputs import training_blocks
from compressor.job import Job
from compressor.recipe_file import read_recipe
from compressor.run import Run
from compressor.sizing import training_range
from compressor.stages import subnet_scores as subnets
from compressor.stages.choosing import choose
from compressor.stages.control import control_of, likeness_of
from compressor.stages.layer_timings import speed_table
from compressor.stages.picking import measured
from compressor.stages.repairing import searched_weights
from compressor.stages.requalify import current_front
from compressor.stages.score_keys import held_out_keys, score_keys
from compressor.stages.searching import check_uniform, uniform_architectures
from compressor.stages.subnet_scores import FINALISTS, FIRST_BLOCKS, HeldOut
from compressor.stages.warm_start import proposals
from evals.speed.table import SpeedTable
from search.control_records import Control
from search.pareto import Target
from search.scores import Score
from search.store import EvaluationStore
from supernet.architecture import Architecture
from supernet.common.errors import RequestError
from supernet.common.files import read_json
from supernet.families import describe, head_dim
from supernet.training.data import HELD_OUT_BLOCKS
from supernet.training.losses import held_out_loss
from tests.support import tiny
from tests.support.tiny_families import CONFIGS


class Made:
    """A run whose super-network is ready, and a task of two metrics."""

    def __init__(self, folder: Path) -> None:
        self.tasks = tiny.task(folder / "tasks", documents=60, solved=True)
        task = self.tasks / "tiny_choice.yaml"
        task.write_text(task.read_text() + "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n")
        given = {
            "model": str(tiny.checkpoint(folder / "model")),
            "data": str(tiny.data(folder / "data.jsonl", 300)),
            "tasks": "tiny_choice:acc",
            "include_path": str(self.tasks),
            "space": {"ffn.*": [16, 32, 64], "kv.*": [1, 2], "layer.1": [0, 1]},
            "finetuning": {"tokens": 0, "sequence_length": 32, "batch_size": 4},
            "searching": {"evaluations": 24, "population": 8, "limit": 24, "objectives": ["quality", "parameters"]},
            "device": "cpu",
        }
        self.run = folder / "run"
        job = pipeline.start(read_recipe(None, given), self.run)
        pipeline.finetune(job)
        speed_table(job, lambda: job.load_supernet().model)  # once: every search below is of a copy

    def search(self, folder: Path, **searching: Any) -> dict[str, Any]:
        """front.json of a search of a copy of the run."""
        if not folder.exists():
            shutil.copytree(self.run, folder)
        job = pipeline.resume(folder, {f"searching.{name}": value for name, value in searching.items()})
        return pipeline.search(job)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("searching"))


def test_objectives_beyond_a_tasks_own_metric(made: Made, tmp_path: Path) -> None:
    names = ["held_out_loss", "kl_to_base", "tiny_choice:acc_norm", "latency"]
    found = made.search(tmp_path / "run", objectives=names)
    base = found["evaluations"][0]
    # Nothing was trained, so the whole super-network is the base with its neurons in another order.
    assert base["values"]["kl_to_base"] == pytest.approx(0, abs=1e-6)
    assert base["values"]["quality"] == 1.0
    for row in found["evaluations"]:
        assert row["values"]["kl_to_base"] > -1e-6 and row["values"]["held_out_loss"] > 0
        assert row["values"]["latency"] > 0 and 0 <= row["values"]["tiny_choice:acc_norm"] <= 1
    smallest = min(found["evaluations"], key=lambda row: row["values"]["latency"])
    assert smallest["values"]["kl_to_base"] > 1e-6
    with EvaluationStore(tmp_path / "run" / "search" / "evaluations.db") as store:
        kept = {row.task: row for _, row in store.all(weights=found["weights"])}
    assert kept["kl_to_base"].n == 16 and kept["kl_to_base"].stderr is not None
    assert "tiny_choice:acc_norm,none" in kept


def rows(found: dict[str, Any]) -> list[tuple[str, float, bool]]:
    return [(row["key"], row["values"]["quality"], row["full"]) for row in found["evaluations"]]


def test_a_front_of_the_earlier_definition_of_quality_is_read_by_todays(made: Made, tmp_path: Path) -> None:
    found = made.search(tmp_path / "run", screening=0.25, evaluations=16)
    file = tmp_path / "run" / "search" / "front.json"
    earlier = json.loads(file.read_text())
    del earlier["quality"]
    base = earlier["base"]["tiny_choice"]
    for row in earlier["evaluations"]:
        row["values"]["quality"] = row["values"]["tiny_choice"] / base  # chance not subtracted
    earlier["front"] = earlier["front"][:1]
    file.write_text(json.dumps(earlier))
    again = current_front(pipeline.resume(tmp_path / "run", {}))
    assert again["quality"] == found["quality"] and again["quality"]["counted"] == ["tiny_choice"]
    assert again["front"] == found["front"]
    for now, then in zip(again["evaluations"], found["evaluations"], strict=True):
        # A screening's correction is a median of differences, which is of scores here and was of qualities there.
        assert now["values"]["quality"] == pytest.approx(then["values"]["quality"], abs=1e-9 if now["full"] else 0.2)
    assert [g["hypervolume"] for g in again["generations"]] == pytest.approx(
        [g["hypervolume"] for g in found["generations"]]
    )
    assert {row.key for row in front_rows(tmp_path / "run")} == set(again["front"])
    assert made.search(tmp_path / "run") == again  # nothing is searched again


def test_where_no_task_counts_the_loss_on_text_does(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.run, tmp_path / "run")
    tiny.task(tmp_path / "tasks", "guessed")
    given = {"tasks": "guessed", "include_path": str(tmp_path / "tasks"), "searching.evaluations": 6}
    job = pipeline.resume(tmp_path / "run", given)
    found = pipeline.search(job)
    assert found["quality"]["left_out"] == ["guessed"] and "No task counts (guessed)" in found["quality"]["remark"]
    values = [row["values"] for row in found["evaluations"]]
    for one in values:
        assert one["quality"] == pytest.approx(math.exp(values[0]["held_out_loss"] - one["held_out_loss"]))
    assert len({one["quality"] for one in values}) == 6
    # Of the definition before, which did not cap the qualities by tasks, they are the same.
    file = tmp_path / "run" / "search" / "front.json"
    file.write_text(json.dumps(found | {"quality": found["quality"] | {"definition": 2}}))
    assert current_front(job)["evaluations"] == found["evaluations"]


def test_a_random_search_beside_it_is_predicted_and_measured_on_request(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(made.run, folder)
    sized = {"targets.max_params": "0.9", "searching.objectives": ["held_out_loss", "parameters"]}
    found = pipeline.search(pipeline.resume(folder, sized, replace_targets=True))
    assert found["control"]["way"] == "predicted" and found["control"]["evaluations"] <= 24
    assert 0 < found["likeness"]["correlation"] <= 1
    job = pipeline.resume(folder, {})
    assert control_of(job, found) == Control.model_validate(found["control"])
    measured = pipeline.measure_control(job)
    assert measured is not None and measured.way == "measured" and measured.found == found["control"]["found"]
    assert control_of(job, found) == measured
    assert [row["key"] for row in read_json(job.run.front)["evaluations"]] == [
        row["key"] for row in found["evaluations"]
    ]
    with EvaluationStore(job.run.evaluations) as store:
        before = len(list(store.all(weights=found["weights"])))
        assert pipeline.measure_control(job) == measured, "what was measured is kept"
        assert len(list(store.all(weights=found["weights"]))) == before
    monkeypatch.setattr("compressor.stages.control.within_bounds", lambda *_: [])
    with pytest.raises(RequestError, match=r"--control: no sub-network within the sizes asked for"):
        pipeline.measure_control(pipeline.resume(folder, {}))


def test_a_control_is_shown_of_the_search_that_is_asked_for(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(made.run, folder)
    given: dict[str, Any] = {"targets.max_params": "0.9", "searching.objectives": ["held_out_loss", "parameters"]}
    pipeline.search(pipeline.resume(folder, given, replace_targets=True))
    first = pipeline.resume(folder, {})
    measured = pipeline.measure_control(first)
    further = pipeline.resume_search(folder, {"targets.max_params": "0.95", "searching.evaluations": 10})
    found = pipeline.search(further)
    assert control_of(further, found) == Control.model_validate(found["control"])
    assert control_of(first, found) == measured and likeness_of(first, found) is None


def test_other_processes_measure_the_same(made: Made, tmp_path: Path) -> None:
    alone = made.search(tmp_path / "alone", evaluations=10)
    shared = made.search(tmp_path / "shared", evaluations=10, workers=2)
    assert rows(alone) == rows(shared)
    # Who measures is no part of what is measured: nothing is searched again.
    before = (tmp_path / "shared" / "search" / "front.json").stat().st_mtime_ns
    made.search(tmp_path / "shared", workers=1)
    assert (tmp_path / "shared" / "search" / "front.json").stat().st_mtime_ns == before


def test_a_first_look_on_part_of_the_documents(made: Made, tmp_path: Path) -> None:
    found = made.search(tmp_path / "run", screening=0.25, evaluations=30)
    everything = {row["key"]: row for row in found["evaluations"]}
    partial = {key for key, row in everything.items() if not row["full"]}
    assert partial and not partial & set(found["front"])
    with EvaluationStore(tmp_path / "run" / "search" / "evaluations.db") as store:
        documents: dict[str, set[int]] = {}
        for architecture, row in store.all(weights=found["weights"]):
            documents.setdefault(architecture.key, set()).add(row.n)
    assert {n for key in partial for n in documents[key]} == {6}
    assert all(documents[key] == {6, 24} for key in set(everything) - partial)
    spent = len(everything) - len(partial) + 0.25 * (len(everything) - 8)
    assert 28 < spent <= 30 < len(everything)  # more candidates than full evaluations of the same cost
    (tmp_path / "run" / "search" / "front.json").unlink()
    assert rows(made.search(tmp_path / "run")) == rows(found)


def test_the_earlier_front_and_greedy_cuts_come_first(made: Made, tmp_path: Path) -> None:
    earlier = made.search(tmp_path / "earlier")
    start = [str(tmp_path / "earlier"), "greedy", "blockwise"]
    found = made.search(tmp_path / "run", warm_start=start)
    keys = [row["key"] for row in found["evaluations"]]
    assert len(keys) == len(set(keys)) == 24
    first = [Architecture.from_dict(row["architecture"]) for row in found["evaluations"][:6]]
    whole = first[0]
    for cut in first[1:]:  # a quarter of the budget: the base, then single cuts of it
        assert sum(a != b for a, b in zip(cut.layers, whole.layers, strict=True)) == 1
    assert set(keys) & set(earlier["front"])
    proposed = json.loads((tmp_path / "run" / "search" / "proposals-blockwise.json").read_text())["architectures"]
    assert set(keys) & {Architecture.from_dict(row).key for row in proposed}
    assert json.loads((tmp_path / "run" / "search" / "front.json").read_text())["front"] == found["front"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tasks": "tiny_chioce"}, "tiny_chioce"),
        ({"searching.warm_start": "blockwsie"}, "blockwsie"),
        ({"formats": "gguf"}, "llama.cpp"),
        ({"targets.max_params": "0.01"}, "cannot be reached"),
    ],
)
def test_a_wrong_option_of_a_stage_leaves_the_recipe_alone(
    made: Made, tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    shutil.copytree(made.run, tmp_path / "run")
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    with pytest.raises(RequestError, match=said):
        pipeline.resume(tmp_path / "run", given)
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before


def test_targets_that_a_search_is_given_replace_the_runs(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made.run, tmp_path / "run")
    monkeypatch.setattr(pipeline, "search", lambda job: {"evaluations": [], "front": []})
    monkeypatch.setattr(pipeline, "pick", lambda job: [])
    assert Run(tmp_path / "run").recipe().targets.max_drop == 0.01  # nobody named it
    assert cli.run(["search", str(tmp_path / "run"), "--max-params", "0.8,0.7"]) == 0
    targets = Run(tmp_path / "run").recipe().targets
    assert targets.max_params == ["0.8", "0.7"] and targets.max_drop is None
    assert cli.run(["search", str(tmp_path / "run"), "--evaluations", "20"]) == 0
    assert Run(tmp_path / "run").recipe().targets == targets


def test_genes_that_seldom_fall_as_large_as_what_is_trained(tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path / "model", num_hidden_layers=24)
    given = {"model": str(model), "targets.max_params": "0.9", "device": "cpu"}
    job = Job(Run(tmp_path), read_recipe(None, given), weights=False)
    range_ = training_range(job)
    drawn = [job.structure.parameters(range_.uniform(np.random.default_rng(seed))) for seed in range(3)]
    assert min(drawn) > 0.97 * range_.sizes[0]


def test_workers_share_the_cores(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made.run, tmp_path / "run")
    (tmp_path / "run" / "search").mkdir()
    monkeypatch.setattr("compressor.job.available_cores", lambda: 5)
    asked: list[int] = []

    def tune(lm: Any, spans: Any, cores: int) -> None:
        asked.append(cores)
        lm.set_workers(cores, cores)

    monkeypatch.setattr("evals.scoring.lm.NetworkLM.tune", tune)
    threads = torch.get_num_threads()
    try:
        recipe = Run(tmp_path / "run").recipe().model_dump() | {"batch_tokens": 512}
        recipe["searching"]["workers"] = 2
        made_base = Job(Run(tmp_path / "run"), Run(tmp_path / "run").recipe()).structure.base
        for _ in range(2):
            _, scorer = subnets.open_scorer(tmp_path / "run", recipe).open(made_base)
            assert scorer.lm.workers == 2 and torch.get_num_threads() == 1
        job = Job(Run(tmp_path / "run"), read_recipe(tmp_path / "run" / "recipe.yaml", {}))
        assert job.scorer(job.load_base()).lm.workers == 5
        assert asked == [2, 5]  # found out once for each share of the cores
        _, scorer = subnets.open_scorer(tmp_path / "run", recipe).open(made_base)
        assert scorer.lm.workers == 2 and asked == [2, 5]
    finally:
        torch.set_num_threads(threads)


def test_timings_of_elsewhere_do_not_stay(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made.run, tmp_path / "run")
    here = SpeedTable.load(made.run / "speed.json")
    monkeypatch.setattr(SpeedTable, "measure", lambda *_, **__: here)
    replace(here, device="elsewhere").save(tmp_path / "elsewhere.json")

    def table(named: str | None) -> SpeedTable:
        return speed_table(pipeline.resume(tmp_path / "run", {"speed_table": named}), lambda: None)

    assert table(str(tmp_path / "elsewhere.json")).device == "elsewhere"
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(f"speed_table: {tmp_path / 'elsewhere.json'}", "speed_table: null"))
    assert table(None) == here == SpeedTable.load(tmp_path / "run" / "speed.json")


def test_scores_of_another_precision_are_not_taken_for_these(made: Made) -> None:
    recipe = Run(made.run).recipe()
    recipe.searching.objectives.append("held_out_loss")
    keys = score_keys(Job(Run(made.run), recipe), "full")
    assert keys["tiny_choice"].name == "tiny_choice:acc,none" and keys["held_out_loss"].name == "held_out_loss"
    half = score_keys(Job(Run(made.run), recipe.model_copy(update={"dtype": "bfloat16"})), "full")
    assert not {key.place for key in keys.values()} & {key.place for key in half.values()}


def test_what_losses_are_measured_on_is_not_trained_on(made: Made) -> None:
    job = Job(Run(made.run), Run(made.run).recipe())
    training, _ = training_blocks(job, 0).split()  # as the fine-tuning splits
    trained = {tuple(row) for row in training[:].ids.tolist()}
    measured_on = [tuple(block.ids[0].tolist()) for block in HeldOut(job).blocks]
    assert len(measured_on) == 16 and not trained.intersection(measured_on)


@pytest.mark.parametrize(
    ("score", "stderr", "n", "expected"),
    [
        (0.4, 0.1, 20, 0.1),
        (0.0, 0.0, 18, (0.05 * 0.95 / 20) ** 0.5),  # 1 of 20 after one more of each
        (1.0, None, 8, (0.9 * 0.1 / 10) ** 0.5),
        (31.5, None, 8, 0.0),
    ],
)
def test_few_documents_are_no_certainty(score: float, stderr: float | None, n: int, expected: float) -> None:
    measured = Score(metric="acc", value=score, stderr=stderr, n=n, split="search")
    assert measured.uncertainty == pytest.approx(expected)


def test_held_out_loss_decides_where_tasks_cannot(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made.search(tmp_path / "run")
    job = pipeline.resume(tmp_path / "run", {})
    evaluations = measured(job)
    assert all(0 < e.values["quality_stderr"] < 0.3 for e in evaluations)
    target = Target(max_params=job.structure.parameters(job.structure.base))
    noisy = [replace(e, values=e.values | {"quality_stderr": 10.0}) for e in evaluations]
    chosen = choose(job, noisy, target).architecture
    # All were measured on few blocks, the best of them on all: by these the choice is made.
    weights, sizes = searched_weights(job), (FIRST_BLOCKS, HELD_OUT_BLOCKS)
    keys = {blocks: held_out_keys(job, ["held_out_loss"], blocks)["held_out_loss"] for blocks in sizes}
    assert len(noisy) > FINALISTS
    with EvaluationStore(job.run.evaluations) as store:
        losses = {
            blocks: {
                e.architecture: score.value
                for e in noisy
                if (score := store.get(e.architecture, weights, keys[blocks])) is not None
            }
            for blocks in sizes
        }
    finalists = sorted(losses[FIRST_BLOCKS], key=lambda a: losses[FIRST_BLOCKS][a])[:FINALISTS]
    assert len(losses[FIRST_BLOCKS]) == len(noisy) and set(losses[HELD_OUT_BLOCKS]) >= set(finalists)
    assert len(losses[HELD_OUT_BLOCKS]) <= 2 * FINALISTS  # the fastest of those as good are measured too
    assert chosen == min(losses[HELD_OUT_BLOCKS], key=lambda a: losses[HELD_OUT_BLOCKS][a])
    supernet = job.load_supernet()
    supernet.activate(chosen)
    held_out = training_blocks(job, 0).split()[1].part(0, HELD_OUT_BLOCKS)
    alone = held_out_loss(supernet.model, held_out, 1, job.device)
    assert losses[HELD_OUT_BLOCKS][chosen] == pytest.approx(alone, rel=0.02)  # blocks weigh alike there, tokens here
    monkeypatch.setattr(subnets, "HeldOut", None)  # everything is known by now
    assert choose(job, noisy, target).architecture == chosen
    clear = [replace(e, values=e.values | {"quality_stderr": 0.0}) for e in evaluations]
    assert choose(job, clear, target).values["quality"] == max(e.values["quality"] for e in evaluations)


def test_a_space_without_sizes_of_single_layers_is_searched_without_proposals(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.run, tmp_path / "run")
    given = {"space": {"ffn": [16, 32, 64]}, "searching.warm_start": "blockwise"}
    assert proposals(pipeline.resume(tmp_path / "run", given)) == []


def asked_for(model: Path, formats: list[str], evaluations: int, *sizes: str) -> Job:
    """A job on a checkpoint, before anything of it is done."""
    given = {"model": str(model), "formats": formats, "targets.max_params": list(sizes)}
    return Job(Run(model / "run"), read_recipe(None, {**given, "searching.evaluations": evaluations}).resolved())


def test_networks_whose_layers_are_alike_are_measured_of_every_size_asked_for(tmp_path: Path) -> None:
    job = asked_for(tiny.checkpoint(tmp_path / "model"), ["uneven", "uniform"], 3, "0.9", "0.6", "0.5")
    first, *_ = uniform_architectures(job)
    parameters = job.structure.parameters(first)  # the base, the smallest and this are all that three evaluations see
    assert parameters <= 0.5 * job.structure.parameters(job.structure.base)
    for share in (0.9, 0.6):
        most = share * job.structure.parameters(job.structure.base)
        assert any(parameters < job.structure.parameters(a) <= most for a in uniform_architectures(job))
    check_uniform(job)


def test_a_search_that_could_measure_nothing_for_uniform_is_refused(tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path / "model")
    check_uniform(asked_for(model, ["uneven"], 2, "0.75"))
    with pytest.raises(RequestError, match="--evaluations: --format uniform needs 3"):
        check_uniform(asked_for(model, ["uneven", "uniform"], 2, "0.75"))
    job = asked_for(model, ["uneven", "uniform"], 8, "0.35")
    smallest = job.structure.parameters(job.space.smallest())
    assert smallest < 0.35 * job.structure.parameters(job.structure.base)  # which is no reason to refuse the size
    with pytest.raises(RequestError, match=r"--format uniform: no network of this space of at most .* are alike; ask"):
        check_uniform(job)
    config = CONFIGS["gemma2"]()
    config.query_pre_attn_scalar = 2 * head_dim(config)
    job = asked_for(model, ["uneven", "uniform", "gguf"], 8)
    job.checkpoint = SimpleNamespace(config=config, structure=describe(config))
    with pytest.raises(
        RequestError, match=r"--format gguf: of networks whose layers are alike, .* have a query_pre_attn_scalar"
    ):
        check_uniform(job)
