"""Weights rounded to nearest, as compressed-tensors and auto-round store them: tensor by tensor, without data or model.

Data-free packages hold such weights, and so do the layers of tuned ones that AutoRound leaves out. What was rounded
otherwise (`export.quantization.gptq`) is stored here too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export.quantization.schemes import LinearLayers, Scheme, SchemePlan, form_of
from export.shards import WeightWriter
from supernet.architecture import table_format
from supernet.streaming import WeightFiles

Rounded = tuple[Tensor, Tensor]
"""Codes [outputs, inputs] (int8) and scales [outputs, groups] of a linear layer's weight."""
QuantizationConfig = dict[str, Any]
"""`quantization_config` of a config.json."""

_NO_ACTIVATIONS = {"input_activations": None, "output_activations": None}
_DYNAMIC = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
    "group_size": None,
}
CHANNEL_INT8 = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "channel",
    "dynamic": False,
    "group_size": None,
}
CHANNEL_GROUP = {"targets": ["Linear"], "weights": CHANNEL_INT8, **_NO_ACTIVATIONS, "format": "pack-quantized"}


def round_to_nearest(weight: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype = torch.bfloat16) -> Rounded:
    """Codes and scales of a linear layer's weight [out, in].

    `group_size` input channels share a scale; -1: all of them. Codes are computed with the scale as it is stored.
    """
    rows, columns = weight.shape
    groups = weight.float().unflatten(1, (-1, columns if group_size < 0 else group_size))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    lowest = -(2 ** (bits - 1))
    if bits < 8:
        # Codes reach one step further below zero than above: the scale's sign puts the largest weight on that side.
        scale = (torch.where(-low > high, low, high) / lowest).to(scale_dtype)
    else:
        # Rounding the scale down would clip the largest weight, which costs more than larger steps: it is rounded up.
        scale = (torch.maximum(-low, high) / 127 * (1 + torch.finfo(scale_dtype).eps / 2)).to(scale_dtype)
    step = scale.float()
    codes = (groups / torch.where(step == 0, 1.0, step)).round_().clamp_(lowest, -lowest - 1)
    return codes.to(torch.int8).view(rows, columns), scale.squeeze(-1)


def rounded(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """The values [out, in] that a weight has once it is rounded so, in its own dtype."""
    return values_of(round_to_nearest(weight, bits, group_size)).to(weight.dtype)


def scale_dtype(form: Scheme) -> torch.dtype:
    """The dtype that a scheme's scales are stored in."""
    return torch.float16 if form.auto_round else torch.bfloat16


def values_of(rounded: Rounded) -> Tensor:
    """What codes and scales say: float32 values [out, in]."""
    codes, scale = rounded
    return (codes.unflatten(1, (scale.shape[1], -1)) * scale.float()[..., None]).flatten(1)


@torch.no_grad()
def round_network(network: nn.Module, plan: SchemePlan, linear: LinearLayers, done: Collection[str] = ()) -> None:
    """Give a network in memory the weights that a package of the scheme holds where they are rounded without data;
    `done` are linear layers that are rounded already."""
    for name in linear.widths.keys() - set(done):
        parameter = network.get_parameter(f"{name}.weight")
        bits, group_size = plan.format_of(name, parameter.shape)
        if bits < 16:
            parameter.copy_(rounded(parameter, bits, group_size))
    for name, asked in outer_modules(plan, linear).items():
        parameter = network.get_parameter(f"{name}.weight")
        parameter.copy_(rounded(parameter, *table_format(asked, parameter.shape[1])))


def packed(weight: Tensor, bits: int, group_size: int) -> dict[str, Tensor]:
    """A linear layer's tensors, rounded to nearest, as `pack-quantized` names and stores them."""
    return packed_codes(round_to_nearest(weight, bits, group_size), bits)


def packed_codes(rounded: Rounded, bits: int) -> dict[str, Tensor]:
    """A linear layer's tensors as `pack-quantized` names and stores them: codes in words of 32 bits."""
    # compressed-tensors takes seconds to import.
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes, scale = rounded
    return {
        "weight_packed": pack_to_int32(codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(codes.shape),
    }


def packed_by_auto_round(rounded: Rounded, bits: int) -> dict[str, Tensor]:
    """A linear layer's tensors in auto-round's own form, which is GPTQ's: unsigned codes [in, out] in words of 32 bits
    down the inputs, zero points (less one) along the outputs, float16 scales [groups, out]."""
    codes, scale = rounded
    zero = 2 ** (bits - 1)
    zeros = torch.full(scale.shape, zero - 1, dtype=torch.int32)
    return {
        "qweight": _words(codes.t().int() + zero, bits),
        "qzeros": _words(zeros, bits).t().contiguous(),
        "scales": scale.t().contiguous(),
    }


def outer_modules(plan: SchemePlan, linear: LinearLayers) -> dict[str, int]:
    """The bits of embedding and head, by module name; without what stays bfloat16."""
    bits = {linear.embedding: plan.outer.embedding}
    if not linear.tied:
        bits[linear.head] = plan.outer.head
    return {name: number for name, number in bits.items() if number < 16}


def packed_table(weight: Tensor, bits: int) -> dict[str, Tensor]:
    """An embedding's or a head's tensors, as `packed` gives a layer's."""
    return packed(weight, *table_format(bits, weight.shape[1]))


def with_outer(config: QuantizationConfig, linear: LinearLayers, stored: Mapping[str, tuple[int, int]]) -> Any:
    """A compressed-tensors configuration with embedding and head under groups of their own; `stored`: bits and
    channels of each, by module name."""
    if not stored:
        return config
    groups = dict(config["config_groups"])
    for name, (bits, columns) in stored.items():
        bits, group = table_format(bits, columns)
        groups[f"group_{len(groups)}"] = {**CHANNEL_GROUP, "targets": [name], "weights": _weights(bits, group)}
    formats = {group["format"] for group in groups.values()}
    # A head that is the embedding is no linear layer any more.
    gone = {*stored, linear.head} if linear.tied else set(stored)
    return {
        **config,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": [name for name in config["ignore"] if name not in gone],
    }


def _weights(bits: int, group_size: int) -> dict[str, Any]:
    """compressed-tensors' description of weights: one scale for each output channel, or for each group of inputs."""
    if group_size < 0:
        return {**CHANNEL_INT8, "num_bits": bits}
    return {**CHANNEL_INT8, "num_bits": bits, "strategy": "group", "group_size": group_size}


def _words(codes: Tensor, bits: int) -> Tensor:
    """Unsigned int32 codes [n, m] as words [n * bits / 32, m], the first in the lowest bits."""
    count = 32 // bits
    shifts = bits * torch.arange(count, dtype=torch.int32)
    return (codes.unflatten(0, (-1, count)) << shifts[:, None]).sum(1, dtype=torch.int32)


def round_files(
    source: Path, plan: SchemePlan, linear: LinearLayers, target: Path, rounded: Mapping[str, Rounded] | None = None
) -> QuantizationConfig:
    """Write `source`'s weights to `target` with the linear layers inside blocks rounded, and embedding and head where
    the plan says so; returns their configuration.

    Layers among `rounded`, by module name, are so already; the others are rounded to nearest. Layers that the plan
    leaves out are rounded to 8 bits, or (in auto-round's own form) not at all. Needs memory for a few tensors and
    shards.
    """
    # 1. The weights, tensor by tensor.
    files, form, left_out = WeightFiles(source), form_of(plan.scheme), plan.left_out
    outer, tables = outer_modules(plan, linear), dict[str, tuple[int, int]]()
    given = rounded or {}
    with WeightWriter(target) as weights:
        for stored_name in files:
            tensor, name = files.read(stored_name), linear.name_of(stored_name)
            module, _, part = name.rpartition(".")
            if module in outer:
                tables[module] = outer[module], tensor.shape[1]
                for suffix, value in packed_table(tensor, outer[module]).items():
                    weights.add(f"{module}.{suffix}", value)
                continue
            as_stored = module in linear.widths and plan.format_of(module, linear.widths[module])[0] == 16
            if module not in linear.widths or as_stored or (form.auto_round and module in left_out):
                weights.add(name, tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor)
                continue
            if part != "weight":
                stored = {part: tensor.to(torch.float16 if form.auto_round else torch.bfloat16)}
            else:
                bits, group_size = plan.format_of(module, tensor.shape)
                codes_and_scales = given.get(module) or round_to_nearest(tensor, bits, group_size, scale_dtype(form))
                if form.auto_round:
                    stored = packed_by_auto_round(codes_and_scales, bits)
                elif form.dynamic:
                    stored = dict(zip(("weight", "weight_scale"), codes_and_scales, strict=True))
                else:
                    stored = packed_codes(codes_and_scales, bits)
            for suffix, value in stored.items():
                weights.add(f"{module}.{suffix}", value)
    return with_outer(plan_configuration(plan, linear), linear, tables)


def plan_configuration(plan: SchemePlan, linear: LinearLayers) -> QuantizationConfig:
    """The quantization configuration of linear layers inside blocks that are rounded by a plan; embedding and head are
    not in it (`with_outer`)."""
    form, left_out = form_of(plan.scheme), plan.left_out
    if form.auto_round:
        return {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "bits": form.bits,
            "group_size": plan.group_size,
            "sym": True,
            "data_type": "int",
            "block_name_to_quantize": linear.blocks,
            "extra_config": {name: {"bits": 16, "data_type": "fp"} for name in left_out},
        }
    groups, ignored = {"group_0": CHANNEL_GROUP}, linear.outside
    if plan.bits is not None:
        alike: dict[tuple[int, int], list[str]] = {}
        for module, shape in linear.widths.items():
            alike.setdefault(plan.format_of(module, shape), []).append(module)
        ignored = ignored + alike.pop((16, -1), [])
        groups = {
            f"group_{number}": {**CHANNEL_GROUP, "weights": _weights(*kind), "targets": modules}
            for number, (kind, modules) in enumerate(sorted(alike.items()))
        }
    elif form.dynamic:
        groups = {"group_0": {**CHANNEL_GROUP, "input_activations": _DYNAMIC, "format": "int-quantized"}}
    elif form.bits < 8:
        groups = {"group_0": {**CHANNEL_GROUP, "weights": _weights(form.bits, plan.group_size)}}
        if left_out:
            groups["group_0"]["targets"] = [name for name in linear.widths if name not in left_out]
            groups["group_1"] = {**CHANNEL_GROUP, "targets": list(left_out)}
    return configuration(groups, ignored=ignored)


def configuration(groups: dict[str, dict[str, Any]], ignored: list[str]) -> QuantizationConfig:
    """The quantization configuration of a compressed-tensors checkpoint whose groups share one format."""
    return {
        "quant_method": "compressed-tensors",
        "format": next(iter(groups.values()), CHANNEL_GROUP)["format"],
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
    }
