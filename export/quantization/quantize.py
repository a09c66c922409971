"""INT8 and INT4 packages: neural-compressor's AutoRound, in compressed-tensors or auto-round's own form.

The work runs in a child process (`export.quantization.autoround_child`): auto-round writes to stdout and
stderr, changes global state, and leaves files where it runs. One child makes all schemes asked for, since starting it
takes longer than quantizing a small network. Of what AutoRound writes, only the weights and the quantization
configuration are used; everything else is copied from the unquantized package. Without calibration data none of that is
needed: weights are rounded to nearest, tensor by tensor (`export.quantization.round_to_nearest`). What the schemes are:
`export.quantization.schemes`. Scales are bfloat16 in compressed-tensors, float16 in auto-round's form.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.package import check_destination, staged
from export.package_record import CARD, RECORD, PackageInfo, path_in_run, read_package, read_record, write_record
from export.quantization.round_to_nearest import round_files
from export.quantization.schemes import SCHEMES, SchemeName
from export.shards import weight_bytes, weight_files
from supernet.architecture import Architecture
from supernet.common.errors import RequestError
from supernet.common.files import read_json, sha256, write_json
from supernet.common.processes import fresh_environment, last_line
from supernet.common.versions import versions
from supernet.families import families
from supernet.trust import UNEVEN_PREFIX, check_code

if TYPE_CHECKING:
    from torch import Tensor

GROUP_SIZES = (128, 64, 32)
AUTOROUND_STEP = 32
"""AutoRound leaves a weight-only linear layer out unless both its widths are multiples of this."""

Progress = Callable[[int, int, str], None]
"""Called with blocks done, blocks in all, and what is being quantized."""


@dataclass(frozen=True)
class Quantized:
    """One quantized package and what it really costs.

    `bits_per_weight` counts the stored codes, scales and shapes of the linear layers inside blocks;
    `bits_per_parameter` the whole file. `exceptions` maps each linear layer that is not under the scheme to what
    became of it.
    """

    package: PackageInfo
    scheme: SchemeName
    group_size: int
    iterations: int
    bits_per_weight: float
    bits_per_parameter: float
    bytes: int
    exceptions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LinearLayers:
    """Linear layers of a network by module name: those inside its blocks with output and input width, and others.

    `blocks` is the name of the list of blocks.
    """

    widths: dict[str, tuple[int, int]]
    outside: list[str]
    blocks: str


def linear_layers(config: Any, trust_remote_code: bool = False) -> LinearLayers:
    """Of the network of a configuration, plain or uneven.

    Raises `RequestError` where most weights are in modules of other kinds: compressed-tensors knows linear layers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from supernet.slicing import family_of_standalone

    family = family_of_standalone(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    prefix = family.layers + "."
    widths = {name: (m.out_features, m.in_features) for name, m in linear.items() if name.startswith(prefix)}
    weights = sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith(prefix))
    if 2 * sum(rows * columns for rows, columns in widths.values()) < weights:
        kind = family.model_type
        raise RequestError(f"{kind} networks cannot be quantized: most of their weights are not in linear layers")
    return LinearLayers(widths, [name for name in linear if name not in widths], family.layers)


def linear_layers_of(source: Path) -> LinearLayers:
    """Of the network in a package. Raises `RequestError` as `linear_layers` does."""
    from transformers import AutoConfig

    trusted = check_code(source)
    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=trusted)
    return linear_layers(config, trusted)


def plan_groups(
    widths: Mapping[str, tuple[int, int]], scheme: SchemeName, group_size: int | None = None
) -> tuple[int, list[str]]:
    """The group size (-1: one scale for each output channel) and the layers that are left out of the scheme.

    At 4 bits without a group size of the user's: the largest of 128, 64, 32 that divides the input width of every layer
    that is not left out. Layers with a width that is no multiple of 32 are. Raises `RequestError` for a group size of
    the user's that does not divide a width, or has no meaning for the scheme, and where none would be left in.
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
        return -1, [] if form.dynamic else left_out
    inputs = sorted({columns for _, columns in widths.values()})
    if group_size is not None:
        valid = [g for g in GROUP_SIZES if not any(width % g for width in inputs)]
        bad = [width for width in inputs if group_size <= 0 or width % group_size]
        if bad:
            choice = f"valid sizes here are {', '.join(map(str, valid))}" if valid else "no group size divides them all"
            raise RequestError(f"group size {group_size} does not divide the width {bad[0]}; {choice}")
        if group_size % AUTOROUND_STEP:
            raise RequestError(f"group size {group_size} is not a multiple of {AUTOROUND_STEP}")
        return group_size, left_out
    inside = {columns for name, (_, columns) in widths.items() if name not in left_out}
    return next((g for g in GROUP_SIZES if not any(width % g for width in inside)), GROUP_SIZES[-1]), left_out


def quantize_package(
    source: Path,
    destination: Path,
    scheme: SchemeName,
    *,
    calibration: Tensor | Sequence[str] | None,
    iterations: int,
    group_size: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    log: Path | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """Quantize one unquantized package; see `quantize_packages`."""
    return quantize_packages(
        source,
        {scheme: destination},
        calibration=calibration,
        iterations=iterations,
        group_size=group_size,
        seed=seed,
        device=device,
        log=log,
        progress=progress,
    )[0]


def quantize_packages(
    source: Path,
    destinations: Mapping[SchemeName, Path],
    *,
    calibration: Tensor | Sequence[str] | None,
    iterations: int,
    group_size: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    log: Path | None = None,
    progress: Progress | None = None,
) -> list[Quantized]:
    """Write a quantized package for each scheme in `destinations`, all in one child process.

    `calibration` is token ids [sequences, length], or texts, of the user's data. `iterations` are AutoRound's steps
    for each block; 0 rounds to nearest with scales chosen on the calibration data. Without calibration data, weights
    are rounded to nearest and nothing else (and `iterations` must be 0), in memory for a few tensors. `group_size` is
    the user's wish for int4. The child's output is appended to `log`.

    Raises `RequestError` (a group size that does not divide, a destination that holds something else, no disk space)
    before anything is computed, and RuntimeError with the child's last words where it fails.
    """
    import torch
    from safetensors.torch import save_file

    record = read_record(source)
    if record["entry"]["quantization"] is not None:
        raise RequestError(f"{source}: already quantized; quantize the unquantized package")
    unknown = [scheme for scheme in destinations if scheme not in SCHEMES]
    if unknown:
        raise RequestError(f"unknown quantization '{unknown[0]}'; known are: {', '.join(SCHEMES)}")
    if calibration is None and iterations:
        raise RequestError("tuning needs calibration data: give some, or ask for 0 iterations")
    linear = linear_layers_of(source)
    widths = linear.widths
    for destination in destinations.values():
        check_destination(destination, weight_bytes(source))
    plans = {s: plan_groups(widths, s, group_size if SCHEMES[s].bits < 8 else None) for s in destinations}

    data_free = calibration is None
    tools = ("compressed-tensors",) if data_free else ("neural-compressor", "auto-round", "compressed-tensors")

    def assemble(scheme: SchemeName, fill: Callable[[Path], dict[str, Any]]) -> Quantized:
        group, left_out = plans[scheme]
        destination = destinations[scheme]
        return _assemble(source, record, destination, scheme, group, left_out, iterations, linear, tools, fill)

    if calibration is None:
        made = []
        for number, (scheme, (group, left_out)) in enumerate(plans.items()):
            if progress is not None:
                progress(number, len(plans), scheme)
            rounding = functools.partial(
                round_files,
                source,
                scheme=scheme,
                group_size=group,
                linear=list(widths),
                left_out=left_out,
                ignored=linear.outside,
                blocks=linear.blocks,
            )
            made.append(assemble(scheme, rounding))
        return made
    if not isinstance(calibration, torch.Tensor):
        calibration = pack_texts(source, calibration)
    with tempfile.TemporaryDirectory(prefix="compressor-quantize-") as folder:
        scratch = Path(folder)
        save_file({"ids": calibration.contiguous()}, scratch / "calibration.safetensors")
        job = {
            "source": str(source.resolve()),
            "iterations": iterations,
            "seed": seed,
            "device": device,
            "linear": list(widths),
            "schemes": [{"scheme": s, "group_size": g, "left_out": names} for s, (g, names) in plans.items()],
        }
        write_json(scratch / "job.json", job)
        blocks = len(Architecture.from_dict(record["entry"]["architecture"]).kept)
        output = _run_child(scratch, source, blocks, len(plans), progress)
        if log is not None:
            with log.open("a", encoding="utf-8") as stream:
                stream.write(output)
        if not (scratch / "done").exists():
            raise RuntimeError(f"quantization of {source} failed: {last_line(output)}")
        return [assemble(scheme, functools.partial(_taken_over, scratch / scheme)) for scheme in plans]


def _taken_over(raw: Path, target: Path) -> dict[str, Any]:
    """Move the child's weights to `target`, which may be on another disk. Returns the quantization configuration."""
    for file in [*weight_files(raw), *raw.glob("*.index.json")]:
        shutil.move(file, target / file.name)
    return read_json(raw / "quantization_config.json")


def pack_texts(source: Path, texts: Sequence[str], length: int = 512) -> Tensor:
    """Token ids [sequences, length] of texts joined end to end; no longer than the network's context."""
    import torch

    from supernet.trust import load_tokenizer

    tokenizer = load_tokenizer(source)
    context = read_json(source / "config.json").get("max_position_embeddings") or length
    ids = [token for text in texts for token in tokenizer(text, verbose=False).input_ids]
    length = min(length, context, len(ids))
    if length < 2:
        raise RequestError("the calibration data holds no text")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def _run_child(scratch: Path, source: Path, blocks: int, schemes: int, progress: Progress | None) -> str:
    """Run the child, following its log for progress. Returns what it printed."""
    printed = scratch / "output.txt"
    with printed.open("wb") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", "export.quantization.autoround_child", str(scratch / "job.json")],
            env=fresh_environment(scratch, weight_bytes(source)),
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            while child.poll() is None:
                time.sleep(0.2)
                if progress is not None:
                    progress(*_position(printed.read_text(errors="replace"), blocks, schemes))
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    return printed.read_text(errors="replace")


def _position(output: str, blocks: int, schemes: int) -> tuple[int, int, str]:
    """Blocks done so far, read off auto-round's own progress bar: a change of its wording costs only this display."""
    _, *started = re.split(r"^== (\S+)$", output, flags=re.MULTILINE)
    if not started:
        return 0, blocks * schemes, "starting"
    scheme, printed = started[-2:]
    bars = re.findall(r"Quantizing[^\r\n]*?(\d+)/\d+ \[", printed)
    done = int(bars[-1]) if bars else 0
    return (len(started) // 2 - 1) * blocks + done, blocks * schemes, scheme


def _assemble(
    source: Path,
    record: dict[str, Any],
    destination: Path,
    scheme: SchemeName,
    group_size: int,
    left_out: list[str],
    iterations: int,
    linear: LinearLayers,
    tools: Sequence[str],
    fill: Callable[[Path], dict[str, Any]],
) -> Quantized:
    """Build the package: `fill` writes its weights and returns their configuration, the rest is the source's."""
    with staged(destination, weight_bytes(source)) as folder:
        skipped = {CARD, RECORD, "config.json", "model.safetensors.index.json"}
        skipped |= {file.name for file in weight_files(source)}
        for name in record["files"]:
            if name not in skipped:
                (folder / name).write_bytes((source / name).read_bytes())
        config = read_json(source / "config.json")
        config["dtype"] = "bfloat16"
        config["quantization_config"] = fill(folder)
        write_json(folder / "config.json", config)
        costs = stored_bits(folder, linear.widths)
        report = {
            "scheme": scheme,
            "group_size": group_size,
            "iterations": iterations,
            "bits_per_weight": costs,
            "bits_per_parameter": 8 * weight_bytes(folder) / record["entry"]["params"],
            "exceptions": _exceptions(linear, left_out, scheme, config),
        }
        kept = ("architecture", "layout", "params")
        entry = {
            "name": destination.name,
            "path": path_in_run(destination),
            **{key: record["entry"][key] for key in kept},
            "quantization": scheme,
            "quantization_report": report,
            "bytes": weight_bytes(folder),
        }
        lineage = {
            **record["lineage"],
            "quantized_from": {"name": record["entry"]["name"], "record_sha256": sha256(source / RECORD)},
            "quantizer": versions(tools),
        }
        write_record(folder, entry=entry, lineage=lineage, probe=record["probe"])
    info = read_package(destination)
    return Quantized(
        package=info,
        scheme=scheme,
        group_size=group_size,
        iterations=iterations,
        bits_per_weight=costs,
        bits_per_parameter=report["bits_per_parameter"],
        bytes=info.bytes,
        exceptions=report["exceptions"],
    )


def _exceptions(
    linear: LinearLayers, left_out: list[str], scheme: SchemeName, config: Mapping[str, Any]
) -> dict[str, str]:
    family = families()[str(config["model_type"]).removeprefix(UNEVEN_PREFIX)]
    exceptions = {family.embedding.removesuffix(".weight"): "bfloat16 (embeddings are not quantized)"}
    if not config.get("tie_word_embeddings"):
        exceptions |= dict.fromkeys(linear.outside, "bfloat16 (the output head is not quantized)")
    instead = "bfloat16" if SCHEMES[scheme].auto_round else "per-channel INT8, rounded to nearest"
    return exceptions | dict.fromkeys(left_out, f"{instead} (a width is no multiple of {AUTOROUND_STEP})")


def stored_bits(folder: Path, widths: Mapping[str, tuple[int, int]]) -> float:
    """Bits stored for each weight of the blocks' linear layers: codes, scales, zero points and shapes; no biases."""
    from safetensors import safe_open

    sizes = {"I32": 32, "I8": 8, "BF16": 16, "F16": 16, "F32": 32, "I64": 64, "U8": 8}
    bits = 0
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                module, _, part = name.rpartition(".")
                if module in widths and part != "bias":
                    view = tensors.get_slice(name)
                    count = 1
                    for size in view.get_shape():
                        count *= size
                    bits += count * sizes[view.get_dtype()]
    return bits / sum(rows * columns for rows, columns in widths.values())
