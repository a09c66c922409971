"""Losses by hand, and that going through the vocabulary in chunks changes neither value nor gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, LayerSizes
from supernet.training import losses
from supernet.training.data import IGNORED, Batch, Blocks
from supernet.training.losses import Loss, cross_entropy, forward_kl
from supernet.training.traces import HiddenStates, Recorder, trace
from tests.support import tiny_families
from tests.support.tiny_families import assert_close

SMALL = Architecture(32, (LayerSizes(2, 1, 32), LayerSizes(0, 0, 0), LayerSizes(2, 1, 64)))


@pytest.fixture
def batch() -> Batch:
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = IGNORED
    return Batch(ids, labels, torch.arange(12).expand(2, 12))


def test_token_losses_by_hand() -> None:
    logits = torch.zeros(1, 4)
    logits[0, 1] = math.log(3)  # token 1 has probability 3/6
    target, uniform = torch.tensor([1]), torch.zeros(1, 4)
    assert cross_entropy(logits, target, None, 1.0).item() == pytest.approx(math.log(2))
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # sum of 1/4 log(1/4 / p)
    assert forward_kl(logits, target, uniform, 1.0).item() == pytest.approx(by_hand)
    assert forward_kl(uniform, target, uniform, 1.0).item() == 0
    # Twice the logits at temperature 2 are the same distributions, times 4.
    assert forward_kl(2 * logits, target, uniform, 2.0).item() == pytest.approx(4 * by_hand)


def test_a_trace_and_its_head_are_the_models_own_logits(network: PreTrainedModel, batch: Batch) -> None:
    logits = network(input_ids=batch.ids, use_cache=False).logits[:, :-1][batch.learnt]
    seen = trace(network, batch)
    assert_close(seen.head(seen.hidden), logits)
    assert torch.equal(seen.targets, batch.ids[:, 1:][batch.learnt])
    assert_close(network(input_ids=batch.ids, use_cache=False).logits[:, :-1][batch.learnt], logits)


@pytest.mark.parametrize("family", tiny_families.CONFIGS)
def test_every_familys_head_packing_and_attention(family: str) -> None:
    """A head does what the family's does behind its projection (Gemma 2 caps, Granite scales); packed documents do not
    see one another, where the family's masks use positions; queries, keys and values are recorded."""
    model: Any = tiny_families.tiny_network(family)
    ids = torch.randint(3, 100, (1, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(16)[None] % 8
    supernet = SuperNetwork(model)
    with torch.no_grad(), Recorder(supernet, attention=True) as recorder:
        whole = trace(model, Batch(ids, ids, torch.arange(16)[None]), recorder)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        packed = trace(model, Batch(ids, ids, positions)).hidden[8:]
        alone = trace(model, Batch(ids[:, 8:], ids[:, 8:], positions[:, 8:])).hidden
    assert torch.allclose(whole.head(whole.hidden), logits, atol=1e-6)
    isolated = torch.allclose(packed, alone, atol=1e-5 * float(alone.abs().max()))
    assert isolated == (family not in ("opt", "opt-projected", "qwen3_5_text"))
    assert len(whole.attention) == (1 if family.startswith("gpt_neox") else 3)


@pytest.mark.parametrize("weights", [{"ce": 1.0}, {"kl": 1.0}, {"ce": 0.3, "kl": 0.7}])
def test_chunks_change_neither_loss_nor_gradients(
    network: PreTrainedModel, batch: Batch, weights: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    supernet = SuperNetwork(network)
    with torch.no_grad():
        teacher = trace(network, batch).detached()
    supernet.activate(SMALL)
    heads: list[int] = []

    def run(head: Any = None) -> tuple[float, list[Tensor]]:
        seen = trace(network, batch)
        if head:
            monkeypatch.setattr("supernet.device.LOGITS", 3 * seen.vocabulary)
            seen = HiddenStates(**(vars(seen) | {"head": head(seen.head)}))
        loss = Loss(weights)(seen, teacher)
        used = [p for p in network.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, used, allow_unused=True)
        return loss.item(), [g for g in gradients if g is not None]

    def counted(head: Any) -> Any:
        def of(states: Tensor) -> Tensor:
            heads.append(len(states))
            return head(states)

        return of

    whole, plain = run()
    chunked, gradients = run(counted)
    assert max(heads) == 3 and sum(heads) >= len(batch.learnt.nonzero())
    # A divergence is the difference of two cross-entropies of some nats each, so its error is absolute.
    assert chunked == pytest.approx(whole, rel=1e-6, abs=1e-6)
    assert len(plain) == len(gradients)
    for gradient, expected in zip(gradients, plain, strict=True):
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_a_weighted_sum_is_the_sum_and_no_teacher_means_the_data(network: PreTrainedModel, batch: Batch) -> None:
    supernet = SuperNetwork(network)
    with torch.no_grad(), Recorder(supernet, layers=True, attention=True) as recorder:
        teacher = trace(network, batch, recorder)
        supernet.activate(SMALL)
        student = trace(network, batch, recorder)
        parts = {name: Loss({name: 1.0})(student, teacher).item() for name in losses.LOSSES}
        weights = {"ce": 0.5, "kl": 2.0, "relations": 3.0, "hidden": 0.25}
        together = Loss(weights)(student, teacher).item()
        alone = Loss(weights)(student, None).item()
    assert together == pytest.approx(sum(weights[name] * value for name, value in parts.items()), rel=1e-5)
    assert all(value > 0 for value in parts.values())
    assert alone == pytest.approx(0.5 * parts["ce"])
    assert Loss({"kl": 2.0})(student, None).item() == pytest.approx(parts["ce"])


def test_state_losses_are_nothing_for_the_teacher_itself(network: PreTrainedModel, batch: Batch) -> None:
    with torch.no_grad(), Recorder(SuperNetwork(network), layers=True, attention=True) as recorder:
        seen = trace(network, batch, recorder)
    assert sorted(seen.layers) == [0, 1, 2]
    assert [part.shape[-1] for part in seen.attention] == [32, 16, 16]  # queries, keys, values
    assert losses.relations(seen, seen).item() == 0
    assert losses.hidden(seen, seen).item() == pytest.approx(0, abs=1e-6)


def of_logits(logits: Tensor) -> HiddenStates:
    """States that a head gives as they are."""
    nothing = torch.zeros(1, 1)
    targets = torch.zeros(len(logits), dtype=torch.int64)
    return HiddenStates(Batch(nothing, nothing, nothing), logits, targets, lambda states: states, logits.shape[1])


def test_the_temperature_of_a_loss_is_that_of_its_divergence() -> None:
    """Twice the logits at temperature 2 are the same distributions, times 4."""
    logits, teacher = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]]), torch.zeros(2, 3)
    warm = Loss({"kl": 1.0}, temperature=2.0)(of_logits(2 * logits), of_logits(teacher)).item()
    assert warm == pytest.approx(4 * Loss({"kl": 1.0})(of_logits(logits), of_logits(teacher)).item())


def test_a_held_out_loss_is_the_mean_over_tokens_and_not_over_blocks(network: PreTrainedModel, batch: Batch) -> None:
    blocks = Blocks(torch.stack([batch.ids, batch.labels, batch.positions], 1).int(), "", 2)
    with torch.no_grad():
        logits = network(input_ids=batch.ids, use_cache=False).logits[:, :-1][batch.learnt]
    expected = torch.nn.functional.cross_entropy(logits, batch.ids[:, 1:][batch.learnt]).item()
    for rows in (1, 2):
        loss = losses.held_out_loss(network, blocks, rows, torch.device("cpu"))
        assert loss == pytest.approx(expected, rel=1e-5)


def test_a_narrower_residual_is_compared_with_the_teachers_first_channels() -> None:
    """The cosine between (1, 0) and (3, 4) is 0.6."""
    student, teacher = of_logits(torch.zeros(1, 2)), of_logits(torch.zeros(1, 4))
    student.layers[1], teacher.layers[1] = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[3.0, 4.0, 1.0, 0.0]]])
    assert losses.hidden(student, teacher).item() == pytest.approx(0.4)


def test_relations_by_hand() -> None:
    """One head of width 1, two tokens in one document: pairs (0,0), (1,0), (1,1); a third token is a document of its
    own, paired with itself only."""
    batch = Batch(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([[0, 1, 0]]))

    def of(values: list[float]) -> HiddenStates:
        projected = [torch.tensor(values)[None, :, None]]
        return HiddenStates(batch, torch.zeros(1), torch.zeros(1), lambda h: h, 1, head_dim=1, attention=projected)

    # Scores: the teacher's 1, 2, 4, 9; the student's 1, 1, 1, 9.
    loss = losses.relations(of([1.0, 1.0, 3.0]), of([1.0, 2.0, 3.0])).item()
    assert loss == pytest.approx((0 + 1 + 9 + 0) / (1 + 4 + 16 + 81))


def test_relations_of_a_narrower_student_are_scaled_by_its_own_width() -> None:
    """One token: the student's one channel scores 1 / 1, the teacher's four 4 / 2."""
    batch = Batch(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64))

    def of(values: list[float]) -> HiddenStates:
        projected = [torch.tensor([[values]])]
        return HiddenStates(batch, torch.zeros(1), torch.zeros(1), lambda h: h, 1, head_dim=4, attention=projected)

    assert losses.relations(of([1.0]), of([2.0, 0.0, 0.0, 0.0])).item() == pytest.approx((1 - 2) ** 2 / 2**2)


def test_a_recorder_sees_the_sub_network_and_takes_its_hooks_off(network: PreTrainedModel, batch: Batch) -> None:
    supernet = SuperNetwork(network)
    supernet.activate(Architecture(32, (LayerSizes(2, 1, 32), LayerSizes(2, 1, 32), LayerSizes(0, 0, 64))))
    with torch.no_grad(), Recorder(supernet, layers=True, attention=True) as recorder:
        seen = trace(network, batch, recorder)
    assert [part.shape[-1] for part in seen.attention] == [16, 8, 8]  # the last layer that has attention
    assert not any(module._forward_hooks for module in network.modules())
