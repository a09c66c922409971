"""A run by the clock: what stages cost, budgets that fit a time, what a run that goes on keeps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig

from compressor import memory_needs, pipeline, rates
from compressor.checks import check, check_budgets
from compressor.cli import run
from compressor.costs import COSTS, stage_costs
from compressor.generated import repeated
from compressor.job import Job
from compressor.plan import (
    FEWEST,
    MOST,
    MOSTLY,
    STEPS,
    WORTH_TRAINING,
    WORTHWHILE,
    adjust,
    expected_of,
    fit,
    is_settled,
    largest,
    make_plan,
    open_budgets,
    put,
    read_plan,
    share_of_rates,
    two_digits,
    write_plan,
)
from compressor.rates import Rates
from compressor.recipe import BUDGETS, OPEN
from compressor.recipe_file import read_recipe
from compressor.run import Run
from compressor.schedule import STAGES, Schedule
from export.quantization.cost import step_seconds
from supernet.common.errors import RequestError
from supernet.training.accelerator import make_accelerator
from supernet.training.muon import operations
from tests.support import tiny
from tests.support.tiny_families import CONFIGS, tiny_network

RATES = Rates(load=0.5, read=1e-4, teach=1e-4, train=3e-4, step=1e-3, decode=1e-3, rounding=1e-3)
"""Rates of an imagined machine, so that nothing here depends on how fast this one is."""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("plan")
    return {
        "model": str(tiny.checkpoint(folder / "model")),
        "data": str(tiny.data(folder / "data.jsonl", 300)),
        "tasks": "tiny_choice",
        "include_path": str(tiny.task(folder / "tasks", documents=60)),
        "targets.max_params": "0.8",
        "quantizing.schemes": "int8,int4",
        "finetuning.sequence_length": 32,
        "device": "cpu",
    }


@pytest.fixture
def imagined(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The imagined machine in place of this one; holds one entry for each time that it was measured."""
    asked: list[int] = []

    def measured(job: Job) -> Rates:
        asked.append(1)
        return RATES

    monkeypatch.setattr("compressor.plan.measure_rates", measured)
    yield asked


def job_of(given: dict[str, Any], folder: Path, **changes: Any) -> Job:
    recipe = read_recipe(None, given | changes)
    return Job(Run(folder), recipe.resolved())


def seconds(job: Job) -> float:
    return sum(cost.seconds for cost in stage_costs(job, RATES))


def test_every_stage_has_a_cost(given: dict[str, Any], tmp_path: Path) -> None:
    assert tuple(COSTS) == STAGES
    job = job_of(given, tmp_path)
    rows = stage_costs(job, RATES)
    assert [row.name for row in rows] == [name for name in STAGES if not name.startswith("writing")]
    written = given | {"data": "generated", "finetuning.tokens": 10**4, "healing.tokens": 10**6}
    assert [row.name for row in stage_costs(job_of(written, tmp_path), RATES)] == list(STAGES)
    assert all(row.memory > 0 for row in rows)
    without = stage_costs(job_of(given | {"quantizing.schemes": ""}, tmp_path), RATES)
    (rounding,) = [row for row in without if row.name == "quantizing"]
    assert rounding.budget == "of the base"  # which stands in every table in few bits
    assert rounding.seconds < next(row.seconds for row in rows if row.name == "quantizing")
    as_it_is = stage_costs(job_of(given | {"finetuning.tokens": 0}, tmp_path), RATES)
    assert "fine-tuning" not in [row.name for row in as_it_is]
    assert sum(row.disk for row in as_it_is) == sum(row.disk for row in rows)  # the base is stored as it is


def test_costs_follow_the_budgets(given: dict[str, Any], tmp_path: Path) -> None:
    """A token of healing costs a teacher's pass over it and the student's steps: counted by hand."""
    one, two = (
        {row.name: row.seconds for row in stage_costs(job_of(given, tmp_path, **{"healing.tokens": n}), RATES)}
        for n in (128_000, 256_000)
    )
    batch = 16 * 32  # tokens in a step of `standard`
    share = 0.8
    assert two["healing"] - one["healing"] == pytest.approx(
        128_000 * (1e-4 + share * 3e-4) + share * 1e-3 * 128_000 / batch, rel=1e-6
    )
    del one["healing"], two["healing"]
    assert one == two


def test_scoring_costs_what_is_read(given: dict[str, Any], tmp_path: Path) -> None:
    """The tokens of the tasks' own documents, each shared prefix once."""
    job = job_of(given, tmp_path, **{"searching.limit": 5})
    spans = {span.tokens[:-1] for span in job.tasks.requests("search", 5).spans}
    prefixes = {tokens[: i + 1] for tokens in spans for i in range(len(tokens))}
    assert job.tasks.tokens("search", 5) == (len(prefixes), 0)


@pytest.mark.parametrize("time", ["3m", "20m", "3h"])
def test_budgets_fit_the_time(given: dict[str, Any], tmp_path: Path, time: str) -> None:
    job = job_of(given, tmp_path, time=time)
    fit(job, RATES, list(OPEN), strict=True)
    limit = {"3m": 180, "20m": 1200, "3h": 10800}[time]
    assert 0.85 * limit < seconds(job) <= limit
    for name in OPEN:
        value = job.recipe.budget(name)
        assert value is not None and FEWEST[name] <= value <= MOST.get(name, 10**12)
        assert job.given.budget(name) == value  # what stands in recipe.yaml is what is done


def test_more_time_buys_no_less_of_anything(given: dict[str, Any], tmp_path: Path) -> None:
    job = job_of(given, tmp_path, time="3m")
    before = dict.fromkeys(OPEN, 0)
    for time in ("3m", "6m", "15m", "1h"):
        job.recipe.time = time
        fit(job, RATES, list(OPEN), strict=True)
        now = {name: job.recipe.budget(name) or 0 for name in OPEN}
        assert all(now[name] >= before[name] for name in OPEN), (before, now)
        before = now


def test_rounding_is_tuned_for_enough_steps_or_none(given: dict[str, Any], tmp_path: Path) -> None:
    """With few steps AutoRound loses more than GPTQ, which takes none."""
    slow, steps = RATES.model_copy(update={"rounding": 0.2}), set()
    for minutes in range(8, 40, 2):
        job = job_of(given, tmp_path, time=f"{minutes}m")
        fit(job, slow, list(OPEN), strict=True)
        steps.add(job.recipe.quantizing.iterations or 0)
    assert 0 in steps and max(steps) > 40 and all(n == 0 or n >= WORTHWHILE["rounding"] for n in steps)


def test_few_tokens_all_heal(given: dict[str, Any], tmp_path: Path) -> None:
    """Fine-tuning pays from some tokens for each parameter on (docs/time.md)."""
    job = job_of(given, tmp_path, time="3h")
    fit(job, RATES, list(OPEN), strict=True)
    assert job.recipe.finetuning.tokens and job.recipe.finetuning.tokens < (job.recipe.healing.tokens or 0)
    slow = Rates(**{name: value * (5000 if name in ("train", "teach") else 1) for name, value in RATES})
    job = job_of(given, tmp_path, time="3h")
    fit(job, slow, list(OPEN), strict=False)
    tokens = job.recipe.healing.tokens or 0
    assert job.recipe.finetuning.tokens == 0
    assert tokens < WORTH_TRAINING * job.structure.parameters(job.structure.base)


@pytest.mark.parametrize("step", [1e-3, 1.0])
def test_the_batch_is_the_largest_that_leaves_enough_steps_and_more_tokens_are_read_in_it(
    given: dict[str, Any], tmp_path: Path, step: float
) -> None:
    """Steps that cost a second each (Muon's products on a wide network) are worth larger batches."""
    here = RATES.model_copy(update={"step": step})
    tokens = {}
    for batch in (None, 4, 8, 16, 32):
        own = {} if batch is None else {"finetuning.batch_size": batch}
        job = job_of(given, tmp_path, time="40m", **own)
        fit(job, here, [name for name in OPEN if batch is None or name != "batch"], strict=True)
        tokens[batch] = max(job.recipe.finetuning.tokens or 0, job.recipe.healing.tokens or 0)
        if batch is None:
            chosen = job.recipe.finetuning.batch_size
            assert chosen in (8, 16, 32) and tokens[None] >= STEPS * job.length * chosen
    assert tokens[None] == tokens[chosen]
    assert all(tokens[other] < STEPS * job.length * other for other in (8, 16, 32) if other > chosen)
    assert all(tokens[other] <= tokens[chosen] for other in (4, 8, 16) if other < chosen)


def test_what_the_user_set_stays(given: dict[str, Any], tmp_path: Path) -> None:
    recipe = read_recipe(None, given | {"time": "20m", "healing.tokens": 5000, "searching.limit": 30})
    assert set(open_budgets(recipe)) == set(OPEN) - {"heal_tokens", "limit"}
    job = Job(Run(tmp_path), recipe.resolved())
    fit(job, RATES, open_budgets(recipe), strict=True)
    assert (job.recipe.healing.tokens, job.recipe.searching.limit) == (5000, 30)


def test_too_short_a_time_is_refused(given: dict[str, Any], tmp_path: Path, imagined: list[int]) -> None:
    recipe = read_recipe(None, given | {"time": "20s"})
    with pytest.raises(RequestError, match=r"--time 20s: .* takes .*(min|s) here .*; ask for .* or more"):
        pipeline.start(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("time", ["", "3", "h", "3x", "-1h", "0m", "1h 3", "three hours"])
def test_times_that_are_none(given: dict[str, Any], time: str) -> None:
    with pytest.raises(RequestError, match=r"'time': .*write for example 3h, 90m or 1h30m"):
        read_recipe(None, given | {"time": time})


def test_a_run_that_goes_on_keeps_its_budgets(given: dict[str, Any], tmp_path: Path, imagined: list[int]) -> None:
    recipe = read_recipe(None, given | {"time": "20m"})
    first = pipeline.start(recipe, tmp_path / "run")
    budgets = {name: first.recipe.budget(name) for name in OPEN}
    assert read_recipe(tmp_path / "run" / "recipe.yaml", {}).healing.tokens == budgets["heal_tokens"]
    again = pipeline.start(recipe, tmp_path / "run")
    assert {name: again.recipe.budget(name) for name in OPEN} == budgets
    assert len(imagined) == 1
    # Another time: what has not begun is chosen anew, with the rates that are known.
    later = pipeline.start(read_recipe(None, given | {"time": "1h"}), tmp_path / "run")
    assert (later.recipe.healing.tokens or 0) > (budgets["heal_tokens"] or 0)
    assert len(imagined) == 1


@pytest.mark.parametrize(("taken", "slower"), [(2.0, 2.0), (0.5, 1.0)])
def test_a_late_search_slows_what_comes_after_it(
    given: dict[str, Any], tmp_path: Path, imagined: list[int], taken: float, slower: float
) -> None:
    """A search that took twice as long leaves less healing; one that was faster leaves its rate as it was measured."""
    job = pipeline.start(read_recipe(None, given | {"time": "20m"}), tmp_path / "run")
    plan = read_plan(job.run.plan_file)
    assert plan is not None and share_of_rates(job, plan.rates, "search", ["read"]) > MOSTLY
    with job.schedule.stage("search"):
        pass
    job.schedule.add("search", taken * plan.expected["search"], ended=True)
    adjust(job)
    after = read_plan(job.run.plan_file)
    assert after is not None and after.rates.read == pytest.approx(taken * plan.rates.read, rel=1e-2)
    for name in ("teach", "train", "step", "rounding", "decode"):
        assert getattr(after.rates, name) == pytest.approx(slower * getattr(plan.rates, name), rel=1e-2)


def test_late_healing_leaves_less_rounding(given: dict[str, Any], tmp_path: Path, imagined: list[int]) -> None:
    """All picks are healed before the first is rounded, so what healing took decides how long the rounding is tuned."""
    slow = RATES.model_copy(update={"rounding": 0.05})
    job = pipeline.start(read_recipe(None, given | {"time": "20m"}), tmp_path / "run")
    plan = read_plan(job.run.plan_file)
    assert plan is not None
    write_plan(job, plan.model_copy(update={"rates": slow}))
    put(job, {"rounding": 150})
    late = 3 * plan.expected["healing"]
    with job.schedule.stage("healing"):
        pass
    job.schedule.add("healing", late, ended=True)
    job.schedule.began -= 1100
    heal = job.recipe.healing.tokens
    assert adjust(job)
    assert (job.recipe.quantizing.iterations or 0) < 100 and job.recipe.healing.tokens == heal
    with job.schedule.stage("quantizing"):
        pass
    assert is_settled(job, "rounding")


def test_a_longer_time_calibrates_on_more(given: dict[str, Any], tmp_path: Path) -> None:
    """Where projections are refitted, between the least and the most; what the user set stays."""
    slow = RATES.model_copy(update={"teach": 5e-3, "train": 15e-3})
    found = []
    for number, time in enumerate(("20m", "3h")):
        job = job_of(given, tmp_path / str(number), time=time, **{"repair.enabled": True})
        fit(job, slow, list(OPEN), strict=False)
        found.append(job.recipe.repair.tokens or 0)
    assert FEWEST["calibration"] * 0.9 < found[0] < found[1] <= MOST["calibration"]
    job = job_of(given, tmp_path / "own", time="3h", **{"repair.enabled": True, "repair.tokens": 5000})
    fit(job, slow, [name for name in OPEN if name != "calibration"], strict=False)
    assert job.recipe.repair.tokens == 5000
    with job.schedule.stage("proposals"):
        pass
    assert is_settled(job, "calibration")  # which moments were gathered on by then
    healed = job_of(given, tmp_path / "healed", time="10h")  # on more than a hundredth of the parameters
    fit(healed, RATES, list(OPEN), strict=True)
    assert not healed.repairs and healed.recipe.repair.tokens == BUDGETS["standard"].calibration


def test_a_plan_that_knew_fewer_budgets_goes_on(given: dict[str, Any], tmp_path: Path, imagined: list[int]) -> None:
    """Its run was calibrated on what was the default then, and stays so."""
    recipe = read_recipe(None, given | {"time": "20m"})
    job = pipeline.start(recipe, tmp_path / "run")
    plan = read_plan(job.run.plan_file)
    assert plan is not None
    budgets = {name: value for name, value in plan.budgets.items() if name != "calibration"}
    open_ = [name for name in plan.open if name != "calibration"]
    write_plan(job, plan.model_copy(update={"budgets": budgets, "open": open_}))
    again = pipeline.start(recipe, tmp_path / "run")
    assert {name: again.recipe.budget(name) for name in budgets} == budgets
    assert again.recipe.repair.tokens == BUDGETS["standard"].calibration and len(imagined) == 1


def test_sequences_are_no_longer_than_the_context_and_it_is_said(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, long = (job_of(given, tmp_path, **{"finetuning.sequence_length": n}) for n in (10**6, 10**7))
    assert job.length < 10**6 and memory_needs.expected_memory(job) == memory_needs.expected_memory(long)
    check(job)
    assert f"{job.length:,} tokens are read at once" in capsys.readouterr().err


def test_how_often_text_is_read_is_said_of_the_budgets_by_the_time(
    given: dict[str, Any], tmp_path: Path, imagined: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = read_recipe(None, given | {"time": "20m", "data": "generated:5k"})
    job = pipeline.start(recipe, tmp_path / "run")
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "generated:5k: " in line)
    assert line == f"--data generated:5k: {repeated(job)}"


def test_budgets_follow_what_stages_took(given: dict[str, Any], tmp_path: Path, imagined: list[int]) -> None:
    """A fine-tuning that took three times as long leaves less healing; what has begun keeps its budget."""
    recipe = read_recipe(None, given | {"time": "20m"})
    job = pipeline.start(recipe, tmp_path / "run")
    plan = read_plan(job.run.plan_file)
    assert plan is not None
    heal, train = job.recipe.healing.tokens or 0, job.recipe.finetuning.tokens
    late = 3 * plan.expected["fine-tuning"]
    with job.schedule.stage("fine-tuning"):
        pass
    job.schedule.add("fine-tuning", late, ended=True)
    job.schedule.began -= late
    assert adjust(job)
    assert job.recipe.finetuning.tokens == train
    assert 0 < (job.recipe.healing.tokens or 0) < heal / 2
    after = read_plan(job.run.plan_file)
    assert after is not None and after.rates.train == pytest.approx(3 * plan.rates.train, rel=1e-3)
    left = sum(row.seconds for row in stage_costs(job, after.rates) if not job.schedule.over(row.name))
    assert job.schedule.elapsed + left <= 1200
    assert not adjust(job)  # no stage ended since


def test_text_to_heal_on_is_written_when_it_is_known_how_much(
    given: dict[str, Any], tmp_path: Path, imagined: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first text took says what more of it will take; how much that is follows from the time that is left."""
    job = pipeline.start(
        read_recipe(None, given | {"data": "generated", "time": "20m", "finetuning.tokens": 0}), tmp_path
    )
    plan = read_plan(job.run.plan_file)
    assert plan is not None and plan.expected["writing more text"] > plan.expected["writing text"]
    heal = job.recipe.healing.tokens or 0
    late = 2 * plan.expected["writing text"]
    with job.schedule.stage("writing text"):
        pass
    with job.schedule.stage("ordering"):
        pass
    job.schedule.add("writing text", late, ended=True)
    job.schedule.add("ordering", 2 * plan.expected["ordering"], ended=True)
    with monkeypatch.context() as patched:  # as if it were nearly all passes over text: they explain what writing took
        patched.setattr("compressor.plan.MOSTLY", 0.0)
        assert adjust(job)
    after = read_plan(job.run.plan_file)
    assert after is not None and after.rates.teach > plan.rates.teach
    explained = expected_of(job, plan.rates.times(teach=after.rates.teach / plan.rates.teach), "writing text")
    assert after.rates.write == pytest.approx(late / explained, rel=0.2) and after.rates.write < 2
    write_plan(job, plan)
    put(job, {"heal_tokens": heal})
    job.schedule.newly_done()
    job.schedule.times.clear()
    with job.schedule.stage("writing text"):
        pass
    job.schedule.add("writing text", late, ended=True)
    assert adjust(job)
    after = read_plan(job.run.plan_file)
    assert after is not None and after.rates.write == pytest.approx(2.0, rel=0.2)  # and what this machine adds
    assert 0 < (job.recipe.healing.tokens or 0) < heal
    with job.schedule.stage("picking"):
        pass
    job.schedule.began -= 600  # what is left is for the end alone
    assert adjust(job) and (job.recipe.healing.tokens or 0) < heal / 2
    assert not is_settled(job, "heal_tokens")
    with pytest.raises(KeyboardInterrupt), job.schedule.stage("writing more text"):
        raise KeyboardInterrupt
    assert is_settled(job, "heal_tokens")  # so that what goes on writes the same text


def test_a_stage_that_is_hardly_made_of_a_rate_says_nothing_of_it(
    given: dict[str, Any], tmp_path: Path, imagined: list[int]
) -> None:
    """Ordering is mostly loading here, so that it took long makes no pass over text dearer."""
    job = pipeline.start(read_recipe(None, given | {"time": "20m"}), tmp_path / "run")
    plan = read_plan(job.run.plan_file)
    assert plan is not None and share_of_rates(job, plan.rates, "ordering", ["teach"]) < 0.5
    assert share_of_rates(job, plan.rates, "fine-tuning", ["train", "teach"]) > MOSTLY
    with job.schedule.stage("ordering"):
        pass
    job.schedule.add("ordering", 3 * plan.expected["ordering"], ended=True)
    adjust(job)
    after = read_plan(job.run.plan_file)
    assert after is not None and after.rates == plan.rates


def test_what_was_begun_keeps_its_budget(given: dict[str, Any], tmp_path: Path, imagined: list[int]) -> None:
    """A run that was killed while it healed, and one whose base is searched as it is, go on with what they had."""
    recipe = read_recipe(None, given | {"time": "20m"})
    job = pipeline.start(recipe, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt), job.schedule.stage("healing"):
        raise KeyboardInterrupt
    again = pipeline.start(recipe, tmp_path / "run")
    heal = again.recipe.healing.tokens
    again.schedule.began -= 600
    with again.schedule.stage("picking"):
        pass
    adjust(again)
    assert again.recipe.healing.tokens == heal
    fresh = pipeline.start(recipe, tmp_path / "other")
    fresh.run.supernet.mkdir()
    (fresh.run.supernet / "manifest.json").write_text("{}")
    assert is_settled(fresh, "train_tokens") and not is_settled(fresh, "heal_tokens")


def test_a_plan_alone_leaves_nothing_behind(
    given: dict[str, Any], tmp_path: Path, imagined: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compress", given["model"], "--data", given["data"], "--tasks", "tiny_choice", "--max-params", "0.8"]
    command += ["--include-path", given["include_path"], "--time", "20m", "--plan", "--output", str(tmp_path / "run")]
    assert run([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert list(tmp_path.iterdir()) == []
    assert [row["name"] for row in shown["stages"]] == [name for name in STAGES if not name.startswith("writing")]
    assert shown["seconds"] <= 1200 and shown["budgets"]["heal_tokens"] > 0
    assert all(name in err for name in ("fine-tuning", "proving", "memory", "disk"))


def test_an_optimizer_that_multiplies_matrices_costs_time_and_less_memory(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "matrix_rate", lambda *_: 1e6)
    monkeypatch.setattr(rates, "copy_rate", lambda *_: 1e9)
    muon, adamw = (job_of(given, tmp_path / name, **{"finetuning.optimizer": name}) for name in ("muon", "adamw"))
    structure = muon.structure
    shapes = [structure.shape(t, structure.base) or () for t in structure.tensors if t.layer is not None]
    matrices = [shape for shape in shapes if len(shape) == 2]
    slower = sum(operations(shape) for shape in matrices) / 1e6
    assert rates.estimate_rates(muon).step == pytest.approx(rates.estimate_rates(adamw).step + slower)
    less = memory_needs.expected_memory(adamw)["fine-tuning"] - memory_needs.expected_memory(muon)["fine-tuning"]
    assert less == 4 * sum(rows * columns for rows, columns in matrices) > 0


def test_a_batch_is_one_that_a_gpu_has_memory_for(
    given: dict[str, Any], tmp_path: Path, imagined: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = read_recipe(None, given | {"time": "10h"})
    job = job_of(given, tmp_path / "one", time="10h")
    make_plan(job, asked)
    batch = job.recipe.finetuning.batch_size
    assert batch is not None and batch > 4

    def missing(job: Job) -> dict[str, tuple[float, int]]:
        return {"healing": (2.0, 1)} if (job.recipe.finetuning.batch_size or 0) > 4 else {}

    monkeypatch.setattr("compressor.plan.without_room", missing)
    smaller = job_of(given, tmp_path / "two", time="10h")
    make_plan(smaller, asked)
    assert smaller.recipe.finetuning.batch_size == 4 and (smaller.recipe.healing.tokens or 0) > 0


def test_training_that_a_gpu_has_no_memory_for_is_refused(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(given, tmp_path, **{"finetuning.tokens": 0, "healing.tokens": 1000})
    assert memory_needs.without_room(job) == {}
    monkeypatch.setattr(Job, "device", torch.device("cuda"))
    monkeypatch.setattr(memory_needs, "logits_at_once", lambda _: 2**25)
    for free, found in ((10**12, []), (10, ["healing"])):
        monkeypatch.setattr(memory_needs, "free_bytes", lambda _, free=free: free)
        assert list(memory_needs.without_room(job)) == found
    with pytest.raises(RequestError, match=r"healing takes about .*, this GPU has 10 B free: leave it out"):
        check_budgets(job)


def test_measured_rates_are_of_this_network(given: dict[str, Any], tmp_path: Path) -> None:
    measured = rates.measure_rates(job_of(given, tmp_path))
    assert all(value > 0 for _, value in measured)
    assert rates.measure_rates(job_of(given | {"quantizing.schemes": ""}, tmp_path)).rounding == 0


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_can_be_measured(family: str) -> None:
    """Its weights hold no gradients: a large network would not fit four times."""
    network = tiny_network(family)
    teach, train = rates.training_rates(network, make_accelerator("cpu", "float32"), 16, 2)
    assert 0 < teach < train and rates.decoding_rate(network, 16) > 0
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    if family not in ("gpt2", "mixtral", "qwen3_moe"):  # refused before: their weights are not in linear layers
        assert step_seconds(network, 16, 2) > 0


def test_a_network_without_biases_and_norms_can_be_measured() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = OPTConfig(**sizes, max_position_embeddings=32, enable_bias=False, layer_norm_elementwise_affine=False)
    network = AutoModelForCausalLM.from_config(config)
    assert all(parameter.ndim == 2 for parameter in network.parameters())
    teach, train = rates.training_rates(network, make_accelerator("cpu", "float32"), 16, 2)
    assert 0 < teach < train


def test_a_run_that_is_done_has_no_plan_left(
    given: dict[str, Any], tmp_path: Path, imagined: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    job = pipeline.start(read_recipe(None, given | {"time": "20m"}), tmp_path / "run")
    pipeline.show_plan(job)
    assert "proving" in capsys.readouterr().err
    job.schedule.add("search", 1.0, ended=True)
    pipeline.show_plan(job)
    shown = capsys.readouterr().err
    assert "healing" in shown and "ordering" not in shown
    job.schedule.add("proving", 1.0, ended=True)
    pipeline.show_plan(job)
    assert capsys.readouterr().err == ""


def test_rates_are_measured_again_where_they_do_not_hold(
    given: dict[str, Any], tmp_path: Path, imagined: list[int]
) -> None:
    """On another device, and where something is to be rounded that was not."""
    asked = read_recipe(None, given | {"time": "20m"})
    job = job_of(given, tmp_path, time="20m")
    write_plan(job, make_plan(job, asked))
    make_plan(job, asked)
    assert len(imagined) == 1
    kept = json.loads(job.run.plan_file.read_text())
    for changed in ({"made_on": "cuda, torch.bfloat16"}, {"rates": kept["rates"] | {"rounding": 0.0}}):
        job.run.plan_file.write_text(json.dumps(kept | changed))
        before = len(imagined)
        assert make_plan(job, asked).rates == RATES
        assert len(imagined) == before + 1


def test_a_damaged_plan_is_named(given: dict[str, Any], tmp_path: Path, imagined: list[int]) -> None:
    job = job_of(given, tmp_path, time="20m")
    write_plan(job, make_plan(job, read_recipe(None, given | {"time": "20m"})))
    job.run.plan_file.write_text("{}")
    with pytest.raises(RequestError, match=r"plan\.json: not what this version writes; remove it"):
        read_plan(job.run.plan_file)


def test_schedule_counts_down(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    schedule = Schedule(tmp_path / "times.json")
    assert schedule.left() is None
    schedule.expected = {"ordering": 5.0, "search": 10.0, "healing": 20.0, "quantizing": 4.0, "proving": 1.0}
    assert schedule.left() == 40.0
    with schedule.stage("ordering"), schedule.stage("search"):  # within another it counts as that
        pass
    assert set(schedule.times) == {"ordering"} and schedule.left() == 35.0
    with pytest.raises(ZeroDivisionError), schedule.stage("search"):
        raise ZeroDivisionError
    assert not schedule.over("search")
    with schedule.stage("search"):
        pass
    left = schedule.left()
    assert left is not None and 24.9 < left <= 25.0
    with schedule.stage("healing"):
        pass
    assert schedule.over("healing") and schedule.left() == 5.0
    again = Schedule(tmp_path / "times.json")
    assert again.over("healing") and not again.over("quantizing")
    with again.stage("proving"):
        pass
    assert again.over("quantizing")
    again.expected = schedule.expected
    assert again.left() == 0.0
    for error, stands in ((RequestError, True), (ZeroDivisionError, False)):  # what is refused undoes nothing
        with pytest.raises(error), again.stage("proving"):
            raise error
        assert again.times["proving"].ended is stands
    with again.stage("proving"):
        pass
    done = Schedule(tmp_path / "times.json")
    done.expected = schedule.expected
    assert done.left() is None  # all of it was done before
    done.redo("quantizing")
    assert set(done.times) == {"ordering", "search", "healing"} and done.left() == 5.0


def test_a_stage_that_goes_on_has_a_headline_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").touch()
    first = Schedule(tmp_path / "times.json")
    first.expected = {"ordering": 5.0, "search": 10.0}
    with first.stage("ordering"):
        pass
    with pytest.raises(ZeroDivisionError), first.stage("search"):
        raise ZeroDivisionError
    again = Schedule(tmp_path / "times.json")
    again.expected = first.expected
    for name in ("ordering", "search", "search"):
        with again.stage(name):
            pass
    said = [line.split(";")[0] for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert said == ["[1 of 2] ordering", "[2 of 2] search", "[2 of 2] search goes on"]


def test_largest() -> None:
    asked: list[int] = []

    def square(n: int) -> float:
        asked.append(n)
        return n * n

    assert largest(square, 50, 0, 100) == 7 == asked[-1]
    assert largest(square, -1, 3, 100) == 3
    assert [two_digits(n) for n in (0, 7, 99, 123, 98765)] == [0, 7, 99, 120, 98000]


def test_a_whole_run_by_the_clock(given: dict[str, Any], tmp_path: Path, imagined: list[int]) -> None:
    """Its recipe names every budget, so that it gives the same run without a clock."""
    recipe = read_recipe(None, given | {"time": "120s", "quantizing.schemes": ""})
    pipeline.compress(recipe, tmp_path / "run")
    resolved = read_recipe(tmp_path / "run" / "recipe.yaml", {})
    assert not open_budgets(resolved)
    times = json.loads((tmp_path / "run" / "times.json").read_text())
    assert list(times) == [name for name in STAGES if not name.startswith("writing")]
    assert all(row["ended"] for row in times.values())
    shutil.rmtree(tmp_path / "run" / "packages")
    pipeline.compress(resolved, tmp_path / "run")  # nothing is searched again
