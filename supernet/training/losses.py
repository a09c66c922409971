"""What a network learns from: a weighted sum of losses against the data and against a teacher.

One function is one loss. `TOKEN_LOSSES` compare next-token distributions. They are computed in chunks of tokens, head
included, so that the logits of all tokens are never in memory at once. `STATE_LOSSES` compare hidden states and
attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from supernet.device import logits_at_once
from supernet.training.data import Blocks
from supernet.training.traces import HiddenStates, trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cross_entropy(logits: Tensor, targets: Tensor, teacher: Tensor | None, temperature: float) -> Tensor:
    """Next-token cross-entropy in nats, summed over tokens. `logits` [tokens, vocabulary], `targets` [tokens]."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def forward_kl(logits: Tensor, targets: Tensor, teacher: Tensor | None, temperature: float) -> Tensor:
    """KL(teacher || student) in nats, summed over tokens, times the squared temperature, which keeps the size of
    gradients (Hinton et al., arXiv 1503.02531, section 2.1). Both logits are [tokens, vocabulary].

    Computed for each token as a cross-entropy minus the teacher's entropy, which keeps fewer arrays of logits than
    `kl_div` and is faster.
    """
    assert teacher is not None
    student, teacher = (x.float() / temperature if temperature != 1 else x.float() for x in (logits, teacher))
    soft = F.softmax(teacher, dim=-1)
    entropy = F.cross_entropy(teacher, soft, reduction="none")
    return (F.cross_entropy(student, soft, reduction="none") - entropy).sum() * temperature**2


def relations(student: HiddenStates, teacher: HiddenStates) -> Tensor:
    """Self-attention relations of the last layer (AutoDistil, arXiv 2201.12507, section 3.2), a scalar.

    For each A of queries, keys and values, the scores A A^T / sqrt(d) of all pairs of tokens within a document, the
    later with the earlier; the mean squared difference of teacher's and student's, summed over the three. As in the
    published code, before the softmax. Divided by the teacher's mean square, so that a weight means the same for every
    network. The student's channels are split into as many of the teacher's heads as divide both widths.
    """
    positions = student.batch.positions
    length = positions.shape[1]
    index = torch.arange(length, device=positions.device)
    start = index - positions  # where each token's document begins: equal within a document
    pairs = (start[:, :, None] == start[:, None, :]) & (index[:, None] >= index)
    total = student.hidden.new_zeros(())
    for projected, aim in zip(student.attention, teacher.attention, strict=True):
        common = gcd(projected.shape[-1], aim.shape[-1])
        heads = max(h for h in range(1, aim.shape[-1] // teacher.head_dim + 1) if common % h == 0)
        target = _scores(aim, heads)
        difference = (_scores(projected, heads) - target).square().mean(1)
        total = total + (difference * pairs).sum() / (target.square().mean(1) * pairs).sum()
    return total


def _scores(projected: Tensor, heads: int) -> Tensor:
    """[rows, length, channels] -> scaled products of all pairs [rows, heads, length, length]."""
    split = projected.float().unflatten(-1, (heads, -1)).transpose(1, 2)
    return split @ split.transpose(-1, -2) / split.shape[-1] ** 0.5


def hidden(student: HiddenStates, teacher: HiddenStates) -> Tensor:
    """One minus the cosine between teacher's and student's hidden states, mean over tokens and the student's layers.

    A student's residual channels are the first of the teacher's, so no projection is needed.
    """
    distances = [
        1 - F.cosine_similarity(states.float(), teacher.layers[index][..., : states.shape[-1]].float(), dim=-1).mean()
        for index, states in student.layers.items()
    ]
    return torch.stack(distances).mean()


TokenLoss = Callable[[Tensor, Tensor, "Tensor | None", float], Tensor]
StateLoss = Callable[[HiddenStates, HiddenStates], Tensor]

TOKEN_LOSSES: dict[str, TokenLoss] = {"ce": cross_entropy, "kl": forward_kl}
STATE_LOSSES: dict[str, StateLoss] = {"relations": relations, "hidden": hidden}
LOSSES = (*TOKEN_LOSSES, *STATE_LOSSES)


@dataclass(frozen=True)
class Loss:
    """A weighted sum of losses by name, and the temperature of its distributions.

    A network that has no teacher (the largest, where the largest teaches) learns from the data alone: with the weight
    of `ce`, as in InstaTune (arXiv 2308.15609), or without that with 1, as in BigNAS (arXiv 2003.11142).
    """

    weights: Mapping[str, float]
    temperature: float = 1.0

    @property
    def taught(self) -> bool:
        """Whether one of the losses needs a teacher."""
        return set(self.weights) != {"ce"}

    def keeps(self) -> dict[str, bool]:
        """What a `Recorder` has to keep for it, as the recorder's arguments."""
        return {"attention": "relations" in self.weights, "layers": "hidden" in self.weights}

    def __call__(self, student: HiddenStates, teacher: HiddenStates | None) -> Tensor:
        """Mean over the tokens learnt from (token losses) plus the state losses, weighted; a scalar."""
        weights = self.weights if teacher is not None else {"ce": self.weights.get("ce", 1.0)}
        total = student.hidden.new_zeros((), dtype=torch.float32)
        in_tokens = {name: weight for name, weight in weights.items() if name in TOKEN_LOSSES}
        if in_tokens:
            total = total + token_losses(in_tokens, student, teacher, self.temperature) / max(1, len(student.targets))
        for name, weight in weights.items():
            if name in STATE_LOSSES:
                assert teacher is not None
                total = total + weight * STATE_LOSSES[name](student, teacher)
        return total


def token_losses(
    weights: Mapping[str, float], student: HiddenStates, teacher: HiddenStates | None, temperature: float
) -> Tensor:
    """Weighted sum over tokens of the token losses, in chunks of tokens.

    A chunk's logits, the teacher's too, are computed where they are used, dropped, and computed again for the backward
    pass, so at most one chunk's are in memory. Where one chunk is enough, they are computed once.
    """

    def chunk_loss(hidden: Tensor, targets: Tensor, teacher_hidden: Tensor | None) -> Tensor:
        logits = student.head(hidden)
        teacher_logits = None
        if teacher is not None and teacher_hidden is not None:
            with torch.no_grad():
                teacher_logits = teacher.head(teacher_hidden)
        losses = [
            weight * TOKEN_LOSSES[name](logits, targets, teacher_logits, temperature)
            for name, weight in weights.items()
        ]
        return torch.stack(losses).sum()

    size = max(1, logits_at_once(student.hidden.device) // student.vocabulary)
    hidden, targets = student.hidden.split(size), student.targets.split(size)
    teacher_hidden: Sequence[Tensor | None] = [None] * len(hidden)
    if teacher is not None and set(weights) != {"ce"}:
        teacher_hidden = teacher.hidden.split(size)
    chunks = list(zip(hidden, targets, teacher_hidden, strict=True))
    if len(chunks) == 1:
        return chunk_loss(*chunks[0])
    total = student.hidden.new_zeros((), dtype=torch.float32)
    for chunk in chunks:
        total = total + checkpoint(chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False)
    return total


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, data: Blocks, rows: int, device: torch.device) -> float:
    """Mean next-token cross-entropy in nats over held-out blocks, `rows` at a time, of the active sub-network."""
    total, count = 0.0, 0
    for start in range(0, len(data), rows):
        part = trace(model, data[start : start + rows].to(device))
        total += float(token_losses({"ce": 1.0}, part, None, 1.0))
        count += len(part.targets)
    return total / max(count, 1)


def divergence(student: HiddenStates, teacher: HiddenStates) -> Tensor:
    """KL(teacher || student), nats per token."""
    return token_losses({"kl": 1.0}, student, teacher, 1.0) / max(1, len(student.targets))
