"""What a network learns from. One function is one loss; `LOSSES` says which loss each member of a step gets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.finetune.data import IGNORED


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats. `logits` [batch, length, vocabulary], `labels` [batch, length]."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


def forward_kl(logits: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over learnt tokens of KL(teacher || student) in nats, times the squared temperature.

    `logits` and `teacher` are [batch, length, vocabulary]; positions whose next token is not learnt from do not count.
    """
    learnt = labels[:, 1:].flatten() != IGNORED
    student_log = F.log_softmax(logits[:, :-1].flatten(0, 1)[learnt].float() / temperature, dim=-1)
    teacher_log = F.log_softmax(teacher[:, :-1].flatten(0, 1)[learnt].float() / temperature, dim=-1)
    return F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True) * temperature**2


MemberLoss = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]
"""(logits, labels, the largest member's detached logits or None, the frozen base's logits or None) -> loss."""


def ce(logits: Tensor, labels: Tensor, largest: Tensor | None, base: Tensor | None) -> Tensor:
    """Cross-entropy for every member (LLaMA-NAS)."""
    return cross_entropy(logits, labels)


def in_place(logits: Tensor, labels: Tensor, largest: Tensor | None, base: Tensor | None) -> Tensor:
    """In-place distillation (BigNAS): the largest learns from the data, the others from the largest's soft labels."""
    return cross_entropy(logits, labels) if largest is None else forward_kl(logits, largest, labels)


def base_kl(logits: Tensor, labels: Tensor, largest: Tensor | None, base: Tensor | None) -> Tensor:
    """Distillation from the frozen base for every member (InstaTune's strong teacher, g = 1)."""
    assert base is not None, "base_kl needs the frozen base"
    return forward_kl(logits, base, labels)


LOSSES: dict[str, MemberLoss] = {"ce": ce, "in-place": in_place, "base-kl": base_kl}
NEEDS_BASE = frozenset({"base-kl"})


@torch.no_grad()
def held_out_loss(forward: Callable[[Tensor], Tensor], ids: Tensor, labels: Tensor, batch: int) -> float:
    """Mean next-token cross-entropy in nats over held-out blocks, `batch` blocks at a time."""
    total, count = 0.0, 0
    for start in range(0, len(ids), batch):
        part = labels[start : start + batch]
        learnt = int((part[:, 1:] != IGNORED).sum())
        if learnt:
            total += float(cross_entropy(forward(ids[start : start + batch]), part)) * learnt
            count += learnt
    return total / max(count, 1)
