"""Whole layers removed, by five criteria.

- `shortgpt`: least block influence, 1 - E[cos(x, y)] of a layer's input and output. Men et al., ShortGPT,
  arXiv 2403.03853, eq. 1.
- `late-block`: the consecutive layers of least angular distance. Gromov et al., The Unreasonable Ineffectiveness of the
  Deeper Layers, arXiv 2403.17887, eq. 3.
- `sleb`: the layer of least calibration loss without it, measured again after each. Song et al., SLEB,
  arXiv 2402.09025.
- `minitron-depth`: the same, measured once. Muralidharan et al., arXiv 2407.14679.
- `nemotron-depth`: least normalised square error of the last hidden states without it, measured once. Taghibakhshi et
  al., Nemotron Elastic, arXiv 2511.16664.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.baselines import Baseline, Cut, PruningContext, as_batch, ordered_cut, removable, removal, without
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture
from supernet.common.progress import bar
from supernet.hooks import Hooks
from supernet.importance import block_influence, skipped_error, wanda
from supernet.training.data import Batch
from supernet.training.losses import token_losses
from supernet.training.traces import LayerCache, trace


def residuals(supernet: SuperNetwork, ids: Tensor) -> list[Tensor]:
    """The residual stream before each layer and after the last one: depth + 1 tensors [batch, length, hidden]."""
    stream: list[Tensor] = []
    layers = list(supernet.model.get_submodule(supernet.family.layers).children())

    def before(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        stream.append(inputs[0].detach())

    def after(_: torch.nn.Module, __: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        stream.append((output if isinstance(output, Tensor) else output[0]).detach())

    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(after))
    with Hooks(hooks), torch.no_grad():
        trace(supernet.model, as_batch(ids))
    return stream


def angular_distance(inputs: Tensor, outputs: Tensor) -> Tensor:
    """arccos(cos(x, y)) / pi of residuals [..., hidden] -> [...], 0 for parallel and 1 for opposite ones.

    Gromov et al., arXiv 2403.17887, eq. 3.
    """
    cosine = F.cosine_similarity(inputs.double(), outputs.double(), dim=-1)
    return torch.arccos(cosine.clamp(-1, 1)) / math.pi


def shortgpt(context: PruningContext) -> Cut:
    """The base without the layers of the least block influence, measured once on the whole network (eq. 1)."""
    influence = block_influence(context.supernet(), context.calibration)
    order = sorted(range(len(influence)), key=influence.__getitem__)
    return _cut(context, removal(context, (order[:n] for n in range(1, len(order)))))


def late_block(context: PruningContext) -> Cut:
    """The base without the n consecutive layers that turn the last token's residual least (eq. 3)."""
    block = least_turning(context.supernet(), context.calibration)
    return _cut(context, removal(context, (block(n) for n in range(1, len(context.structure.base.layers)))))


def least_turning(supernet: SuperNetwork, batches: Sequence[Tensor]) -> Callable[[int], range]:
    """The n consecutive layers of the least mean angular distance between the last token's residuals, as a function of
    n; `batches` are token ids [rows, length]."""
    last_tokens = [torch.stack(residuals(supernet, ids))[:, :, -1] for ids in batches]
    last = torch.cat(last_tokens, dim=1)  # [depth + 1, sequences, hidden]

    def block(n: int) -> range:
        distances = [float(angular_distance(last[start], last[start + n]).mean()) for start in range(len(last) - n)]
        start = min(range(len(distances)), key=distances.__getitem__)
        return range(start, start + n)

    return block


def sleb(context: PruningContext) -> Cut:
    """The base without one layer after another, always the one without which the calibration loss is least."""
    loss, base, most = calibration_loss(context), context.structure.base, removable(context)
    removals: list[set[int]] = [set()]
    with bar("choosing layers to remove", sum(len(base.layers) - n for n in range(most))) as progress:
        for _ in range(most):
            losses = losses_without_one_more(loss, base, removals[-1], progress.advance)
            removals.append(removals[-1] | {min(losses, key=losses.__getitem__)})
    return _cut(context, removal(context, removals))


def one_shot_loss(context: PruningContext) -> Cut:
    """The base without the layers without each of which, alone, the calibration loss is least."""
    loss, base = calibration_loss(context), context.structure.base
    with bar("choosing layers to remove", len(base.layers)) as progress:
        losses = losses_without_one_more(loss, base, set(), progress.advance)
    order = sorted(losses, key=losses.__getitem__)
    return _cut(context, removal(context, (order[:n] for n in range(1, len(order)))))


def nemotron_depth(context: PruningContext) -> Cut:
    """The base without the layers without each of which, alone, the last hidden states change least."""
    errors = skipped_error(context.supernet(), context.calibration)
    order = sorted(range(len(errors)), key=errors.__getitem__)
    return _cut(context, removal(context, (order[:n] for n in range(1, len(order)))))


def losses_without_one_more(
    loss: Callable[[Architecture], float], base: Architecture, removed: set[int], progress: Callable[[], object]
) -> dict[int, float]:
    """The loss without the `removed` layers and one more, by that layer. `progress` is called after each."""
    losses = {}
    for index in range(len(base.layers)):
        if index not in removed:
            losses[index] = loss(without(base, removed | {index}))
            progress()
    return losses


def calibration_loss(context: PruningContext) -> Callable[[Architecture], float]:
    """`loss_in`, on the calibration text."""
    return loss_in(context.supernet(), [as_batch(ids) for ids in context.calibration])


def loss_in(supernet: SuperNetwork, batches: Sequence[Batch]) -> Callable[[Architecture], float]:
    """Mean next-token cross-entropy on `batches`, in nats per token, as a function of the architecture; quick for one
    that has leading layers in common with the one before it."""
    passes = LayerCache(supernet)

    @torch.no_grad()
    def loss(architecture: Architecture) -> float:
        total, count = 0.0, 0
        with supernet.activated(architecture):
            for number, batch in enumerate(batches):
                states = passes.trace(number, batch)
                total += float(token_losses({"ce": 1.0}, states, None, 1.0))
                count += len(states.targets)
        return total / max(1, count)

    return loss


def _cut(context: PruningContext, architecture: Architecture) -> Cut:
    """The cut to this architecture; where the FFN is narrowed too, the neurons of the highest `wanda` scores stay."""
    return ordered_cut(context, wanda(context.supernet(), context.calibration), architecture)


BASELINES = (
    Baseline("shortgpt", "Men et al., arXiv 2403.03853", shortgpt),
    Baseline("late-block", "Gromov et al., arXiv 2403.17887", late_block),
    Baseline("sleb", "Song et al., arXiv 2402.09025", sleb),
    Baseline("minitron-depth", "Muralidharan et al., arXiv 2407.14679", one_shot_loss),
    Baseline("nemotron-depth", "Taghibakhshi et al., arXiv 2511.16664", nemotron_depth),
)
