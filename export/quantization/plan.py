"""What of a network is quantized: its linear layers, and the form that a scheme gives to each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from export.quantization.schemes import SCHEMES, LinearLayers, SchemeName, SchemePlan
from supernet.architecture import GROUP_SIZES
from supernet.common.errors import RequestError
from supernet.streaming import WeightFiles
from supernet.trust import check_code
from supernet.uneven import family_of_standalone

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

AUTOROUND_STEP = 32
"""AutoRound leaves a weight-only linear layer out unless both its widths are multiples of this."""


def linear_layers(config: PreTrainedConfig, trust_remote_code: bool = False) -> LinearLayers:
    """The linear layers of the network of a configuration, plain or uneven.

    Raises `RequestError` where experts or most weights are in modules of other kinds: compressed-tensors knows linear
    layers.
    """
    with torch.device("meta"):
        return linear_layers_in(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))


def linear_layers_in(model: PreTrainedModel) -> LinearLayers:
    """The linear layers of a network. Raises `RequestError` as `linear_layers` does."""
    config, family = model.config, family_of_standalone(model.config)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    prefix = family.layers + "."
    widths = {name: (m.out_features, m.in_features) for name, m in linear.items() if name.startswith(prefix)}
    inside = [parameter for name, parameter in model.named_parameters() if name.startswith(prefix)]
    weights = sum(parameter.numel() for parameter in inside)
    experts = "experts" in family.settings and any(parameter.dim() > 2 for parameter in inside)
    # Stacked experts are refused however few they are: files hold them one by one, and a code file's class does not.
    if experts or 2 * sum(rows * columns for rows, columns in widths.values()) < weights:
        held = "weights of experts" if experts else "most of their weights"
        raise RequestError(
            f"{family.model_type} networks{' with experts' if experts else ''} cannot be quantized: {held} are not in "
            "linear layers; leave the quantization out"
        )
    head = family.head.removesuffix(".weight")
    embedding = family.embedding.removesuffix(".weight")
    outside = [name for name in linear if name not in widths]
    return LinearLayers(widths, outside, family.layers, embedding, head, bool(config.tie_word_embeddings))


def linear_layers_of(source: Path) -> LinearLayers:
    """The linear layers of the network in a package. Raises `RequestError` as `linear_layers` does."""
    trusted = check_code(source)
    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=trusted)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    renamings = [
        one for one in get_model_conversion_mapping(model, add_legacy=False) if isinstance(one, WeightRenaming)
    ]
    names = {stored: rename_source_key(stored, renamings, [])[0] for stored in WeightFiles(source)}
    renamed = {stored: name for stored, name in names.items() if name != stored}
    return replace(linear_layers_in(model), renamed=renamed)


def plan_scheme(widths: Mapping[str, tuple[int, int]], scheme: SchemeName, group_size: int | None = None) -> SchemePlan:
    """The group size of a scheme, and the layers that are left out of it.

    Layers with a width that is no multiple of 32 are left out. At 4 bits and without `group_size`, which is the user's,
    the group size is the largest of 128, 64, 32 that divides the input width of every other layer.

    Raises `RequestError` where the user's group size does not divide a width or has no meaning for the scheme, and
    where all layers would be left out.
    """
    left_out = [name for name, pair in widths.items() if any(width % AUTOROUND_STEP for width in pair)]
    form = SCHEMES[scheme]
    if form.bits == 8 and group_size not in (None, -1):
        raise RequestError(f"a group size of {group_size} was given, but {scheme} has one scale for each channel")
    if len(left_out) == len(widths) and (form.bits < 8 or form.auto_round):
        raise RequestError(
            f"{scheme} needs widths that are multiples of {AUTOROUND_STEP}, and no layer has; ask for int8"
        )
    if form.bits == 8:
        return SchemePlan(scheme, -1, [] if form.dynamic else left_out)
    inputs = sorted({columns for _, columns in widths.values()})
    if group_size is not None:
        valid = [g for g in GROUP_SIZES if not any(width % g for width in inputs)]
        bad = [width for width in inputs if group_size <= 0 or width % group_size]
        if bad:
            choice = f"valid sizes here are {', '.join(map(str, valid))}" if valid else "no group size divides them all"
            raise RequestError(f"group size {group_size} does not divide the width {bad[0]}; {choice}")
        if group_size % AUTOROUND_STEP:
            raise RequestError(f"group size {group_size} is not a multiple of {AUTOROUND_STEP}")
    else:
        under = {columns for name, (_, columns) in widths.items() if name not in left_out}
        group_size = next((g for g in GROUP_SIZES if not any(width % g for width in under)), GROUP_SIZES[-1])
    return SchemePlan(scheme, group_size, left_out)
