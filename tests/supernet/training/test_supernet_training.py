"""Samplers, draws and the loop: who takes part, what moves, and a killed run that ends at the same weights."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedConfig, PreTrainedModel, Starcoder2Config

from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, LayerSizes
from supernet.common.errors import RequestError
from supernet.families import describe
from supernet.slicing import extract
from supernet.training import loop, samplers, supernet_training
from supernet.training.adapters import PARAMETERS, AllWeights
from supernet.training.data import Batch, Blocks, pack
from supernet.training.history import History
from supernet.training.inactive import inactive_slices, restore_inactive
from supernet.training.loop import Backward, train
from supernet.training.losses import LOSSES, Loss
from supernet.training.optimizers import OPTIMIZERS
from supernet.training.samplers import (
    DRAWS,
    SAMPLERS,
    EvenSizes,
    ShiftedSizes,
    SizesAndCuts,
    UniformGenes,
)
from supernet.training.settings import TrainSettings
from supernet.training.state import TrainingState
from supernet.training.supernet_training import ElasticScheme, finetune_supernet, heal, without_dropout
from supernet.training.traces import Recorder, trace
from tests.support import tiny, tiny_families
from tests.support.finetune_helpers import CUT, SMALL, range_of, settings, widths_near

CE = Loss({"ce": 1.0})


@pytest.fixture
def blocks(tmp_path: Path) -> Blocks:
    return pack(str(tiny.data(tmp_path / "d.jsonl")), tiny.byte_tokenizer(), 16)


def tuned(
    network: PreTrainedModel,
    blocks: Blocks,
    folder: Path,
    scheme: ElasticScheme,
    how: TrainSettings,
    parameters: str = "all",
    **more: Any,
) -> History:
    supernet = SuperNetwork(network)
    load = (lambda: SuperNetwork(copy.deepcopy(network))) if scheme.needs_base else None
    history = finetune_supernet(
        PARAMETERS[parameters](supernet, load, 4, 7),
        blocks,
        how,
        scheme,
        range_of(supernet.structure),
        state=folder / "state.safetensors",
        accelerator=Accelerator(cpu=True),
        **more,
    )
    assert supernet.current == supernet.base
    return history


def test_who_takes_part_in_a_step(network: PreTrainedModel) -> None:
    range_, rng = range_of(describe(network.config)), np.random.default_rng(0)
    draw = EvenSizes(range_)

    def roles(sampler: str, step: int) -> list[str]:
        return [member.role for member in SAMPLERS[sampler](step, rng, range_, draw, 2)]

    assert roles("sandwich", 0) == ["largest", "random", "random", "smallest"]
    assert roles("alternate", 0) == ["largest"] and roles("alternate", 1) == ["random", "random"]
    assert roles("joint", 0) == ["largest", "random", "random"]
    members = SAMPLERS["sandwich"](0, rng, range_, draw, 1)
    assert members[0].architecture == range_.largest and members[-1].architecture == range_.least


def test_sizes_are_drawn_evenly_and_genes_as_they_fall(network: PreTrainedModel) -> None:
    asked: list[float] = []
    structure = describe(network.config)
    uniform = widths_near(np.random.default_rng(5), 0)
    range_ = replace(range_of(structure), uniform=lambda rng: uniform, near=lambda rng, n: asked.append(n) or SMALL)
    rng = np.random.default_rng(1)
    low, high = range_.sizes
    for _ in range(2000):
        EvenSizes(range_)(rng)
    assert low <= min(asked) and max(asked) <= high < structure.parameters(range_.largest)
    shares = np.histogram(asked, bins=4, range=(low, high))[0] / 2000
    assert np.abs(shares - 0.25).max() < 0.04
    assert UniformGenes(range_)(rng) == uniform
    drawn = [SizesAndCuts(range_)(rng) for _ in range(2000)]
    assert abs(drawn.count(CUT) / 2000 - 0.5) < 0.04 and drawn.count(CUT) + drawn.count(SMALL) == 2000


def test_shifted_sizes_lie_within_the_range(network: PreTrainedModel) -> None:
    asked: list[float] = []
    range_ = replace(range_of(describe(network.config)), near=lambda rng, size: asked.append(size) or SMALL)
    low, high = range_.sizes
    draw, rng = ShiftedSizes(range_), np.random.default_rng(2)
    for _ in range(200):
        draw(rng)
    bin_ = (high - low) / draw.BINS
    assert low <= min(asked) < low + bin_ and high - bin_ < max(asked) <= high


def test_sizes_that_still_learn_are_drawn_more_often(network: PreTrainedModel) -> None:
    structure = describe(network.config)
    range_ = range_of(structure)
    memory: dict[str, Any] = {}
    draw = ShiftedSizes(range_, memory)
    assert np.allclose(draw.shares(), 1 / draw.BINS)
    for step in range(30):
        draw.observe(SMALL, 3.0 - 0.05 * step)  # the smallest bin still falls
        draw.observe(structure.base, 0.5)  # the largest does not
    shares = draw.shares()
    assert shares.sum() == pytest.approx(1) and shares[0] == max(shares) > 3 * shares[-1]
    assert shares[-1] == pytest.approx(draw.EVEN / draw.BINS)
    again = ShiftedSizes(range_, json.loads(json.dumps(memory)))  # as restored from a training state
    assert np.array_equal(again.shares(), shares)


@pytest.mark.parametrize("tail", [0.0, 0.25])
def test_the_rate_warms_up_falls_and_stays(tail: float) -> None:
    how = settings(16 * 2 * 400, learning_rate=1.0, warmup_share=0.1, tail_share=tail, final_share=0.2)
    rates = [how.rate(step) for step in range(how.steps)]
    assert rates[0] == pytest.approx(1 / 40) and max(rates) == rates[39] == rates[40] == 1.0
    assert rates[40:] == sorted(rates[40:], reverse=True)
    flat = sum(rate == 0.2 for rate in rates)
    assert flat >= 400 * tail if tail else flat <= 1
    line = settings(16 * 2 * 400, learning_rate=1.0, warmup_share=0.1, schedule="linear", final_share=0.0)
    assert line.rate(40 + 90) == pytest.approx(0.75)
    assert settings(16 * 2 * 400, learning_rate=1.0, schedule="constant").rate(399) == 1.0


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("draw", "parameters", "optimizer"),
    [
        ("sizes", "all", "muon"),
        ("sizes", "all", "adamw"),
        ("shift", "all", "muon"),
        ("sizes", "lora", "muon"),
        ("sizes", "lora", "adamw"),
        ("sizes", "routed", "muon"),
    ],
)
def test_a_killed_run_ends_at_the_same_weights_bit_for_bit(
    network: PreTrainedModel,
    blocks: Blocks,
    tmp_path: Path,
    draw: str,
    parameters: str,
    optimizer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = copy.deepcopy(network.state_dict())
    later = copy.deepcopy(network)  # what a new process loads: nothing that the killed one held in memory
    how = settings(32 * 24, checkpoint_seconds=0, weight_decay=0.1, optimizer=optimizer)
    scheme = ElasticScheme(draw=draw)
    (tmp_path / "whole").mkdir()
    tuned(network, blocks, tmp_path / "whole", scheme, how, parameters)
    whole = copy.deepcopy(network.state_dict())
    assert any(not torch.equal(whole[name], start[name]) for name in whole)
    network.load_state_dict(start)
    passes = 0

    def dies(*args: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 3 * 15 + 2:  # in the midst of step 15
            raise Killed
        return trace(*args)

    (tmp_path / "killed").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(supernet_training, "trace", dies)
        with pytest.raises(Killed):
            tuned(network, blocks, tmp_path / "killed", scheme, how, parameters)
    tuned(later, blocks, tmp_path / "killed", scheme, how, parameters)
    for name, value in later.state_dict().items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_every_sampler_makes_small_sub_networks_better(
    network: PreTrainedModel, blocks: Blocks, tmp_path: Path, sampler: str
) -> None:
    watched = {"largest": [describe(network.config).base], "middle": [CUT], "smallest": [SMALL]}
    history = tuned(network, blocks, tmp_path, ElasticScheme(sampler), settings(3200), watched=watched)
    # `alternate` trains the smallest only through the weights that it shares.
    assert history.curve[-1]["smallest"] < history.curve[0]["smallest"] - 0.3
    assert history.curve[-1]["largest"] < history.curve[0]["largest"] - 0.3
    assert history.tokens == 3200
    assert history.passes == 100 * {"sandwich": 3, "joint": 2, "alternate": 1}[sampler]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("strong", [0.0, 1.0])
def test_every_loss_brings_the_smallest_nearer_to_what_teaches_it(
    network: PreTrainedModel, blocks: Blocks, tmp_path: Path, loss: str, strong: float
) -> None:
    supernet = SuperNetwork(copy.deepcopy(network))
    scheme = ElasticScheme(loss=Loss({loss: 1.0}), strong_teacher=strong)
    batch = blocks[:8]

    def distance(student: SuperNetwork) -> float:
        """The loss of the smallest sub-network of `student` to what taught the trained one."""
        teacher = SuperNetwork(network) if strong else supernet
        keeps = scheme.loss.keeps()
        with torch.no_grad(), Recorder(teacher, **keeps) as of_teacher, Recorder(student, **keeps) as of_student:
            taught_by = trace(teacher.model, batch, of_teacher)
            student.activate(SMALL)
            result = scheme.loss(trace(student.model, batch, of_student), taught_by)
            student.activate(student.base)
        return result.item()

    tuned(supernet.model, blocks, tmp_path, scheme, settings(1600))
    assert distance(supernet) < distance(SuperNetwork(copy.deepcopy(network)))


def test_a_strong_teacher_teaches_the_first_part_only(network: PreTrainedModel, blocks: Blocks, tmp_path: Path) -> None:
    base = copy.deepcopy(network)
    before = copy.deepcopy(base.state_dict())
    calls: list[Any] = []
    base.model.register_forward_hook(lambda *_: calls.append(1))
    supernet = SuperNetwork(network)
    finetune_supernet(
        AllWeights(supernet, SuperNetwork(base)),
        blocks,
        settings(320),
        ElasticScheme(strong_teacher=0.3),
        range_of(supernet.structure),
        state=tmp_path / "s",
        accelerator=Accelerator(cpu=True),
    )
    assert len(calls) == 3
    assert all(torch.equal(before[name], weight) for name, weight in base.state_dict().items())


def moved(network: PreTrainedModel, members: list[Architecture], move_idle: bool, name: str) -> dict[str, torch.Tensor]:
    """Train the full network for a step, so that there is momentum; then a step of `members` only. What moved?"""
    supernet = SuperNetwork(network)
    parameters = dict(network.named_parameters())
    settings = TrainSettings(1, 1, 1, 1e-2, 0, weight_decay=0.1)
    optimizer = OPTIMIZERS[name](loop.parameter_groups(network, parameters, settings), 1e-2)
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    batch = Batch(ids, ids, torch.arange(16).expand(2, 16))
    before: dict[str, torch.Tensor] = {}
    for active in ([supernet.base], members):
        before = {name: p.detach().clone() for name, p in parameters.items()}
        for architecture in active:
            supernet.activate(architecture)
            CE(trace(network, batch), None).backward()
        inactive = {} if move_idle else inactive_slices(supernet.structure, active)
        with restore_inactive(optimizer, parameters, inactive):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    supernet.activate(supernet.base)
    return {name: parameters[name].detach() != before[name] for name in parameters}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_decay_and_momentum_leave_inactive_slices_alone(network: PreTrainedModel, optimizer: str) -> None:
    at = {moves: moved(copy.deepcopy(network), [SMALL], moves, optimizer) for moves in (True, False)}
    gate, query = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    out, gone = "model.layers.2.self_attn.o_proj.weight", "model.layers.1.self_attn.v_proj.weight"
    assert at[True][gate][32:].all() and at[True][query][16:].all()  # what would happen
    still = at[False]
    assert still[gate][:32].all() and not still[gate][32:].any()
    assert still[query][:16].all() and not still[query][16:].any()
    assert still[out][:, :16].all() and not still[out][:, 16:].any()
    assert not still[gone].any()
    assert still["model.embed_tokens.weight"].all()


def test_what_any_member_of_a_step_used_is_not_inactive(network: PreTrainedModel) -> None:
    structure = describe(network.config)
    wide = Architecture(32, (LayerSizes(4, 2, 16), LayerSizes(0, 0, 0), LayerSizes(2, 1, 64)))
    inactive = inactive_slices(structure, [SMALL, wide])
    assert inactive["model.layers.1.self_attn.q_proj.weight"] is None
    assert [(d, i.tolist()) for d, i in inactive["model.layers.0.mlp.down_proj.weight"]] == [(1, list(range(32, 64)))]
    assert not {"model.layers.0.self_attn.q_proj.weight", "model.layers.2.mlp.up_proj.weight"} & inactive.keys()
    assert inactive_slices(structure, [structure.base]) == {}


def test_accumulated_parts_step_like_the_whole_batch(network: PreTrainedModel, blocks: Blocks, tmp_path: Path) -> None:
    blocks.table[:, 1, :5] = -100  # and parts that learn from different numbers of tokens
    blocks.table[::2, 1, :12] = -100
    start = copy.deepcopy(network.state_dict())
    ends = []
    for parts in (1, 4):
        network.load_state_dict(start)
        folder = tmp_path / str(parts)
        folder.mkdir()
        tuned(network, blocks, folder, ElasticScheme(), settings(16 * 4 * 6, batch_size=4, accumulation=parts))
        ends.append(copy.deepcopy(network.state_dict()))
    for name, value in ends[0].items():
        assert torch.allclose(value, ends[1][name], atol=2e-4), name
    assert any(not torch.equal(value, start[name]) for name, value in ends[0].items())


def test_gradient_checkpointing_changes_no_weight(network: PreTrainedModel, blocks: Blocks, tmp_path: Path) -> None:
    plain = copy.deepcopy(network)
    recomputed = 0

    def count(*_: Any) -> None:
        nonlocal recomputed
        recomputed += 1

    network.model.layers[0].mlp.act_fn.register_forward_hook(count)
    loss = Loss({"kl": 1.0, "relations": 0.5, "hidden": 0.5})
    for model, folder, on in ((network, tmp_path / "a", True), (plain, tmp_path / "b", False)):
        folder.mkdir()
        tuned(model, blocks, folder, ElasticScheme(loss=loss), settings(32 * 4, gradient_checkpointing=on))
    assert recomputed == 2 * 3 * 4  # three members, four steps, forward and again
    assert not network.is_gradient_checkpointing
    for (name, parameter), expected in zip(network.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(parameter, expected, atol=1e-6), name


def test_only_the_largest_is_regularised() -> None:
    block = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(2, 2))
    block[1].attention_dropout = 0.25
    block[1].p = 0.75  # of something else
    with without_dropout(block, True):
        assert block[0].p == 0 and block[1].attention_dropout == 0 and block[1].p == 0.75
    with without_dropout(block, False):
        assert block[0].p == 0.5 and block[1].attention_dropout == 0.25
    assert block[0].p == 0.5 and block[1].attention_dropout == 0.25


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(
            **tiny_families.COMMON,
            ffn_dim=56,
            word_embed_proj_dim=48,
            dropout=0.5,
            attention_dropout=0.5,
            layerdrop=0.0,
        ),
        Starcoder2Config(**tiny_families.SIZES, residual_dropout=0.5, embedding_dropout=0.5, attention_dropout=0.5),
    ],
    ids=lambda config: config.model_type,
)
def test_dropout_is_off_wherever_a_family_keeps_it(config: PreTrainedConfig) -> None:
    network = AutoModelForCausalLM.from_config(config).train()
    ids = torch.arange(1, 33)[None]
    with torch.no_grad(), without_dropout(network, True):
        assert torch.equal(network(ids).logits, network(ids).logits)
    with torch.no_grad():
        assert not torch.equal(network(ids).logits, network(ids).logits)


def test_healing_brings_a_network_nearer_to_the_base(network: PreTrainedModel, blocks: Blocks, tmp_path: Path) -> None:
    structure = describe(network.config)
    learning = {"state": tmp_path / "b.safetensors", "accelerator": Accelerator(cpu=True)}
    heal(network, network, blocks, settings(4800), loss=CE, **learning)  # what knows nothing teaches nothing
    cut = Architecture(32, (LayerSizes(2, 1, 32),) * 3)
    standalone = extract(network, structure, cut)
    batch = blocks[:4]

    def distance() -> float:
        with torch.no_grad():
            return Loss({"kl": 1.0})(trace(standalone, batch), trace(network, batch)).item()

    before = distance()
    base = copy.deepcopy(network)
    heal(standalone, base, blocks, settings(3200), state=tmp_path / "h.safetensors", accelerator=Accelerator(cpu=True))
    assert distance() < 0.7 * before
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), network.parameters(), strict=True))


def test_healing_in_half_precision_keeps_steps_that_a_half_cannot_hold(
    network: PreTrainedModel, blocks: Blocks, tmp_path: Path
) -> None:
    base = copy.deepcopy(network).bfloat16()
    standalone = extract(base, describe(network.config), Architecture(32, (LayerSizes(2, 1, 32),) * 3))
    before = copy.deepcopy(standalone.state_dict())
    how = settings(32 * 20, learning_rate=1e-6)  # by the text alone: a random base teaches nothing that would be kept
    heal(standalone, base, blocks, how, state=tmp_path / "h.safetensors", accelerator=Accelerator(cpu=True), loss=CE)
    after = standalone.get_parameter("model.layers.0.mlp.up_proj.weight")
    moved = after != before["model.layers.0.mlp.up_proj.weight"]
    assert after.dtype == torch.float32 and moved.float().mean() > 0.9


def test_a_state_that_takes_long_to_write_is_written_seldom(
    network: PreTrainedModel, blocks: Blocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 10 s in all, and 30 s to write: 5 % of the time is what goes into it."""
    now, written = 0.0, []

    def step(number: int, batch: Batch, backward: Backward) -> float:
        nonlocal now
        now += 10
        backward(CE(trace(network, batch), None))
        return 0.0

    def save(*_: Any) -> None:
        nonlocal now
        now += 30
        written.append(now)

    monkeypatch.setattr("supernet.training.state.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(TrainingState, "save", save)
    state = tmp_path / "s.safetensors"
    train(network, blocks, settings(32 * 150), step, what="t", state=state, accelerator=Accelerator(cpu=True))
    assert written == [100, 740, 1380]


def test_state_is_json_and_safetensors_only(network: PreTrainedModel, blocks: Blocks, tmp_path: Path) -> None:
    def step(number: int, batch: Batch, backward: Backward) -> float:
        backward(CE(trace(network, batch), None))
        return 0.0

    state = tmp_path / "s.safetensors"
    how = settings(96, checkpoint_seconds=0)
    train(network, blocks, how, step, what="t", state=state, accelerator=Accelerator(cpu=True), memory={"a": [0.1]})
    with safe_open(state, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    assert facts["step"] == 3 and facts["history"]["tokens"] == 96 and facts["memory"] == {"a": [0.1]}


def test_a_state_of_another_optimizer_is_refused(network: PreTrainedModel, blocks: Blocks, tmp_path: Path) -> None:
    for how in (settings(64, checkpoint_seconds=0, optimizer=name) for name in ("muon", "adamw")):
        if (tmp_path / "state.safetensors").exists():
            with pytest.raises(RequestError, match="a training by muon wrote it, not by adamw"):
                tuned(network, blocks, tmp_path, ElasticScheme(), how)
        else:
            tuned(network, blocks, tmp_path, ElasticScheme(), how)


def test_every_name_of_the_recipe_is_known() -> None:
    from compressor.recipe import Finetuning

    section = Finetuning()
    assert section.sampler in SAMPLERS and section.draw in DRAWS and section.optimizer is None
    assert section.parameters in PARAMETERS
    assert set(section.losses) <= set(LOSSES) and Finetuning(loss={"ce": 0.3, "kl": 0.7}).losses["kl"] == 0.7
    with pytest.raises(ValueError, match="weights must be above 0"):
        Finetuning(loss={"ce": 0.0})


def test_checkpointed_layers_are_computed_again_without_dropout(blocks: Blocks, tmp_path: Path) -> None:
    sizes = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Starcoder2Config(
        **sizes, num_key_value_heads=2, intermediate_size=64, residual_dropout=0.5, embedding_dropout=0.5
    )
    torch.manual_seed(0)
    networks = [AutoModelForCausalLM.from_config(config)]
    networks.append(copy.deepcopy(networks[0]))
    for network, on in zip(networks, (True, False), strict=True):
        folder = tmp_path / str(on)
        folder.mkdir()
        tuned(network, blocks, folder, ElasticScheme(loss=CE), settings(32 * 4, gradient_checkpointing=on))
    for parameter, expected in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.allclose(parameter, expected, atol=1e-6)


def test_a_draw_learns_once_a_step_whatever_parts_the_batch_has(
    network: PreTrainedModel, blocks: Blocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[float]] = []
    for number, parts in enumerate((1, 2)):
        seen.append([])
        monkeypatch.setattr(samplers.UniformGenes, "observe", lambda _, __, loss, kept=seen[-1]: kept.append(loss))
        folder = tmp_path / str(number)
        folder.mkdir()
        tuned(
            copy.deepcopy(network),
            blocks,
            folder,
            ElasticScheme(draw="genes", loss=CE),
            settings(32 * 4, accumulation=parts),
        )
    assert len(seen[0]) == len(seen[1]) > 0
    assert seen[0] == pytest.approx(seen[1], abs=1e-5)
