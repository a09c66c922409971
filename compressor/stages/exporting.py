"""Slice, heal, package, quantize and prove every pick: fills `subnets/` and `packages/`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from compressor.architecture import Architecture
from compressor.elastic.streaming import StreamedNetwork
from compressor.finetune.data import Blocks
from compressor.finetune.elastic import heal
from compressor.job import Job, versions
from compressor.progress import bar, say
from compressor.run import fingerprint, write_json
from compressor.stages.finetuning import training_blocks
from compressor.stages.measuring import measure_packages
from compressor.stages.picking import read_picks


def export(job: Job) -> list[dict[str, Any]]:
    """Slice, heal, package, quantize, prove and score every pick; returns the packages' entries."""
    from export.package import read_record
    from export.verify import TaskFiles, verify_all

    recipe, run = job.recipe, job.run
    picks = read_picks(job)
    manifest = run.manifest(run.supernet) or {}
    run.packages.mkdir(exist_ok=True)
    base = job.load_base()
    blocks = training_blocks(job, recipe.healing.tokens or 0)
    written: list[str] = []
    with tempfile.TemporaryDirectory(prefix="compressor-") as scratch:
        proofs: list[tuple[Path, Path | None]] = []
        for picked in picks:
            name, architecture = picked["name"], Architecture.from_dict(picked["architecture"])
            inputs = {
                "weights": manifest["weights"],
                "architecture": picked["key"],
                "healing": recipe.healing.model_dump(),
                "quantizing": recipe.quantizing.model_dump(),
                "data": blocks.fingerprint,
                "seed": recipe.seed,
            }
            folders = package_folders(job, name)
            written += [folder.name for folder in folders]
            if job.redo != "export" and all(made_from(folder, inputs) for folder in folders):
                continue
            lineage = {
                "inputs": fingerprint(inputs),
                "base": {"name": recipe.model, "fingerprint": job.base_fingerprint},
                "supernet": manifest["weights"],
                "target": picked["target"],
                "versions": versions(),
            }
            network = shipped_network(job, base, blocks, name, architecture, lineage)
            reference = Path(scratch) / f"{name}.safetensors"
            write_packages(job, name, architecture, network, blocks, folders, lineage, reference)
            proofs += [(folder, reference) for folder in folders]
        measure_packages(job, base, written)
        if proofs:
            say(f"proving {len(proofs)} package{'s' * (len(proofs) > 1)} in a fresh process")
            verify_all(proofs, record=True, log=run.log_file, tasks=TaskFiles(recipe.include_path))
    run.log(f"exported: {', '.join(written)}")
    return [read_record(run.packages / name)["entry"] for name in written]


def package_folders(job: Job, name: str) -> list[Path]:
    """What is written of one pick: its own layout first, quantized ones, then copies in other layouts."""
    formats = job.recipe.formats
    suffixes = ["", *(f"-{scheme}" for scheme in job.recipe.quantizing.schemes)]
    if not name.endswith("-uniform"):
        suffixes += [f"-{layout}" for layout in formats if layout not in ("uneven", "uniform")]
    return [job.run.packages / f"{name}{suffix}" for suffix in suffixes]


def write_packages(
    job: Job,
    name: str,
    architecture: Architecture,
    network: Any,
    blocks: Blocks,
    folders: list[Path],
    lineage: dict[str, Any],
    reference: Path,
) -> None:
    """Write one pick in every variant asked for; `reference` receives the logits that each is proved against."""
    from export.layouts import write_layout
    from export.quantize import quantize_packages

    quantizing = job.recipe.quantizing
    own, *others = folders
    say(f"packaging {name}")
    options: dict[str, Any] = {
        "tokenizer": job.tokenizer,
        "dtype": job.stored_dtype,
        "lineage": lineage,
        "probe_ids": blocks.split()[1][:4].ids[:, :32],
    }
    entry = {"name": name, "architecture": architecture.to_dict()}
    write_layout("uneven", network, architecture, own, entry=entry, reference=reference, **options)
    if quantizing.schemes:
        blocks_to_do = len(quantizing.schemes) * len(architecture.kept)
        with bar(f"quantizing {name}", blocks_to_do) as progress:
            quantize_packages(
                own,
                dict(zip(quantizing.schemes, others, strict=False)),
                calibration=blocks[: quantizing.samples].ids,
                iterations=quantizing.iterations or 0,
                group_size=quantizing.group_size,
                seed=job.recipe.seed,
                device=job.device.type,
                log=job.run.log_file,
                progress=lambda done, _, what: progress.advance(done - progress.done, what),
            )
            progress.advance(blocks_to_do - progress.done)
    for folder in others[len(quantizing.schemes) :]:
        layout = folder.name.removeprefix(f"{name}-")
        copied = options | {"entry": entry | {"name": folder.name}, "lineage": lineage | {"copy_of": name}}
        write_layout(layout, network, architecture, folder, **copied)


def made_from(folder: Path, inputs: Any) -> bool:
    """Whether this package is there, proved, and was made from the same inputs."""
    from export.package import RECORD, read_record

    if not (folder / RECORD).is_file():
        return False
    record = read_record(folder)
    return record["lineage"].get("inputs") == fingerprint(inputs) and bool(record["entry"].get("verified"))


def shipped_network(
    job: Job,
    base: Any,
    blocks: Blocks,
    name: str,
    architecture: Architecture,
    lineage: dict[str, Any],
) -> Any:
    """The sub-network as it ships: cut out (`subnets/NAME-sliced`), then healed (`subnets/NAME`).

    It is cut out of the super-network's files, of which no more than one tensor at a time is in memory.
    """
    from export.package import RECORD, read_record, write_package

    recipe, run = job.recipe, job.run
    run.subnets.mkdir(exist_ok=True)
    cut = StreamedNetwork(run.supernet, job.checkpoint.config, job.structure, architecture)
    entry = {"name": name, "architecture": architecture.to_dict()}
    options: dict[str, Any] = {
        "tokenizer": job.tokenizer,
        "entry": entry,
        "dtype": job.stored_dtype,
        "lineage": lineage,
    }
    write_package(cut, run.subnets / f"{name}-sliced", **options)
    network = cut.built(job.compute_dtype, job.device)
    if not recipe.healing.tokens:
        return network
    healed = run.subnets / name
    if (healed / RECORD).is_file() and read_record(healed)["lineage"] == lineage:
        network.load_state_dict(load_weights(healed), strict=False)
        return network
    state = run.subnets / f".{name}-{lineage['inputs']}.training.safetensors"
    settings = job.train_settings(recipe.healing, blocks.length, recipe.seed + 1)
    job.threads(scoring=False)
    history = heal(network, base, blocks, settings, state=state, accelerator=job.accelerator)
    write_package(network, healed, **options)
    write_json(healed / "healing.json", vars(history))
    state.unlink(missing_ok=True)
    round_as_stored(job, network)
    return network


def round_as_stored(job: Job, network: Any) -> None:
    """Give the weights the values that the stored dtype has, so that what is proved and scored is what ships."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.to(job.stored_dtype))


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights
