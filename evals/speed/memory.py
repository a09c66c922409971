"""Memory that a network needs to read a prompt and generate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from evals.speed.passes import called

if TYPE_CHECKING:
    import torch
    from torch import nn

MEMORY_STEPS = 4
"""New tokens whose memory is looked at; what the cache needs for the others is added."""


def peak_memory(model: nn.Module, ids: torch.Tensor, new: int) -> int:
    """Bytes of the weights and the most that a run holds beside them: at most, where reading the prompt needs most."""
    import torch

    later, new = max(0, new - MEMORY_STEPS), min(new, MEMORY_STEPS)
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    if later:
        weights += later * _bytes_of_a_token(model, ids)
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
        before = torch.cuda.memory_allocated(ids.device)
        torch.cuda.reset_peak_memory_stats(ids.device)
        list(called(model, ids, new - 1)())
        return weights + torch.cuda.max_memory_allocated(ids.device) - before
    from torch.profiler import ProfilerActivity, profile

    with _native_stderr_closed(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        list(called(model, ids, new - 1)())
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return weights + int(held.max(initial=0))


def _bytes_of_a_token(model: nn.Module, ids: torch.Tensor) -> int:
    """Bytes by which the cache grows with each token of all rows."""
    import torch

    out = model(input_ids=ids[:, :1], use_cache=True, logits_to_keep=1)
    held = []
    for _ in range(2):
        out = model(input_ids=ids[:, :1], past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        kept = [value for layer in out.past_key_values.layers for value in vars(layer).values()]
        held.append(sum(value.nbytes for value in kept if isinstance(value, torch.Tensor)))
    return held[1] - held[0]


@contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """Within, nothing is written to the process's stderr: torch 2.13's profiler does, past Python."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)
