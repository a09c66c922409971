"""What may be cut: genomes, and the architectures that they stand for.

A genome holds one index for each gene, into that gene's ascending values; the last value is the base's own, so the
genome of all last values is the base model. Several genomes can stand for one architecture (the width of a layer that
another gene removes is inert); `canonicalize` maps them to one. Most work is done on matrices of genomes, one per row,
because a search on predictions looks at thousands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from search.genes import AS_STORED, BITS, OUTER, SIZES, Gene, check_genes
from search.presets import read_space
from supernet.architecture import Architecture, LayerSizes, Structure

Genome = tuple[int, ...]
Genomes = NDArray[np.int64]
"""Genomes as rows, [n, genes]."""

HEADS, KV, FFN, EXPERTS, ATTENTION_BITS, FFN_BITS = range(6)
"""Columns of a matrix of sizes: query heads, key-value heads, FFN width, experts, bits of attention and of FFN."""
COLUMNS = {"kv": KV, "ffn": FFN, "experts": EXPERTS, "attention_bits": ATTENTION_BITS, "ffn_bits": FFN_BITS}
HIDDEN, EMBEDDING_BITS, HEAD_BITS = range(3)
"""Columns of what lies outside the layers: residual width, bits of embedding and head."""
OUTER_COLUMNS = {"hidden_size": HIDDEN, "embedding_bits": EMBEDDING_BITS, "head_bits": HEAD_BITS}
HALF_OF_BITS = {"attention_bits": KV, "ffn_bits": FFN}
"""The units without which bits mean nothing."""
ENUMERABLE = 50_000
"""Spaces of at most so many genomes are listed where no formula or sampling will do."""


class SearchSpace:
    """Genes over a base model's structure. `search.sampling` draws from it.

    `kept` [values of `depth`, layers] says which layers each value of the `depth` gene keeps (one row of all layers
    without such a gene); `removable` [layers], which layers other genes can remove; `counts` [genes], how many values
    each gene has; `positions`, where each gene stands in a genome.

    An architecture of the space keeps attention in at least one layer, where the base has any: a genome that would not
    is repaired, the first layer that it keeps (or else the first that it could) getting its smallest attention.

    Raises ValueError, with what would be valid, for genes that the base cannot be cut to.
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
        check_genes(structure, self.genes)
        self.positions = {gene.name: position for position, gene in enumerate(self.genes)}
        self.counts = np.array([len(gene.values) for gene in self.genes], dtype=np.int64)
        self._values = [np.array(gene.values, dtype=np.int64) for gene in self.genes]
        self._base_sizes = np.array(
            [
                [s.num_attention_heads, s.num_key_value_heads, s.intermediate_size, s.num_experts, AS_STORED, AS_STORED]
                for s in self.base.layers
            ],
            dtype=np.int64,
        )
        self.kept = self._kept_layers(kept)
        self.removable = np.array(
            [
                f"layer.{i}" in self.positions
                or (self._holds_zero(f"ffn.{i}") and (self._holds_zero(f"kv.{i}") or not kv_heads))
                for i, kv_heads in enumerate(self._base_sizes[:, KV])
            ]
        )
        self._layer_sizes: dict[tuple[int, ...], LayerSizes] = {}

    def _kept_layers(self, kept: Sequence[Iterable[int]] | None) -> NDArray[np.bool_]:
        """`kept` as a matrix. Raises ValueError unless it fits the values of `depth` and leaves attention."""
        layers = len(self.base.layers)
        if "depth" not in self.positions:
            if kept is not None:
                raise ValueError("layers to keep were given, but there is no depth gene")
            return np.ones((1, layers), dtype=bool)
        depths = self.values_of("depth")
        subsets = [set(subset) for subset in kept or ()]
        if [len(subset) for subset in subsets] != list(depths):
            raise ValueError(f"depth: {list(depths)} layers need as many sets of layers to keep, in the same order")
        for subset in subsets:
            if not subset <= set(range(layers)):
                raise ValueError(f"depth: layers {sorted(subset)} are not all among 0 to {layers - 1}")
            if not any(self._base_sizes[i, KV] for i in subset):
                raise ValueError(f"depth: keeping only layers {sorted(subset)} leaves no attention")
        return np.array([[i in subset for i in range(layers)] for subset in subsets])

    @property
    def bits(self) -> bool:
        """Whether genes say what weights are rounded to."""
        return any(gene.kind in BITS for gene in self.genes)

    def values_of(self, name: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The values of a gene by its name; `default` where there is no such gene."""
        return self.genes[self.positions[name]].values if name in self.positions else default

    def _holds_zero(self, name: str) -> bool:
        return 0 in self.values_of(name)[:1]

    # -- genomes to sizes --

    def sizes(self, genomes: Genomes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sizes that genomes stand for, [n, layers, columns], and those outside the layers, [n, outer columns].

        Canonical as an `Architecture` is: sizes of removed halves are 0, and so are bits of what is as stored.
        """
        return self._sizes_unrepaired(self.repair(genomes))

    def _sizes_unrepaired(self, genomes: Genomes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """As `sizes`, of genomes that need no repair."""
        # 1. The base's sizes, replaced by what the genes say.
        n = len(genomes)
        sizes = np.repeat(self._base_sizes[None], n, axis=0)
        outer = np.repeat(np.array([[self.base.hidden_size, AS_STORED, AS_STORED]], dtype=np.int64), n, axis=0)
        queries = np.repeat((self._base_sizes[:, HEADS] // np.maximum(self._base_sizes[:, KV], 1))[None], n, axis=0)
        present = self._kept_by(genomes)
        for position, gene in enumerate(self.genes):
            chosen = self._values[position][genomes[:, position]]
            if gene.kind in OUTER_COLUMNS:
                outer[:, OUTER_COLUMNS[gene.kind]] = chosen
            elif gene.kind == "heads":
                queries = np.minimum(queries, chosen[:, None])
            elif gene.kind == "layer":
                present[:, gene.layer] &= chosen.astype(bool)
            elif gene.kind in COLUMNS and gene.layer is not None:
                sizes[:, gene.layer, COLUMNS[gene.kind]] = chosen
            elif gene.kind in COLUMNS:
                column = sizes[:, :, COLUMNS[gene.kind]]
                np.minimum(column, chosen[:, None], out=column)
        # 2. What is removed is 0, and with it what depends on it.
        sizes *= present[:, :, None]
        sizes[:, :, HEADS] = sizes[:, :, KV] * queries
        sizes[:, :, EXPERTS] *= sizes[:, :, FFN] > 0
        for bits, units in ((ATTENTION_BITS, KV), (FFN_BITS, FFN)):
            sizes[:, :, bits] *= (sizes[:, :, units] > 0) & (sizes[:, :, bits] < AS_STORED)
        outer[:, HIDDEN + 1 :] *= outer[:, HIDDEN + 1 :] < AS_STORED
        return sizes, outer

    def _kept_by(self, genomes: Genomes) -> NDArray[np.bool_]:
        """The layers that each genome's `depth` keeps, [n, layers], as a copy."""
        depths = genomes[:, self.positions["depth"]] if "depth" in self.positions else np.zeros(len(genomes), dtype=int)
        return self.kept[depths]

    def repair(self, genomes: Genomes) -> Genomes:
        """The genomes, those changed that would leave no attention anywhere, where the base has any."""
        genomes = np.array(genomes, dtype=np.int64, ndmin=2)
        if not self._base_sizes[:, KV].any():
            return genomes
        sizes, _ = self._sizes_unrepaired(genomes)
        kept = self._kept_by(genomes)
        for row in np.flatnonzero(~sizes[:, :, KV].any(axis=1)):
            possible = np.flatnonzero(kept[row] & (self._base_sizes[:, KV] > 0))
            with_mlp = [i for i in possible if sizes[row, i, FFN]]
            layer = with_mlp[0] if with_mlp else possible[0]
            if f"layer.{layer}" in self.positions:
                position = self.positions[f"layer.{layer}"]
                genomes[row, position] = self.counts[position] - 1
            if self._holds_zero(f"kv.{layer}"):
                position = self.positions[f"kv.{layer}"]
                genomes[row, position] = max(genomes[row, position], 1)
        return genomes

    def canonicalize(self, genomes: Genomes) -> Genomes:
        """One genome, of all that stand for the same architecture. Inert genes take their last value."""
        return self._canonicalize(genomes)[0]

    def _canonicalize(self, genomes: Genomes) -> tuple[Genomes, NDArray[np.bool_]]:
        """Canonical genomes, and which of their genes are inert, both [n, genes]."""
        # 1. Which layers are removed, by any gene.
        genomes = self.repair(genomes)
        sizes, _ = self._sizes_unrepaired(genomes)
        inert = np.zeros(genomes.shape, dtype=bool)
        removed = ~(sizes[:, :, KV] | sizes[:, :, FFN]).astype(bool)
        # 2. Depth: the first set of layers that holds the kept ones and whose others other genes can remove.
        if "depth" in self.positions:
            holds = (~removed[:, None] <= self.kept[None]).all(2)
            explains = (self.kept[None] <= (~removed | self.removable)[:, None]).all(2)
            genomes[:, self.positions["depth"]] = np.argmax(holds & explains, axis=1)
        kept = self._kept_by(genomes)
        # 3. Genes of bits: inert where nothing has them. Genes of single layers: 0 where they remove a layer that
        #    depth keeps, inert where the layer is removed without them.
        for position, gene in enumerate(self.genes):
            if gene.kind in HALF_OF_BITS:
                units = sizes[:, :, HALF_OF_BITS[gene.kind]] > 0
                inert[:, position] = ~(units.any(axis=1) if gene.layer is None else units[:, gene.layer])
                continue
            if gene.layer is None:
                continue
            lost, here = removed[:, gene.layer], kept[:, gene.layer]
            if gene.kind == "layer":
                genomes[lost & here, position] = 0
                inert[:, position] = ~here
            elif f"layer.{gene.layer}" in self.positions:
                inert[:, position] = lost
            else:
                inert[:, position] = ~here
                genomes[lost & here, position] = 0
            if gene.kind == "experts":
                inert[:, position] |= sizes[:, gene.layer, FFN] == 0
        return np.where(inert, self.counts - 1, genomes), inert

    def features(self, genomes: Genomes) -> NDArray[np.float64]:
        """What predictors see, [n, features]: every gene's value as a share of the base's, then its one-hot code over
        the declared values. Both are 0 where the gene is inert, so equal architectures have equal features."""
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
        sizes, outer = self.sizes(genomes)
        return [
            Architecture(width, tuple(self._sizes_of(tuple(row)) for row in rows), embedding, head)
            for (width, embedding, head), rows in zip(outer.tolist(), sizes.tolist(), strict=True)
        ]

    def _sizes_of(self, row: tuple[int, ...]) -> LayerSizes:
        if row not in self._layer_sizes:
            self._layer_sizes[row] = LayerSizes(*row)
        return self._layer_sizes[row]

    def encode(self, architecture: Architecture) -> Genome:
        """The canonical genome of an architecture. Raises ValueError where the space does not hold it."""
        if len(architecture.layers) != len(self.base.layers):
            raise ValueError(f"the architecture has {len(architecture.layers)} layers, not {len(self.base.layers)}")
        # 1. The depth that keeps just its layers, as far as other genes do not remove them.
        genome = self.counts - 1
        present = np.array([not layer.removed for layer in architecture.layers])
        if "depth" in self.positions:
            fits = (present <= self.kept).all(1) & (self.kept <= (present | self.removable)).all(1)
            if not fits.any():
                raise ValueError("the space has no depth that keeps just the architecture's layers")
            genome[self.positions["depth"]] = np.argmax(fits)
        # 2. Every other gene's value as the layers show it.
        kept = [layer for layer in architecture.layers if not layer.removed]
        for position, gene in enumerate(self.genes):
            value = None if gene.kind == "depth" else _value_in(gene, architecture, kept)
            if value is not None and value in gene.values:
                genome[position] = gene.values.index(value)
        # 3. Does the genome stand for the architecture?
        canonical = self.canonicalize(genome[None])
        if self.decode_all(canonical)[0] != architecture:
            raise ValueError("the search space does not hold this architecture")
        return tuple(canonical[0].tolist())

    def __contains__(self, architecture: Architecture) -> bool:
        try:
            self.encode(architecture)
        except ValueError:
            return False
        return True

    def inert(self, genome: Sequence[int]) -> list[bool]:
        """Which genes of a genome have no effect."""
        return self._canonicalize(self._row(genome))[1][0].tolist()

    def _row(self, genome: Sequence[int]) -> Genomes:
        row = np.array([genome], dtype=np.int64)
        if row.shape[1] != len(self.genes) or (row < 0).any() or (row >= self.counts).any():
            raise ValueError(f"a genome of this space has {len(self.genes)} indices below {self.counts.tolist()}")
        return row

    def smallest(self) -> Architecture:
        """All genes at their least: the smallest size that the space holds."""
        return self.decode_all(np.zeros((1, len(self.genes)), dtype=np.int64))[0]

    # -- how many --

    @property
    def upper(self) -> NDArray[np.int64]:
        """The highest index of each gene."""
        return self.counts - 1

    @property
    def size(self) -> int:
        """Number of raw genomes, inert genes counted."""
        return math.prod(len(gene.values) for gene in self.genes)

    def architectures(self) -> Iterator[Architecture]:
        """All different architectures, in the order of their genomes. For spaces small enough to enumerate."""
        yield from self.decode_all(self.all_genomes())

    def all_genomes(self) -> Genomes:
        """All different canonical genomes, ascending, [n, genes]. For spaces small enough to enumerate."""
        raw = list(product(*(range(len(gene.values)) for gene in self.genes)))
        return np.unique(self.canonicalize(np.array(raw, dtype=np.int64)), axis=0)

    # -- spaces in recipes --

    @classmethod
    def preset(cls, name: str, structure: Structure, **options: int | str | Sequence[int]) -> SearchSpace:
        """A space by name; `options` are the `step`, `policy` and `order` of `from_dict`."""
        space = cls.from_dict({"preset": name, **options}, structure)
        space.name = name
        return space

    @classmethod
    def from_dict(
        cls, data: Mapping[str, object], structure: Structure, measured_order: Sequence[int] | None = None
    ) -> SearchSpace:
        """A space that a recipe spells out: gene names to values.

        `ffn.*` stands for all layers (that have such a size) and `ffn.4-7` for a range; a later line overrides an
        earlier one for its layers. Values are a list, or `{step: 64, min: 128}` for FFN widths (min 0 lets the MLP
        go). `depth` is `{values: [6, 8], policy: late-block}`, `{values: …, order: […]}` or `{keep: [[0, 1, 3], …]}`.

        `preset: llama-nas` starts from a named space (`search.presets.PRESETS`), in which `step` is that of FFN
        widths, and `policy` or `order` (all layers, most important first) says which layers a depth keeps; the other
        lines are put over the preset's.

        `measured_order` (all layers, most important first) serves a depth gene of policy `importance` that names no
        order. Raises ValueError, with what would be valid, for anything that the original cannot be cut to.
        """
        genes, kept = read_space(data, structure, measured_order)
        return cls(structure, [Gene(name, values) for name, values in genes.items()], kept=kept)

    def to_dict(self) -> dict[str, object]:
        """What `from_dict` reads, every gene in full."""
        data: dict[str, object] = {gene.name: list(gene.values) for gene in self.genes}
        if "depth" in data:
            data["depth"] = {"keep": [np.flatnonzero(row).tolist() for row in self.kept]}
        return data


def _value_in(gene: Gene, architecture: Architecture, kept: list[LayerSizes]) -> int | None:
    """A gene's value as an architecture, and those of its layers that are kept, show it; None where nothing does."""
    if gene.kind == "hidden_size":
        return architecture.hidden_size
    if gene.kind in OUTER:
        return (architecture.embedding_bits if gene.kind == "embedding_bits" else architecture.head_bits) or AS_STORED
    if gene.layer is None and gene.kind in BITS:
        return next((bits for layer in kept if (bits := SIZES[gene.kind](layer))), None)
    if gene.layer is None and gene.kind in ("heads", "kv"):
        return next((SIZES[gene.kind](layer) for layer in kept if layer.num_key_value_heads), None)
    layer = architecture.layers[gene.layer] if gene.layer is not None else next(iter(kept), None)
    if gene.kind == "layer":
        return int(layer is not None and not layer.removed)
    return None if layer is None else SIZES[gene.kind](layer)
