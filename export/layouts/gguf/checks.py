"""What llama.cpp cannot compute is refused before anything is written, in one line that says what it is."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from export.layouts.gguf.families import FAMILIES, GGUFFamily
from supernet.architecture import Architecture
from supernet.common.errors import RequestError
from supernet.families import families, head_dim
from supernet.slicing import standalone_config
from supernet.trust import UNEVEN_PREFIX


def table_of(config: Any) -> GGUFFamily:
    """The table for a network, plain or uneven. Raises `RequestError` where there is none."""
    plain = config.model_type.removeprefix(UNEVEN_PREFIX)
    if plain not in FAMILIES:
        raise RequestError(f"--format gguf does not know {plain} networks; it writes {', '.join(FAMILIES)}")
    family = FAMILIES[plain]
    if plain == config.model_type and (not family.square or _is_square(config)):
        return family
    if family.uneven is not None:
        return family.uneven
    if plain == config.model_type:
        raise RequestError(f"llama.cpp's {family.name} networks have query heads as wide as the residual, all together")
    raise RequestError(
        f"llama.cpp has no architecture for uneven {plain} networks; let one whose layers are alike be picked "
        "(--format uniform,gguf), or use --format padded"
    )


def holds_uneven(config: Any) -> bool:
    """Whether networks of this (plain) family may have layers that differ in size."""
    return FAMILIES[config.model_type].uneven is not None


def holds(config: Any, architecture: Architecture) -> bool:
    """Whether a sub-network whose layers are alike has a place in llama.cpp; `config` is the base's."""
    plain = standalone_config(config, architecture)
    try:
        return all(table_of(plain).assumed_of_layers(plain).values())
    except RequestError:
        return False


def _is_square(config: Any) -> bool:
    """Whether the query heads are as wide as the residual, all together."""
    return bool(head_dim(config) * config.num_attention_heads == config.hidden_size)


def check_family(config: Any, parameters: Collection[str]) -> None:
    """Refuse a family, a parameter or a setting that llama.cpp has no place for: what no choice of sizes changes.

    `parameters` are the names of the network's own. Raises `RequestError` that says what llama.cpp cannot do.
    """
    family = table_of(config)
    known = families()[family.model_type]
    theirs = f"llama.cpp's {family.name} networks"
    for parameter in parameters:
        family.stored(parameter)
    if not family.listed:
        for parameter in family.missing(parameters, config.num_hidden_layers):
            raise RequestError(f"{theirs} need {parameter}, which this network has not")
    if family.head != "either" and (family.head == "own") != (known.head in parameters):
        head = "a weight of its own" if family.head == "own" else "the embedding"
        raise RequestError(f"{theirs} have {head} as their output head; this one has not")
    names = ("hidden_activation", "activation_function", "hidden_act")
    activation = next(value for name in names if (value := getattr(config, name, None)))
    if activation not in family.activations:
        raise RequestError(f"{theirs} have no activation '{activation}'; known are: {', '.join(family.activations)}")
    rope = family.rope(config)
    kind = rope.get("rope_type", "default")
    if kind not in family.rotary:
        raise RequestError(
            f"{theirs} have no rotary embeddings of type '{kind}'; known are: {', '.join(family.rotary)}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and not family.partial:
        raise RequestError(f"{theirs} rotate whole heads; this one rotates a part of each")
    for statement, holds in family.assumed(config).items():
        if not holds:
            raise RequestError(f"{theirs} {statement}; this one does not")


def check_network(config: Any, parameters: Collection[str]) -> None:
    """Refuse a cut-out network that llama.cpp does not compute. Raises `RequestError` as `check_family` does."""
    check_family(config, parameters)
    family = table_of(config)
    theirs = f"llama.cpp's {family.name} networks"
    for statement, holds in family.assumed_of_layers(config).items():
        if not holds:
            raise RequestError(f"{theirs} {statement}; with the layers that are left this one does not")
