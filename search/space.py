"""What may be cut: genes, genomes, and the architectures they stand for.

A genome holds one index for each gene, into that gene's ascending values; the last value is the base's own,
so the genome of all last values is the base model. Several genomes can stand for one architecture (the width
of a layer that another gene removes is inert); `canonicalize` maps them to one. Most work is done on matrices
of genomes, one per row, because a predicted search looks at thousands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.presets import POLICIES, SIZES, kept_layers, read
from supernet.architecture import REMOVED, Architecture, LayerSizes, Structure

Genome = tuple[int, ...]
Genomes = NDArray[np.int64]
"""Genomes as rows, [n, genes]."""

PER_LAYER = ("kv", "ffn", "experts", "layer")
GLOBAL = ("kv", "ffn", "experts", "heads", "hidden_size", "depth")
HEADS, KV, FFN, EXPERTS = range(4)
ENUMERABLE = 50_000
"""Spaces of at most so many genomes are listed where no formula or sampling will do."""
COLUMNS = {"kv": KV, "ffn": FFN, "experts": EXPERTS}


@dataclass(frozen=True, slots=True)
class Gene:
    """One elastic size. `kv.3`, `ffn.3`, `experts.3` and `layer.3` belong to layer 3 of the base; `kv`, `ffn`
    and `experts` hold for all layers at once, `heads` is the number of query heads for each key-value head,
    `hidden_size` the residual width, and `depth` the number of layers, which a policy chooses.

    `values` ascend and end with the base's own. 0 removes the half-block (`kv`, `ffn`) or the layer
    (`layer`).
    """

    name: str
    values: tuple[int, ...]

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def layer(self) -> int | None:
        index = self.name.partition(".")[2]
        return int(index) if index else None


class SearchSpace:
    """Genes over a base model's structure.

    `kept` says for each value of the `depth` gene, in order, which layers stay. An architecture of the space
    keeps attention in at least one layer: a genome that would not is repaired, the first layer that it keeps
    (or else the first that it could) getting its smallest attention.
    """

    def __init__(
        self,
        structure: Structure,
        genes: Iterable[Gene],
        *,
        kept: Sequence[Iterable[int]] | None = None,
        name: str = "custom",
    ) -> None:
        self.structure = structure
        self.base = structure.base
        self.genes = tuple(genes)
        self.name = name
        self._index = {gene.name: position for position, gene in enumerate(self.genes)}
        self._check()
        layers = len(self.base.layers)
        self._values = [np.array(gene.values, dtype=np.int64) for gene in self.genes]
        self._counts = np.array([len(gene.values) for gene in self.genes], dtype=np.int64)
        self._base_sizes = np.array(
            [
                [s.num_attention_heads, s.num_key_value_heads, s.intermediate_size, s.num_experts]
                for s in self.base.layers
            ],
            dtype=np.int64,
        )
        self._queries = self._base_sizes[:, HEADS] // np.maximum(self._base_sizes[:, KV], 1)
        self._keep = self._check_kept(kept, layers)
        self._removable = np.array(
            [
                f"layer.{i}" in self._index
                or (self._holds_zero(f"ffn.{i}") and (self._holds_zero(f"kv.{i}") or not self._base_sizes[i, KV]))
                for i in range(layers)
            ]
        )
        self._layer_sizes: dict[tuple[int, ...], LayerSizes] = {}

    # -- validation --

    def _check(self) -> None:
        layers = len(self.base.layers)
        if not self.genes:
            raise ValueError("the search space has no genes; name at least one of kv, ffn, layer, depth")
        if len(self._index) != len(self.genes):
            raise ValueError("the search space names a gene twice")
        for gene in self.genes:
            kind, _, index = gene.name.partition(".")
            per_layer = kind in PER_LAYER and index.isdecimal() and int(index) < layers
            if not per_layer and not (kind in GLOBAL and not index):
                raise ValueError(
                    f"unknown gene '{gene.name}'; valid are {', '.join(GLOBAL)} "
                    f"and, for layers 0 to {layers - 1}, " + ", ".join(f"{k}.N" for k in PER_LAYER)
                )
            if per_layer and kind in self._index:
                raise ValueError(f"'{gene.name}' contradicts '{kind}', which holds for all layers; keep one of them")
            self._check_values(gene)

    def _check_values(self, gene: Gene) -> None:
        full, least = self._base_value(gene), 1
        if gene.layer is not None and gene.kind != "experts":
            least = 0
        if not full:
            what = {"kv": "attention heads", "experts": "experts"}.get(gene.kind, "of these")
            where = "the original" if gene.layer is None else f"layer {gene.layer} of the original"
            raise ValueError(f"{gene.name}: {where} has no {what}")
        valid = f"valid are {least} to {full}, ascending, the original's {full} last"
        if gene.kind == "hidden_size" and self.structure.fixed_hidden:
            raise ValueError(f"hidden_size: cannot change here ({self.structure.fixed_hidden}); leave it out")
        if any(not isinstance(v, int) or isinstance(v, bool) for v in gene.values):
            raise ValueError(f"{gene.name}: {list(gene.values)} are not all whole numbers; {valid}")
        ascending = all(
            a < b or (a == b and gene.kind == "depth") for a, b in zip(gene.values, gene.values[1:], strict=False)
        )
        if not gene.values or not ascending:
            raise ValueError(f"{gene.name}: {list(gene.values)} does not ascend; {valid}")
        if gene.values[-1] > full:
            reason = "query heads for each key-value head" if gene.kind == "heads" else "size"
            raise ValueError(f"{gene.name}: {gene.values[-1]} is above the original's {reason}; {valid}")
        if gene.values[0] < least:
            raise ValueError(f"{gene.name}: {gene.values[0]} is too small; {valid}")
        if gene.kind == "hidden_size" and (heads := max(s.num_attention_heads for s in self.base.layers)):
            uneven = [v for v in gene.values if v % heads]
            if uneven:  # configurations refuse it, even where they name a head's width
                raise ValueError(
                    f"hidden_size: {uneven[0]} is not a multiple of the {heads} query heads; "
                    f"valid are the multiples of {heads} up to {full}"
                )
        if gene.kind in ("ffn", "hidden_size") and (uneven := [v for v in gene.values[:-1] if v % self._step(gene)]):
            raise ValueError(f"{gene.name}: {uneven[0]} is not a multiple of {self._step(gene)} (stacked experts)")
        if gene.values[-1] != full:
            raise ValueError(f"{gene.name}: {list(gene.values)} leaves out the original; {valid}")

    def _step(self, gene: Gene) -> int:
        layers = self.base.layers if gene.layer is None else [self.base.layers[gene.layer]]
        return max(self.structure.step(layer) for layer in layers)

    def _base_value(self, gene: Gene) -> int:
        if gene.kind == "hidden_size":
            return self.base.hidden_size
        if gene.kind == "depth":
            return len(self.base.layers)
        if gene.kind == "layer":
            return 1
        if gene.layer is not None:
            return SIZES[gene.kind](self.base.layers[gene.layer])
        attends = gene.kind in ("heads", "kv")  # layers of linear attention have neither
        present = [s for s in self.base.layers if (s.num_key_value_heads if attends else not s.removed)]
        sizes = {SIZES[gene.kind](layer) for layer in present}
        if len(sizes) != 1:
            raise ValueError(
                f"{gene.name}: the original's layers differ ({', '.join(map(str, sorted(sizes)))}); "
                f"use {gene.kind}.N for each layer"
            )
        return sizes.pop()

    def _check_kept(self, kept: Sequence[Iterable[int]] | None, layers: int) -> NDArray[np.bool_]:
        """Which layers each value of `depth` keeps, [values, layers]; one row of all layers without such a
        gene.
        """
        if "depth" not in self._index:
            if kept is not None:
                raise ValueError("layers to keep were given, but there is no depth gene")
            return np.ones((1, layers), dtype=bool)
        counts = self.genes[self._index["depth"]].values
        subsets = [set(subset) for subset in kept or ()]
        if [len(subset) for subset in subsets] != list(counts):
            raise ValueError(f"depth: {list(counts)} layers need as many sets of layers to keep, in the same order")
        for subset in subsets:
            if not subset <= set(range(layers)):
                raise ValueError(f"depth: layers {sorted(subset)} are not all among 0 to {layers - 1}")
            if not any(self._base_sizes[i, KV] for i in subset):
                raise ValueError(f"depth: keeping only layers {sorted(subset)} leaves no attention")
        return np.array([[i in subset for i in range(layers)] for subset in subsets])

    def _holds_zero(self, name: str) -> bool:
        return name in self._index and self.genes[self._index[name]].values[0] == 0

    # -- genomes to sizes --

    def sizes(self, genomes: Genomes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sizes that genomes stand for: [n, layers, (query heads, kv heads, FFN width, experts)], and hidden
        sizes [n].

        Canonical as an `Architecture` is: sizes of removed halves are 0.
        """
        return self._express(self.repair(genomes))

    def _express(self, genomes: Genomes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        n = len(genomes)
        sizes = np.repeat(self._base_sizes[None], n, axis=0)
        hidden = np.full(n, self.base.hidden_size, dtype=np.int64)
        queries = np.repeat(self._queries[None], n, axis=0)
        present = (
            self._keep[genomes[:, self._index["depth"]]]
            if "depth" in self._index
            else np.ones((n, len(self.base.layers)), dtype=bool)
        )
        present = present.copy()
        for position, gene in enumerate(self.genes):
            chosen = self._values[position][genomes[:, position]]
            if gene.kind == "hidden_size":
                hidden = chosen
            elif gene.kind == "heads":
                queries = np.minimum(queries, chosen[:, None])
            elif gene.kind == "layer":
                present[:, gene.layer] &= chosen.astype(bool)
            elif gene.kind in COLUMNS and gene.layer is not None:
                sizes[:, gene.layer, COLUMNS[gene.kind]] = chosen
            elif gene.kind in COLUMNS:
                column = sizes[:, :, COLUMNS[gene.kind]]
                np.minimum(column, chosen[:, None], out=column)
        sizes *= present[:, :, None]
        sizes[:, :, HEADS] = sizes[:, :, KV] * queries
        sizes[:, :, EXPERTS] *= sizes[:, :, FFN] > 0
        return sizes, hidden

    def repair(self, genomes: Genomes) -> Genomes:
        """The genomes, those changed that would leave no attention anywhere."""
        genomes = np.array(genomes, dtype=np.int64, ndmin=2)
        sizes, _ = self._express(genomes)
        for row in np.flatnonzero(~sizes[:, :, KV].any(axis=1)):
            keep = self._keep[genomes[row, self._index["depth"]]] if "depth" in self._index else self._keep[0]
            possible = np.flatnonzero(keep & (self._base_sizes[:, KV] > 0))
            standing = [i for i in possible if sizes[row, i, FFN]]
            layer = standing[0] if standing else possible[0]
            if f"layer.{layer}" in self._index:
                genomes[row, self._index[f"layer.{layer}"]] = len(self.genes[self._index[f"layer.{layer}"]].values) - 1
            if self._holds_zero(f"kv.{layer}"):
                position = self._index[f"kv.{layer}"]
                genomes[row, position] = max(genomes[row, position], 1)
        return genomes

    def canonicalize(self, genomes: Genomes) -> Genomes:
        """One genome, of all that stand for the same architecture. Inert genes take their last value."""
        return self._canonicalize(genomes)[0]

    def _canonicalize(self, genomes: Genomes) -> tuple[Genomes, NDArray[np.bool_]]:
        """Canonical genomes, and which of their genes are inert, both [n, genes]."""
        genomes = self.repair(genomes)
        sizes, _ = self._express(genomes)
        inert = np.zeros(genomes.shape, dtype=bool)
        gone = ~(sizes[:, :, KV] | sizes[:, :, FFN]).astype(bool)
        inside = np.ones_like(gone)
        if "depth" in self._index:
            # The first set of layers that holds the kept ones and whose others other genes can remove.
            holds = (~gone[:, None] <= self._keep[None]).all(2)
            explains = (self._keep[None] <= (~gone | self._removable)[:, None]).all(2)
            genomes[:, self._index["depth"]] = np.argmax(holds & explains, axis=1)
            inside = self._keep[genomes[:, self._index["depth"]]]
        for position, gene in enumerate(self.genes):
            if gene.layer is None:
                continue
            lost, here = gone[:, gene.layer], inside[:, gene.layer]
            if gene.kind == "layer":
                genomes[lost & here, position] = 0
                inert[:, position] = ~here
            elif f"layer.{gene.layer}" in self._index:
                inert[:, position] = lost
            else:
                inert[:, position] = ~here
                genomes[lost & here, position] = 0
            if gene.kind == "experts":
                inert[:, position] |= sizes[:, gene.layer, FFN] == 0
        return np.where(inert, self._counts - 1, genomes), inert

    def features(self, genomes: Genomes) -> NDArray[np.float64]:
        """What predictors see, [n, features]: every gene's value as a share of the base's, then its one-hot
        code over the declared values. Both are 0 where the gene is inert, so equal architectures have equal
        features.
        """
        genomes, inert = self._canonicalize(genomes)
        ordinal = np.empty(genomes.shape)
        codes = []
        for position, values in enumerate(self._values):
            ordinal[:, position] = values[genomes[:, position]] / values[-1]
            codes.append((genomes[:, position, None] == np.arange(len(values))) & ~inert[:, position, None])
        ordinal[inert] = 0.0
        return np.hstack([ordinal, *codes])

    # -- single genomes and architectures --

    def decode(self, genome: Sequence[int]) -> Architecture:
        """The architecture that a genome stands for."""
        return self.decode_all(self._row(genome))[0]

    def decode_all(self, genomes: Genomes) -> list[Architecture]:
        """The architectures that rows of genomes stand for."""
        sizes, hidden = self.sizes(genomes)
        return [
            Architecture(width, tuple(self._sizes_of(tuple(row)) for row in rows))
            for width, rows in zip(hidden.tolist(), sizes.tolist(), strict=True)
        ]

    def _sizes_of(self, row: tuple[int, ...]) -> LayerSizes:
        if row not in self._layer_sizes:
            self._layer_sizes[row] = LayerSizes(*row)
        return self._layer_sizes[row]

    def encode(self, architecture: Architecture) -> Genome:
        """The canonical genome of an architecture. ValueError where the space does not hold it."""
        if len(architecture.layers) != len(self.base.layers):
            raise ValueError(f"the architecture has {len(architecture.layers)} layers, not {len(self.base.layers)}")
        genome = self._counts - 1
        kept = np.array([not layer.removed for layer in architecture.layers])
        if "depth" in self._index:
            fits = (kept <= self._keep).all(1) & (self._keep <= (kept | self._removable)).all(1)
            if not fits.any():
                raise ValueError("the space has no depth that keeps just the architecture's layers")
            genome[self._index["depth"]] = np.argmax(fits)
        standing = [layer for layer in architecture.layers if not layer.removed]
        for position, gene in enumerate(self.genes):
            if gene.kind == "depth":
                continue
            wanted = self._value_in(gene, architecture, standing)
            if wanted is not None and wanted in gene.values:
                genome[position] = gene.values.index(wanted)
        canonical = self.canonicalize(genome[None])
        if self.decode_all(canonical)[0] != architecture:
            raise ValueError("the search space does not hold this architecture")
        return tuple(canonical[0].tolist())

    def _value_in(self, gene: Gene, architecture: Architecture, standing: list[LayerSizes]) -> int | None:
        """A gene's value as an architecture shows it; None where nothing shows it."""
        if gene.kind == "hidden_size":
            return architecture.hidden_size
        if gene.layer is None and gene.kind in ("heads", "kv"):
            return next((SIZES[gene.kind](layer) for layer in standing if layer.num_key_value_heads), None)
        chosen = architecture.layers[gene.layer] if gene.layer is not None else next(iter(standing), None)
        if gene.kind == "layer":
            return int(chosen is not None and not chosen.removed)
        if chosen is None:
            return None
        return SIZES[gene.kind](chosen)

    def canonical(self, genome: Sequence[int]) -> Genome:
        """`canonicalize` for one genome."""
        return tuple(self.canonicalize(self._row(genome))[0].tolist())

    def inert(self, genome: Sequence[int]) -> list[bool]:
        """Which genes of a genome have no effect."""
        return self._canonicalize(self._row(genome))[1][0].tolist()

    def _row(self, genome: Sequence[int]) -> Genomes:
        row = np.array([genome], dtype=np.int64)
        if row.shape[1] != len(self.genes) or (row < 0).any() or (row >= self._counts).any():
            raise ValueError(f"a genome of this space has {len(self.genes)} indices below {self._counts.tolist()}")
        return row

    def __contains__(self, architecture: Architecture) -> bool:
        try:
            self.encode(architecture)
        except ValueError:
            return False
        return True

    def smallest(self) -> Architecture:
        """All genes at their least: the smallest size that the space holds."""
        return self.decode_all(np.zeros((1, len(self.genes)), dtype=np.int64))[0]

    # -- how many --

    @property
    def upper(self) -> NDArray[np.int64]:
        """The highest index of each gene."""
        return self._counts - 1

    @property
    def size(self) -> int:
        """Number of raw genomes, inert genes counted."""
        return math.prod(len(gene.values) for gene in self.genes)

    def _gene_values(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        return self.genes[self._index[name]].values if name in self._index else default

    def architectures(self) -> Iterator[Architecture]:
        """All different architectures, in the order of their genomes. For spaces small enough to
        enumerate.
        """
        yield from self.decode_all(self.all_genomes())

    def all_genomes(self) -> Genomes:
        """All different canonical genomes, ascending, [n, genes]. For spaces small enough to enumerate."""
        raw = list(product(*(range(len(gene.values)) for gene in self.genes)))
        return np.unique(self.canonicalize(np.array(raw, dtype=np.int64)), axis=0)

    # -- samples --

    def sample(self, rng: np.random.Generator, n: int = 1) -> Genomes:
        """Random canonical genomes, [n, genes], each gene uniform and independent; they may repeat."""
        return self.canonicalize(rng.integers(0, self._counts, size=(n, len(self.genes))))

    def sample_tilted(self, rng: np.random.Generator, n: int) -> Genomes:
        """Random canonical genomes whose sizes spread widely, [n, genes]: `sample_near` without a size to
        meet.
        """
        u = rng.random((n, len(self.genes))) ** np.exp(rng.uniform(-3, 3, size=(n, 1)))
        return self.canonicalize(np.minimum((self._counts * u).astype(np.int64), self._counts - 1))

    def sample_near(self, rng: np.random.Generator, parameters: Sequence[float] | NDArray[np.float64]) -> Genomes:
        """A random canonical genome for each of the numbers of parameters given, and near it, [n, genes].

        One uniform u for each gene picks the index floor(count * u**exp(tilt)). The index falls as the tilt
        grows, from the base to the smallest; bisection finds the tilt that meets the size. What a uniform
        draw would almost never reach (sizes near either end) is as likely this way as the middle.
        """
        n = len(parameters)
        u = rng.random((n, len(self.genes)))
        low, high = np.full(n, -12.0), np.full(n, 12.0)
        nearest, best = np.full(n, np.inf), np.zeros((n, len(self.genes)), dtype=np.int64)
        for _ in range(24):
            middle = (low + high) / 2
            index = np.minimum((self._counts * u ** np.exp(middle)[:, None]).astype(np.int64), self._counts - 1)
            excess = np.array([self.structure.parameters(a) for a in self.decode_all(index)]) - np.asarray(parameters)
            better = np.abs(excess) < nearest
            best[better], nearest[better] = index[better], np.abs(excess)[better]
            low, high = np.where(excess > 0, middle, low), np.where(excess > 0, high, middle)
        return self.canonicalize(best)

    def sample_sizes(
        self, rng: np.random.Generator, n: int, least: float | None = None, most: float | None = None
    ) -> Genomes:
        """Genomes spread over the sizes from `least` (the smallest's) to `most` (the base's) parameters, one
        each from `n` equal shares of that range, [n, genes].
        """
        smallest, base = (self.structure.parameters(a) for a in (self.smallest(), self.base))
        low = smallest if least is None else min(max(least, smallest), base)
        high = base if most is None else min(max(most, low), base)
        return self.sample_near(rng, low + (high - low) * (np.arange(n) + rng.random(n)) / max(n, 1))

    def uniform_members(
        self, n: int, largest: float | None = None, holds: Callable[[Architecture], bool] = lambda _: True
    ) -> list[Architecture]:
        """At most `n` architectures whose kept layers are alike and whole, and that `holds` accepts, spread over all
        sizes up to `largest` parameters, the most evenly cut of each size: what the plain layout can hold.
        """
        found: dict[Architecture, tuple[int, float]] = {}
        for candidate, shares in self._uniform_candidates():
            if candidate.is_uniform_in(self.base) and candidate in self and holds(candidate):
                found[candidate] = (self.structure.parameters(candidate), max(shares) - min(shares))
        if largest is not None:
            found = {a: v for a, v in found.items() if v[0] <= largest}
        if not found or n < 1:
            return []
        low, high = min(v[0] for v in found.values()), max(v[0] for v in found.values())
        bins: dict[int, list[Architecture]] = {}
        for candidate, (parameters, _) in found.items():
            bins.setdefault(min(int(n * (parameters - low) / max(high - low, 1)), n - 1), []).append(candidate)
        return [min(members, key=lambda a: (found[a][1], found[a][0], a.layers)) for _, members in sorted(bins.items())]

    def _uniform_candidates(self) -> Iterator[tuple[Architecture, list[float]]]:
        """Combinations of a common width, a common number of heads and a depth, with each one's share of the
        base.
        """
        layers = len(self.base.layers)
        full = max(self.base.layers)  # beside layers like it there may be some without heads (linear attention)
        attending = [bool(layer.num_key_value_heads) for layer in self.base.layers]
        if any(layer not in (full, replace(full, num_attention_heads=0)) for layer in self.base.layers):
            return
        common: dict[str, set[int]] = {}
        for kind, whole in (("kv", full.num_key_value_heads), ("ffn", full.intermediate_size)):
            having = [i for i in range(layers) if kind != "kv" or attending[i]]
            options = [set(self._gene_values(kind, self._gene_values(f"{kind}.{i}", (whole,)))) for i in having]
            common[kind] = set.intersection(*options) - {0}
        if "depth" in self._index:
            subsets = {tuple(np.flatnonzero(row).tolist()) for row in self._keep}
        elif self._removable.all():
            subsets = {kept_layers(p, layers, d) for p in POLICIES for d in range(1, layers + 1)}
        else:
            subsets = {tuple(range(layers))}
        queries = full.num_attention_heads // max(full.num_key_value_heads, 1)
        for hidden, group, kv, ffn, kept in product(
            self._gene_values("hidden_size", (self.base.hidden_size,)),
            self._gene_values("heads", (queries,)),
            sorted(common["kv"]),
            sorted(common["ffn"]),
            sorted(subsets),
        ):
            sizes = LayerSizes(kv * group, kv, ffn, full.num_experts)
            headless = replace(sizes, num_attention_heads=0)
            present = [sizes if attending[i] else headless for i in range(layers)]
            rows = tuple(present[i] if i in kept else REMOVED for i in range(layers))
            shares = [kv / full.num_key_value_heads, ffn / full.intermediate_size, len(kept) / layers]
            yield Architecture(hidden, rows), shares

    # -- named and written spaces --

    @classmethod
    def preset(cls, name: str, structure: Structure, **options: Any) -> SearchSpace:
        """A space by name; `options` are the `step`, `policy` and `order` of `from_dict`."""
        space = cls.from_dict({"preset": name, **options}, structure)
        space.name = name
        return space

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], structure: Structure, measured_order: Sequence[int] | None = None
    ) -> SearchSpace:
        """A space that a recipe spells out: gene names to values.

        `ffn.*` stands for all layers (that have such a size) and `ffn.4-7` for a range; a later line overrides
        an earlier one for its layers. Values are a list, or `{step: 64, min: 128}` for FFN widths (min 0 lets
        the MLP go). `depth` is `{values: [6, 8], policy: late-block}`, `{values: …, order: […]}` or
        `{keep: [[0, 1, 3], …]}`. `preset: llama-nas` starts from a named space (`search.presets.PRESETS`), in which
        `step` is that of FFN widths, and `policy` or `order` (all layers, most important first) says which layers a
        depth keeps; the other lines are put over its own.
        `measured_order` (all layers, most important first) serves a depth gene of policy `importance` without an order
        of its own.
        Raises ValueError, with what would be valid, for anything that the original cannot be cut to.
        """
        genes, kept = read(data, structure, measured_order)
        return cls(structure, [Gene(name, values) for name, values in genes.items()], kept=kept)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads, every gene in full."""
        data: dict[str, Any] = {gene.name: list(gene.values) for gene in self.genes}
        if "depth" in data:
            data["depth"] = {"keep": [np.flatnonzero(row).tolist() for row in self._keep]}
        return data
