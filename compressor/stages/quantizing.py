"""What is quantized of a pick, and how: used for picks and for the base beside them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compressor.job import Job
from compressor.sizing import bits_group
from compressor.stages.picks import PickRecord
from export.package_record import PackageRecord
from export.quantization.quantize import quantize_mixed, quantize_packages
from export.quantization.schemes import SCHEMES, EmbeddingBits, OuterBits, SchemeName, SchemePlan
from search.genes import AS_STORED
from supernet.architecture import Architecture, StorageFormat, Structure
from supernet.common.progress import Bar, bar, say
from supernet.device import release_cached_memory
from supernet.families import family_of
from supernet.slicing import renumbered
from supernet.training.data import Blocks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def schemes_of(job: Job, picked: PickRecord) -> dict[SchemeName, EmbeddingBits | None]:
    """The schemes that a pick is quantized in, with the embedding's bits: those that the recipe names, and the one that
    was picked together with the size."""
    quantizing, bits = job.recipe.quantizing, picked.get("bits")
    schemes: dict[SchemeName, EmbeddingBits | None] = {}
    schemes |= dict.fromkeys(quantizing.schemes, quantizing.embedding)
    scheme = None if bits is None else bits["scheme"]
    if bits is not None and scheme is not None and scheme != "mixed" and scheme != "gguf-mixed":
        schemes[scheme] = bits["embedding"]
    return schemes


def quantizing_inputs(job: Job, blocks: Blocks) -> dict[str, object]:
    """All that rounding depends on beside the network, the scheme and the embedding's bits."""
    recipe = job.recipe
    return {
        **recipe.quantizing.model_dump(exclude={"schemes", "bits", "embedding"}),
        "data": blocks.fingerprint,
        "length": blocks.length,
        "seed": recipe.seed,
    }


def by_gptq(job: Job, scheme: str, tuned: bool = True) -> dict[str, object]:
    """What a package that GPTQ rounds depends on more than `quantizing_inputs` says: earlier versions rounded the same
    package otherwise. `scheme` may be `mixed`, of bits that were picked; `tuned` is as in `quantize`."""
    steps = job.recipe.quantizing.iterations if tuned else 0
    gains = scheme == "mixed" or any(name == scheme and gains_by_text(name) for name in SCHEMES)
    return {"by": "gptq"} if gains and not steps else {}


def quantize(
    job: Job,
    source: Path,
    layers: int,
    schemes: Mapping[SchemeName, Path],
    embeddings: Mapping[SchemeName, EmbeddingBits | None],
    calibration: torch.Tensor,
    *,
    tuned: bool = True,
    plain: bool = False,
) -> None:
    """Quantize the package in `source`, of so many layers, with the embeddings in these bits. `calibration` are token
    ids [samples, length]. `tuned`: with the recipe's steps of tuning; else, as where there are none, by GPTQ. `plain`:
    packages stay of the family's plain class, whatever it cannot hold."""
    quantizing = job.recipe.quantizing
    release_cached_memory(job.device)  # what rounds is on the same device
    on_text = {name: folder for name, folder in schemes.items() if gains_by_text(name)}
    nearest = {name: folder for name, folder in schemes.items() if name not in on_text}
    records: list[PackageRecord] = []
    with bar(f"quantizing {source.name}", len(schemes) * layers) as progress:
        for part, seen in ((nearest, None), (on_text, calibration)):
            if not part:
                continue
            before = progress.done
            records += quantize_packages(
                source,
                part,
                calibration=seen,
                iterations=(quantizing.iterations or 0) if tuned and seen is not None else 0,
                group_size=quantizing.group_size,
                embedding=embeddings,
                code=not plain,
                seed=job.recipe.seed,
                device=job.device.type,
                log=job.run.debug_file,
                progress=partial(_follow, progress, before),
            )
            progress.advance(before + len(part) * layers - progress.done)
    kept = [record.entry.name for record in records if keeps_embedding(record)]
    if kept and (quantizing.embedding is None or (plain and quantizing.embedding < 16)):
        other = f"{'with --format uneven and' if plain else 'with'} quantizing.embedding: 8 a code file"
        say(
            f"{', '.join(kept)}: the embedding stays in 16 bits, as transformers' plain class holds no quantized one; "
            f"{other} does, and --format gguf-q8_0 does for llama.cpp"
        )


def own_group(job: Job, picked: PickRecord) -> int:
    """Input channels that share a scale in a pick's mixed package: as they were picked, or as they were searched."""
    bits = picked.get("bits")
    return bits_group(job) if bits is None or "group_size" not in bits else bits["group_size"]


def quantize_by_architecture(
    job: Job, source: Path, picked: PickRecord, folder: Path, calibration: torch.Tensor
) -> None:
    """Quantize the package in `source` to the bits that a pick's architecture says: bits that were searched as they
    were scored, rounded to nearest; bits that were picked with the size rounded as those of a scheme are."""
    architecture = Architecture.from_dict(picked["architecture"])
    plan = mixed_plan(job, architecture, own_group(job, picked))
    bits, tuned = plan.bits or {}, picked.get("bits") is not None
    if tuned and job.recipe.quantizing.group_size not in (None, plan.group_size):
        say(
            f"warning: {folder.name}: --group-size {job.recipe.quantizing.group_size}: its bits were picked for groups "
            f"of {plan.group_size}, which it keeps; run compressor pick to pick them for others"
        )
    release_cached_memory(job.device)  # what rounds is on the same device
    layers = len(architecture.kept)
    with bar(f"quantizing {source.name}", layers) as progress:
        quantize_mixed(
            source,
            folder,
            bits,
            architecture,
            plan.group_size,
            calibration=calibration if tuned and any(of_layer < 8 for of_layer in bits.values()) else None,
            iterations=job.recipe.quantizing.iterations or 0,
            seed=job.recipe.seed,
            device=job.device.type,
            log=job.run.debug_file,
            progress=partial(_follow, progress, 0.0),
        )
        progress.advance(layers - progress.done)


def mixed_plan(job: Job, architecture: Architecture, group_size: int) -> SchemePlan:
    """How a network is rounded to the bits that its architecture says; 16: as stored. By names in the network that is
    cut out."""
    storage = StorageFormat(AS_STORED, group_size, by_architecture=True)
    bits = bits_by_module(job.structure, job.checkpoint.config, architecture, storage)
    head = 16 if job.structure.tied else architecture.head_bits or 16
    return SchemePlan("mixed", group_size, [], OuterBits(architecture.embedding_bits or 16, head), bits)


def bits_by_module(
    structure: Structure, config: PreTrainedConfig, architecture: Architecture, storage: StorageFormat
) -> dict[str, int]:
    """Bits of every linear layer inside blocks, by its name in the network that is cut out; 16: as stored."""
    family = family_of(config)
    return {
        renumbered(tensor.name, family, architecture).removesuffix(".weight"): storage.bits_of(tensor, architecture)
        for tensor in structure.tensors
        if tensor.role == "linear" and structure.shape(tensor, architecture) is not None
    }


def keeps_embedding(record: PackageRecord) -> bool:
    """Whether a package in compressed-tensors holds its embedding unquantized."""
    report = record.entry.quantization_report
    return report is not None and report.embedding == 16 and not report.scheme.endswith("auto-round")


def _follow(progress: Bar, before: float, done: float, _: int, what: str) -> None:
    progress.advance(before + done - progress.done, what)


def gains_by_text(scheme: SchemeName) -> bool:
    """Whether a scheme's weights are worth rounding on text, by tuning or by GPTQ. At 8 bits tuning gains at most
    0.02 % in bits per byte over rounding to nearest (docs/results.md, "Quantization")."""
    return SCHEMES[scheme].bits < 8
