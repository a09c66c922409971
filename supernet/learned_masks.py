"""Learned masks on frozen weights: which units a network can do without, found by gradient descent.

Lottery Jackpots (Zhang et al., arXiv 2104.08700) for units in place of single weights: every unit has a score, the
units with the highest scores are kept, the weights never change, and the scores are trained to keep the masked network
near the full one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supernet.activation import SuperNetwork
from supernet.hooks import Hooks, frozen
from supernet.ordering import Reader, Scores, Units, readers

Masks = dict[Units, Tensor]


def learn_masks(
    supernet: SuperNetwork,
    batches: Iterable[Tensor],
    first: Scores,
    *,
    epochs: int = 8,
    rate: float = 0.1,
    momentum: float = 0.9,
    least: float = 0.5,
    seed: int = 0,
) -> Scores:
    """Scores whose order is an ordering of the units, learnt on calibration batches of token ids [batch, length].

    The paper's mask is 1 for the top share of the scores m, and dL/dm = dL/d(mask), straight through.
    Here L is the KL divergence from the full network to the masked one, and the mask multiplies the inputs of the
    modules that read a unit. The share that is kept is drawn for every step, uniformly from `least` to 1, since an
    ordering has to serve all sizes. Scores start between 0.99 and 1, in the order of `first` (the paper's 0.99 for what
    magnitude would prune, 1 for the rest), so that neighbours change places easily. `rate` is the peak of a cosine. The
    paper's limit on how many places change in a step has no meaning where the share is drawn; the falling rate takes
    its place. Raises ValueError where there are no batches.
    """
    data = list(batches)
    if not data:
        raise ValueError("no calibration batch was given")
    if not first:
        return {}
    scores = {units: _spread(value).requires_grad_() for units, value in first.items()}
    device = data[0].device
    optimizer = torch.optim.SGD(scores.values(), lr=rate, momentum=momentum)
    generator = torch.Generator().manual_seed(seed)
    # Masks that are in force; without any, the full network runs.
    masks: Masks = {}
    hooks = [
        reader.module.register_forward_pre_hook(_masking(reader, masks))
        for reader in readers(supernet)
        if reader.inputs.units in scores
    ]
    with Hooks(hooks), frozen(supernet.model):
        steps = epochs * len(data)
        for step in range(steps):
            # 1. Gradients of KL(full network || masked network) with a random share of the units kept.
            ids = data[step % len(data)]
            share = least + (1 - least) * float(torch.rand((), generator=generator))
            for row in ids.split(1):  # three times one row's logits are in memory
                masks.clear()
                with torch.no_grad():
                    full = F.log_softmax(supernet.model(input_ids=row, use_cache=False).logits.float(), -1)
                with torch.enable_grad():
                    masks |= {units: straight_through(score, share).to(device) for units, score in scores.items()}
                    masked = F.log_softmax(supernet.model(input_ids=row, use_cache=False).logits.float(), -1)
                    loss = F.kl_div(masked, full, log_target=True, reduction="sum")
                    (loss / ids.numel()).backward()
            # 2. A step of the scores.
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.step()
            optimizer.zero_grad()
    return {units: score.detach() for units, score in scores.items()}


def straight_through(scores: Tensor, share: float) -> Tensor:
    """The mask of the top `share` of the units, at least one; its gradient is passed on to the scores unchanged."""
    kept = max(1, round(share * scores.shape[-1]))
    mask = torch.zeros_like(scores).scatter(-1, scores.topk(kept).indices, 1.0)
    return mask + scores - scores.detach()


def _spread(first: Tensor) -> Tensor:
    """Scores from 0.99 to 1 in the order of `first`."""
    ranks = first.argsort(stable=True).argsort().double()
    return 0.99 + 0.01 * ranks / max(first.shape[-1] - 1, 1)


def _masking(reader: Reader, masks: Masks) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
    """A hook that multiplies the inputs of a module by the mask of its units, where there is one."""
    units, width = reader.inputs.units, reader.inputs.width

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if units not in masks:
            return None
        mask = masks[units].to(inputs[0].dtype).flatten().repeat_interleave(width)
        return inputs[0] * mask, *inputs[1:]

    return hook
