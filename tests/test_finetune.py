"""Data, samplers, losses and the loop: hand-computed cases, and a killed run that ends at the same weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from torch import Tensor

from compressor.architecture import Architecture, LayerSizes
from compressor.elastic.supernet import SuperNetwork
from compressor.errors import RequestError
from compressor.finetune.data import IGNORED, Blocks, encode_row, pack, read_rows
from compressor.finetune.elastic import finetune_supernet, heal
from compressor.finetune.loop import Backward, TrainSettings, train
from compressor.finetune.losses import LOSSES, cross_entropy, forward_kl
from compressor.finetune.samplers import SAMPLERS, SizedSpace, alternate, joint, sandwich

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}\n{% else %}A:{{ m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


def test_packing_joins_documents_with_end_marks(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "abc"}\n{"text": "de"}\n{"text": "fgh"}\n')
    tokenizer = tiny.byte_tokenizer()
    blocks = pack(str(file), tokenizer, 5)
    a, b, c, d, e, f = (tokenizer(letter).input_ids[0] for letter in "abcdef")
    assert blocks.ids.tolist() == [[a, b, c, 257, d], [e, 257, f, *tokenizer("gh").input_ids]]
    assert torch.equal(blocks.ids, blocks.labels) and blocks.documents == 3


def test_conversations_are_learnt_from_where_the_assistant_speaks() -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "q"), ("assistant", "z")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    ids, labels = encode_row(row, tokenizer, "x")
    assert tokenizer.decode(ids) == "U:hi\nA:yo\nU:q\nA:z\n"
    learnt = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    assert tokenizer.decode(learnt) == "yo\nz\n"


def test_conversations_need_a_chat_template() -> None:
    with pytest.raises(RequestError, match="chat template"):
        encode_row({"messages": [{"role": "assistant", "content": "x"}]}, tiny.byte_tokenizer(), "x")


def test_plain_text_and_parquet_are_read(tmp_path: Path) -> None:
    import pandas

    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    pandas.DataFrame({"text": ["three", "four"]}).to_parquet(tmp_path / "b.parquet")
    assert [row["text"].strip() for row in read_rows(str(tmp_path))] == ["one", "two", "three", "four"]


def test_every_epoch_visits_every_block_once_in_its_own_order() -> None:
    blocks = Blocks(torch.arange(7)[:, None], torch.arange(7)[:, None], "", 7)
    seen = torch.cat([blocks.batch(step, 2, seed=1)[0].flatten() for step in range(7)]).tolist()
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7))
    assert seen[:7] != seen[7:]
    assert seen[4:6] == blocks.batch(2, 2, seed=1)[0].flatten().tolist()


def test_losses_by_hand() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 1] = math.log(3)  # the first token predicts token 1 with probability 3/6
    labels = torch.tensor([[0, 1, IGNORED]])
    assert cross_entropy(logits, labels).item() == pytest.approx(math.log(2))
    teacher = torch.zeros(1, 3, 4)  # uniform: KL = sum 1/4 log(1/4 / p) = 1/4 log(1/2) + 3/4 log(3/2)
    assert forward_kl(logits, teacher, labels).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert forward_kl(teacher, teacher, labels).item() == 0


class Sizes:
    """A space of one number, so that draws can be told apart."""

    def largest(self) -> Architecture:
        return self.of(8)

    def smallest(self) -> Architecture:
        return self.of(1)

    def sample(self, rng: np.random.Generator) -> Architecture:
        return self.of(int(rng.integers(2, 8)))

    def of(self, width: int) -> Architecture:
        return Architecture(4, (LayerSizes(1, 1, width),))


def widths(members: list[Any]) -> list[int]:
    return [member.architecture.layers[0].intermediate_size for member in members]


def test_who_takes_part_in_a_step() -> None:
    rng = np.random.default_rng(0)
    assert widths(sandwich(Sizes())(0, rng))[::2] == [8, 1]
    assert 1 < widths(sandwich(Sizes())(0, rng))[1] < 8
    assert widths(alternate(Sizes())(0, rng)) == [8]
    assert len(alternate(Sizes())(1, rng)) == 1 and widths(alternate(Sizes())(1, rng))[0] < 8
    assert widths(joint(Sizes())(0, rng))[0] == 8 and len(joint(Sizes())(0, rng)) == 2
    assert set(SAMPLERS) == {"sandwich", "alternate", "joint"}


def test_sizes_are_drawn_evenly() -> None:
    drawn = []
    space = SizedSpace(Sizes().of(8), Sizes().of(1), 100, 200, lambda rng, n: drawn.append(n) or Sizes().of(2))
    rng = np.random.default_rng(1)
    for _ in range(2000):
        space.sample(rng)
    assert 100 <= min(drawn) < 105 and 195 < max(drawn) <= 200
    assert abs(np.mean(drawn) - 150) < 3


def settings(tokens: int, **more: Any) -> TrainSettings:
    return TrainSettings(tokens=tokens, batch_size=2, sequence_length=16, learning_rate=1e-2, seed=3, **more)


@pytest.fixture
def network(tmp_path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny.checkpoint(tmp_path / "m"), dtype=torch.float32)


@pytest.fixture
def blocks(tmp_path: Path) -> Blocks:
    return pack(str(tiny.data(tmp_path / "d.jsonl")), tiny.byte_tokenizer(), 16)


class Killed(Exception):
    pass


def test_a_killed_run_ends_at_the_same_weights_bit_for_bit(network: Any, blocks: Blocks, tmp_path: Path) -> None:
    start = {name: value.clone() for name, value in network.state_dict().items()}
    accelerator = Accelerator(cpu=True)
    stop_at: int | None = None

    def step(number: int, ids: Tensor, labels: Tensor, backward: Backward) -> float:
        if number == stop_at:
            raise Killed
        loss = cross_entropy(network(input_ids=ids).logits, labels)
        backward(loss)
        return float(loss.detach())

    def run(state: Path) -> None:
        train(
            network, blocks, settings(320, checkpoint_seconds=0), step, what="t", state=state, accelerator=accelerator
        )

    run(tmp_path / "whole.safetensors")
    whole = {name: value.clone() for name, value in network.state_dict().items()}
    assert any(not torch.equal(whole[name], start[name]) for name in whole)
    network.load_state_dict(start)
    stop_at = 6
    with pytest.raises(Killed):
        run(tmp_path / "killed.safetensors")
    network.load_state_dict(start)  # whatever memory held is gone
    stop_at = None
    run(tmp_path / "killed.safetensors")
    for name, value in network.state_dict().items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("loss", list(LOSSES))
def test_fine_tuning_makes_small_sub_networks_better(
    network: Any, blocks: Blocks, tmp_path: Path, sampler: str, loss: str
) -> None:
    import copy

    base = copy.deepcopy(network)
    supernet = SuperNetwork(network)
    small = Architecture(supernet.base.hidden_size, (LayerSizes(2, 1, 32),) * 3)

    class Two:
        def largest(self) -> Architecture:
            return supernet.base

        def smallest(self) -> Architecture:
            return small

        def sample(self, rng: np.random.Generator) -> Architecture:
            return small

    history = finetune_supernet(
        supernet,
        blocks,
        settings(1600),
        SAMPLERS[sampler](Two()),
        LOSSES[loss],
        state=tmp_path / "s.safetensors",
        accelerator=Accelerator(cpu=True),
        base=base,
        watched={"largest": supernet.base, "smallest": small},
    )
    assert supernet.current == supernet.base
    if loss != "base-kl":  # the random base has nothing to teach
        assert history.curve[-1]["smallest"] < history.curve[0]["smallest"] - 0.3
        assert history.curve[-1]["largest"] < history.curve[0]["largest"] - 0.3
    assert history.tokens == 1600 and history.passes >= 50


def test_healing_brings_a_network_nearer_to_the_base(network: Any, blocks: Blocks, tmp_path: Path) -> None:
    import copy

    from compressor.elastic.slicing import extract
    from compressor.families import describe

    structure = describe(network.config)
    cut = Architecture(32, (LayerSizes(2, 1, 32),) * 3)
    standalone = extract(network, structure, cut)
    ids = blocks.ids[:4]

    def distance() -> float:
        with torch.no_grad():
            return float(forward_kl(standalone(ids).logits, network(ids).logits, ids))

    before = distance()
    base = copy.deepcopy(network)
    heal(standalone, base, blocks, settings(3200), state=tmp_path / "h.safetensors", accelerator=Accelerator(cpu=True))
    assert distance() < 0.7 * before
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), network.parameters(), strict=True))


def test_state_is_json_and_safetensors_only(network: Any, blocks: Blocks, tmp_path: Path) -> None:
    from safetensors import safe_open

    def step(number: int, ids: Tensor, labels: Tensor, backward: Backward) -> float:
        backward(cross_entropy(network(input_ids=ids).logits, labels))
        return 0.0

    state = tmp_path / "s.safetensors"
    train(
        network, blocks, settings(96, checkpoint_seconds=0), step, what="t", state=state,
        accelerator=Accelerator(cpu=True),
    )  # fmt: skip
    with safe_open(state, "pt") as file:
        assert int(file.metadata()["step"]) == 3
        assert json.loads(file.metadata()["history"])["tokens"] == 96
