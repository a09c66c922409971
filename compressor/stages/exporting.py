"""Slice, heal, package, quantize and prove every pick: fills `subnets/` and `packages/`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from compressor.architecture import Architecture
from compressor.elastic.slicing import extract
from compressor.elastic.supernet import SuperNetwork
from compressor.errors import RequestError
from compressor.finetune.data import Blocks
from compressor.finetune.elastic import heal
from compressor.finetune.loop import TrainSettings
from compressor.job import Job, versions
from compressor.progress import say
from compressor.run import fingerprint, read_json, write_json
from compressor.stages.finetuning import training_blocks
from compressor.stages.measuring import measure_packages


def export(job: Job) -> list[dict[str, Any]]:
    """Slice, heal, package, quantize, prove and score every pick; returns the packages' entries."""
    from export.package import read_record, write_package
    from export.quantize import quantize_packages
    from export.verify import verify_all

    recipe, run = job.recipe, job.run
    if not run.picks.is_file():
        raise RequestError(f"{run.path}: nothing was picked yet; run compressor pick")
    picks = read_json(run.picks)
    manifest = run.manifest(run.supernet) or {}
    run.packages.mkdir(exist_ok=True)
    supernet = job.load_supernet()
    base = job.load_base()
    blocks = training_blocks(job, recipe.healing.tokens or 0)
    probe_ids = blocks.split()[1].ids[:4, :32]
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
            folders = [
                run.packages / name,
                *(run.packages / f"{name}-{s}" for s in recipe.quantizing.schemes),
            ]
            written += [folder.name for folder in folders]
            if all(made_from(folder, inputs) for folder in folders):
                continue
            lineage = {
                "inputs": fingerprint(inputs),
                "base": {"name": recipe.model, "fingerprint": job.base_fingerprint},
                "supernet": manifest["weights"],
                "target": picked["target"],
                "versions": versions(),
            }
            entry = {"name": name, "architecture": picked["architecture"]}
            network = shipped_network(job, supernet, base, blocks, name, architecture, lineage)
            reference = Path(scratch) / f"{name}.safetensors"
            say(f"packaging {name}")
            write_package(
                network,
                folders[0],
                tokenizer=job.tokenizer,
                entry=entry,
                dtype=job.stored_dtype,
                lineage=lineage,
                probe_ids=probe_ids,
                reference=reference,
            )
            if recipe.quantizing.schemes:
                say(f"quantizing {name} to {', '.join(recipe.quantizing.schemes)}")
                quantize_packages(
                    folders[0],
                    dict(zip(recipe.quantizing.schemes, folders[1:], strict=True)),
                    calibration=blocks.ids[: recipe.quantizing.samples],
                    iterations=recipe.quantizing.iterations or 0,
                    group_size=recipe.quantizing.group_size,
                    seed=recipe.seed,
                    log=run.log_file,
                )
            proofs += [(folder, reference) for folder in folders]
        if proofs:
            say(f"proving {len(proofs)} packages in a fresh process")
            verify_all(proofs, record=True, log=run.log_file)
    measure_packages(job, base, written)
    entries = [read_record(run.packages / name)["entry"] for name in written]
    run.log(f"exported: {', '.join(written)}")
    return entries


def made_from(folder: Path, inputs: Any) -> bool:
    """Whether this package is there, proved, and was made from the same inputs."""
    from export.package import RECORD, read_record

    if not (folder / RECORD).is_file():
        return False
    record = read_record(folder)
    return record["lineage"].get("inputs") == fingerprint(inputs) and bool(record["entry"].get("verified"))


def shipped_network(
    job: Job,
    supernet: SuperNetwork,
    base: Any,
    blocks: Blocks,
    name: str,
    architecture: Architecture,
    lineage: dict[str, Any],
) -> Any:
    """The sub-network as it ships: cut out (`subnets/NAME-sliced`), then healed (`subnets/NAME`)."""
    from export.package import RECORD, read_record, write_package

    recipe, run = job.recipe, job.run
    run.subnets.mkdir(exist_ok=True)
    network = extract(supernet.model, job.structure, architecture)
    entry = {"name": name, "architecture": architecture.to_dict()}
    options: dict[str, Any] = {
        "tokenizer": job.tokenizer,
        "entry": entry,
        "dtype": job.stored_dtype,
        "lineage": lineage,
    }
    write_package(network, run.subnets / f"{name}-sliced", **options)
    if not recipe.healing.tokens:
        return network
    healed = run.subnets / name
    if (healed / RECORD).is_file() and read_record(healed)["lineage"] == lineage:
        network.load_state_dict(load_weights(healed), strict=False)
        return network
    state = run.subnets / f".{name}-{lineage['inputs']}.training.safetensors"
    settings = TrainSettings(
        tokens=recipe.healing.tokens,
        batch_size=recipe.finetuning.batch_size,
        sequence_length=blocks.ids.shape[1],
        learning_rate=recipe.healing.learning_rate,
        seed=recipe.seed + 1,
    )
    job.threads(scoring=False)
    history = heal(network, base, blocks, settings, state=state, accelerator=job.accelerator)
    write_package(network, healed, **options)
    write_json(healed / "healing.json", vars(history))
    state.unlink(missing_ok=True)
    with torch.no_grad():  # as stored, so that what is proved and scored is what ships
        for parameter in network.parameters():
            parameter.copy_(parameter.to(job.stored_dtype))
    return network


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights
