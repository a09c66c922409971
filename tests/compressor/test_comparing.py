"""The comparison with other methods: statistics by hand, then the whole command on a tiny run."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.metrics import mean
from rich.console import Console

from compressor import pipeline
from compressor.cli import run
from compressor.run import Run
from compressor.stages import comparing, comparison_rows
from compressor.stages.comparison_methods import methods
from evals.comparison import paired_interval, resampled, score_intervals, text_qualities
from evals.quality import QualityScale
from evals.speed.measured import Speed
from export.report.comparison import summarize, summary, terminal_table
from export.report.schema import Comparison, Difference
from search.scores import Score
from supernet.common.errors import RequestError
from supernet.common.files import read_json, write_json
from tests.support import report_helpers, tiny


class Task:
    """As much of a scored task as a bootstrap needs: one subtask, whose score is the mean."""

    higher_is_better = True
    metric = "acc"

    def __init__(self, aggregation: Any = mean, name: str = "coin") -> None:
        task = SimpleNamespace(aggregation=lambda: {"acc": aggregation})
        self.subtasks = [SimpleNamespace(name=name, task=task)]

    @staticmethod
    def aggregate(values: list[float], _: Any, __: Any) -> tuple[float, None]:
        return values[0], None


TASKS: Any = {"coin": Task()}


def scale_of(base: list[float]) -> QualityScale:
    value = sum(base) / len(base)
    score = Score(metric="acc", value=value, n=4, split="report", higher_is_better=Task.higher_is_better)
    return QualityScale({"coin": score})


def drawn(items: list[float], base: list[float]) -> Any:
    return scale_of(base).resampled(resampled(TASKS, {"coin": [items]}))


def test_resamples_are_of_the_same_documents_for_everybody() -> None:
    left = [float(i % 3 == 0) for i in range(60)]
    right = [1 - value for value in left]
    first = resampled(TASKS, {"coin": [left]})["coin"]
    second = resampled(TASKS, {"coin": [right]})["coin"]
    assert np.allclose(first + second, 1.0)  # only where both rest on the same documents
    assert first.std() == pytest.approx(np.std(left) / 60**0.5, rel=0.1)


def test_resamples_of_two_tasks_are_independent() -> None:
    tasks: Any = {"coin": Task(), "dice": Task(name="dice")}
    items = [[float(i % 2) for i in range(200)]]
    found = resampled(tasks, {"coin": items, "dice": items})
    assert abs(np.corrcoef(found["coin"], found["dice"])[0, 1]) < 0.15


def test_an_aggregation_that_is_no_mean_is_lm_evals_own() -> None:
    tasks: Any = {"coin": Task(aggregation=max)}
    assert set(resampled(tasks, {"coin": [[1.0, 2.0]]}, resamples=50)["coin"]) == {1.0, 2.0}


def test_quality_of_the_base_is_one_and_lower_is_better_is_inverted(monkeypatch: pytest.MonkeyPatch) -> None:
    base = [2.0] * 4
    assert np.allclose(drawn(base, base), 1.0)
    assert np.allclose(drawn([1.0] * 4, base), 0.5)
    monkeypatch.setattr(Task, "higher_is_better", False)
    assert np.allclose(drawn([4.0] * 4, base), 0.5)


def test_scores_and_losses_are_compared_over_the_same_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    theirs = resampled(TASKS, {"coin": [list((rng.random(300) < 0.5).astype(float))]})
    ours = {"coin": theirs["coin"] - 0.01}  # a little worse on every draw, far below the error of either
    low, high = score_intervals(TASKS, ours, theirs)["coin"] or (0.0, 0.0)
    assert (low, high) == pytest.approx((-0.01, -0.01))
    monkeypatch.setattr(Task, "higher_is_better", False)
    low, high = score_intervals(TASKS, ours, theirs)["coin"] or (0.0, 0.0)
    assert (low, high) == pytest.approx((0.01, 0.01))
    base = list(rng.normal(3.0, 0.5, 16))
    kept = text_qualities([loss + 0.1 for loss in base], base)
    assert np.allclose(kept, np.exp(-0.1)) and np.allclose(text_qualities(base, base), 1.0)


def test_better_is_said_only_where_it_is() -> None:
    rng = np.random.default_rng(0)
    base = [1.0] * 400
    good = (rng.random(400) < 0.8).astype(float)
    same, bad = good[::-1], good * (rng.random(400) < 0.9)
    ours = [drawn(list(good), base)]

    def meaning(first: Any, second: Any) -> str:
        low, high = paired_interval(first, second) or (None, None)
        return Difference.model_validate({"value": 0.0, "low": low, "high": high}).meaning

    theirs = [drawn(list(bad), base)]
    low, high = paired_interval(ours, theirs) or (0.0, 0.0)
    assert low < float(good.mean() - bad.mean()) < high
    assert meaning(ours, theirs) == "better" and meaning(theirs, ours) == "worse"
    assert meaning(ours, [drawn(list(same), base)]) == "unclear"
    assert paired_interval(ours, ours) == (0.0, 0.0)  # the same documents: no difference in any resample
    assert paired_interval(ours, [np.full_like(ours[0], np.nan)]) is None
    two = [np.zeros(4000), np.ones(4000)]  # the standard error of their mean is a half, and so is what is drawn
    assert paired_interval(two, [np.zeros(4000)]) == pytest.approx((0.5 - 0.5 * 2**0.5, 0.5 + 0.5 * 2**0.5))


def test_an_interval_holds_the_middle_95_percent_of_all_resamples() -> None:
    low, high = paired_interval([np.linspace(0.0, 1.0, 1001)], [np.zeros(1001)]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((0.025, 0.975))


def test_seeds_that_disagree_widen_the_doubt() -> None:
    base = [1.0] * 100
    low, high = [float(i % 10 < 6) for i in range(100)], [float(i % 10 < 8) for i in range(100)]
    steady = [drawn([float(i % 10 < 7) for i in range(100)], base)] * 2
    lucky = [drawn(low, base), drawn(high, base)]
    assert paired_interval(steady, steady) == (0.0, 0.0)
    low, high = paired_interval(steady, lucky) or (0.0, 0.0)
    assert low < -0.05 and high > 0.05


def row(method: str, quality: float, size: str | None = "0.67", seed: int | None = 0, **more: Any) -> Comparison:
    values = {"about": "", "path": "x", "params": 670, "method": method, "quality": quality, "size": size, "seed": seed}
    return Comparison.model_validate(values | more)


WORK = {"runtime": "transformers", "device": "cpu", "dtype": "float32", "batch": 1, "prompt": 8, "new": 8}


def less(low: float, high: float) -> dict[str, float]:
    return {"value": (low + high) / 2, "low": low, "high": high}


def test_what_wins_stands_first_whoever_made_it() -> None:
    rows = [
        row("ours", 0.90),
        row("sleb", 0.95, ours_minus_this=less(-0.08, -0.02)),
        row("flap", 0.91, ours_minus_this=less(-0.03, 0.01)),
        row("magnitude", 0.5, ours_minus_this=less(0.3, 0.5)),
        row("elsewhere", 0.4, size=None, seed=None, params=700, ours_minus_this=less(0.4, 0.6)),
    ]
    (table,) = summarize(rows)
    assert [one.method for one in table] == ["sleb", "flap", "ours", "magnitude", "elsewhere"]
    assert summary(table).startswith("At 0.67 sleb beat ours (quality 90") and "better than 2 of 4 others" in summary(
        table
    )
    assert "is not clearly different from the best (flap)" in summary([one for one in table if one.method != "sleb"])
    assert "ours is best" in summary(table[2:])
    (tie,) = summarize([row("ours", 0.9), row("flap", 0.9, ours_minus_this=less(-0.01, 0.01))])
    assert "ours (quality 90" in summary(tie) and "is as good as flap; it is better than 0 of 1" in summary(tie)
    assert terminal_table([table]).row_count == 5


def test_the_table_fits_80_columns() -> None:
    fast, base = ({"decode_tps": tps, "prefill_tps": 1.0} | WORK for tps in (1.5, 1.0))
    more = {"quality_before_healing": 0.402, "quality_stderr": 0.013, "speed": fast, "base_speed": base}
    rows = [row("ours", 0.75, **more), row("untrained-search", 0.5, ours_minus_this=less(0.195, 0.288), **more)]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(terminal_table(summarize(rows)))
    shown = capture.get()
    assert "+24.1 (+19.5, +28.8) *" in shown and "1.50" in shown and "…" not in shown


def test_seeds_are_put_together() -> None:
    rows = [row("ours", 0.8, seed=0, quality_stderr=0.03), row("ours", 0.9, seed=1, quality_stderr=0.03)]
    ((one,),) = summarize(rows)
    assert one.seeds == 2 and one.quality == pytest.approx(0.85)
    assert one.stderr == pytest.approx((0.03**2 + 0.05**2) ** 0.5)


def test_a_task_is_put_together_over_seeds_too() -> None:
    def scored(value: float, seed: int) -> Comparison:
        score = {"metric": "acc", "value": value, "stderr": 0.03, "n": 200, "split": "report"}
        return row("ours", 0.8, seed=seed, tasks={"blimp": score})

    ((one,),) = summarize([scored(0.6, 0), scored(0.7, 1)])
    score = one.tasks["blimp"]
    assert score.value == pytest.approx(0.65) and score.stderr == pytest.approx((0.03**2 + 0.05**2) ** 0.5)


def test_a_task_that_one_seed_has_no_finite_score_of_is_left_out() -> None:
    def scored(value: float, seed: int) -> Comparison:
        score = {"metric": "perplexity", "value": value, "n": 5, "split": "report", "higher_is_better": False}
        return row("scratch", 0.5, seed=seed, tasks={"text": score, "stories": score | {"value": 3.0}})

    ((_, scratch),) = summarize([row("ours", 0.8), scored(9.0, 0), scored(float("inf"), 1)])
    assert scratch.seeds == 2 and set(scratch.tasks) == {"stories"}


class Folder:
    """A run as far as `comparison_rows` looks at it, with rows written by hand."""

    def __init__(self, path: Path) -> None:
        self.job: Any = SimpleNamespace(
            run=Run(path), vocabulary=None, tasks=SimpleNamespace(tasks=TASKS, fingerprint=lambda *_: "d")
        )
        self.job.run.supernet.mkdir(parents=True)
        self.job.run.comparison.mkdir()
        self.trained("weights")
        documents = comparison_rows.origin(self.job)["documents"]
        write_json(
            self.job.run.comparison / "base.json",
            {"inputs": documents, "tasks": {"coin": self.score(1.0)}, "documents": {"coin": [[1.0] * 4]}},
        )

    @staticmethod
    def score(value: float) -> dict[str, Any]:
        return {"metric": "acc", "value": value, "n": 4, "split": "report"}

    def trained(self, weights: str) -> None:
        write_json(self.job.run.supernet / "manifest.json", {"weights": weights})

    def compared(self, method: str, seed: int, inputs: str, quality: float, size: str = "0.67") -> None:
        row = {
            "method": method,
            "about": "",
            "size": size,
            "seed": seed,
            "params": 1,
            "quality": 123.0,  # of another definition: what is shown follows from the scores
            "path": method,
            "tasks": {"coin": self.score(quality)},
        }
        documents = {"coin": [[1.0, quality, 0.0, 1.0]]}
        data = {"inputs": inputs, "of": comparison_rows.origin(self.job), "row": row, "documents": documents}
        write_json(self.job.run.comparison / f"{method}-{size}-{seed}.json", data)

    @property
    def shown(self) -> list[tuple[str, int, float]]:
        return [(row.method, row.seed, row.quality) for row in comparison_rows.comparison_rows(self.job)]


def test_rows_of_an_earlier_comparison_are_not_shown(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for seed in range(3):
        folder.compared("ours", seed, "old", 0.5)
        folder.compared("wanda", seed, "old", 0.5)
    assert len(folder.shown) == 6
    folder.compared("ours", 0, "new", 0.9)  # after a change, with one seed
    folder.compared("wanda", 0, "new", 0.8)
    assert folder.shown == [("ours", 0, 0.9), ("wanda", 0, 0.8)]


def test_a_difference_is_ours_less_theirs(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.compared("ours", 0, "now", 0.9)
    folder.compared("wanda", 0, "now", 0.8)
    ours, theirs = comparison_rows.comparison_rows(folder.job)
    assert ours.ours_minus_this is None and theirs.ours_minus_this is not None
    assert theirs.ours_minus_this.value == pytest.approx(0.1)
    assert 0 <= theirs.ours_minus_this.low < theirs.ours_minus_this.high  # type: ignore[operator]


def test_rows_of_another_super_network_or_of_other_documents_are_not_shown(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.compared("ours", 0, "first", 0.5)
    folder.trained("other weights")
    assert folder.shown == []
    folder.compared("ours", 0, "second", 0.6, size="0.5")
    assert folder.shown == [("ours", 0, 0.6)]
    folder.job.tasks = SimpleNamespace(tasks={"dice": Task()}, fingerprint=lambda *_: "d")
    assert folder.shown == []


def test_packages_are_timed_one_by_one_beside_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path)
    for method in ("ours", "wanda", "flap"):
        folder.compared(method, 0, "inputs", 0.5)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    timed: list[str] = []
    fast = Speed.model_validate(report_helpers.speed(100.0))

    def load_package(path: Path, *_: Any) -> Any:
        alive.add(model := torch.nn.Identity())
        timed.append(path.name)
        return model

    def speed_beside(model: Any, base: Any) -> tuple[Any, Any]:
        assert set(alive) == {model}
        return fast.model_copy(update={"runtime": timed[-1]}), fast

    monkeypatch.setattr(comparing, "load_package", load_package)
    monkeypatch.setattr(comparing, "speed_beside", speed_beside)
    monkeypatch.setattr(comparing, "update_record", lambda *_, **__: None)
    folder.job.threads, folder.job.compute_dtype, folder.job.device = lambda scoring: None, None, None
    rows = sorted(tmp_path.glob("comparison/*-0.json"))
    comparing.time_beside_base(folder.job, torch.nn.Identity(), rows)
    comparing.time_beside_base(folder.job, torch.nn.Identity(), rows)  # nothing is left to time
    assert timed == ["flap", "ours", "wanda"]
    wanda = comparison_rows.FinishedRow.read(tmp_path / "comparison" / "wanda-0.67-0.json").row
    assert wanda.speed == fast.model_copy(update={"runtime": "wanda"}) and wanda.base_speed == fast


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    (folder / "recipe.yaml").write_text(
        "finetuning: {tokens: 640, batch_size: 4, sequence_length: 32}\n"
        "searching: {evaluations: 8, population: 4, limit: 12}\n"
        "healing: {tokens: 640}\n"
        "space: {ffn.*: [48, 64]}\n"
        "targets: {max_params: [0.9]}\n"
    )
    arguments = [
        "compress", str(tiny.checkpoint(folder / "model")), "--recipe", str(folder / "recipe.yaml"),
        "--data", str(tiny.data(folder / "data.jsonl", 300)), "--tasks", "tiny_choice",
        "--include-path", str(tiny.task(folder / "tasks", documents=40)), "--output", str(folder / "run"),
    ]  # fmt: skip
    assert run(arguments) == 0
    return folder / "run"


def test_one_command_makes_every_row_and_a_second_one_makes_none(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There may be more rows, of the other tests' commands."""
    command = ["compare", str(made), "--baselines", "shortgpt,flap,slicegpt,random,untrained-search,scratch"]
    assert run([*command, "--json", "--with", str(made / "packages" / "best")]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) >= {"ours", "shortgpt", "flap", "slicegpt", "random", "untrained-search", "scratch", "best"}
    report = json.loads((made / "report.json").read_text())
    assert {row["method"] for row in report["comparison"]} == set(rows)
    best = report["packages"][0]
    for same in (rows["ours"], rows["best"]):  # the same network, however it came
        assert same["tasks"]["tiny_choice"]["value"] == best["tasks"]["tiny_choice"]["value"]
        assert same["quality"] == best["quality"]
    assert rows["ours"]["params"] == best["params"]
    for method, one in rows.items():
        if method == "best":
            continue
        assert one["params"] == pytest.approx(best["params"], rel=0.01)
        assert one["tokens"] == (640 if method in ("ours", "random") else 1280)
        assert one["speed"]["decode_tps"] > 0
        record = json.loads((made / one["path"] / "compression.json").read_text())
        assert record["entry"]["verified"]["cached_equals_uncached"] is True
    assert "Comparison with other methods" in (made / "report.html").read_text()
    assert "Comparison with other methods" in (made / "packages" / "best" / "README.md").read_text()

    stamps = {file: file.stat().st_mtime_ns for file in (made / "comparison").rglob("*.safetensors")}
    assert run(command) == 0
    assert {file: file.stat().st_mtime_ns for file in (made / "comparison").rglob("*.safetensors")} == stamps


def test_a_size_says_what_was_picked(made: Path) -> None:
    job = pipeline.resume(made, {})
    ((label, ours),) = comparing.sizes_to_compare(job, [])
    assert label == "0.9"
    assert comparing.sizes_to_compare(job, ["90%"]) == [("0.9", ours)]  # what ships, also where another would be chosen
    job.recipe.targets.max_params = ["1M"]  # as if something far smaller than asked for had been the best
    share = job.structure.parameters(ours) / job.structure.parameters(job.structure.base)
    assert comparing.sizes_to_compare(job, []) == [(f"{share:.2f}", ours)]
    job.recipe.targets.max_params = ["0.5"]  # and where a key picked what is larger
    assert comparing.sizes_to_compare(job, []) == [(f"{share:.2f}", ours)]


def test_what_fails_of_ours_ends_a_comparison(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(*_: object) -> None:
        raise RequestError("no room")

    known = methods()
    monkeypatch.setattr(comparing, "methods", lambda **_: known | {"ours": replace(known["ours"], make=cut)})
    for file in (made / "comparison").glob("ours-*.json"):
        file.unlink()
    assert run(["compare", str(made), "--baselines", "taylor"]) == 2
    said = capsys.readouterr().err
    assert "error: no room" in said and "left out" not in said


def test_nothing_to_compare_with_is_said(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(*_: object) -> None:
        raise RequestError("cannot be reached")

    known = methods()
    monkeypatch.setattr(comparing, "methods", lambda **_: known | {"taylor": replace(known["taylor"], make=cut)})
    assert run(["compare", str(made), "--baselines", "taylor"]) == 2
    said = capsys.readouterr().err
    assert "taylor is left out at 0.9: cannot be reached" in said and "error: no method could be compared" in said


def test_an_interrupted_comparison_goes_on_behind_the_last_row(made: Path) -> None:
    command = ["compare", str(made), "--baselines", "shortgpt,flap"]
    assert run(command) == 0
    (lost,) = (made / "comparison").glob("flap-*.json")
    kept = next((made / "comparison").glob("shortgpt-*/*.safetensors"))
    lost.unlink()
    before = kept.stat().st_mtime_ns
    assert run(command) == 0
    assert lost.is_file() and kept.stat().st_mtime_ns == before


def test_methods_that_cut_the_same_network_share_one(made: Path) -> None:
    """At 0.9 a whole layer would be too much, so both only narrow the FFN."""
    assert run(["compare", str(made), "--baselines", "shortgpt,late-block"]) == 0
    first, second = (
        json.loads((made / "comparison" / f"{method}-0.9-0.json").read_text()) for method in ("shortgpt", "late-block")
    )
    assert second["row"] == first["row"] | {"method": "late-block", "about": second["row"]["about"]}
    assert second["row"]["about"] != first["row"]["about"] and second["documents"] == first["documents"]
    assert (made / first["row"]["path"]).is_dir() and not (made / "comparison" / "late-block-0.9-0").exists()


def test_rows_made_beside_another_pick_are_left_out(made: Path) -> None:
    assert run(["compare", str(made), "--baselines", "shortgpt,flap"]) == 0
    row = next((made / "comparison").glob("flap-*.json"))
    before = row.read_text()
    row.write_text(json.dumps(json.loads(before) | {"inputs": "of another super-network"}))
    assert run(["report", str(made)]) == 0
    row.write_text(before)
    shown = {one["method"] for one in json.loads((made / "report.json").read_text())["comparison"]}
    assert {"ours", "shortgpt"} <= shown and "flap" not in shown


@contextmanager
def altered(file: Path, text: str) -> Iterator[None]:
    before = file.read_text()
    file.write_text(text)
    try:
        yield
    finally:
        file.write_text(before)


def test_a_run_whose_tasks_changed_still_has_a_report(made: Path) -> None:
    """Neither the search nor the comparison knows the new task yet."""
    assert run(["compare", str(made), "--baselines", "shortgpt"]) == 0
    tiny.task(made.parent / "tasks", "tiny_other", documents=40)
    recipe = made / "recipe.yaml"
    with altered(recipe, recipe.read_text().replace("tiny_choice", "tiny_other")):
        assert run(["report", str(made)]) == 0
        report = read_json(made / "report.json")
    assert set(report["recipe"]["fingerprints"]["tasks"]) == {"tiny_other"}
    assert report["comparison"] == [] and all(not point["tasks"] for point in report["search"]["points"])
    assert run(["report", str(made)]) == 0
    assert read_json(made / "report.json")["comparison"]


def test_an_interrupted_healing_goes_on_only_with_what_it_began_with(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []

    def interrupted(*_: Any, state: Path, **__: Any) -> None:
        states.append(state.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(comparing, "heal", interrupted)
    recipe = made / "recipe.yaml"
    for tokens in (320, 320, 960):  # of the healing: another one begins anew
        with altered(recipe, recipe.read_text().replace("healing:\n  tokens: 640", f"healing:\n  tokens: {tokens}")):
            assert run(["compare", str(made), "--baselines", "ours"]) != 0
    assert states[0] == states[1] != states[2]


def test_checkpoints_from_folders_of_one_name_are_two_rows(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = made / "packages" / "best", tmp_path / "best"
    shutil.copytree(made / "subnets" / "best", second)
    try:
        assert run(["compare", str(made), "--baselines", "ours", "--with", str(first), "--with", str(second)]) == 0
        rows = [row for row in read_json(made / "report.json")["comparison"] if row["size"] is None]
        assert {row["path"] for row in rows} == {str(first), str(second)} and len({r["method"] for r in rows}) == 2
    finally:
        for file in made.glob("comparison/with-best-*.json"):
            file.unlink()


def test_what_was_measured_in_another_super_network_is_not_used(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = made / "supernet" / "manifest.json"
    with altered(manifest, json.dumps(read_json(manifest) | {"weights": "of another fine-tuning"})):
        for command, words in (
            ("pick", "is not the one that was searched"),
            ("export", "is not the one that was picked"),
        ):
            assert run([command, str(made)]) == 2
            assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--baselines", "shortgtp"], "did you mean"),
        (["--max-params", "0.3"], "no measured architecture"),
        (["--max-params", "much"], "is not a size"),
        (["--seeds", "0"], "--seeds"),
        (["--with", "./nowhere"], "no such folder"),
    ],
)
def test_what_cannot_be_compared_is_said_at_once(
    made: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert run(["compare", str(made), "--baselines", "ours", *options]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
