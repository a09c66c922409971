"""Finalists: several picks healed on a share of the tokens each, the best of them to the end."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from compressor import cli, pipeline
from compressor.inputs import training_blocks
from compressor.stages.finalists import rounds_of
from search.preference import ordered
from supernet.training import supernet_training
from supernet.training.data import HELD_OUT_BLOCKS
from supernet.training.losses import held_out_loss
from tests.support import tiny

TOKENS = 3072
STEP = 4 * 32


class Made:
    """A run that is picked and not yet exported, for three finalists."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        recipe = folder / "recipe.yaml"
        recipe.write_text(
            "finetuning: {tokens: 0, batch_size: 4, sequence_length: 32}\n"
            f"healing: {{tokens: {TOKENS}, finalists: 3, learning_rate: 0.003}}\n"
            "searching: {evaluations: 16, population: 8, limit: 12, warm_start: []}\n"
            "space: {ffn.*: [16, 32, 48, 64], kv.*: [1, 2]}\ntargets: {max_params: [0.8]}\n"
        )
        model, data = tiny.checkpoint(folder / "model"), tiny.data(folder / "data.jsonl", 300)
        tasks = tiny.task(folder / "tasks", documents=40)
        given = ["--recipe", str(recipe), "--data", str(data), "--output", str(self.run)]
        given += ["--tasks", "tiny_choice", "--include-path", str(tasks)]
        assert cli.run(["finetune", str(model), *given[:-4]]) == 0
        assert cli.run(["search", str(self.run), *given[-4:]]) == 0
        assert cli.run(["pick", str(self.run)]) == 0

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.run, folder))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("finalists"))


def pick_of(run: Path) -> dict[str, Any]:
    (pick,) = json.loads((run / "search" / "picks.json").read_text())
    return pick


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_rounds_read_as_many_tokens_in_all(count: int) -> None:
    plan = rounds_of(count, 1_000_000)
    assert next(networks for networks, _ in plan) == count and plan[-1][0] == 1
    assert sum(networks * tokens for networks, tokens in plan) == 1_000_000
    assert all(later <= -(-earlier // 2) for (earlier, _), (later, _) in pairwise(plan))
    spent = [networks * tokens for networks, tokens in plan]
    assert max(spent) - min(spent) <= 2 * count  # the same in each round, but for what does not divide


def test_the_best_finalist_ships(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made.copy(tmp_path / "run")
    before = pick_of(run)
    assert len(before["finalists"]) >= 3 and before["finalists"][0]["key"] == before["key"]
    read: list[int] = []
    original = supernet_training.train

    def counted(*args: Any, **kwargs: Any) -> Any:
        read.append(args[2].tokens)
        return original(*args, **kwargs)

    monkeypatch.setattr(supernet_training, "train", counted)
    assert cli.run(["export", str(run)]) == 0
    assert len(read) == 3 + 2 + 1 and sum(read) == TOKENS
    record = json.loads((run / "subnets" / "best-finalists.json").read_text())
    last = record["rounds"][-1]["losses"]
    assert len(record["rounds"][0]["losses"]) == 3 and len(last) == 2
    assert record["best"] == min(last, key=last.__getitem__)
    # The best one is what ships, what the pick says, and of the finalists the only one that is kept.
    after = pick_of(run)
    assert after["key"] == record["best"] and after["finalists"] == before["finalists"]
    package = json.loads((run / "packages" / "best" / "compression.json").read_text())
    assert package["entry"]["architecture"] == after["architecture"] and package["entry"]["verified"]
    assert len(list((run / "subnets").glob("best-finalist-*"))) == 1
    healing = json.loads((run / "subnets" / "best" / "healing.json").read_text())
    assert healing["curve"][0]["loss"] == pytest.approx(last[record["best"]], abs=1e-4)  # it goes on from there
    # Picked and exported again, it heals nothing again.
    assert cli.run(["pick", str(run)]) == 0 and cli.run(["export", str(run)]) == 0
    assert len(read) == 6 and pick_of(run)["key"] == record["best"]


def test_where_speed_is_preferred_the_fastest_of_the_near_ones_goes_on(made: Made, tmp_path: Path) -> None:
    run = made.copy(tmp_path / "run")
    before = pick_of(run)
    (run / "search" / "picks.json").write_text(json.dumps([before | {"prefer": "speed"}]))
    speeds = {row["key"]: row["values"]["decode_tps"] for row in before["finalists"]}
    assert cli.run(["export", str(run)]) == 0
    record = json.loads((run / "subnets" / "best-finalists.json").read_text())
    last = record["rounds"][-1]["losses"]
    job = pipeline.resume(run, {})
    _, held_out = training_blocks(job, TOKENS).split()
    whole = held_out_loss(job.load_base(), held_out.part(0, HELD_OUT_BLOCKS), 4, job.device)
    first, *_ = ordered("speed", list(last.values()), [speeds[key] for key in last], whole)
    assert record["best"] == list(last)[first] == pick_of(run)["key"]


def test_interrupted_finalists_go_on(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, run = made.copy(tmp_path / "whole"), made.copy(tmp_path / "run")
    assert cli.run(["export", str(whole)]) == 0
    original, calls = supernet_training.train, 0

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (3, 6):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(supernet_training, "train", killed)
    assert [cli.run(["export", str(run)]) for _ in range(3)] == [130, 130, 0]
    assert calls == 6 + 2  # nothing that had ended is healed again
    records = [json.loads((folder / "subnets" / "best-finalists.json").read_text()) for folder in (whole, run)]
    assert records[0]["best"] == records[1]["best"]
    for one, other in zip(records[0]["rounds"], records[1]["rounds"], strict=True):
        assert one["losses"] == pytest.approx(other["losses"], abs=1e-4)


def test_too_few_tokens_for_so_many(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made.copy(tmp_path / "run")
    assert cli.run(["export", str(run), "--heal-tokens", str(3 * STEP)]) == 2
    assert "healing.finalists: 3 networks share" in capsys.readouterr().err
