"""Speed of standalone networks, measured: reading a prompt and generating new tokens.

A machine's speed drifts and other work on it only ever adds time, so networks are timed in turn, never alone. torch is
imported only where something is measured: reports and saved speed tables are read without it.

On a GPU, passes are replayed as CUDA graphs: at batch 1 Python takes several times longer to launch a pass than the GPU
to compute it, so that eager times say nothing about a network's size.
"""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from supernet.device import device_name

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

WARMUP = 3
"""Passes before a CUDA graph is captured."""
CUDA_GRAPH = " (CUDA graph)"
TIMED, REPLAYED, FEWEST_RUNS = 45.0, 4.0, 3
"""Seconds that the runs of networks that are timed in turn may take, called as usual or replayed as CUDA graphs, whose
times hardly vary; and how many there are at the least: the longer a run is, the less its time varies."""
MEMORY_STEPS = 4
"""New tokens whose memory is looked at; what the cache needs for the others is added."""
READS, STEPS = 3, 16
"""Readings of the prompt, and decoding steps, in one round of timing."""


Passes = Callable[[], Iterator[float]]
"""A network's passes over some tokens, begun anew at each call: the seconds of reading them, and of each greedy token
behind them, all with one cache."""


class Times(NamedTuple):
    """Seconds to read the prompt, and of one decoding step."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one network's passes, as shares of the whole pass of a reference network beside them: of each layer,
    and of all else (embedding, head), in reading the prompt and in one decoding step; and the reference's seconds."""

    prefill_layers: list[float]
    prefill_rest: float
    decode_layers: list[float]
    decode_rest: float
    reference: Times


class Speed(BaseModel):
    """Measured speed, and where and at what it was measured: numbers of different runtimes do not compare."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    runtime: str
    """Such as `transformers`, `transformers (decompressed at load)` or `llama.cpp`."""
    device: str
    """`cpu`, `cuda`, or the accelerator's name."""
    threads: int | None = None
    """CPU threads; None on an accelerator."""
    dtype: str
    batch: int
    prompt: int
    """Tokens in the prompt."""
    new: int
    """Tokens generated."""
    prefill_tps: float
    """Prompt tokens per second, over the whole batch."""
    decode_tps: float
    """Generated tokens per second, over the whole batch."""
    throughput_tps: float | None = None
    """Generated tokens per second of the whole run, reading the prompt counted, over the whole batch."""
    ttft_ms: float | None = None
    """Milliseconds to the first new token."""
    latency_ms: float | None = None
    """Milliseconds of the whole run."""
    peak_memory_bytes: int | None = None
    """Weights, cache and working memory at their highest."""
    warmup: int | None = None
    repeats: int | None = None
    """Runs of which these are medians, after so many for warming up."""
    prefill_spread: float | None = None
    decode_spread: float | None = None
    """Interquartile range of the runs' times as a share of their median."""

    @property
    def where(self) -> str:
        """Runtime, device, threads and dtype in words."""
        threads = "" if self.threads is None else f", {self.threads} thread{'s' * (self.threads != 1)}"
        return f"{self.runtime}, {self.device}{threads}, {self.dtype}"

    @property
    def workload(self) -> str:
        """Batch, prompt and new tokens in words."""
        return f"batch {self.batch}, prompt of {self.prompt}, {self.new} new tokens"

    def comparable(self, other: Speed) -> bool:
        """Whether the two were measured in the same runtime, on the same device, at the same work."""
        keys = ("runtime", "device", "threads", "batch", "prompt", "new")
        return all(getattr(self, key) == getattr(other, key) for key in keys)


def compare_speed(
    models: Mapping[str, PreTrainedModel],
    *,
    batch: int = 1,
    prompt: int = 128,
    new: int = 128,
    repeats: int = 7,
    warmup: int = 1,
    threads: int | None = None,
) -> dict[str, Speed]:
    """The speed of several networks, timed in turn, so that what slows the machine down slows all of them alike.

    `prompt` and `new` are cut to what the shortest of the networks' contexts holds. `threads`: torch's while measuring
    (None: as they are). Times are medians of `repeats` runs after `warmup` others; of fewer where these take long
    (`runs_within`).
    """
    import torch

    # 1. The same work for all of them.
    context = min(context_of(model, prompt + new) for model in models.values())
    prompt, new = fitting(prompt, new, context)
    with torch.inference_mode(), _threads(threads):
        used_threads = torch.get_num_threads()
        ids = {name: _random_ids(model, batch, prompt) for name, model in models.items()}
        memory = {name: _peak_memory(model, ids[name], new) for name, model in models.items()}
        ready, graphs = _ready([(model, ids[name], new - 1) for name, model in models.items()])
        # 2. Runs in turn.
        passes = dict(zip(models, ready, strict=True))
        runs = _runs_in_turn(passes, warmup, repeats, REPLAYED if graphs else TIMED)
    # 3. Medians.
    speeds = {}
    for name, model in models.items():
        parameter = next(model.parameters())
        first = statistics.median(first for first, _ in runs[name])
        rest = statistics.median(rest for _, rest in runs[name])
        total = statistics.median(first + rest for first, rest in runs[name])
        speeds[name] = Speed(
            runtime=runtime_of(model) + (CUDA_GRAPH if graphs else ""),
            device=device_name(parameter.device),
            threads=used_threads if parameter.device.type == "cpu" else None,
            dtype=str(parameter.dtype).removeprefix("torch."),
            batch=batch,
            prompt=prompt,
            new=new,
            prefill_tps=batch * prompt / first,
            decode_tps=batch * (new - 1) / rest,
            throughput_tps=batch * new / total,
            ttft_ms=1e3 * first,
            latency_ms=1e3 * total,
            peak_memory_bytes=memory[name],
            warmup=warmup,
            repeats=len(runs[name]),
            prefill_spread=_spread_of([first for first, _ in runs[name]]),
            decode_spread=_spread_of([rest for _, rest in runs[name]]),
        )
    return speeds


def _runs_in_turn(
    passes: Mapping[str, Passes], warmup: int, repeats: int, within: float
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of reading and of generating in each run of every network, but for those that warm up. They take turns,
    and each round begins with another one. There are `repeats`, or fewer that take `within` seconds (`runs_within`)."""
    names = list(passes)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    turn = 0
    while turn < warmup + repeats:
        began = time.monotonic()
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            first, *steps = passes[name]()
            if turn >= warmup:
                runs[name].append((first, sum(steps)))
        if turn == warmup:  # the first that counts
            repeats = runs_within(time.monotonic() - began, repeats, within)
        turn += 1
    return runs


def speed_beside(
    model: PreTrainedModel, base: PreTrainedModel, known: Speed | None = None, **workload: int
) -> tuple[Speed, Speed]:
    """Speed of a network timed in turn with the base, and the base's. Many networks can be timed with two in memory.

    `known` is the base's speed beside an earlier network. A machine's speed drifts, so each number of `model` is then
    its ratio to the base's number here, times `known`, which is returned. `workload` is for `compare_speed`.
    """
    speed, base_speed = compare_speed({"model": model, "base": base}, **workload).values()
    if known is None:
        return speed, base_speed
    timed = ("prefill_tps", "decode_tps", "throughput_tps", "ttft_ms", "latency_ms")
    drift = {name: getattr(known, name) / getattr(base_speed, name) for name in timed}
    scaled: dict[str, Any] = {name: getattr(speed, name) * drift[name] for name in timed}
    # Where one of the two has no graph, both are timed without; what they are scaled to says what they are of.
    way = CUDA_GRAPH if known.runtime.endswith(CUDA_GRAPH) else ""
    scaled["runtime"] = speed.runtime.removesuffix(CUDA_GRAPH) + way
    return speed.model_copy(update=scaled), known


def runs_within(seconds: float, repeats: int, within: float = TIMED) -> int:
    """How many runs of so many seconds are timed, where there may be `repeats`: what fits into `within` seconds, but at
    least `FEWEST_RUNS`."""
    return min(repeats, max(FEWEST_RUNS, int(within / max(seconds, 1e-9))))


def _spread_of(times: Sequence[float]) -> float:
    """Interquartile range as a share of the median."""
    low, middle, high = np.percentile(times, [25, 50, 75])
    return float((high - low) / middle)


def runtime_of(model: PreTrainedModel) -> str:
    """What the network runs in. transformers unpacks compressed-tensors when it first uses them on a CPU."""
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is None:
        return "transformers"
    return "auto-round" if quantization.quant_method == "auto-round" else "transformers (decompressed at load)"


class Reference:
    """A network that others are timed beside: reading `prompt` tokens, and one more token half-way through generating
    `new`, in `rounds` rounds. Its CUDA graphs are captured once for all of them."""

    def __init__(self, model: PreTrainedModel, *, batch: int, prompt: int, new: int, rounds: int) -> None:
        steps = max(1, min(STEPS * rounds, new - 2))
        self._readings, self._steps = 1 + READS * rounds, steps + 1
        self._ids = _random_ids(model, batch, prompt), _random_ids(model, batch, prompt + (new - steps) // 2)
        self._eager = [_called(*work) for work in self._works(model)]
        self._graphs: list[Passes] | None = None
        self._model, self._capturable = model, True

    def _works(self, model: nn.Module) -> list[tuple[nn.Module, torch.Tensor, int]]:
        """What is timed of a network: reading alone, and generating behind a longer prompt."""
        return [(model, self._ids[0], 0), (model, self._ids[1], self._steps)]

    def beside(self, model: PreTrainedModel) -> tuple[Times, Times]:
        """Times of `model` and of the reference.

        They take turns pass by pass, and `model`'s time is its median ratio to the pass beside it, times the
        reference's seconds: a machine's speed drifts within a second by more than the differences that are to be
        measured.
        """
        import torch

        with torch.inference_mode():
            if self._capturable and self._graphs is None:  # its graphs first: what it cannot have, nobody has
                ready, self._capturable = _ready(self._works(self._model))
                self._graphs = ready if self._capturable else None
            own, of_reference = [_called(*work) for work in self._works(model)], self._eager
            if self._graphs is not None:
                ready, graphs = _ready(self._works(model))
                own, of_reference = (ready, self._graphs) if graphs else (own, of_reference)
            reads = [_in_turns(own[0], of_reference[0], 0)[0] for _ in range(self._readings)][1:]
            decode = _in_turns(own[1], of_reference[1], self._steps)[2:]
        ratios, seconds = zip(*(_ratio_and_seconds(pairs) for pairs in (reads, decode)), strict=True)
        return Times(ratios[0] * seconds[0], ratios[1] * seconds[1]), Times(*seconds)


def layer_times_beside(
    model: PreTrainedModel, reference: PreTrainedModel, *, batch: int, prompt: int, new: int, rounds: int
) -> LayerTimes:
    """As `Reference.beside`, on a CPU, of each layer of `model`: a pass of a network whose layers differ times all."""
    import torch

    steps = max(1, min(STEPS * rounds, new - 2))
    before = prompt + (new - steps) // 2
    with torch.inference_mode(), _LayerClock(model) as clock:
        ids = _random_ids(reference, batch, prompt), _random_ids(reference, batch, before)
        own, beside = (
            [_called(network, ids[0], 0), _called(network, ids[1], steps + 1)] for network in (model, reference)
        )
        reads = [clock.shares(_in_turns(own[0], beside[0], 0)) for _ in range(1 + READS * rounds)][1:]
        prefill = np.concatenate(reads)
        decode = clock.shares(_in_turns(own[1], beside[1], steps + 1))[2:]
    layers, rest, seconds = zip(*(_medians(passes) for passes in (prefill, decode)), strict=True)
    return LayerTimes(layers[0], rest[0], layers[1], rest[1], Times(*seconds))


def _medians(passes: NDArray[np.float64]) -> tuple[list[float], float, float]:
    """Of passes as `_LayerClock.shares` gives them: the median shares of layers, of the rest, and the lower quartile of
    the reference's seconds."""
    *layers, rest = np.median(passes[:, :-1], axis=0).tolist()
    return layers, rest, float(np.percentile(passes[:, -1], 25))


class _LayerClock:
    """Notes when each decoder layer of a standalone network begins, and when the last one ends. A context manager: its
    hooks are removed at the end."""

    def __init__(self, model: PreTrainedModel) -> None:
        from supernet.hooks import Hooks
        from supernet.uneven import family_of_standalone

        self._now = _clock_of(next(model.parameters()).device)
        self._marks: list[float] = []
        layers = list(model.get_submodule(family_of_standalone(model.config).layers).children())
        handles = [layer.register_forward_pre_hook(self._mark) for layer in layers]
        self._hooks = Hooks([*handles, layers[-1].register_forward_hook(self._mark)])
        self._each = len(layers) + 1

    def __enter__(self) -> _LayerClock:
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.remove()

    def _mark(self, *_: object) -> None:
        self._marks.append(self._now())

    def shares(self, pairs: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
        """Of the passes since the last call, of the network and of the reference: the shares of its layers and of the
        rest in the reference's seconds, and these seconds, [passes, layers + 2]."""
        marks, self._marks = np.array(self._marks).reshape(len(pairs), self._each), []
        seconds = np.array(pairs)
        layers = np.diff(marks, axis=1)
        rest = seconds[:, :1] - layers.sum(1, keepdims=True)
        return np.hstack([np.hstack([layers, rest]) / seconds[:, 1:], seconds[:, 1:]])


def _in_turns(model: Passes, reference: Passes, steps: int) -> list[tuple[float, float]]:
    """Seconds of each pass of `model` and of `reference`, one beside the other, each going first in turn."""
    passes = model(), reference()
    pairs = []
    for number in range(1 + steps):
        if number % 2:
            of_reference = next(passes[1])
            of_model = next(passes[0])
        else:
            of_model, of_reference = next(passes[0]), next(passes[1])
        pairs.append((of_model, of_reference))
    return pairs


def _ratio_and_seconds(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The median ratio of the first to the second, and the second's lower quartile, since other work on the machine
    only ever adds time."""
    timed = np.array(pairs)
    return float(np.median(timed[:, 0] / timed[:, 1])), float(np.percentile(timed[:, 1], 25))


def _ready(works: Sequence[tuple[nn.Module, torch.Tensor, int]]) -> tuple[list[Passes], bool]:
    """The passes of networks over ids, [batch, length], and so many tokens more; and whether they are replays of CUDA
    graphs: on a GPU, where the code of none of them waits for a result."""
    if all(ids.is_cuda for _, ids, _ in works):
        try:
            return [_replayed(*work) for work in works], True
        except RuntimeError as error:  # torch says why: code that synchronises cannot be captured
            log.info("no CUDA graph: %s", error)
    return [_called(*work) for work in works], False


def _called(model: nn.Module, ids: torch.Tensor, steps: int) -> Passes:
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
    clock = _clock_of(ids.device)
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


def _clock_of(device: torch.device) -> Callable[[], float]:
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


def _random_ids(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    """Random token ids [batch, length], always the same ones, on the network's device."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, _text_config(model).vocab_size, (batch, length), generator=generator)
    return ids.to(next(model.parameters()).device)


def _peak_memory(model: nn.Module, ids: torch.Tensor, new: int) -> int:
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
        list(_called(model, ids, new - 1)())
        return weights + torch.cuda.max_memory_allocated(ids.device) - before
    from torch.profiler import ProfilerActivity, profile

    with _native_stderr_closed(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        list(_called(model, ids, new - 1)())
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


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Within, torch uses so many threads (None: as many as before)."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
