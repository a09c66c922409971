"""INT8 and INT4 packages: neural-compressor's AutoRound, in compressed-tensors or auto-round's own form.

AutoRound runs in a child process (`export.quantization.autoround_child`), because it writes to stdout and stderr,
changes global state, and leaves files where it runs. One child makes all schemes asked for, since starting it takes
longer than quantizing a small network. Of AutoRound's output, only weights and quantization configuration are used;
everything else is copied from the unquantized package. Without calibration data there is no child: weights are
rounded to nearest, tensor by tensor (`export.quantization.round_to_nearest`). The schemes are in
`export.quantization.schemes`. Scales are bfloat16 in compressed-tensors, float16 in auto-round's form.
"""

from __future__ import annotations

import functools
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from export.package import check_destination, package_draft, write_config
from export.package_record import CARD, RECORD, PackageRecord, QuantizationReport, read_record, update_record
from export.quantization.autoround_child import AutoRoundJob
from export.quantization.round_to_nearest import QuantizationConfig, round_files
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
from export.shards import weight_bytes, weight_files
from supernet.architecture import GROUP_SIZES, Architecture
from supernet.common.errors import RequestError
from supernet.common.files import read_json, sha256, write_json
from supernet.common.processes import fresh_environment, last_line
from supernet.common.versions import versions
from supernet.families import describe
from supernet.slicing import build_standalone, family_of_standalone, standalone_config
from supernet.streaming import WeightFiles
from supernet.trust import check_code, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

AUTOROUND_STEP = 32
"""AutoRound leaves a weight-only linear layer out unless both its widths are multiples of this."""

STEP = r"^-- step (\d+)$\n?"
"""A line by which the child says how many steps it has taken; it is for the bar alone."""

TUNERS = ("neural-compressor", "auto-round", "compressed-tensors")
"""What packages with tuned rounding are made with."""

Progress = Callable[[float, int, str], None]
"""Called with blocks done (of the one at work, the share of its steps), blocks in all, and what is being quantized."""


def linear_layers(config: PreTrainedConfig, trust_remote_code: bool = False) -> LinearLayers:
    """The linear layers of the network of a configuration, plain or uneven.

    Raises `RequestError` where most weights are in modules of other kinds: compressed-tensors knows linear layers.
    """
    with torch.device("meta"):
        return linear_layers_in(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))


def linear_layers_in(model: PreTrainedModel) -> LinearLayers:
    """The linear layers of a network. Raises `RequestError` as `linear_layers` does."""
    config, family = model.config, family_of_standalone(model.config)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    prefix = family.layers + "."
    widths = {name: (m.out_features, m.in_features) for name, m in linear.items() if name.startswith(prefix)}
    weights = sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith(prefix))
    if 2 * sum(rows * columns for rows, columns in widths.values()) < weights:
        kind = family.model_type
        raise RequestError(f"{kind} networks cannot be quantized: most of their weights are not in linear layers")
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
    """Write a quantized package for each scheme in `destinations`, all in one child process; returns their records.

    `calibration` is token ids [sequences, length], or texts, of the user's data. `iterations` are AutoRound's steps
    for each block; 0 rounds to nearest with scales chosen on the calibration data. Without calibration data, weights
    are rounded to nearest and nothing else (and `iterations` must be 0), in memory for a few tensors. `group_size` is
    the user's, for fewer than 8 bits. The child's output is appended to `log`.

    `embedding` are the bits of embedding and head, of all schemes or by scheme. A plain class holds no
    quantized embedding: where bits are asked for, the package gets a code file, unless `code` is false. None: 8 bits,
    where that needs no other class.

    Raises `RequestError` (a group size that does not divide, a destination that holds something else, no disk space)
    before anything is computed, and RuntimeError with the last line that the child printed where it fails.
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
    # 3. Without data: round to nearest in this process.
    if calibration is None:
        packages = []
        for number, plan in enumerate(plans):
            if progress is not None:
                progress(number, len(plans), plan.scheme)
            write_weights = functools.partial(round_files, source, plan, linear)
            packages.append(assemble(plan, write_weights, ["compressed-tensors"]))
        return packages
    # 4. With data: tune the rounding in a child process, then make packages of what it wrote.
    if not isinstance(calibration, Tensor):
        calibration = pack_texts(source, calibration)
    options = {"iterations": iterations, "seed": seed, "device": device}
    with _tuned(record, linear, plans, calibration, log, progress, **options) as scratch:
        return [assemble(plan, functools.partial(_move_weights, scratch / plan.scheme), TUNERS) for plan in plans]


@contextmanager
def _tuned(
    source: PackageRecord,
    linear: LinearLayers,
    plans: Sequence[SchemePlan],
    calibration: Tensor,
    log: Path | None,
    progress: Progress | None,
    **options: Any,
) -> Iterator[Path]:
    """Within, a folder that holds the weights of every plan, by its scheme's name, as the child has tuned them;
    `options` are of an `AutoRoundJob`."""
    job = AutoRoundJob(source=str(source.folder.resolve()), linear=linear, schemes=list(plans), **options)
    blocks = len(source.entry.architecture.kept)
    with tempfile.TemporaryDirectory(prefix="compressor-quantize-") as folder:
        scratch = Path(folder)
        save_file({"ids": calibration.contiguous()}, scratch / "calibration.safetensors")
        write_json(scratch / "job.json", job.model_dump())
        output = _run_child(scratch, job, blocks, progress)
        if log is not None:
            with log.open("a", encoding="utf-8") as stream:
                stream.write(output)
        if not (scratch / "done").exists():
            if "out of memory" in (why := last_line(output)):
                raise RequestError(f"tuning the rounding ran out of memory ({why}); --rounding-steps 0 needs less")
            raise RuntimeError(f"quantization of {job.source} failed: {why}")
        yield scratch


def _move_weights(raw: Path, target: Path) -> QuantizationConfig:
    """Move the child's weights to `target`, which may be on another disk. Returns the quantization configuration."""
    for file in [*weight_files(raw), *raw.glob("*.index.json")]:
        shutil.move(file, target / file.name)
    return read_json(raw / "quantization_config.json")


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
    scale. Without `calibration`, weights are rounded to nearest; else their rounding is tuned, and all else is as in
    `quantize_packages`.
    """
    record, linear = read_record(source), linear_layers_of(source)
    check_destination(destination, weight_bytes(source))
    outer = OuterBits(architecture.embedding_bits or 16, 16 if linear.tied else architecture.head_bits or 16)
    odd = [name for name, pair in linear.widths.items() if any(width % AUTOROUND_STEP for width in pair)]
    left_out = [name for name in odd if bits[name] < 16]
    plan = SchemePlan("mixed", group_size, left_out, outer, {name: bits[name] for name in linear.widths})
    assemble = functools.partial(_assemble, record, {"mixed": destination}, linear)
    if calibration is None:
        assemble(0, plan, functools.partial(round_files, source, plan, linear), ["compressed-tensors"])
    else:
        options = {"iterations": iterations, "seed": seed, "device": device}
        with _tuned(record, linear, [plan], calibration, log, progress, **options) as scratch:
            assemble(iterations, plan, functools.partial(_move_weights, scratch / plan.scheme), TUNERS)
    made = read_record(destination).entry.quantization_report
    assert made is not None
    report = made.model_dump(exclude_unset=True) | {"bits": architecture.to_dict()}
    update_record(destination, entry={"quantization_report": report})
    return read_record(destination)


def pack_texts(source: Path, texts: Sequence[str], length: int = 512) -> Tensor:
    """Token ids [sequences, length] of texts joined end to end, where `length` is at most the network's context."""
    tokenizer = load_tokenizer(source)
    context = read_json(source / "config.json").get("max_position_embeddings") or length
    ids = [token for text in texts for token in tokenizer(text, verbose=False).input_ids]
    length = min(length, context, len(ids))
    if length < 2:
        raise RequestError("the calibration data holds no text")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def _run_child(scratch: Path, job: AutoRoundJob, blocks: int, progress: Progress | None) -> str:
    """Run the child, following its log for progress. Returns what it printed."""
    printed = scratch / "output.txt"
    with printed.open("wb") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", "export.quantization.autoround_child", str(scratch / "job.json")],
            env=fresh_environment(scratch, weight_bytes(Path(job.source))),
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            while child.poll() is None:
                time.sleep(0.2)
                if progress is not None:
                    output = printed.read_text(errors="replace")
                    progress(*position(output, blocks, len(job.schemes), job.iterations))
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    return re.sub(STEP, "", printed.read_text(errors="replace"), flags=re.MULTILINE)


def position(output: str, blocks: int, schemes: int, iterations: int) -> tuple[float, int, str]:
    """Blocks done, blocks in all and the scheme at work, read off what the child has printed: the bar of auto-round
    0.16, and the number of steps of `iterations` for each block.

    Another version may word its bar otherwise: then only this display is wrong.
    """
    _, *started = re.split(r"^== (\S+)$", output, flags=re.MULTILINE)
    if not started:
        return 0, blocks * schemes, "starting"
    scheme, printed = started[-2:]
    counts = re.findall(r"Quantizing[^\r\n]*?(\d+)/\d+ \[", printed)
    steps = re.findall(STEP, printed, flags=re.MULTILINE)
    done = float(counts[-1]) if counts else 0.0
    if steps and iterations:
        done = max(done, min(int(steps[-1]) / iterations, blocks))
    return (len(started) // 2 - 1) * blocks + done, blocks * schemes, scheme


def _assemble(
    source: PackageRecord,
    destinations: Mapping[Any, Path],
    linear: LinearLayers,
    iterations: int,
    plan: SchemePlan,
    write_weights: Callable[[Path], QuantizationConfig],
    tools: Sequence[str],
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
        "quantizer": versions(tools),
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
