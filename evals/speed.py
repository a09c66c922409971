"""Speed of networks: measured on standalone networks, and predicted for architectures from a table of timings.

Machines drift and are shared, so nothing is timed alone: networks take turns, and other work only ever adds time.
Nothing here needs torch until something is measured: a saved `SpeedTable` predicts for its device on any machine.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compressor.architecture import Architecture, LayerSizes, Structure

if TYPE_CHECKING:
    import torch
    from torch import nn

SCHEMA = 1
MLP_SIZES = 8
"""Widths of an MLP that are timed, beside 0; what lies between is interpolated. Likewise heads of attention."""
ATTENTION_SIZES = 4
MIXED = 16
"""Random architectures that are timed along with the designed ones."""
HELD_OUT = 6
"""Of those, the ones that are first left out, to state the table's error in it."""
SMOOTHING = 2.0
"""Pull of the table's timings towards straight lines between neighbouring sizes, against timings worth 1 each."""
READS, STEPS = 3, 16
"""Readings of the prompt, and decoding steps, in one round of timing."""


Times = tuple[float, float]
"""Two numbers: of reading the prompt, and of one decoding step."""


@dataclass(frozen=True)
class Speed:
    """Medians over `repeats` runs, after `warmup` more: read `prompt` tokens, then write `new` greedily with a
    key-value cache.

    `prefill_tps` and `decode_tps` are tokens per second over the whole batch; `ttft_ms`: time to the first token;
    `latency_ms`: the whole run; `throughput_tps`: new tokens per second of the whole run, over the whole batch.
    `prefill_spread`, `decode_spread`: interquartile range of the runs' times as a share of their median.
    `peak_memory_bytes`: weights, cache and working memory at their highest.
    """

    runtime: str
    device: str
    threads: int | None
    dtype: str
    batch: int
    prompt: int
    new: int
    prefill_tps: float
    decode_tps: float
    throughput_tps: float
    ttft_ms: float
    latency_ms: float
    peak_memory_bytes: int
    warmup: int
    repeats: int
    prefill_spread: float
    decode_spread: float

    def to_dict(self) -> dict[str, Any]:
        """What report.json holds of it."""
        return asdict(self)


def compare_speed(
    models: Mapping[str, nn.Module],
    *,
    batch: int = 1,
    prompt: int = 128,
    new: int = 128,
    repeats: int = 7,
    warmup: int = 1,
    threads: int | None = None,
) -> dict[str, Speed]:
    """Time several networks in turn, round by round, so that what slows the machine down slows all of them alike.

    `prompt` and `new` are cut to what the shortest of the networks' contexts holds. `threads`: torch's for the time
    of measuring (None: as they are).
    """
    import torch

    context = min(_context(model, prompt + new) for model in models.values())
    prompt, new = _fitting(prompt, new, context)
    names = list(models)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with torch.inference_mode(), _threads(threads):
        used_threads = torch.get_num_threads()
        ids = {name: _random_ids(model, batch, prompt) for name, model in models.items()}
        memory = {name: _peak_memory(model, ids[name], new) for name, model in models.items()}
        for turn in range(warmup + repeats):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                first, steps = _run(models[name], ids[name], new)
                if turn >= warmup:
                    runs[name].append((first, sum(steps)))
    result = {}
    for name, model in models.items():
        parameter = next(model.parameters())
        first = statistics.median(first for first, _ in runs[name])
        rest = statistics.median(rest for _, rest in runs[name])
        total = statistics.median(first + rest for first, rest in runs[name])
        result[name] = Speed(
            runtime=runtime_of(model),
            device=_device_name(parameter.device),
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
            repeats=repeats,
            prefill_spread=_spread_of([first for first, _ in runs[name]]),
            decode_spread=_spread_of([rest for _, rest in runs[name]]),
        )
    return result


def speed_beside(model: nn.Module, base: nn.Module, known: Speed | None = None, **workload: Any) -> tuple[Speed, Speed]:
    """Speed of a network that takes turns with the base, and the base's: many are timed with two in memory.

    `known` is the base's speed beside an earlier network. Machines drift, so `model` is then stated as its share in
    the base here, times `known`, which is returned.
    """
    found, beside = compare_speed({"model": model, "base": base}, **workload).values()
    if known is None:
        return found, beside
    timed = ("prefill_tps", "decode_tps", "throughput_tps", "ttft_ms", "latency_ms")
    drift = {name: getattr(known, name) / getattr(beside, name) for name in timed}
    return replace(found, **{name: getattr(found, name) * drift[name] for name in timed}), known


def _spread_of(times: Sequence[float]) -> float:
    """Interquartile range as a share of the median."""
    low, middle, high = np.percentile(times, [25, 50, 75])
    return float((high - low) / middle)


def runtime_of(model: Any) -> str:
    """What the network runs in. compressed-tensors are unpacked when transformers first uses them on a CPU."""
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is None:
        return "transformers"
    return "auto-round" if quantization.quant_method == "auto-round" else "transformers (decompressed at load)"


@dataclass(frozen=True)
class PartTimes:
    """Seconds of a network's parts: `fixed` (embedding, head, all that is outside the layers), and attention and MLP
    at some sizes, ascending from 0 (a removed half-block), between which timings are interpolated.

    The size of an attention block is the number of its query and key-value heads together, that of an MLP its width,
    times its experts where it has any. Where the residual width is not the base's, a half-block counts as many heads
    or neurons of the base's width as have its weights.
    """

    fixed: float
    attention_sizes: list[int]
    attention: list[float]
    mlp_sizes: list[int]
    mlp: list[float]

    def seconds(self, architecture: Architecture, hidden_size: int) -> float:
        """The architecture's time. `hidden_size`: the base's."""
        width = architecture.hidden_size / hidden_size
        return self.fixed + sum(
            float(np.interp(_attention_size(layer) * width, self.attention_sizes, self.attention))
            + float(np.interp(_mlp_size(layer) * width, self.mlp_sizes, self.mlp))
            for layer in architecture.layers
        )

    @classmethod
    def fit(
        cls,
        architectures: Sequence[Architecture],
        seconds: NDArray[np.float64],
        attention_sizes: Sequence[int],
        mlp_sizes: Sequence[int],
        hidden_size: int,
    ) -> PartTimes:
        """Least squares of relative errors over the parts' times, none negative, with a pull towards smoothness."""
        from scipy.optimize import nnls

        attention, mlp = np.array(attention_sizes[1:], float), np.array(mlp_sizes[1:], float)
        rows = []
        for architecture in architectures:
            width = architecture.hidden_size / hidden_size
            of_attention = sum(_shares(_attention_size(layer) * width, attention) for layer in architecture.layers)
            of_mlp = sum(_shares(_mlp_size(layer) * width, mlp) for layer in architecture.layers)
            rows.append(np.concatenate([[1.0], of_attention, of_mlp]))
        matrix = np.array(rows) / seconds[:, None]
        unit = float(np.linalg.norm(matrix, axis=0).mean()) * SMOOTHING
        straight = []
        for start, sizes in ((1, attention), (1 + len(attention), mlp)):
            for i in range(1, len(sizes) - 1):
                before, after = sizes[i] - sizes[i - 1], sizes[i + 1] - sizes[i]
                row = np.zeros(matrix.shape[1])
                row[start + i - 1 : start + i + 2] = np.array([after, -before - after, before]) / (before + after)
                straight.append(unit * row)
        wanted = np.concatenate([np.ones(len(rows)), np.zeros(len(straight))])
        solution, _ = nnls(np.vstack([matrix, *straight]), wanted)
        split = 1 + len(attention)
        return cls(
            float(solution[0]),
            [int(size) for size in attention_sizes],
            [0.0, *map(float, solution[1:split])],
            [int(size) for size in mlp_sizes],
            [0.0, *map(float, solution[split:])],
        )


@dataclass(frozen=True)
class SpeedTable:
    """speed.json: what each part of the network takes on one device, so that an architecture's speed is a sum.

    `prefill`: reading `prompt` tokens; `decode`: one more token half-way through writing `new`; both for `batch`
    sequences. `check`: median relative errors on random architectures that were left out for that purpose.
    """

    runtime: str
    device: str
    threads: int | None
    dtype: str
    batch: int
    prompt: int
    new: int
    hidden_size: int
    prefill: PartTimes
    decode: PartTimes
    check: dict[str, float]
    vocab_size: int | None = None

    def predict(self, architecture: Architecture) -> dict[str, float]:
        """`prefill_tps` and `decode_tps`, tokens per second over the whole batch, and seconds of `latency`: reading
        the prompt and writing `new` tokens."""
        prefill = self.prefill.seconds(architecture, self.hidden_size)
        decode = self.decode.seconds(architecture, self.hidden_size)
        return {
            "prefill_tps": self.batch * self.prompt / prefill,
            "decode_tps": self.batch / decode,
            "latency": prefill + (self.new - 1) * decode,
        }

    def save(self, path: Path) -> None:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")
        os.replace(temporary, path)  # noqa: PTH105 - atomic on purpose

    @classmethod
    def load(cls, path: Path) -> SpeedTable:
        """Raises ValueError for a file that is not a speed table of this schema."""
        try:
            values = json.loads(path.read_text())
            if values.pop("schema", None) != SCHEMA:
                raise ValueError(f"its schema is not {SCHEMA}")
            values |= {name: PartTimes(**values[name]) for name in ("prefill", "decode")}
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a speed table ({error})") from error

    @classmethod
    def measure(
        cls,
        build: Callable[[Architecture], nn.Module],
        structure: Structure,
        *,
        batch: int = 1,
        prompt: int = 128,
        new: int = 128,
        rounds: int = 5,
        seed: int = 0,
        on_step: Callable[[], None] = lambda: None,
    ) -> SpeedTable:
        """Time a designed set of sub-networks, each in turns with the base, and solve for the parts.

        `build` gives a standalone network for an architecture, on the device to measure. Two networks are in memory
        at a time. `on_step` is called after each of `steps(structure)` networks.
        """
        import torch

        base = structure.base
        sizes = sizes_to_time(structure)
        design = designed(structure, seed)
        reference = build(base)
        prompt, new = _fitting(prompt, new, _context(reference, prompt + new))
        pairs: list[tuple[Times, Times]] = []
        for architecture in design:
            pairs.append(
                time_beside(build(architecture), reference, batch=batch, prompt=prompt, new=new, rounds=rounds)
            )
            on_step()
        # The machine's speed drifts; the base, timed beside every network, tells by how much.
        timed = np.array(pairs)  # [networks, itself or the base, prefill or decode]
        seconds = timed[:, 0] / timed[:, 1] * np.median(timed[:, 1], axis=0)
        fitted, held_out = range(len(design) - HELD_OUT), range(len(design) - HELD_OUT, len(design))
        times: list[PartTimes] = []
        errors = {}
        for column, name in enumerate(("prefill", "decode")):
            known = PartTimes.fit([design[i] for i in fitted], seconds[fitted, column], *sizes, base.hidden_size)
            guesses = np.array([known.seconds(design[i], base.hidden_size) for i in held_out])
            errors[f"{name}_median_error"] = float(np.median(np.abs(guesses / seconds[held_out, column] - 1)))
            times.append(PartTimes.fit(design, seconds[:, column], *sizes, base.hidden_size))
        parameter = next(reference.parameters())
        return cls(
            runtime_of(reference),
            _device_name(parameter.device),
            torch.get_num_threads() if parameter.device.type == "cpu" else None,
            str(parameter.dtype).removeprefix("torch."),
            batch,
            prompt,
            new,
            base.hidden_size,
            times[0],
            times[1],
            errors,
            structure.vocab_size,
        )

    def made_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether these are timings of this device in this dtype and, on a CPU, on as many threads as torch has now."""
        import torch

        threads = torch.get_num_threads() if device.type == "cpu" else None
        now = (_device_name(device), threads, str(dtype).removeprefix("torch."))
        return (self.device, self.threads, self.dtype) == now

    def fits(self, structure: Structure) -> bool:
        """Whether it was measured on a network of these sizes, of whatever depth: it holds times of single layers."""
        sizes = sizes_to_time(structure)
        return (
            self.hidden_size == structure.base.hidden_size
            and self.vocab_size in (structure.vocab_size, None)  # tables of earlier versions do not say
            and all((part.attention_sizes, part.mlp_sizes) == sizes for part in (self.prefill, self.decode))
        )

    @staticmethod
    def steps(structure: Structure) -> int:
        """Networks that `measure` times."""
        return len(designed(structure, 0))


def time_beside(
    model: nn.Module, reference: nn.Module, *, batch: int, prompt: int, new: int, rounds: int
) -> tuple[Times, Times]:
    """Seconds of `model` and of `reference`: to read `prompt` tokens, and of one more token half-way through writing
    `new`, in `rounds` rounds.

    They take turns pass by pass, and `model`'s time is the median of its share in the pass beside it: a machine's speed
    drifts within a second by more than what is to be told apart.
    """
    import torch

    steps = max(1, min(STEPS * rounds, new - 2))
    before = prompt + (new - steps) // 2
    with torch.inference_mode():
        ids = _random_ids(reference, batch, prompt)
        reading = [_in_turns(model, reference, ids, 0)[0] for _ in range(1 + READS * rounds)][1:]
        writing = _in_turns(model, reference, _random_ids(reference, batch, before), steps + 1)[2:]
    mine, beside = zip(*(_share_and_seconds(pairs) for pairs in (reading, writing)), strict=True)
    return (mine[0] * beside[0], mine[1] * beside[1]), (beside[0], beside[1])


def _in_turns(model: nn.Module, reference: nn.Module, ids: torch.Tensor, steps: int) -> list[tuple[float, float]]:
    """Seconds of each pass of both networks, each pass beside the other's."""
    passes = _passes(model, ids, steps), _passes(reference, ids, steps)
    pairs = []
    for number in range(1 + steps):
        if number % 2:
            second = next(passes[1])
            first = next(passes[0])
        else:
            first, second = next(passes[0]), next(passes[1])
        pairs.append((first, second))
    return pairs


def _share_and_seconds(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The median share of the first in the second, and the second's lower quartile, since other work on the machine
    only ever adds time."""
    timed = np.array(pairs)
    return float(np.median(timed[:, 0] / timed[:, 1])), float(np.percentile(timed[:, 1], 25))


def _attention_size(layer: LayerSizes) -> int:
    return layer.num_attention_heads + layer.num_key_value_heads


def _mlp_size(layer: LayerSizes) -> int:
    return layer.intermediate_size * max(1, layer.num_experts)


def _shares(size: float, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much of the timing at each of `sizes` makes up the one at `size`, by linear interpolation from 0 at 0."""
    grid = np.concatenate([[0.0], sizes])
    return np.array([np.interp(size, grid, row) for row in np.eye(len(grid))[1:]])


def sizes_to_time(structure: Structure) -> tuple[list[int], list[int]]:
    """Sizes of attention blocks and of MLPs to time, from 0 to the largest layer's."""
    layers = structure.base.layers
    largest = max(layers, key=_attention_size)
    ratio = largest.num_attention_heads // largest.num_key_value_heads
    groups = _spread(largest.num_key_value_heads, ATTENTION_SIZES, 1)
    widest = max(layers, key=_mlp_size)
    widths = _spread(widest.intermediate_size, MLP_SIZES, 32)
    return [group * (1 + ratio) for group in groups], [width * max(1, widest.num_experts) for width in widths]


def _spread(largest: int, count: int, unit: int) -> list[int]:
    """0 and up to `count` sizes in even steps of whole `unit`s, the last one `largest`."""
    step = max(1, -(-largest // (unit * count))) * unit
    return [0, *range(step, largest, step), largest]


def designed(structure: Structure, seed: int) -> list[Architecture]:
    """Networks whose times tell the parts apart: each size in all layers at once, halves removed, fewer layers, and
    random mixtures last."""
    base, depth = structure.base, len(structure.base.layers)
    rng = np.random.default_rng(seed)
    ratios = [layer.num_attention_heads // max(layer.num_key_value_heads, 1) for layer in base.layers]
    groups = _spread(max(layer.num_key_value_heads for layer in base.layers), ATTENTION_SIZES, 1)
    widths = _spread(max(layer.intermediate_size for layer in base.layers), MLP_SIZES, 32)

    def sized(index: int, group: int, width: int) -> LayerSizes:
        full = base.layers[index]
        group = min(group, full.num_key_value_heads)
        return LayerSizes(group * ratios[index], group, min(width, full.intermediate_size), full.num_experts)

    def network(rows: Sequence[tuple[int, int]]) -> Architecture:
        return Architecture(base.hidden_size, tuple(sized(i, *row) for i, row in enumerate(rows)))

    full = (groups[-1], widths[-1])
    design = [network([full] * depth)]
    design += [network([(groups[-1], width)] * depth) for width in widths[:-1]]
    design += [network([(group, widths[-1])] * depth) for group in groups[1:-1]]
    # A cache needs one block of attention; the others may go.
    first = next(i for i, layer in enumerate(base.layers) if layer.num_key_value_heads)
    design.append(network([full if i == first else (0, widths[-1]) for i in range(depth)]))
    for count in {max(first + 1, depth // 4), max(first + 1, depth // 2), max(first + 1, 3 * depth // 4)}:
        design.append(network([full] * count + [(0, 0)] * (depth - count)))
    for _ in range(MIXED):
        present = rng.uniform(0.6, 1.0)
        rows = []
        for i in range(depth):
            group = int(rng.choice(groups[1:])) if i == first or rng.random() < present else 0
            width = int(rng.choice(widths[1:])) if i == first or rng.random() < present else 0
            rows.append((group, width))
        design.append(network(rows))
    return list(dict.fromkeys(design))


def _run(model: nn.Module, ids: torch.Tensor, new: int) -> tuple[float, list[float]]:
    """Seconds to the first new token, and of each of the `new - 1` decoding steps after it."""
    first, *steps = _passes(model, ids, new - 1)
    return first, steps


def _passes(model: nn.Module, ids: torch.Tensor, steps: int) -> Iterator[float]:
    """Seconds of each pass: over `ids`, then over `steps` greedy tokens one by one, all with one cache."""
    import torch

    # The time of a single thread does not run while other work has its core.
    clock = time.thread_time if _is_single_thread(ids.device) else time.perf_counter

    def now() -> float:
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)
        return clock()

    cache, token = None, ids
    for _ in range(1 + steps):
        began = now()
        out = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        yield now() - began


def _is_single_thread(device: torch.device) -> bool:
    import torch

    return device.type == "cpu" and torch.get_num_threads() == 1


def _text_config(model: Any) -> Any:
    return getattr(model.config, "text_config", None) or model.config


def _context(model: Any, wanted: int) -> int:
    return getattr(_text_config(model), "max_position_embeddings", None) or wanted


def _fitting(prompt: int, new: int, context: int) -> tuple[int, int]:
    """Prompt and new tokens that a context holds, at least 2 of them new: the first comes with the prompt."""
    prompt = max(1, min(prompt, context // 2))
    return prompt, max(2, min(new, context - prompt))


def _random_ids(model: Any, batch: int, length: int) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, _text_config(model).vocab_size, (batch, length), generator=generator)
    return ids.to(next(model.parameters()).device)


def _peak_memory(model: nn.Module, ids: torch.Tensor, new: int) -> int:
    """Bytes of the weights, and of what a run holds beside them at its highest (on a CPU: of its first steps)."""
    import torch

    tensors = [*model.parameters(), *model.buffers()]
    weights = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
        before = torch.cuda.memory_allocated(ids.device)
        torch.cuda.reset_peak_memory_stats(ids.device)
        _run(model, ids, new)
        return weights + torch.cuda.max_memory_allocated(ids.device) - before
    from torch.profiler import ProfilerActivity, profile

    with _native_stderr_closed(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        _run(model, ids, min(new, 4))
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return weights + int(held.max(initial=0))


@contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """The profiler of torch 2.13 announces itself on the process's stderr, past Python."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
