"""Genes, the elastic sizes of a search space, and the check that a base can be cut to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from supernet.architecture import LayerSizes, Structure

PER_LAYER = ("kv", "ffn", "experts", "layer", "attention_bits", "ffn_bits")
GLOBAL = ("kv", "ffn", "experts", "heads", "hidden_size", "depth", "attention_bits", "ffn_bits")
OUTER = ("embedding_bits", "head_bits")
"""Genes of what lies outside the layers."""
AS_STORED = 16
"""The value of a gene of bits that leaves weights as they are stored."""
BITS = {"attention_bits": (2, 3, 4, 8), "ffn_bits": (2, 3, 4, 8), "embedding_bits": (4, 8), "head_bits": (4, 8)}
"""Genes of bits, and the values below `AS_STORED` that packages can hold."""

SIZES: dict[str, Callable[[LayerSizes], int]] = {
    "kv": lambda layer: layer.num_key_value_heads,
    "ffn": lambda layer: layer.intermediate_size,
    "experts": lambda layer: layer.num_experts,
    "heads": lambda layer: layer.num_attention_heads // max(layer.num_key_value_heads, 1),
    "attention_bits": lambda layer: (layer.attention_bits or AS_STORED) if layer.num_key_value_heads else 0,
    "ffn_bits": lambda layer: (layer.ffn_bits or AS_STORED) if layer.intermediate_size else 0,
}
"""A layer's sizes under the names of genes; `heads` is query heads for each key-value head. Bits are 0 where there is
nothing that has any."""


@dataclass(frozen=True, slots=True)
class Gene:
    """One elastic size.

    `kv.3`, `ffn.3`, `experts.3` and `layer.3` belong to layer 3 of the base; `kv`, `ffn` and `experts` hold for all
    layers at once, `heads` is the number of query heads for each key-value head, `hidden_size` the residual width, and
    `depth` the number of layers (a policy says which). `attention_bits`, `ffn_bits` (of all layers, or of one),
    `embedding_bits` and `head_bits` are what linear weights are rounded to, 16 for as they are stored.

    `values` ascend and end with the base's (those of bits that somebody asked for need not). 0 removes the half-block
    (`kv`, `ffn`) or the layer (`layer`).
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


def check_genes(structure: Structure, genes: Sequence[Gene]) -> None:
    """Raises ValueError, with what would be valid, unless `structure` can be cut to every value of every gene."""
    names = {gene.name for gene in genes}
    layers = len(structure.base.layers)
    if not genes:
        raise ValueError("the search space has no genes; name at least one of kv, ffn, layer, depth")
    if len(names) != len(genes):
        raise ValueError("the search space names a gene twice")
    for gene in genes:
        kind, _, index = gene.name.partition(".")
        per_layer = kind in PER_LAYER and index.isdecimal() and int(index) < layers
        if not per_layer and not (kind in (*GLOBAL, *OUTER) and not index):
            raise ValueError(
                f"unknown gene '{gene.name}'; valid are {', '.join((*GLOBAL, *OUTER))} "
                f"and, for layers 0 to {layers - 1}, " + ", ".join(f"{k}.N" for k in PER_LAYER)
            )
        if per_layer and kind in names:
            raise ValueError(f"'{gene.name}' contradicts '{kind}', which holds for all layers; keep one of them")
        _check_values(structure, gene)


def _check_values(structure: Structure, gene: Gene) -> None:
    """Raises ValueError, with what would be valid, for values that the base cannot be cut to."""
    if gene.kind in BITS:
        _check_bits(structure, gene)
        return
    full = _base_value(structure, gene)
    least = 0 if gene.layer is not None and gene.kind != "experts" else 1
    valid = f"valid are {least} to {full}, ascending, the original's {full} last"

    # 1. The base has such a size, and it may change.
    if not full:
        what = {"kv": "attention heads", "experts": "experts"}.get(gene.kind, "of these")
        where = "the original" if gene.layer is None else f"layer {gene.layer} of the original"
        raise ValueError(f"{gene.name}: {where} has no {what}")
    if gene.kind == "hidden_size" and structure.fixed_hidden:
        raise ValueError(f"hidden_size: cannot change here ({structure.fixed_hidden}); leave it out")

    # 2. Whole numbers, ascending (several depths may be equal: they keep different layers), within the base's size.
    if any(not isinstance(v, int) or isinstance(v, bool) for v in gene.values):
        raise ValueError(f"{gene.name}: {list(gene.values)} are not all whole numbers; {valid}")
    pairs = zip(gene.values, gene.values[1:], strict=False)
    if not gene.values or not all(a < b or (a == b and gene.kind == "depth") for a, b in pairs):
        raise ValueError(f"{gene.name}: {list(gene.values)} does not ascend; {valid}")
    if gene.values[-1] > full:
        reason = "query heads for each key-value head" if gene.kind == "heads" else "size"
        raise ValueError(f"{gene.name}: {gene.values[-1]} is above the original's {reason}; {valid}")
    if gene.values[0] < least:
        raise ValueError(f"{gene.name}: {gene.values[0]} is too small; {valid}")

    # 3. Multiples of what configurations and stacked experts ask for.
    if gene.kind == "hidden_size" and (heads := max(s.num_attention_heads for s in structure.base.layers)):
        uneven = [v for v in gene.values if v % heads]
        if uneven:  # configurations refuse it, even where they name a head's width
            raise ValueError(
                f"hidden_size: {uneven[0]} is not a multiple of the {heads} query heads; "
                f"valid are the multiples of {heads} up to {full}"
            )
    if gene.kind in ("ffn", "hidden_size"):
        layers = structure.base.layers if gene.layer is None else [structure.base.layers[gene.layer]]
        step = max(structure.step(layer) for layer in layers)
        if uneven := [v for v in gene.values[:-1] if v % step]:
            raise ValueError(f"{gene.name}: {uneven[0]} is not a multiple of {step} (stacked experts)")

    # 4. The base itself is in the space.
    if gene.values[-1] != full:
        raise ValueError(f"{gene.name}: {list(gene.values)} leaves out the original; {valid}")


def _check_bits(structure: Structure, gene: Gene) -> None:
    """Raises ValueError, with what would be valid, for bits that weights of this kind cannot have."""
    values, known = list(gene.values), BITS[gene.kind]
    if any(not isinstance(v, int) or isinstance(v, bool) for v in values):
        raise ValueError(f"{gene.name}: {values} are not all whole numbers")
    if gene.kind == "head_bits" and structure.tied:
        raise ValueError("head_bits: the output head is the embedding here; use embedding_bits")
    if gene.layer is not None and not SIZES[gene.kind](structure.base.layers[gene.layer]):
        raise ValueError(f"{gene.name}: layer {gene.layer} of the original has none of these")
    if values != sorted({*values, AS_STORED}) or not set(values) <= {*known, AS_STORED}:
        raise ValueError(f"{gene.name}: {values}; valid are {', '.join(map(str, known))}, ascending, {AS_STORED} last")


def _base_value(structure: Structure, gene: Gene) -> int:
    """The gene's value in the base. Raises ValueError where it holds for layers that differ."""
    base = structure.base
    if gene.kind == "hidden_size":
        return base.hidden_size
    if gene.kind == "depth":
        return len(base.layers)
    if gene.kind == "layer":
        return 1
    if gene.layer is not None:
        return SIZES[gene.kind](base.layers[gene.layer])
    needs_heads = gene.kind in ("heads", "kv")  # layers of linear attention have neither
    present = [s for s in base.layers if (s.num_key_value_heads if needs_heads else not s.removed)]
    sizes = {SIZES[gene.kind](layer) for layer in present}
    if len(sizes) != 1:
        raise ValueError(
            f"{gene.name}: the original's layers differ ({', '.join(map(str, sorted(sizes)))}); "
            f"use {gene.kind}.N for each layer"
        )
    return sizes.pop()
