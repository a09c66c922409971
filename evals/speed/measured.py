"""Speed of standalone networks, measured: reading a prompt and generating new tokens.

A machine's speed drifts and other work on it only ever adds time, so networks are timed in turn, never alone. torch is
imported only where something is measured: reports and saved speed tables are read without it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from evals.speed.memory import peak_memory
from evals.speed.passes import Passes, context_of, fitting, prepared, random_ids
from supernet.device import device_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CUDA_GRAPH = " (CUDA graph)"
TIMED, REPLAYED, FEWEST_RUNS = 45.0, 4.0, 3
"""Seconds that the runs of networks that are timed in turn may take, called as usual or replayed as CUDA graphs, whose
times hardly vary; and how many there are at the least: the longer a run is, the less its time varies."""


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
        ids = {name: random_ids(model, batch, prompt) for name, model in models.items()}
        memory = {name: peak_memory(model, ids[name], new) for name, model in models.items()}
        ready, graphs = prepared([(model, ids[name], new - 1) for name, model in models.items()])
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
