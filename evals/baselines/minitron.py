"""Minitron: neurons and residual channels by the norm of their activations, at the same share of both.

Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation, arXiv 2407.14679: the
activation-based importance of neurons and embedding channels, without the search for an architecture.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from evals.baselines import Baseline, Cut, PruningContext, closest, ordered_cut, with_ffn
from supernet.architecture import Architecture
from supernet.common.errors import RequestError
from supernet.importance import activation


def width(context: PruningContext) -> Cut:
    """The base with all heads and layers, whose residual and FFN keep, as nearly as possible, the same share."""
    structure = context.structure
    if structure.fixed_hidden:
        raise RequestError(
            f"minitron-width: the residual width cannot change ({structure.fixed_hidden}); leave it out of --baselines"
        )
    base = structure.base
    step = max(layer.num_attention_heads for layer in base.layers)  # families' classes want a multiple of the heads
    neurons = max(layer.intermediate_size for layer in base.layers)
    candidates: list[tuple[float, Architecture]] = []
    for hidden in range(step, base.hidden_size + 1, step):
        try:
            candidate = closest(context, partial(with_ffn, replace(base, hidden_size=hidden)), "residual and FFN width")
        except RequestError:
            continue
        kept = max(layer.intermediate_size for layer in candidate.layers)
        candidates.append((abs(hidden / base.hidden_size - kept / neurons), candidate))
    if not candidates:
        raise RequestError(f"{context.parameters:,} parameters cannot be reached by residual and FFN width")
    architecture = min(candidates, key=lambda candidate: candidate[0])[1]
    return ordered_cut(context, activation(context.supernet(), context.calibration), architecture)


BASELINES = (Baseline("minitron-width", "Muralidharan et al., arXiv 2407.14679", width),)
