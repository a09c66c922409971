"""What a search optimises: measured objectives, computed objectives, and hard bounds on either.

Sizes follow exactly from the architecture and are never predicted; neither is speed, which a function handed in
computes from layer timings. Only what an evaluation measures needs a predictor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from search.space import HIDDEN, Genomes, SearchSpace
from supernet.architecture import REMOVED, Architecture, ArchitectureJSON, LayerSizes, StorageFormat, Structure

Direction = Literal["max", "min"]
Values = NDArray[np.float64]
Number = TypeVar("Number", float, Values)

SPEEDS: dict[str, Direction] = {"decode_tps": "max", "prefill_tps": "max", "latency": "min"}


def number(value: float) -> str:
    """A number for a message: large ones in full, with separators."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class Objective:
    """One number of an architecture and which way is better.

    `compute` gives it exactly; without it the number comes from evaluations. `additive`: it is a sum over layers plus a
    part that depends on the hidden size alone, so a search on predictions can add up table entries.
    """

    name: str
    direction: Direction
    compute: Callable[[Architecture], float] | None = None
    additive: bool = False

    @property
    def kind(self) -> Literal["measured", "computed"]:
        return "measured" if self.compute is None else "computed"

    def cost(self, values: Number) -> Number:
        """`values` turned so that less is better."""
        return -values if self.direction == "max" else values


@dataclass(frozen=True)
class Constraint:
    """A hard bound on an objective, which need not be one of those searched for. Bounds are inclusive."""

    objective: Objective
    maximum: float | None = None
    minimum: float | None = None

    def __post_init__(self) -> None:
        if self.maximum is None and self.minimum is None:
            raise ValueError(f"a constraint on {self.objective.name} needs a maximum or a minimum")
        if self.maximum is not None and self.minimum is not None and self.minimum > self.maximum:
            raise ValueError(f"no value is {self}: the bounds contradict each other")

    def violation(self, values: Values) -> Values:
        """How far values [n] miss the bounds, as a share of the bound, [n]; 0 where they hold."""
        missed = np.zeros(len(values))
        if self.maximum is not None:
            missed = np.maximum(missed, (values - self.maximum) / max(abs(self.maximum), 1e-12))
        if self.minimum is not None:
            missed = np.maximum(missed, (self.minimum - values) / max(abs(self.minimum), 1e-12))
        return missed

    def __str__(self) -> str:
        bounds = [] if self.minimum is None else [f"at least {number(self.minimum)}"]
        if self.maximum is not None:
            bounds.append(f"at most {number(self.maximum)}")
        return f"{self.objective.name} {' and '.join(bounds)}"


class EvaluationRecord(TypedDict):
    """An evaluation as front.json holds it; a value that is not finite is None."""

    key: str
    architecture: ArchitectureJSON
    values: dict[str, float | None]
    generation: int
    index: int
    full: bool


@dataclass(frozen=True)
class Evaluation:
    """One measured sub-network: every objective's and constraint's number, and all else that was measured.

    `full` is False for one that was scored on part of the documents only, whose values are predictions; such a one is
    never on the front. `index` counts a search's evaluations in the order in which they were asked for.
    """

    architecture: Architecture
    values: Mapping[str, float]
    generation: int = 0
    index: int = 0
    full: bool = True

    def to_dict(self) -> EvaluationRecord:
        return {
            "key": self.architecture.key,
            "architecture": self.architecture.to_dict(),
            "values": {k: v if math.isfinite(v) else None for k, v in self.values.items()},
            "generation": self.generation,
            "index": self.index,
            "full": self.full,
        }

    @classmethod
    def from_dict(cls, record: EvaluationRecord) -> Evaluation:
        """The inverse of `to_dict`; what was not finite is not a number. Raises KeyError, TypeError or ValueError for
        what is no architecture."""
        return cls(
            Architecture.from_dict(record["architecture"]),
            {name: math.nan if value is None else value for name, value in record["values"].items()},
            record["generation"],
            record["index"],
            record["full"],
        )


def computed(
    structure: Structure,
    *,
    scheme: StorageFormat | None = None,
    context: int = 0,
    speed: Mapping[str, Callable[[Architecture], float]] | None = None,
) -> dict[str, Objective]:
    """The objectives that need no evaluation, by name.

    `parameters`; `bytes` as stored, under `scheme` where one is given; `macs` (multiply-accumulates) for one token
    behind `context` others; `kv_cache_bytes` of one token; and what `speed` computes: `decode_tps`, `prefill_tps`
    (tokens per second), `latency` (seconds). Raises ValueError for an unknown name in `speed`.
    """
    additive = scheme is None or scheme.group_size is not None  # one group size for all layers depends on all
    objectives = [
        Objective("parameters", "min", structure.parameters, additive=True),
        Objective("bytes", "min", lambda a: structure.bytes(a, scheme), additive=additive),
        Objective("macs", "min", lambda a: structure.macs(a, context), additive=True),
        Objective("kv_cache_bytes", "min", structure.kv_cache_bytes, additive=True),
    ]
    for name, function in (speed or {}).items():
        if name not in SPEEDS:
            raise ValueError(f"unknown speed '{name}'; valid are {', '.join(SPEEDS)}")
        objectives.append(Objective(name, SPEEDS[name], function))
    return {objective.name: objective for objective in objectives}


def choose(names: Sequence[str], known: Mapping[str, Objective], measured: Mapping[str, Direction]) -> list[Objective]:
    """Two to four objectives by name: of `known` (see `computed`), or of what evaluations will measure.

    Raises ValueError, with what would be valid, for a name that is neither.
    """
    for name in names:
        if name not in known and name not in measured:
            raise ValueError(f"'{name}' cannot be measured; valid objectives are {', '.join([*measured, *known])}")
    chosen = [known[name] if name in known else Objective(name, measured[name]) for name in names]
    check(chosen)
    return chosen


def check(objectives: Sequence[Objective]) -> None:
    """Raises ValueError unless these are two to four different objectives, at least one of them measured."""
    names = [objective.name for objective in objectives]
    if not 2 <= len(names) <= 4:
        raise ValueError(f"a search takes two to four objectives, not {len(names)}")
    if len(set(names)) != len(names):
        raise ValueError(f"an objective is named twice: {', '.join(names)}")
    if all(objective.kind == "computed" for objective in objectives):
        raise ValueError(f"{', '.join(names)} are all computed from sizes; add a measured objective such as quality")


@dataclass
class Computer:
    """A computed objective of whole matrices of genomes: exact, and fast through tables of layers' parts.

    `_table`: (layer, residual width, the layer's sizes) to the part that the layer adds; `_outer`: residual width and
    bits to the part outside the layers; `_whole`: architecture to value, where the objective is not additive.
    """

    space: SearchSpace
    objective: Objective
    _table: dict[tuple[int, int, tuple[int, ...]], float] = field(default_factory=dict)
    _outer: dict[tuple[int, ...], float] = field(default_factory=dict)
    _whole: dict[Architecture, float] = field(default_factory=dict)

    def __call__(self, genomes: Genomes) -> Values:
        """The objective of each row, [n]. Raises ValueError for a measured objective."""
        compute = self.objective.compute
        if compute is None:
            raise ValueError(f"{self.objective.name} is measured, not computed")
        if self.objective.additive:
            return self._add_up(compute, genomes)
        architectures = self.space.decode_all(genomes)
        for architecture in architectures:
            if architecture not in self._whole:
                self._whole[architecture] = float(compute(architecture))
        return np.array([self._whole[architecture] for architecture in architectures])

    def _add_up(self, compute: Callable[[Architecture], float], genomes: Genomes) -> Values:
        # 1. What lies outside the layers, for each residual width with its bits.
        sizes, outer = self.space.sizes(genomes)
        layers, hidden = sizes.shape[1], outer[:, HIDDEN]
        seen = {tuple(row) for row in np.unique(outer, axis=0).tolist()}
        for width, *bits in seen | {(width, 0, 0) for width, *_ in seen}:
            if (width, *bits) not in self._outer:
                self._outer[width, *bits] = float(compute(Architecture(width, (REMOVED,) * layers, *bits)))
        total = np.array([self._outer[tuple(row)] for row in outer.tolist()])
        # 2. One number for each combination of sizes that a layer has.
        codes = np.repeat(hidden[:, None], layers, axis=1)
        for column in range(sizes.shape[2]):
            codes = codes * (int(sizes[:, :, column].max()) + 1) + sizes[:, :, column]
        # 3. The part of each combination once, from a network of that layer alone.
        for layer in range(layers):
            _, first, where = np.unique(codes[:, layer], return_index=True, return_inverse=True)
            parts = np.empty(len(first))
            for position, row in enumerate(first):
                key = (layer, int(hidden[row]), tuple(sizes[row, layer].tolist()))
                if key not in self._table:
                    alone = tuple(LayerSizes(*key[2]) if i == layer else REMOVED for i in range(layers))
                    self._table[key] = float(compute(Architecture(key[1], alone))) - self._outer[key[1], 0, 0]
                parts[position] = self._table[key]
            total += parts[where]
        return total
