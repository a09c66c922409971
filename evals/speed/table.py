"""Speed of architectures that were never timed, as the sum of their parts' times on one device.

torch is imported only where something is measured: a saved `SpeedTable` predicts for its device on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from evals.speed.beside import READS, STEPS, Reference, Times, layer_times_beside
from evals.speed.measured import runtime_of
from evals.speed.passes import context_of, fitting
from supernet.architecture import Architecture, LayerSizes, Structure
from supernet.common.errors import reading
from supernet.common.files import read_json, write_json
from supernet.device import device_name

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SCHEMA = 1
MLP_SIZES = 8
"""Widths of an MLP that are timed, beside 0; between them is interpolated."""
ATTENTION_SIZES = 4
"""Likewise, numbers of heads of attention."""
MIXED = 16
"""Random architectures that are timed along with the designed ones, where networks are timed as wholes."""
HELD_OUT = 6
"""Of the random ones, so many are left out in turn, to state the table's error in it."""
LAYERS = 90
"""Layers that are timed at least where each is timed by itself, in 4 to 12 networks."""
SMOOTHING = 2.0
"""Pull of the table's timings towards straight lines between neighbouring sizes, against timings worth 1 each."""


@dataclass(frozen=True)
class Timed:
    """Seconds of an architecture's layers together and, with `rest`, of all else in the network: of a whole network, of
    one layer, or (with no layers) of the rest alone."""

    architecture: Architecture
    seconds: float
    rest: bool = True


@dataclass(frozen=True)
class PartTimes:
    """Seconds of a network's parts: `fixed` (embedding, head, and so on), and `attention` and `mlp` at some
    sizes, ascending from 0 (a removed half-block), between which timings are interpolated.

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
        """The architecture's time, in seconds. `hidden_size`: the base's."""
        width = architecture.hidden_size / hidden_size
        return self.fixed + sum(
            float(np.interp(_attention_size(layer) * width, self.attention_sizes, self.attention))
            + float(np.interp(_mlp_size(layer) * width, self.mlp_sizes, self.mlp))
            for layer in architecture.layers
        )

    @classmethod
    def fit(
        cls, timed: Sequence[Timed], attention_sizes: Sequence[int], mlp_sizes: Sequence[int], hidden_size: int
    ) -> PartTimes:
        """Parts' times from those of sums of them: least squares of relative errors, none negative, with a pull towards
        straight lines between neighbouring sizes."""
        from scipy.optimize import nnls  # slow to import, and not needed to predict

        # 1. A row for each sum: how often it has each part, over its seconds, so that errors are relative.
        attention, mlp = np.array(attention_sizes[1:], float), np.array(mlp_sizes[1:], float)
        rows = []
        for part in timed:
            width = part.architecture.hidden_size / hidden_size
            of_attention, of_mlp = np.zeros(len(attention)), np.zeros(len(mlp))
            for layer in part.architecture.layers:
                of_attention += _shares(_attention_size(layer) * width, attention)
                of_mlp += _shares(_mlp_size(layer) * width, mlp)
            rows.append(np.concatenate([[float(part.rest)], of_attention, of_mlp]) / part.seconds)
        matrix = np.array(rows)
        # 2. A row for each three neighbouring sizes: how far the middle one lies from the straight line.
        weight = float(np.linalg.norm(matrix, axis=0).mean()) * SMOOTHING
        bends = []
        for start, sizes in ((1, attention), (1 + len(attention), mlp)):
            for i in range(1, len(sizes) - 1):
                before, after = sizes[i] - sizes[i - 1], sizes[i + 1] - sizes[i]
                row = np.zeros(matrix.shape[1])
                row[start + i - 1 : start + i + 2] = np.array([after, -before - after, before]) / (before + after)
                bends.append(weight * row)
        # 3. Solve.
        targets = np.concatenate([np.ones(len(rows)), np.zeros(len(bends))])
        solution, _ = nnls(np.vstack([matrix, *bends]), targets)
        split = 1 + len(attention)
        return cls(
            float(solution[0]),
            [int(size) for size in attention_sizes],
            [0.0, *map(float, solution[1:split])],
            [int(size) for size in mlp_sizes],
            [0.0, *map(float, solution[split:])],
        )

    @classmethod
    def fit_and_check(
        cls,
        networks: Sequence[Sequence[Timed]],
        design: Sequence[Architecture],
        sizes: tuple[Sequence[int], Sequence[int]],
        hidden_size: int,
    ) -> tuple[PartTimes, float]:
        """Parts' times from the timings of all networks of a design; and the median relative error for each of the last
        `HELD_OUT` of them by the timings of the others."""

        def fit(rows: Sequence[Sequence[Timed]]) -> PartTimes:
            return cls.fit([part for network in rows for part in network], *sizes, hidden_size)

        off = []
        for i in range(max(1, len(design) - HELD_OUT), len(design)):
            without = fit([*networks[:i], *networks[i + 1 :]])
            off.append(without.seconds(design[i], hidden_size) / sum(part.seconds for part in networks[i]) - 1)
        return fit(networks), float(np.median(np.abs(off)))


@dataclass(frozen=True)
class SpeedTable:
    """speed.json: the time of each part of the network on one device, so that an architecture's speed is a sum.

    `prefill`: reading `prompt` tokens; `decode`: one more token half-way through generating `new`; both for `batch`
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
        """`prefill_tps` and `decode_tps`, tokens per second over the whole batch, and `latency`, seconds to read the
        prompt and generate `new` tokens. Bits make none of them faster here."""
        architecture = architecture.without_bits()
        prefill = self.prefill.seconds(architecture, self.hidden_size)
        decode = self.decode.seconds(architecture, self.hidden_size)
        return {
            "prefill_tps": self.batch * self.prompt / prefill,
            "decode_tps": self.batch / decode,
            "latency": prefill + (self.new - 1) * decode,
        }

    def save(self, path: Path) -> None:
        """Write speed.json."""
        write_json(path, {"schema": SCHEMA, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> SpeedTable:
        """The table of a speed.json. Raises `RequestError` for a file that is none of this schema."""
        with reading(f"{path}: not a speed table"):
            values = read_json(path)
            if values.pop("schema", None) != SCHEMA:
                raise ValueError(f"its schema is not {SCHEMA}")
            values |= {name: PartTimes(**values[name]) for name in ("prefill", "decode")}
            return cls(**values)

    @classmethod
    def measure(
        cls,
        build: Callable[[Architecture], PreTrainedModel],
        structure: Structure,
        *,
        batch: int = 1,
        prompt: int = 128,
        new: int = 128,
        rounds: int = 1,
        seed: int = 0,
        on_step: Callable[[], None] = lambda: None,
    ) -> SpeedTable:
        """The table from timing sub-networks, each in turn with the base, and solving for the parts.

        On a CPU, each layer of a few networks of random layers is timed by itself (`times_layers`). Passes on a GPU are
        replayed as graphs, which cannot be looked into: there whole networks of a designed set are timed. `build` gives
        a standalone network for an architecture, on the device to measure. Two networks are in memory at a time.
        `on_step` is called after each of `steps` networks.
        """
        import torch

        # 1. Time every network beside the base. The machine's speed drifts; the base tells by how much.
        base, sizes = structure.base, sizes_to_time(structure)
        reference = build(base)
        parameter = next(reference.parameters())
        by_layer = times_layers(structure, parameter.device)
        prompt, new = fitting(prompt, new, context_of(reference, prompt + new))
        workload = {"batch": batch, "prompt": prompt, "new": new, "rounds": rounds}
        design = mixtures(structure, seed) if by_layer else designed(structure, seed)
        timed, references = list[tuple[list[Timed], list[Timed]]](), list[Times]()
        beside = Reference(reference, **workload)
        for architecture in design:
            by_phase, of_base = (
                _by_layer(build(architecture), architecture, reference, workload)
                if by_layer
                else _as_whole(build(architecture), architecture, beside)
            )
            timed.append(by_phase)
            references.append(of_base)
            on_step()
        # 2. The parts' times: those were shares of the base's.
        fitted = []
        for phase in (0, 1):
            scale = float(np.median([row[phase] for row in references]))
            rows = [[replace(part, seconds=scale * part.seconds) for part in network[phase]] for network in timed]
            fitted.append(PartTimes.fit_and_check(rows, design, sizes, base.hidden_size))
        (prefill, prefill_error), (decode, decode_error) = fitted
        return cls(
            runtime=runtime_of(reference),
            device=device_name(parameter.device),
            threads=torch.get_num_threads() if parameter.device.type == "cpu" else None,
            dtype=str(parameter.dtype).removeprefix("torch."),
            batch=batch,
            prompt=prompt,
            new=new,
            hidden_size=base.hidden_size,
            prefill=prefill,
            decode=decode,
            check={"prefill_median_error": prefill_error, "decode_median_error": decode_error},
            vocab_size=structure.vocab_size,
        )

    def made_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether these are timings of this device in this dtype and, on a CPU, on as many threads as torch has now."""
        import torch

        threads = torch.get_num_threads() if device.type == "cpu" else None
        now = (device_name(device), threads, str(dtype).removeprefix("torch."))
        return (self.device, self.threads, self.dtype) == now

    def fits(self, structure: Structure) -> bool:
        """Whether it was measured on a network of these sizes, of any depth: the times are of single layers."""
        sizes = sizes_to_time(structure)
        return (
            self.hidden_size == structure.base.hidden_size
            and self.vocab_size in (structure.vocab_size, None)  # tables of earlier versions do not say
            and all((part.attention_sizes, part.mlp_sizes) == sizes for part in (self.prefill, self.decode))
        )

    @staticmethod
    def work(rounds: int = 1, prompt: int = 128) -> tuple[int, int]:
        """Tokens that `measure` reads with each of its networks, and tokens that it writes; the base as many again."""
        return (2 + READS * rounds) * prompt, STEPS * rounds

    @staticmethod
    def steps(structure: Structure, device: torch.device) -> int:
        """Number of networks that `measure` times on a device."""
        return len((mixtures if times_layers(structure, device) else designed)(structure, 0))


def _as_whole(
    network: PreTrainedModel, architecture: Architecture, reference: Reference
) -> tuple[tuple[list[Timed], list[Timed]], Times]:
    """A network's prefill and decoding step, as shares of the reference's, and the reference's seconds."""
    own, of_reference = reference.beside(network)
    ratios = [mine / its for mine, its in zip(own, of_reference, strict=True)]
    return ([Timed(architecture, ratios[0])], [Timed(architecture, ratios[1])]), of_reference


def _by_layer(
    network: PreTrainedModel, architecture: Architecture, reference: PreTrainedModel, workload: dict[str, int]
) -> tuple[tuple[list[Timed], list[Timed]], Times]:
    """The same of each of its layers, and of the rest."""
    times = layer_times_beside(network, reference, **workload)
    kept = [Architecture(architecture.hidden_size, (architecture.layers[i],)) for i in architecture.kept]
    rest = Architecture(architecture.hidden_size, ())

    def rows(layers: list[float], of_rest: float) -> list[Timed]:
        each = [Timed(layer, share, rest=False) for layer, share in zip(kept, layers, strict=True)]
        return [*each, Timed(rest, of_rest)]

    return (
        rows(times.prefill_layers, times.prefill_rest),
        rows(times.decode_layers, times.decode_rest),
    ), times.reference


def _attention_size(layer: LayerSizes) -> int:
    return layer.num_attention_heads + layer.num_key_value_heads


def _mlp_size(layer: LayerSizes) -> int:
    return layer.intermediate_size * max(1, layer.num_experts)


def _shares(size: float, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """By which weights [sizes] the timings at `sizes` make up the one at `size`: linear interpolation from 0 at 0."""
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


def times_layers(structure: Structure, device: torch.device) -> bool:
    """Whether each layer is timed by itself: on a CPU, where all that a layer costs follows from its sizes (that of
    linear attention does not)."""
    return device.type == "cpu" and all(layer.num_key_value_heads for layer in structure.base.layers)


class _Sizer:
    """Makes networks from (head group, width) of each layer, cut to what the base's layer has."""

    def __init__(self, structure: Structure) -> None:
        self.base = structure.base
        layers = self.base.layers
        self.groups = _spread(max(layer.num_key_value_heads for layer in layers), ATTENTION_SIZES, 1)
        self.widths = _spread(max(layer.intermediate_size for layer in layers), MLP_SIZES, 32)
        self.first = next(i for i, layer in enumerate(layers) if layer.num_key_value_heads)
        """The layer that keeps its attention, which a cache needs."""

    def network(self, rows: Sequence[tuple[int, int]]) -> Architecture:
        return Architecture(self.base.hidden_size, tuple(self._sized(i, *row) for i, row in enumerate(rows)))

    def _sized(self, index: int, group: int, width: int) -> LayerSizes:
        full = self.base.layers[index]
        ratio = full.num_attention_heads // max(full.num_key_value_heads, 1)
        group = min(group, full.num_key_value_heads)
        return LayerSizes(group * ratio, group, min(width, full.intermediate_size), full.num_experts)


def mixtures(structure: Structure, seed: int) -> list[Architecture]:
    """The base, and networks of layers of random sizes, among all of which every size is as frequent as any other."""
    sizer, depth = _Sizer(structure), len(structure.base.layers)
    rng = np.random.default_rng(seed)
    count = min(12, max(4, -(-LAYERS // depth)))

    def shuffled(sizes: list[int]) -> list[int]:
        return [int(size) for size in rng.permutation(np.resize(sizes, count * depth))]

    rows = list(zip(shuffled(sizer.groups), shuffled(sizer.widths), strict=True))
    design = [sizer.network([(sizer.groups[-1], sizer.widths[-1])] * depth)]
    for n in range(count):
        own = rows[n * depth : (n + 1) * depth]
        own[sizer.first] = (max(own[sizer.first][0], sizer.groups[1]), own[sizer.first][1])
        design.append(sizer.network(own))
    return list(dict.fromkeys(design))


def designed(structure: Structure, seed: int) -> list[Architecture]:
    """Networks from whose times as wholes the parts' times follow: each size in all layers at once, halves removed,
    fewer layers, and random mixtures last."""
    sizer, depth = _Sizer(structure), len(structure.base.layers)
    rng = np.random.default_rng(seed)
    groups, widths, first, network = sizer.groups, sizer.widths, sizer.first, sizer.network

    # 1. Each size in all layers at once.
    full = (groups[-1], widths[-1])
    design = [network([full] * depth)]
    design += [network([(groups[-1], width)] * depth) for width in widths[:-1]]
    design += [network([(group, widths[-1])] * depth) for group in groups[1:-1]]
    # 2. No attention but in one layer, which a cache needs; fewer layers.
    design.append(network([full if i == first else (0, widths[-1]) for i in range(depth)]))
    for count in {max(first + 1, depth // 4), max(first + 1, depth // 2), max(first + 1, 3 * depth // 4)}:
        design.append(network([full] * count + [(0, 0)] * (depth - count)))
    # 3. Random mixtures.
    for _ in range(MIXED):
        present = rng.uniform(0.6, 1.0)
        rows = []
        for i in range(depth):
            group = int(rng.choice(groups[1:])) if i == first or rng.random() < present else 0
            width = int(rng.choice(widths[1:])) if i == first or rng.random() < present else 0
            rows.append((group, width))
        design.append(network(rows))
    return list(dict.fromkeys(design))
