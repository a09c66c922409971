"""Search spaces as recipes write them: by name, or gene by gene.

`read_space` makes of them the genes that a `SearchSpace` is built from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeGuard

from search.genes import AS_STORED, SIZES
from supernet.architecture import LayerSizes, Structure

POLICIES = ("first", "alternate", "late-block")
"""Which layers a depth gene keeps, of the policies that need no measurement; `importance` is one more."""

RecipeSpace = dict[str, object]
"""A space as a recipe writes it: names of genes, with `*` and ranges for layers, to values."""
WriteDepth = Callable[[Iterable[int]], object]
"""Writes a `depth` gene of these values, under the policy or order that was asked for."""


def kept_layers(policy: str, layers: int, depth: int, order: Sequence[int] | None = None) -> tuple[int, ...]:
    """The `depth` of `layers` layers that a published policy keeps.

    `first` keeps the first (DyNAS-T's rule for BERT and ViT), `alternate` removes evenly spaced ones
    (AutoDistil), `late-block` removes one block that ends just before the last sixteenth of the layers, at
    least one (the late-middle block of the depth-pruning papers). `importance` keeps the first `depth` of
    `order`, which lists all layers, most important first. Raises ValueError for any other policy.
    """
    count = layers - depth  # to remove
    if policy == "first":
        removed: Iterable[int] = range(depth, layers)
    elif policy == "alternate":
        removed = {int((i + 0.5) * layers / count) for i in range(count)}
    elif policy == "late-block":
        end = max(layers - max(1, layers // 16), count)
        removed = range(end - count, end)
    elif policy == "importance" and order is not None:
        removed = set(order[depth:])
    else:
        raise ValueError(f"depth: unknown policy '{policy}'; valid are {', '.join(POLICIES)}, importance")
    return tuple(i for i in range(layers) if i not in set(removed))


def widths(base: int, step: int | None = None, unit: int = 1) -> tuple[int, ...]:
    """FFN widths from `step` to `base`, in steps that suit hardware and quantization groups.

    Without `step`: multiples of the largest of 128, 64 and 32 that divides `base` into at least 8 parts,
    thinned to about 12 values. A base that 32 does not divide gets the multiples of 32 below it and itself; one
    below 64 gets about 8 values, multiples of `unit`. A last step of less than half is left out.

    Raises ValueError for a `step` that neither divides the base nor is a multiple of 32.
    """
    if step is None:
        if base < 64:
            step = unit * math.ceil(base / (8 * unit))
        else:
            block = next((u for u in (128, 64, 32) if base % u == 0 and base // u >= 8), 32)
            parts = base // block
            coarse = math.ceil(parts / 12)
            step = block * next((c for c in range(coarse, parts // 8 + 1) if parts % c == 0), coarse)
    elif not isinstance(step, int) or not 0 < step <= base or (base % step and step % 32):
        divisors = [d for d in range(1, base + 1) if base % d == 0 and base // d <= 64]
        raise ValueError(
            f"a step of {step} does not divide the FFN width {base}; valid are its divisors "
            f"({', '.join(map(str, divisors))}) and multiples of 32 below it"
        )
    below = [w for w in range(step, base, step) if base - w >= step / 2]
    return (*below, base)


def _fine(structure: Structure, step: int | None, depth: WriteDepth) -> RecipeSpace:
    """Heads and FFN width of each layer, 0 included, at a step of the FFN width that suits hardware and quantization
    groups, and the number of experts."""
    genes: RecipeSpace = {}
    for i, layer in enumerate(structure.base.layers):
        if layer.num_key_value_heads:
            genes[f"kv.{i}"] = list(range(layer.num_key_value_heads + 1))
        genes[f"ffn.{i}"] = [0, *widths(layer.intermediate_size, step, structure.step(layer))]
        if layer.num_experts:
            genes[f"experts.{i}"] = _experts(layer.num_experts, structure.experts_per_token)
    return genes


def _llama_nas(structure: Structure, step: int | None, depth: WriteDepth) -> RecipeSpace:
    """Three depths and two FFN widths for each layer: {24, 28, 32} and {5504, 11008} on Llama-2-7B, in proportion
    elsewhere (LLaMA-NAS, section 3)."""
    count = len(structure.base.layers)
    genes: RecipeSpace = {"depth": depth([_shrunk(count, 3 / 4, 2), _shrunk(count, 7 / 8, 1), count])}
    for i, layer in enumerate(structure.base.layers):
        genes[f"ffn.{i}"] = _shares(layer.intermediate_size, (1 / 2,), step, structure.step(layer))
    return genes


def _instatune(structure: Structure, step: int | None, depth: WriteDepth) -> RecipeSpace:
    """Depths from three quarters up, half to all heads, half to all of the FFN, for each layer."""
    count = len(structure.base.layers)
    genes: RecipeSpace = {"depth": depth(range(_shrunk(count, 3 / 4, 2), count + 1))}
    for i, layer in enumerate(structure.base.layers):
        if kv := layer.num_key_value_heads:
            genes[f"kv.{i}"] = sorted({max(1, round(kv * share)) for share in (1 / 2, 2 / 3, 5 / 6)} | {kv})
        genes[f"ffn.{i}"] = _shares(layer.intermediate_size, (1 / 2, 3 / 4), step, structure.step(layer))
    return genes


def _any_layers(structure: Structure, step: int | None, depth: WriteDepth) -> RecipeSpace:
    """Any subset of layers."""
    return {f"layer.{i}": [0, 1] for i in range(len(structure.base.layers))}


def _uniform(structure: Structure, step: int | None, depth: WriteDepth) -> RecipeSpace:
    """Depth, one FFN width and one number of heads for all layers."""
    layers = structure.base.layers
    return {
        "depth": depth(range(max(1, len(layers) // 4), len(layers) + 1)),
        "kv": list(range(1, max(layer.num_key_value_heads for layer in layers) + 1)),
        "ffn": list(widths(layers[0].intermediate_size, step, structure.step(layers[0]))),
    }


def _simq(structure: Structure, step: int | None, depth: WriteDepth) -> RecipeSpace:
    """The space `fine`, and with it the bits of every half-block's linear weights, of the embedding and of a head that
    has its own weight (SimQ-NAS, arXiv 2312.13301)."""
    genes = _fine(structure, step, depth)
    for i, layer in enumerate(structure.base.layers):
        if layer.num_key_value_heads:
            genes[f"attention_bits.{i}"] = [3, 4, 8, AS_STORED]
        if layer.intermediate_size:
            genes[f"ffn_bits.{i}"] = [3, 4, 8, AS_STORED]
    genes["embedding_bits"] = [4, 8, AS_STORED]
    return genes if structure.tied else genes | {"head_bits": [4, 8, AS_STORED]}


PRESETS: dict[str, Callable[[Structure, int | None, WriteDepth], RecipeSpace]] = {
    "llama-nas": _llama_nas,
    "instatune": _instatune,
    "depth": _any_layers,
    "uniform": _uniform,
    "fine": _fine,
    "simq": _simq,
}
"""Named spaces, from the structure, a step of the FFN width (None: the space chooses) and what writes a depth gene."""


def _experts(count: int, per_token: int) -> list[int]:
    """Numbers of experts in about eight steps, none so few that a token would go to fewer than it used to."""
    return sorted({max(per_token, round(count * eighths / 8)) for eighths in range(1, 9)})


def _shrunk(count: int, share: float, missing: int) -> int:
    """A share of `count` layers, with at least so many `missing` where that leaves one."""
    return max(1, min(round(count * share), count - missing))


def _shares(base: int, shares: Sequence[float], step: int | None, least: int) -> list[int]:
    """Shares of a width, rounded to multiples of `step` (32, or `least` below 64), and the width itself."""
    unit = step or (32 if base >= 64 else least)
    if step is not None:
        widths(base, step)
    return sorted({max(unit, round(base * share / unit) * unit) for share in shares} - {base} | {base})


def _depth(values: Iterable[int], policy: object, order: Sequence[int] | None) -> dict[str, object]:
    """A depth gene as `_read_depth` reads it."""
    gene: dict[str, object] = {"values": sorted(set(values)), "policy": policy}
    return gene if order is None else gene | {"order": list(order)}


def read_space(
    data: Mapping[str, object], structure: Structure, measured_order: Sequence[int] | None = None
) -> tuple[dict[str, tuple[int, ...]], list[tuple[int, ...]] | None]:
    """Values of each gene of a space in a recipe, and the layers that each value of `depth` keeps (None without it).

    `SearchSpace.from_dict` says what can be written. Raises ValueError, with what would be valid, for what cannot be
    read; whether the base can be cut to the values is for `search.genes.check_genes` to say.
    """
    if not isinstance(data, Mapping):
        raise ValueError("a search space is a mapping from gene names to values")
    if "preset" in data:
        data = _over_preset(data, structure)
    genes: dict[str, tuple[int, ...]] = {}
    kept: list[tuple[int, ...]] | None = None
    for name, values in data.items():
        if name == "depth":
            kept = _read_depth(values, len(structure.base.layers), measured_order)
            genes["depth"] = tuple(len(subset) for subset in kept)
            continue
        for target in _targets(str(name), structure.base.layers):
            genes[target] = _read_values(target, values, structure)
    return genes, kept


def _over_preset(data: Mapping[str, Any], structure: Structure) -> RecipeSpace:
    """The lines of a recipe's space put over those of the named space that it starts from."""
    name, step, order = data["preset"], data.get("step"), data.get("order")
    if name not in PRESETS:
        raise ValueError(f"unknown search space '{name}'; valid are {', '.join(PRESETS)}")
    if order is not None and not _whole_numbers(order):
        raise ValueError(f"order: {order!r} is not a list of layers")
    policy = "importance" if order is not None else data.get("policy", "late-block")
    genes = PRESETS[name](structure, step, partial(_depth, policy=policy, order=order))
    if "depth" not in genes and {"policy", "order"} & set(data):
        raise ValueError(f"policy, order: the space '{name}' has no depth gene that they could serve")
    return genes | {gene: values for gene, values in data.items() if gene not in ("preset", "step", "policy", "order")}


def _read_depth(values: object, layers: int, measured_order: Sequence[int] | None) -> list[tuple[int, ...]]:
    """The layers that each value of a depth gene keeps."""
    if not isinstance(values, Mapping):
        values = {"values": values}
    unknown = set(values) - {"values", "policy", "order", "keep"}
    if unknown:
        raise ValueError(
            f"depth: unknown {', '.join(sorted(map(str, unknown)))}; valid are values, policy, order, keep"
        )
    if "keep" in values:
        if not isinstance(values["keep"], Sequence) or not all(map(_whole_numbers, values["keep"])):
            raise ValueError(f"depth: keep: {values['keep']!r} is not a list of lists of layers")
        return [tuple(sorted(set(subset))) for subset in values["keep"]]
    order = values.get("order")
    if order is not None and (not _whole_numbers(order) or sorted(order) != list(range(layers))):
        raise ValueError(f"depth: the order must list each of the layers 0 to {layers - 1} once")
    policy = "importance" if order is not None else values.get("policy", "late-block")
    if policy == "importance" and order is None:
        order = measured_order
        if order is None:
            raise ValueError("depth: policy importance needs an order of the layers here, since nothing measures one")
    depths = values.get("values")
    if not isinstance(depths, Sequence) or not all(isinstance(d, int) and 1 <= d <= layers for d in depths):
        raise ValueError(f"depth: {depths} are not all whole numbers from 1 to {layers}")
    return [kept_layers(str(policy), layers, depth, order) for depth in depths]


def _whole_numbers(values: object) -> TypeGuard[Sequence[int]]:
    """Whether it is a list of whole numbers."""
    return isinstance(values, Sequence) and all(isinstance(value, int) for value in values)


def _targets(name: str, base: tuple[LayerSizes, ...]) -> list[str]:
    """The genes that a name in a recipe stands for; `*` is all layers that have such a size."""
    kind, _, where = name.partition(".")
    layers = len(base)
    if where == "*":
        having = [i for i, sizes in enumerate(base) if kind not in SIZES or SIZES[kind](sizes)]
        return [f"{kind}.{i}" for i in having or range(layers)]
    first, dash, last = where.partition("-")
    if dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last) < layers:
        return [f"{kind}.{i}" for i in range(int(first), int(last) + 1)]
    return [name]


def _read_values(name: str, values: object, structure: Structure) -> tuple[int, ...]:
    """The values of a gene from a list or, of an FFN width, from `{step, min}`. Raises ValueError for anything else."""
    if isinstance(values, Mapping):
        kind, _, index = name.partition(".")
        if kind != "ffn" or set(values) - {"step", "min"}:
            raise ValueError(f"{name}: give a list of values (only an FFN width can be {{step: …, min: …}})")
        layer = structure.base.layers[
            int(index) if index.isdecimal() and int(index) < len(structure.base.layers) else 0
        ]
        try:
            chosen = widths(layer.intermediate_size, values.get("step"), structure.step(layer))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        least = values.get("min", chosen[0])
        if not isinstance(least, int):
            raise ValueError(f"{name}: min: {least!r} is not a whole number")
        return tuple(v for v in (0, *chosen) if v >= least)
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name}: {values!r} is not a list of values")
    return tuple(values)
