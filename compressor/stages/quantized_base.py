"""The untouched base in few bits, beside every compressed network: people must see whether pruning was worth it.

Fills `packages/base-SCHEME` and `packages/base-gguf-TYPE`, made, scored, timed and proved like those of a pick.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compressor.job import Job
from compressor.sizing import JOINT, can_hold, package_bytes, storage_of
from compressor.stages.picks import PickRecord
from compressor.stages.quantizing import by_gptq, quantize, quantizing_inputs, schemes_of
from export.layouts.gguf import checks as gguf_checks
from export.layouts.gguf.types import QUANTIZED
from export.layouts.table import write_layout
from export.package import write_package
from export.package_record import update_record
from export.quantization.schemes import SCHEMES, EmbeddingBits, SchemeName
from supernet.common.files import fingerprint
from supernet.common.progress import say
from supernet.training.data import Blocks

ALWAYS: tuple[SchemeName, ...] = ("int8", "int4")
"""Schemes of the base that every table shows."""
ALWAYS_GGUF = ("gguf-q8_0", "gguf-q4_0")
"""Layouts of the base that tables show where llama.cpp files are asked for."""
BASE = "base"


def base_schemes(job: Job, picks: Sequence[PickRecord]) -> dict[SchemeName, EmbeddingBits]:
    """The schemes that the base is quantized in, with the embedding's bits: those of every table, and those of the
    picks. Its embedding is quantized unless the recipe says otherwise: what is compared at equal bytes is the best that
    the base can do."""
    if not job.quantizable:
        return {}
    base = job.untouched.structure.base
    named: dict[SchemeName, EmbeddingBits | None] = {}
    named |= dict.fromkeys(scheme for scheme in ALWAYS if can_hold(job, scheme, base))
    for picked in picks:
        named |= schemes_of(job, picked)
        named |= scheme_beside(job, picked)
    bits = job.recipe.quantizing.embedding or 8
    return {scheme: named[scheme] or bits for scheme in SCHEMES if scheme in named}


def scheme_beside(job: Job, picked: PickRecord) -> dict[SchemeName, EmbeddingBits | None]:
    """For a pick with bits of its own, the scheme of most bits in which the base takes no more bytes, or else of the
    fewest; with the pick's bits of the embedding."""
    bits = picked.get("bits")
    if bits is None or bits["scheme"] != "mixed":
        return {}
    base, embedding = job.untouched.structure.base, bits["embedding"]
    able = [scheme for scheme in JOINT if can_hold(job, scheme, base)]
    for scheme in able:
        if package_bytes(job.untouched.structure, base, storage_of(job, scheme, base, embedding)) <= bits["bytes"]:
            return {scheme: embedding}
    return {able[-1]: embedding}


def base_layouts(job: Job) -> list[str]:
    """The llama.cpp layouts that the base is written in."""
    asked = [layout for layout in job.recipe.formats if layout.startswith("gguf")]
    if not asked or not gguf_checks.holds(job.untouched.config, job.untouched.structure.base):
        return []
    more = [layout for layout in asked if layout.removeprefix("gguf-") in QUANTIZED]
    return list(dict.fromkeys([*ALWAYS_GGUF, *more]))


def base_inputs(job: Job, picks: Sequence[PickRecord], blocks: Blocks) -> dict[Path, dict[str, object]]:
    """Of every folder, all that it depends on."""
    bits: dict[str, int | None] = dict(base_schemes(job, picks).items())
    bits.update(dict.fromkeys(base_layouts(job), job.recipe.quantizing.embedding))
    tuned = tunes(job, picks)
    quantizing = quantizing_inputs(job, blocks) | {"tuned": tuned}
    return {
        job.run.packages / f"{BASE}-{form}": {
            "base": job.untouched_fingerprint,
            "quantizing": quantizing | {"embedding": embedding} | by_gptq(job, form, tuned),
        }
        for form, embedding in bits.items()
    }


def tunes(job: Job, picks: Sequence[PickRecord]) -> bool:
    """Whether the base's rounding is tuned: as that of the picks is. Where none is quantized, neither is it tuned."""
    return any(schemes_of(job, picked) or scheme_beside(job, picked) for picked in picks)


def untouched_ids(job: Job, ids: torch.Tensor) -> torch.Tensor:
    """The same tokens by the ids that the untouched base knows them by."""
    if job.vocabulary is None:
        return ids
    found, places = ids.unique(return_inverse=True)
    tokens = job.tokenizer.convert_ids_to_tokens(found.tolist())
    return torch.tensor(job.untouched_tokenizer.convert_tokens_to_ids(tokens), dtype=ids.dtype)[places]


def write_base(
    job: Job, missing: Mapping[Path, Mapping[str, object]], picks: Sequence[PickRecord], blocks: Blocks
) -> None:
    """Write the folders that are missing."""
    if not missing:
        return
    say("packaging the base in few bits")
    architecture = job.untouched.structure.base
    base = job.load_untouched(torch.promote_types(job.stored_dtype, job.compute_dtype))
    lineage = {"base": {"name": job.given.model, "fingerprint": job.untouched_fingerprint}}
    calibration = untouched_ids(job, blocks[: job.recipe.quantizing.samples].ids)
    options: dict[str, Any] = {
        "tokenizer": job.untouched_tokenizer,
        "dtype": job.stored_dtype,
        "probe_ids": untouched_ids(job, blocks.split()[1][:4].ids[:, :32]),
    }

    def entry(name: str) -> dict[str, object]:
        return {"name": name, "architecture": architecture.to_dict()}

    forms = {folder.name.removeprefix(f"{BASE}-"): folder for folder in missing}
    for layout, folder in forms.items():
        if layout.startswith("gguf"):
            own = lineage | {"inputs": fingerprint(missing[folder]), "copy_of": BASE}
            more = {"embedding": job.recipe.quantizing.embedding, "calibration": calibration}
            with job.schedule.stage("quantizing"):
                write_layout(
                    layout, base, architecture, folder, entry=entry(folder.name), lineage=own, **options, **more
                )
    schemes = {scheme: forms[scheme] for scheme in SCHEMES if scheme in forms}
    if not schemes:
        return
    with tempfile.TemporaryDirectory(prefix="compressor-base-") as scratch, job.schedule.stage("quantizing"):
        source = Path(scratch) / BASE
        write_package(base, source, entry=entry(BASE), lineage=lineage, **options)
        del base
        tuned = tunes(job, picks)
        quantize(job, source, len(architecture.kept), schemes, base_schemes(job, picks), calibration, tuned=tuned)
    for folder in schemes.values():
        update_record(folder, lineage={"inputs": fingerprint(missing[folder])})
