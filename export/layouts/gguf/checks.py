"""Refusals of what llama.cpp cannot compute, before anything is written, each in one line."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from export.layouts.gguf.families import FAMILIES, GGUFFamily
from supernet.architecture import Architecture
from supernet.common.errors import NotHeldError
from supernet.families import families, head_dim
from supernet.slicing import standalone_config
from supernet.uneven import UNEVEN_PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def table_of(config: PreTrainedConfig) -> GGUFFamily:
    """The table for a network, plain or uneven. Raises `NotHeldError` where there is none."""
    plain = config.model_type.removeprefix(UNEVEN_PREFIX)
    if plain not in FAMILIES:
        raise NotHeldError(f"--format gguf does not know {plain} networks; it writes {', '.join(FAMILIES)}")
    family = FAMILIES[plain]
    if plain == config.model_type and (not family.square or _is_square(config)):
        return family
    if family.uneven is not None:
        return family.uneven
    if plain == config.model_type:
        raise NotHeldError(
            f"llama.cpp's {family.name} networks have query heads that are together as wide as the residual"
        )
    raise NotHeldError(
        f"llama.cpp has no architecture for uneven {plain} networks; let one whose layers are alike be picked "
        "(--format uniform,gguf), or use --format padded"
    )


def holds_uneven(config: PreTrainedConfig) -> bool:
    """Whether networks of this (plain) family may have layers that differ in size."""
    return FAMILIES[config.model_type].uneven is not None


def check_layers(config: PreTrainedConfig) -> None:
    """Raises `NotHeldError` where llama.cpp does not compute a cut-out network with the layers that are left."""
    family = table_of(config)
    for statement, is_so in family.assumed_of_layers(config).items():
        if not is_so:
            raise NotHeldError(
                f"llama.cpp's {family.name} networks {statement}; with the layers that are left this one does not"
            )


def check_alike(config: PreTrainedConfig, architecture: Architecture) -> None:
    """Raises `NotHeldError` where llama.cpp does not compute a sub-network whose layers are alike; `config` is the
    base's."""
    check_layers(standalone_config(config, architecture))


def holds(config: PreTrainedConfig, architecture: Architecture) -> bool:
    """Whether `check_alike` finds nothing wrong."""
    try:
        check_alike(config, architecture)
    except NotHeldError:
        return False
    return True


def _is_square(config: PreTrainedConfig) -> bool:
    """Whether all query heads together are as wide as the residual."""
    return bool(head_dim(config) * config.num_attention_heads == config.hidden_size)


def check_family(config: PreTrainedConfig, parameters: Collection[str]) -> None:
    """Refuse a family, a parameter or a setting that llama.cpp does not know: what no choice of sizes changes.

    `parameters` are the names of the network's parameters. Raises `NotHeldError` that says what llama.cpp cannot do.
    """
    family = table_of(config)
    networks = f"llama.cpp's {family.name} networks"
    # 1. Parameters.
    for parameter in parameters:
        family.stored(parameter)
    if not family.listed:
        for parameter in family.missing(parameters, config.num_hidden_layers):
            raise NotHeldError(f"{networks} need {parameter}, which this one lacks")
    own_head = families()[family.model_type].head in parameters
    if family.head != "either" and (family.head == "own") != own_head:
        head = "a separate weight" if family.head == "own" else "the embedding"
        raise NotHeldError(f"{networks} have {head} as their output head; this one does not")
    # 2. The activation.
    names = ("hidden_activation", "activation_function", "hidden_act")
    activation = next(value for name in names if (value := getattr(config, name, None)))
    if activation not in family.activations:
        raise NotHeldError(f"{networks} have no activation '{activation}'; known are: {', '.join(family.activations)}")
    # 3. Rotary embeddings.
    rope = family.rope(config)
    kind = rope.get("rope_type", "default")
    if kind not in family.rotary:
        raise NotHeldError(
            f"{networks} have no rotary embeddings of type '{kind}'; known are: {', '.join(family.rotary)}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and not family.partial:
        raise NotHeldError(f"{networks} rotate whole heads; this one rotates a part of each")
    # 4. What else llama.cpp takes for granted.
    for statement, holds in family.assumed(config).items():
        if not holds:
            raise NotHeldError(f"{networks} {statement}; this one does not")


def check_network(config: PreTrainedConfig, parameters: Collection[str]) -> None:
    """Refuse a cut-out network that llama.cpp does not compute. Raises `NotHeldError` as `check_family` does."""
    check_family(config, parameters)
    check_layers(config)
