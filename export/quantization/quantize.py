"""Packages in few bits, in compressed-tensors or auto-round's own form: by neural-compressor's AutoRound, or by GPTQ.

AutoRound tunes the rounding in a child process (`export.quantization.tuning`). Of its output, only weights and
quantization configuration are used; everything else is copied from the unquantized package. Where nothing is tuned
there is no child: weights of fewer than 8 bits are rounded by GPTQ (`export.quantization.gptq`), and all others, and
all where there is no calibration data, to nearest, tensor by tensor (`export.quantization.round_to_nearest`). The
schemes are in `export.quantization.schemes`. Scales are bfloat16 in compressed-tensors, float16 in auto-round's form.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from export.package import check_destination, package_draft, write_config
from export.package_record import CARD, RECORD, PackageRecord, QuantizationReport, read_record, update_record
from export.quantization.gptq import round_in_sequence
from export.quantization.plan import AUTOROUND_STEP, linear_layers_of, plan_scheme
from export.quantization.round_to_nearest import QuantizationConfig, Rounded, round_files
from export.quantization.schemes import (
    SCHEMES,
    EmbeddingBits,
    LinearLayers,
    OuterBits,
    SchemeName,
    SchemePlan,
    form_of,
    outer_bits,
)
from export.quantization.tuning import Progress, move_weights, pack_texts, tuned
from export.shards import weight_bytes, weight_files
from supernet.architecture import Architecture
from supernet.common.errors import RequestError
from supernet.common.files import read_json, sha256, write_json
from supernet.common.versions import versions
from supernet.families import describe
from supernet.loading import check_fit, load_causal_lm
from supernet.slicing import build_standalone, standalone_config
from supernet.trust import check_code

TUNERS = ("neural-compressor", "auto-round", "compressed-tensors")
"""What packages with tuned rounding are made with."""


def quantize_package(source: Path, destination: Path, scheme: SchemeName, **options: Any) -> PackageRecord:
    """Quantize one unquantized package; see `quantize_packages`."""
    return quantize_packages(source, {scheme: destination}, **options)[0]


def quantize_packages(
    source: Path,
    destinations: Mapping[SchemeName, Path],
    *,
    calibration: Tensor | Sequence[str] | None,
    iterations: int,
    group_size: int | None = None,
    embedding: EmbeddingBits | Mapping[SchemeName, EmbeddingBits | None] | None = None,
    code: bool = True,
    seed: int = 0,
    device: str = "cpu",
    log: Path | None = None,
    progress: Progress | None = None,
) -> list[PackageRecord]:
    """Write a quantized package for each scheme in `destinations`; returns their records.

    `calibration` is token ids [sequences, length], or texts, of the user's data. `iterations` are AutoRound's steps
    for each block; 0 rounds fewer than 8 bits by GPTQ. Without calibration data, weights are rounded to nearest and
    nothing else (and `iterations` must be 0), in memory for a few tensors. `group_size` is the user's, for fewer than
    8 bits. All that is tuned is so in one child process, whose output is appended to `log`.

    `embedding` are the bits of embedding and head, of all schemes or by scheme. A plain class holds no
    quantized embedding: where bits are asked for, the package gets a code file, unless `code` is false. None: 8 bits,
    where that needs no other class.

    Raises `RequestError` (a group size that does not divide, a destination that holds something else, no disk space)
    before anything is computed, and RuntimeError with the last line that the child printed where tuning fails.
    """
    # 1. Refuse what cannot be done.
    record = read_record(source)
    if record.entry.quantization is not None:
        raise RequestError(f"{source}: already quantized; quantize the unquantized package")
    unknown = [scheme for scheme in destinations if scheme not in SCHEMES]
    if unknown:
        raise RequestError(f"unknown quantization '{unknown[0]}'; known are: {', '.join(SCHEMES)}")
    if calibration is None and iterations:
        raise RequestError("tuning needs calibration data: give some, or ask for 0 iterations")
    linear = linear_layers_of(source)
    for destination in destinations.values():
        check_destination(destination, weight_bytes(source))
    # 2. Plan every scheme.
    has_code = check_code(source)
    plans = []
    for scheme in destinations:
        plan = plan_scheme(linear.widths, scheme, group_size if SCHEMES[scheme].bits < 8 else None)
        asked = embedding.get(scheme) if isinstance(embedding, Mapping) else embedding
        with_code = has_code or (code and asked is not None)
        outer = outer_bits(SCHEMES[scheme], tied=linear.tied, code=with_code, asked=asked)
        plans.append(replace(plan, outer=outer))
    assemble = functools.partial(_assemble, record, destinations, linear, iterations)
    if calibration is not None and not isinstance(calibration, Tensor):
        calibration = pack_texts(source, calibration)
    # 3. Where nothing is tuned: round in this process.
    if calibration is None or not iterations:
        packages = []
        for number, plan in enumerate(plans):
            rounded = _by_gptq(source, plan, linear, calibration, device, _counted(progress, number, len(plans), plan))
            packages.append(assemble("gptq" if rounded else "nearest", plan, _written(source, plan, linear, rounded)))
        return packages
    # 4. Else tune the rounding in a child process, then make packages of what it wrote.
    options = {"iterations": iterations, "seed": seed, "device": device}
    with tuned(record, linear, plans, calibration, log, progress, **options) as scratch:
        return [assemble("autoround", plan, functools.partial(move_weights, scratch / plan.scheme)) for plan in plans]


def quantize_mixed(
    source: Path,
    destination: Path,
    bits: Mapping[str, int],
    architecture: Architecture,
    group_size: int,
    *,
    calibration: Tensor | None = None,
    iterations: int = 0,
    seed: int = 0,
    device: str = "cpu",
    log: Path | None = None,
    progress: Progress | None = None,
) -> PackageRecord:
    """Write one unquantized package with linear weights in bits of their own; returns its record.

    `bits` are by name of the linear layer in the package, 16 for bfloat16; `architecture` says the same by half-block,
    and those of the embedding and of a head with a weight of its own. Below 8, `group_size` input channels share a
    scale. Without `calibration`, weights are rounded to nearest; else as `iterations` say, and all else is as in
    `quantize_packages`.
    """
    record, linear = read_record(source), linear_layers_of(source)
    check_destination(destination, weight_bytes(source))
    outer = OuterBits(architecture.embedding_bits or 16, 16 if linear.tied else architecture.head_bits or 16)
    odd = [name for name, pair in linear.widths.items() if any(width % AUTOROUND_STEP for width in pair)]
    left_out = [name for name in odd if bits[name] < 16]
    plan = SchemePlan("mixed", group_size, left_out, outer, {name: bits[name] for name in linear.widths})
    assemble = functools.partial(_assemble, record, {"mixed": destination}, linear)
    if calibration is None or not iterations:
        rounded = _by_gptq(source, plan, linear, calibration, device, _counted(progress, 0, 1, plan))
        assemble(0, "gptq" if rounded else "nearest", plan, _written(source, plan, linear, rounded))
    else:
        options = {"iterations": iterations, "seed": seed, "device": device}
        with tuned(record, linear, [plan], calibration, log, progress, **options) as scratch:
            assemble(iterations, "autoround", plan, functools.partial(move_weights, scratch / plan.scheme))
    made = read_record(destination).entry.quantization_report
    assert made is not None
    report = made.model_dump(exclude_unset=True) | {"bits": architecture.to_dict()}
    update_record(destination, entry={"quantization_report": report})
    return read_record(destination)


def _by_gptq(
    source: Path,
    plan: SchemePlan,
    linear: LinearLayers,
    calibration: Tensor | None,
    device: str,
    progress: Callable[[int, int], None],
) -> dict[str, Rounded]:
    """The linear layers of a package whose rounding calibration text helps, rounded on it; none where there is none."""
    if calibration is None or all(plan.format_of(name, shape)[0] >= 8 for name, shape in linear.widths.items()):
        return {}
    network, info = load_causal_lm(source, torch.float32 if device == "cpu" else torch.bfloat16, check_code(source))
    check_fit(str(source), info)
    return round_in_sequence(network.to(device), plan, linear, calibration, progress)


def _written(
    source: Path, plan: SchemePlan, linear: LinearLayers, rounded: Mapping[str, Rounded]
) -> Callable[[Path], QuantizationConfig]:
    """Writes a package's weights into a folder, with those that are `rounded` already; see `round_files`."""
    return functools.partial(round_files, source, plan, linear, rounded=rounded)


def _counted(progress: Progress | None, number: int, plans: int, plan: SchemePlan) -> Callable[[int, int], None]:
    """Tells `progress` of one plan of several: blocks done of those of all plans."""

    def tell(done: int, blocks: int) -> None:
        if progress is not None:
            progress(number * blocks + done, plans * blocks, plan.scheme)

    return tell


def _assemble(
    source: PackageRecord,
    destinations: Mapping[Any, Path],
    linear: LinearLayers,
    iterations: int,
    rounding: Literal["nearest", "gptq", "autoround"],
    plan: SchemePlan,
    write_weights: Callable[[Path], QuantizationConfig],
) -> PackageRecord:
    """The quantized package: `write_weights` puts its weights into a folder and returns their configuration, and the
    rest is the source's."""
    destination = destinations[plan.scheme]
    entry = {
        "name": destination.name,
        "architecture": source.entry.architecture.to_dict(),
        "layout": source.entry.layout,
        "params": source.entry.params,
        "quantization": plan.scheme,
    }
    lineage = source.lineage.model_dump(exclude_unset=True) | {
        "quantized_from": {"name": source.entry.name, "record_sha256": sha256(source.folder / RECORD)},
        "quantizer": versions(TUNERS if rounding == "autoround" else ("compressed-tensors",)),
    }
    with package_draft(destination, weight_bytes(source.folder), entry=entry, lineage=lineage) as draft:
        # 1. What the source has besides weights, and a code file where the plain class cannot hold the embedding.
        config = read_json(source.folder / "config.json")
        if plan.outer.embedding < 16:
            if "auto_map" not in config:
                plain = AutoConfig.from_pretrained(source.folder, local_files_only=True)
                uneven = standalone_config(plain, describe(plain).base, always_uneven=True)
                draft.entry["layout"] = write_config(build_standalone(uneven), draft.folder, torch.bfloat16)
                config = read_json(draft.folder / "config.json")
            config["quantized_embedding"] = True
        skipped = {CARD, "config.json", "model.safetensors.index.json"}
        skipped |= {file.name for file in weight_files(source.folder)}
        for name in source.files.keys() - skipped:
            (draft.folder / name).parent.mkdir(parents=True, exist_ok=True)  # named chat templates have a folder
            shutil.copyfile(source.folder / name, draft.folder / name)
        # 2. Weights and configuration.
        config["dtype"] = "bfloat16"
        config["quantization_config"] = write_weights(draft.folder)
        write_json(draft.folder / "config.json", config)
        # 3. What it costs.
        report = QuantizationReport(
            scheme=plan.scheme,
            group_size=plan.group_size,
            iterations=iterations,
            rounding=rounding,
            embedding=plan.outer.embedding,
            head=plan.outer.head,
            bits_per_weight=stored_bits(draft.folder, linear.widths),
            bits_per_parameter=8 * weight_bytes(draft.folder) / source.entry.params,
            exceptions=_exceptions(linear, plan),
        )
        draft.entry["quantization_report"] = report.model_dump()
        draft.probe = source.probe
    return read_record(destination)


def _exceptions(linear: LinearLayers, plan: SchemePlan) -> dict[str, str]:
    """The linear layers and embeddings that are not under the scheme, and what became of each."""
    bits = {linear.embedding: plan.outer.embedding} | dict.fromkeys(linear.outside, 16) | {linear.head: plan.outer.head}
    if linear.tied:
        del bits[linear.head]
    exceptions = {n: "bfloat16" if b == 16 else f"{b} bits, rounded to nearest" for n, b in bits.items()}
    for name, asked in (plan.bits or {}).items():
        if (stored := plan.format_of(name, linear.widths[name])[0]) != asked:
            exceptions[name] = f"per-channel INT{stored} for {asked} bits (a width is no multiple of the group)"
        elif asked == 16:
            exceptions[name] = "bfloat16"
    instead = "bfloat16" if form_of(plan.scheme).auto_round else "per-channel INT8, rounded to nearest"
    return exceptions | dict.fromkeys(plan.left_out, f"{instead} (a width is no multiple of {AUTOROUND_STEP})")


def stored_bits(folder: Path, widths: Mapping[str, tuple[int, int]]) -> float:
    """Bits stored for each weight of the blocks' linear layers: codes, scales, zero points and shapes; no biases."""
    sizes = {"I32": 32, "I8": 8, "BF16": 16, "F16": 16, "F32": 32, "I64": 64, "U8": 8}
    bits = 0
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                module, _, part = name.rpartition(".")
                if module in widths and part != "bias":
                    view = tensors.get_slice(name)
                    bits += math.prod(view.get_shape()) * sizes[view.get_dtype()]
    return bits / sum(rows * columns for rows, columns in widths.values())
