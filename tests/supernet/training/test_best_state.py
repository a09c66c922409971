"""A training cannot make a network worse: it goes back where a loss rises, ends with its best state, and resumes so."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from math import inf, nan
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, LayerSizes
from supernet.common.errors import RequestError
from supernet.families import describe
from supernet.slicing import extract
from supernet.training import supernet_training
from supernet.training.adapters import PARAMETERS
from supernet.training.best_state import BestState
from supernet.training.data import Batch, Blocks, pack
from supernet.training.history import History, Rule
from supernet.training.loop import Backward, train
from supernet.training.losses import Loss, held_out_loss
from supernet.training.settings import TrainSettings
from supernet.training.state import TrainingState
from supernet.training.supernet_training import TOLERANCE, ElasticScheme, finetune_supernet, heal
from supernet.training.traces import trace
from supernet.training.watch import points_of
from tests.support import tiny
from tests.support.finetune_helpers import CUT, SMALL, range_of, settings

CE = Loss({"ce": 1.0})
RULE = Rule(("middle", "smallest"), "largest", 0.1)
START = {"largest": 1.0, "middle": 2.0, "smallest": 4.0}


@pytest.fixture
def blocks(tmp_path: Path) -> Blocks:
    return pack(str(tiny.data(tmp_path / "d.jsonl")), tiny.byte_tokenizer(), 16)


@pytest.fixture
def learned(network: PreTrainedModel, blocks: Blocks, tmp_path: Path) -> PreTrainedModel:
    """A network that knows the text, so that it has something to lose."""
    state = tmp_path / "learned.safetensors"
    heal(network, network, blocks, settings(3200), state=state, accelerator=Accelerator(cpu=True), loss=CE)
    return network


def finetuned(
    network: PreTrainedModel,
    blocks: Blocks,
    folder: Path,
    how: TrainSettings,
    parameters: str = "all",
    asked: Sequence[Architecture] = (),
) -> History:
    folder.mkdir(exist_ok=True)
    supernet = SuperNetwork(network)
    watched: dict[str, Sequence[Architecture]]
    watched = {"largest": [supernet.base], "middle": [CUT], "smallest": [SMALL]}
    return finetune_supernet(
        PARAMETERS[parameters](supernet, None, 4, 7),
        blocks,
        how,
        ElasticScheme(loss=CE),
        range_of(supernet.structure),
        state=folder / "state.safetensors",
        accelerator=Accelerator(cpu=True),
        watched=watched | {"asked": asked} if asked else watched,
    )


def test_the_best_state_is_that_of_the_lowest_mean_within_the_tolerance() -> None:
    assert RULE.score(START, START) == 3.0
    assert RULE.score({"largest": 1.09, "middle": 1.0, "smallest": 2.0}, START) == 1.5
    assert RULE.score({"largest": 1.11, "middle": 1.0, "smallest": 2.0}, START) == inf
    assert RULE.score({"largest": nan, "middle": 1.0, "smallest": 2.0}, START) == inf
    assert RULE.score({"largest": 1.0, "middle": 1.0}, START) == inf  # not finite, so it is no part of the curve


def test_a_rise_is_allowed_as_long_as_the_steps_left_can_regain_it() -> None:
    rise = {"largest": 1.12, "middle": 1.0, "smallest": 2.0}
    assert RULE.holds(rise, START, 1.0) and not RULE.holds(rise, START, 0.1)
    assert not RULE.holds(rise | {"largest": 1.2}, START, 1.0)
    assert not RULE.holds({"largest": 0.9, "middle": 3.0, "smallest": 4.0}, START, 1.0)  # what is to be low rose


def test_the_best_that_the_state_on_disk_refers_to_stays_until_that_is_written_again(tmp_path: Path) -> None:
    """A run that is killed in between goes on from it."""
    weight = {"weight": torch.nn.Parameter(torch.zeros(1))}
    best = BestState(RULE, tmp_path / "state", weight, History(), Accelerator(cpu=True))
    best.keep(2)
    best.state_saved()
    best.keep(4)
    assert best.file(2).is_file() and best.file(4).is_file()
    best.state_saved()
    assert not best.file(2).exists() and best.file(4).is_file()


def test_losses_are_measured_often_at_first_and_seldom_later() -> None:
    assert points_of(400) == [0, 12, 25, 50, 100, 150, 200, 250, 300, 350, 400]
    assert points_of(20) == [0, 2, 5, 10, 15, 20]
    assert points_of(1) == [0, 1]


def test_a_rate_that_is_too_high_is_halved_and_the_network_is_not_lost(
    learned: PreTrainedModel, blocks: Blocks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = blocks.split()[1]
    before = held_out_loss(learned, held_out, 2, torch.device("cpu"))
    history = finetuned(learned, blocks, tmp_path / "run", settings(3200, learning_rate=0.2))
    after = held_out_loss(learned.eval(), held_out, 2, torch.device("cpu"))
    assert history.halved and history.best is not None
    assert after == pytest.approx(history.best["largest"], abs=1e-5) and after <= (1 + TOLERANCE) * before
    assert history.best["smallest"] < history.start["smallest"]
    assert max(point["largest"] for point in history.curve) > (1 + TOLERANCE) * before  # it was lost for a while
    said = capsys.readouterr().err
    assert "back to the state after 0 steps, with half the rate" in said
    assert f"largest {before:.3f} → {after:.3f}" in said and "of the time" in said
    assert len(list((tmp_path / "run").iterdir())) <= 1  # at most the best state, where it was not the last one


@pytest.mark.parametrize("asked", [[], [CUT, SMALL]], ids=["nothing asked for", "two sizes asked for"])
def test_the_state_that_is_kept_is_the_best_at_the_sizes_asked_for(
    learned: PreTrainedModel, blocks: Blocks, tmp_path: Path, asked: list[Architecture]
) -> None:
    history = finetuned(learned, blocks, tmp_path / "run", settings(32 * 60), asked=asked)
    names = ["asked"] if asked else ["middle", "smallest"]
    limit = (1 + TOLERANCE) * history.start["largest"]
    scores = {
        point["step"]: mean(point[name] for name in names) for point in history.curve if point["largest"] <= limit
    }
    assert history.kept == min(scores, key=lambda step: scores[step])
    for point in history.curve if asked else ():
        assert point["asked"] == pytest.approx(mean([point["middle"], point["smallest"]]))
    supernet = SuperNetwork(learned.eval())
    with supernet.activated(SMALL):  # the weights are those of that state
        loss = held_out_loss(supernet.model, blocks.split()[1].part(0, 16), 2, torch.device("cpu"))
    assert history.best is not None and loss == pytest.approx(history.best["smallest"], abs=1e-5)


@pytest.mark.parametrize("parameters", ["all", "lora"])
def test_training_that_only_makes_it_worse_ends_as_it_began(
    learned: PreTrainedModel, blocks: Blocks, tmp_path: Path, parameters: str
) -> None:
    before = copy.deepcopy(learned.state_dict())
    how = settings(32 * 6, learning_rate=1e3, schedule="constant")
    history = finetuned(learned, blocks, tmp_path / "run", how, parameters)
    assert history.kept == 0 and history.best == history.start and history.halved == [2, 4]
    for name, weight in learned.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_healing_never_ends_worse_than_it_began(learned: PreTrainedModel, blocks: Blocks, tmp_path: Path) -> None:
    cut = extract(learned, describe(learned.config), Architecture(32, (LayerSizes(2, 1, 32),) * 3))
    before = copy.deepcopy(cut.state_dict())
    how, state = settings(32 * 6, learning_rate=1e3), tmp_path / "h.safetensors"
    history = heal(cut, learned, blocks, how, state=state, accelerator=Accelerator(cpu=True))
    assert history.kept == 0 and history.halved
    assert all(torch.equal(weight, before[name]) for name, weight in cut.state_dict().items())


def test_losses_that_are_no_numbers_from_the_start_are_refused(
    learned: PreTrainedModel, blocks: Blocks, tmp_path: Path
) -> None:
    """With nothing to go back to, every step would be dropped without a word."""
    with torch.no_grad():
        learned.get_output_embeddings().weight.fill_(inf)
    cut = copy.deepcopy(learned)
    how, state = settings(32 * 4), tmp_path / "s.safetensors"
    with pytest.raises(RequestError, match=r"healing: held-out loss is .* before the first step"):
        heal(cut, learned, blocks, how, state=state, accelerator=Accelerator(cpu=True))


def test_a_loss_that_is_no_number_is_gone_back_from_at_once(
    learned: PreTrainedModel, blocks: Blocks, tmp_path: Path
) -> None:
    losses = iter([1.0, 0.9, *[0.8] * 20])
    kept: list[dict[str, torch.Tensor]] = []

    def measure() -> dict[str, float]:
        kept.append(copy.deepcopy(learned.state_dict()))
        return {"loss": next(losses)}

    def step(number: int, batch: Batch, backward: Backward) -> float:
        if number == 4:
            assert any(not torch.equal(weight, kept[1][name]) for name, weight in learned.state_dict().items())
            backward(CE(trace(learned, batch), None) * nan)
            return nan
        if number == 5:
            assert all(torch.equal(weight, kept[1][name]) for name, weight in learned.state_dict().items())
        backward(CE(trace(learned, batch), None))
        return 0.0

    history = train(
        learned,
        blocks,
        settings(32 * 40, learning_rate=1e-3),
        step,
        what="t",
        state=tmp_path / "s.safetensors",
        accelerator=Accelerator(cpu=True),
        measure=measure,
        rule=Rule(("loss",), "loss"),
    )
    assert history.halved == [5]
    assert all(torch.isfinite(weight).all() for weight in learned.state_dict().values())


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [7, 15, 24])
def test_a_killed_run_that_went_back_ends_as_if_it_had_not_been_killed(
    learned: PreTrainedModel, blocks: Blocks, tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state is written every third step, so that points and returns lie between the last one and the kill."""
    killed, later = copy.deepcopy(learned), copy.deepcopy(learned)
    how = settings(32 * 24, learning_rate=0.2, checkpoint_seconds=0)
    save = TrainingState.save

    def seldom(self: Any, step: int, accelerator: Accelerator) -> None:
        if step % 3 == 0:
            save(self, step, accelerator)

    monkeypatch.setattr(TrainingState, "save", seldom)
    whole = finetuned(learned, blocks, tmp_path / "whole", how)
    assert len(whole.halved) > 1
    passes = 0

    def dies(*args: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 3 * at - 1:  # in the midst of a step
            raise Killed
        return trace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(supernet_training, "trace", dies)
        with pytest.raises(Killed):
            finetuned(killed, blocks, tmp_path / "killed", how)
    resumed = finetuned(later, blocks, tmp_path / "killed", how)
    assert resumed.curve == whole.curve and resumed.halved == whole.halved and resumed.kept == whole.kept
    for name, weight in later.state_dict().items():
        assert torch.equal(weight, learned.state_dict()[name]), name


def test_a_run_that_an_earlier_version_began_goes_on(
    learned: PreTrainedModel, blocks: Blocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state knows no best one: of those that follow, the best is kept."""
    later, passes = copy.deepcopy(learned), 0

    def dies(*args: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 3 * 15:
            raise Killed
        return trace(*args)

    how = settings(32 * 24, learning_rate=1e-3, checkpoint_seconds=0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(supernet_training, "trace", dies)
        finetuned(learned, blocks, tmp_path / "run", how)
    state = tmp_path / "run" / "state.safetensors"
    with safe_open(state, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    for name in ("kept", "halved", "measuring"):
        del facts["history"][name]
    save_file(load_file(state), state, {"facts": json.dumps(facts)})
    for best in state.parent.glob("*.best-*"):
        best.unlink()
    history = finetuned(later, blocks, tmp_path / "run", how)
    assert history.kept in (18, 24) and history.curve[0]["step"] == 0
