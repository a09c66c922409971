"""Any size later: a search reaches up to the base, goes on for another size, and says what is nearest."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from compressor import cli, pipeline
from compressor.front_table import front_rows
from compressor.job import Job
from compressor.recipe_file import read_recipe
from compressor.run import Run
from compressor.stages.layer_timings import speed_table
from compressor.stages.picking import measured
from compressor.stages.searching import LARGER_SHARE
from supernet.common.errors import RequestError
from supernet.common.formatting import percent
from tests.support import tiny

EVALUATIONS = 28


class Made:
    """A run that was searched for 0.7 of a base whose sizes are many."""

    def __init__(self, folder: Path) -> None:
        given = {
            "model": str(tiny.checkpoint(folder / "model", num_hidden_layers=4)),
            "data": str(tiny.data(folder / "data.jsonl", 300)),
            "tasks": "tiny_choice:acc",
            "include_path": str(tiny.task(folder / "tasks", documents=60)),
            "space": {"ffn.*": [8, 16, 24, 32, 40, 48, 56, 64], "kv.*": [1, 2]},
            "finetuning": {"tokens": 0, "sequence_length": 32, "batch_size": 4},
            "searching": {"evaluations": EVALUATIONS, "population": 8, "limit": 24},
            "targets": {"max_params": "0.7"},
            "device": "cpu",
        }
        self.run = folder / "run"
        job = pipeline.start(read_recipe(None, given), self.run)
        pipeline.finetune(job)
        speed_table(job, lambda: job.load_supernet().model)  # once: every run below is a copy
        pipeline.search(job)
        self.front = front_of(self.run)

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.run, folder))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("parts"))


def front_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "search" / "front.json").read_text())


def keys(front: dict[str, Any]) -> list[str]:
    return [row["key"] for row in front["evaluations"]]


def shares(run: Path, front: dict[str, Any]) -> list[float]:
    """Sizes of everything measured, as shares of the base, in the order in which it was asked for."""
    evaluations = measured(Job(Run(run), Run(run).recipe(), weights=False))
    base = max(e.values["parameters"] for e in evaluations)
    return [e.values["parameters"] / base for e in evaluations]


def scored(run: Path) -> int:
    with sqlite3.connect(run / "search" / "evaluations.db") as database:
        return database.execute("select count(*) from evaluations where task like 'tiny_choice%'").fetchone()[0]


def test_a_share_of_the_search_goes_to_the_sizes_above(made: Made) -> None:
    sizes = shares(made.run, made.front)
    larger = round(LARGER_SHARE * EVALUATIONS)
    assert len(sizes) == len(set(keys(made.front))) == EVALUATIONS and larger == 4
    assert all(0.7 < size < 1 for size in sizes[-larger:])
    assert len({round(size, 2) for size in sizes[-larger:]}) > 1  # spread, not one size
    on_front = {key: size for key, size in zip(keys(made.front), sizes, strict=True) if key in made.front["front"]}
    assert min(on_front.values()) >= 0.85 * 0.7  # smaller ones are not trained
    (part,) = made.front["parts"]
    assert part["measured"] == EVALUATIONS and part["targets"]["max_params"] == ["0.7"]


def test_a_search_goes_on_for_another_size(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made.copy(tmp_path / "run")
    before = scored(run)
    ask = ["search", str(run), "--max-params", "0.85", "--evaluations", "10"]
    assert cli.run(ask) == 0
    said = " ".join(capsys.readouterr().err.split())
    found = front_of(run)
    # All that was known stays, ten more are measured, none of them twice, and the pick is made from all.
    assert keys(found)[:EVALUATIONS] == keys(made.front)
    assert len(set(keys(found))) == len(keys(found)) == EVALUATIONS + 10
    assert scored(run) == before + 10
    assert all(size <= 0.86 for size in shares(run, found)[EVALUATIONS:])
    assert [row["generation"] for row in found["generations"]] == list(range(len(found["generations"])))
    assert "picked best" in said
    (pick,) = json.loads((run / "search" / "picks.json").read_text())
    assert pick["key"] in keys(found) and Run(run).recipe().targets.max_params == ["0.85"]
    # The same again is there already; the recipe makes the same in a run that was never searched.
    assert cli.run(ask) == 0
    assert front_of(run) == found
    (run / "search" / "front.json").unlink()
    assert cli.run(["search", str(run)]) == 0
    assert keys(front_of(run)) == keys(found) and scored(run) == before + 10


@pytest.mark.parametrize(
    ("earlier", "said"),
    [
        ([{"targets": {"max_params": "0.01"}, "evaluations": 4}], "cannot be reached"),
        ([{"targets": {}, "evaluations": 4, "evaluation": 1}], "did you mean evaluations?"),
        ([{"targets": {}}], "'searching.earlier.0.evaluations' is missing"),
    ],
)
def test_earlier_searches_that_make_no_sense(made: Made, tmp_path: Path, earlier: Any, said: str) -> None:
    run = made.copy(tmp_path / "run")
    with pytest.raises(RequestError, match=re.escape(said)):
        pipeline.resume(run, {"searching.earlier": earlier})


def test_the_recipe_of_the_first_search_finds_it_done(made: Made, tmp_path: Path) -> None:
    run = made.copy(tmp_path / "run")
    recipe = (run / "recipe.yaml").read_text()
    assert cli.run(["search", str(run), "--max-params", "0.85", "--evaluations", "6"]) == 0
    found = front_of(run)
    (run / "recipe.yaml").write_text(recipe)
    assert cli.run(["search", str(run)]) == 0
    assert front_of(run) == found and len(keys(found)) == EVALUATIONS + 6


def test_a_search_that_goes_on_is_resumed(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evals.scoring.scorer import Scorer

    whole, run = made.copy(tmp_path / "whole"), made.copy(tmp_path / "run")
    before, original, calls = scored(run), Scorer.ask, 0
    options = ["--max-params", "0.85", "--evaluations", "8"]
    assert cli.run(["search", str(whole), *options]) == 0

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(Scorer, "ask", killed)
    assert cli.run(["search", str(run), *options]) == 130
    monkeypatch.setattr(Scorer, "ask", original)
    assert scored(run) == before + 3 and front_of(run) == made.front
    assert cli.run(["search", str(run), *options]) == 0
    assert keys(front_of(run)) == keys(front_of(whole)) and scored(run) == before + 8


def test_a_pick_far_below_the_size_says_what_is_nearest(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made.copy(tmp_path / "run")
    found = front_of(run)
    kept = [row for row, share in zip(found["evaluations"], shares(run, found), strict=True) if share < 0.72]
    found["evaluations"] = kept
    found["front"] = [key for key in found["front"] if key in {row["key"] for row in kept}]
    (run / "search" / "front.json").write_text(json.dumps(found))
    capsys.readouterr()
    assert cli.run(["pick", str(run), "--max-params", "0.85"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"compressor search {run} --max-params 0.85 --evaluations 30" in said and "below the" in said
    assert cli.run(["pick", str(run), "--max-params", "0.7"]) == 0
    assert "compressor search" not in capsys.readouterr().err


def test_the_front_lists_what_can_be_picked(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made.copy(tmp_path / "run")
    assert cli.run(["pick", str(run)]) == 0
    (pick,) = json.loads((run / "search" / "picks.json").read_text())
    capsys.readouterr()
    assert cli.run(["front", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["key"] for row in rows} == set(made.front["front"])
    assert [row["parameters"] for row in rows] == sorted((row["parameters"] for row in rows), reverse=True)
    values = {row["key"]: row["values"] for row in made.front["evaluations"]}
    for row in rows:
        assert row["quality"] == values[row["key"]]["quality"] and row["layers"] <= 4
        assert row["speedup"] == pytest.approx(values[row["key"]]["decode_tps"] / made.front["base_decode_tps"])
    assert [row["picked"] for row in rows if row["key"] == pick["key"]] in ([["best"]], [])
    by_quality = [row.quality for row in front_rows(run, "quality")]
    assert by_quality == sorted(by_quality, reverse=True)
    assert cli.run(["front", str(run)]) == 0
    shown = capsys.readouterr().err
    assert all(row["key"][:8] in shown for row in rows)
    assert cli.run(["front", str(run), "--sort", "szie"]) == 2
    assert "did you mean size" in capsys.readouterr().err
    assert cli.run(["front", str(tmp_path)]) == 2


def test_a_network_is_picked_by_the_beginning_of_its_key(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, key = made.copy(tmp_path / "run"), made.front["front"][-1]
    unique = next(key[:n] for n in range(1, 17) if sum(other.startswith(key[:n]) for other in keys(made.front)) == 1)
    assert cli.run(["pick", str(run), "--key", unique]) == 0
    (pick,) = json.loads((run / "search" / "picks.json").read_text())
    assert (pick["name"], pick["key"]) == ("best", key)
    assert Run(run).recipe().targets.max_params == ["0.7"]  # what the search was for stays
    capsys.readouterr()
    for wrong, hint in (("", "--key is empty"), (key[:-1] + "x", key), ("zz", "compressor front")):
        assert cli.run(["pick", str(run), "--key", wrong]) == (0 if not wrong else 2)
        assert hint in " ".join(capsys.readouterr().err.split())
    assert cli.run(["pick", str(run), "--key", unique, "--max-params", "0.7"]) == 2
    assert "leave the targets out" in capsys.readouterr().err
    # Targets that are named again take the key's place.
    assert cli.run(["pick", str(run), "--key", unique]) == 0
    assert cli.run(["pick", str(run), "--max-params", "0.7"]) == 0
    assert Run(run).recipe().key is None


def test_a_poor_pick_is_said_before_anything_is_spent_on_it(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made.copy(tmp_path / "run")
    best = max(made.front["evaluations"], key=lambda row: row["values"]["quality"])
    quality = best["values"]["quality"]
    for limit, said in ((quality, False), (quality + 0.01, True)):
        monkeypatch.setattr("compressor.stages.picking.POOR", limit)
        assert cli.run(["pick", str(run), "--key", best["key"]]) == 0
        lines = capsys.readouterr().err
        assert (f"warning: best keeps {percent(quality)} of the base's quality" in lines) is said


def test_every_preference_is_picked_and_the_others_are_named(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made.copy(tmp_path / "run")
    picked = {}
    for preference in ("quality", "balanced", "speed"):
        assert cli.run(["pick", str(run), "--prefer", preference]) == 0
        (pick,) = json.loads((run / "search" / "picks.json").read_text())
        picked[preference] = pick
        said = " ".join(capsys.readouterr().err.split())
        for other in pick["others"]:
            assert f"--prefer {other['prefer']}" in said and other["key"] != pick["key"]
    speeds = {name: pick["values"]["decode_tps"] for name, pick in picked.items()}
    assert speeds["speed"] >= speeds["balanced"] >= speeds["quality"]
    for name, pick in picked.items():  # what is named as the other pick is what that preference picks
        for other in pick["others"]:
            assert picked[other["prefer"]]["key"] == other["key"] != picked[name]["key"]
    assert Run(run).recipe().targets.max_params == ["0.7"]
    assert cli.run(["pick", str(run), "--prefer", "cheap"]) == 2


def recipe_text(run: Path) -> str:
    return (run / "recipe.yaml").read_text()


def test_a_pick_for_other_targets_leaves_the_search_as_it_was(made: Made, tmp_path: Path) -> None:
    run = made.copy(tmp_path / "run")
    assert cli.run(["pick", str(run), "--max-params", "0.8"]) == 0
    recipe = Run(run).recipe()
    assert recipe.targets.max_params == ["0.8"] and recipe.searched_for.max_params == ["0.7"]
    before = scored(run)
    assert cli.run(["search", str(run)]) == 0
    assert front_of(run) == made.front and scored(run) == before  # nothing is searched again
    # The targets of the search again: nothing is left to keep apart.
    assert cli.run(["pick", str(run), "--max-params", "0.7"]) == 0
    assert Run(run).recipe().searching.targets is None
    # A search for a size forgets both, and goes on from what there is.
    assert cli.run(["pick", str(run), "--max-params", "0.8"]) == 0
    assert cli.run(["search", str(run), "--max-params", "0.9", "--evaluations", "4"]) == 0
    assert Run(run).recipe().searching.targets is None
    assert [part["targets"]["max_params"] for part in front_of(run)["parts"]] == [["0.7"], ["0.9"]]


@pytest.mark.parametrize("options", [["--key", "zzzz"], ["--max-params", "0.05"], ["--min-speedup", "900"]])
def test_a_pick_that_fails_leaves_the_recipe(made: Made, tmp_path: Path, options: list[str]) -> None:
    run = made.copy(tmp_path / "run")
    before = recipe_text(run)
    assert cli.run(["pick", str(run), *options]) == 2
    assert recipe_text(run) == before and not (run / "search" / "picks.json").exists()


def test_a_search_for_a_size_forgets_the_key_that_was_picked(made: Made, tmp_path: Path) -> None:
    run = made.copy(tmp_path / "run")
    key = keys(made.front)[-1]
    assert cli.run(["pick", str(run), "--key", key]) == 0 and Run(run).recipe().key == key
    assert cli.run(["search", str(run), "--max-params", "0.85", "--evaluations", "4"]) == 0
    (pick,) = json.loads((run / "search" / "picks.json").read_text())
    assert Run(run).recipe().key is None and pick["target"] != f"key {key}"


def test_what_other_stages_stand_on_is_not_changed_in_passing(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made.copy(tmp_path / "run")
    before = recipe_text(run)
    assert cli.run(["search", str(run), "--set", "seed=3"]) == 2
    assert "--redo finetune" in capsys.readouterr().err
    assert cli.run(["export", str(run), "--set", "targets.max_params=0.5"]) == 2
    assert "run compressor pick" in " ".join(capsys.readouterr().err.split())
    assert recipe_text(run) == before


def test_a_speed_is_asked_of_a_search_that_did_not_look_at_it(made: Made, tmp_path: Path) -> None:
    run = made.copy(tmp_path / "run")
    file = run / "search" / "front.json"
    front = front_of(run)
    for row in front["evaluations"]:
        del row["values"]["decode_tps"]
    file.write_text(json.dumps(front))
    assert cli.run(["pick", str(run), "--min-speedup", "1.01"]) == 0
    (pick,) = json.loads((run / "search" / "picks.json").read_text())
    assert pick["values"]["speedup"] >= 1.01


def test_a_picked_key_that_a_format_cannot_hold_is_refused(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made.copy(tmp_path / "run")
    rows = made.front["evaluations"]
    uneven = next(r["key"] for r in rows if len({one["intermediate_size"] for one in r["architecture"]["layers"]}) > 1)
    assert cli.run(["pick", str(run), "--key", uneven]) == 0
    before = recipe_text(run)
    capsys.readouterr()
    assert cli.run(["export", str(run), "--format", "uniform"]) == 2
    assert "holds only networks whose layers are alike" in " ".join(capsys.readouterr().err.split())
    assert recipe_text(run) == before
    # Picked in a run that has the format, it is said and left out; what there is is exported.
    pipeline.resume(run, {"formats": "uneven,uniform"})
    assert cli.run(["pick", str(run), "--key", uneven]) == 0
    picks = (run / "search" / "picks.json").read_text()
    pipeline.resume_export(run, {})
    assert capsys.readouterr().err.count("not for --format uniform") == 2
    assert (run / "search" / "picks.json").read_text() == picks


def test_channels_that_were_never_put_in_order_are_not_cut(made: Made, tmp_path: Path) -> None:
    run = made.copy(tmp_path / "run")
    space = {"hidden_size": [16, 32], "ffn.*": [32, 64]}
    with pytest.raises(RequestError, match="residual channels were left as they are"):
        pipeline.resume(run, {"space": space})


def test_sizes_below_what_was_trained_are_searched_with_a_warning(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made.copy(tmp_path / "run")
    pipeline.resume(run, {"finetuning.smallest_share": 0.69})
    capsys.readouterr()
    assert cli.run(["search", str(run), "--max-params", "0.65", "--evaluations", "8"]) == 0
    assert "nothing below" in " ".join(capsys.readouterr().err.split())
    new = shares(run, front_of(run))[EVALUATIONS:]
    assert len([size for size in new if 0.85 * 0.65 <= size <= 0.65]) >= 4
