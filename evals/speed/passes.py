"""Timed passes of one network over some tokens, called as usual or replayed as CUDA graphs.

On a GPU, passes are replayed as CUDA graphs: at batch 1 Python takes several times longer to launch a pass than the GPU
to compute it, so that eager times say nothing about a network's size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

WARMUP = 3
"""Passes before a CUDA graph is captured."""
Passes = Callable[[], Iterator[float]]
"""A network's passes over some tokens, begun anew at each call: the seconds of reading them, and of each greedy token
behind them, all with one cache."""


def prepared(works: Sequence[tuple[nn.Module, torch.Tensor, int]]) -> tuple[list[Passes], bool]:
    """The passes of networks over ids, [batch, length], and so many tokens more; and whether they are replays of CUDA
    graphs: on a GPU, where the code of none of them waits for a result."""
    if all(ids.is_cuda for _, ids, _ in works):
        try:
            return [_replayed(*work) for work in works], True
        except RuntimeError as error:  # torch says why: code that synchronises cannot be captured
            log.info("no CUDA graph: %s", error)
    return [called(*work) for work in works], False


def called(model: nn.Module, ids: torch.Tensor, steps: int) -> Passes:
    """Passes called as usual, with a cache that grows."""

    def passes() -> Iterator[float]:
        state: dict[str, Any] = {"past_key_values": None, "input_ids": ids}

        def step() -> None:
            out = model(**state, use_cache=True, logits_to_keep=1)
            state["past_key_values"], state["input_ids"] = out.past_key_values, out.logits[:, -1:].argmax(-1)

        for _ in range(1 + steps):
            yield _seconds(ids, step)

    return passes


def _replayed(model: nn.Module, ids: torch.Tensor, steps: int) -> Passes:
    """Passes as replays of two CUDA graphs, which are captured here."""
    import torch
    from transformers import StaticCache

    length = ids.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=length + steps + 2 * WARMUP)
    token = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
    position = torch.full_like(token, length)
    # What a token more changes is put back where passes begin anew (transformers 5.23 counts in the cache).
    held = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    changed = [(tensor, tensor.clone()) for tensor in (token, position, *held)]

    def read() -> None:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    def write() -> None:
        out = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token.copy_(out.logits[:, -1:].argmax(-1))
        position.add_(1)

    replay_read, replay_write = map(_captured, (read, write))

    def passes() -> Iterator[float]:
        for tensor, value in changed:
            tensor.copy_(value)
        yield _seconds(ids, replay_read)
        for _ in range(steps):
            yield _seconds(ids, replay_write)

    return passes


def _seconds(ids: torch.Tensor, work: Callable[[], object]) -> float:
    """Seconds of some work where `ids` are, the device waited for."""
    clock = clock_of(ids.device)
    began = _now(ids, clock)
    work()
    return _now(ids, clock) - began


def _now(ids: torch.Tensor, clock: Callable[[], float]) -> float:
    import torch

    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return clock()


def _captured(work: Callable[[], None]) -> Callable[[], None]:
    """Some work as a replay of its CUDA graph; it is warmed up on a stream beside, as torch asks for.

    A graph knows addresses only: what the work reads and writes must stay alive as long as its replay does.
    """
    import torch

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARMUP):
            work()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay(alive: Callable[[], None] = work) -> None:
        graph.replay()

    return replay


def clock_of(device: torch.device) -> Callable[[], float]:
    """A clock of what runs on `device`. That of a single thread stands still while other work has its core."""
    import torch

    single = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if single else time.perf_counter


def _text_config(model: PreTrainedModel) -> PreTrainedConfig:
    return getattr(model.config, "text_config", None) or model.config


def context_of(model: PreTrainedModel, wanted: int) -> int:
    """Tokens that the network's context holds; `wanted` where its configuration does not say."""
    return getattr(_text_config(model), "max_position_embeddings", None) or wanted


def fitting(prompt: int, new: int, context: int) -> tuple[int, int]:
    """Prompt and new tokens, cut to what a context of so many tokens holds: the prompt to half of it, at least 2 new
    ones, since the first comes with the prompt."""
    prompt = max(1, min(prompt, context // 2))
    return prompt, max(2, min(new, context - prompt))


def random_ids(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    """Random token ids [batch, length], always the same ones, on the network's device."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, _text_config(model).vocab_size, (batch, length), generator=generator)
    return ids.to(next(model.parameters()).device)
