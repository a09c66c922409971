"""Package, quantize, measure and prove every pick that was healed: fills `packages/`.

Every folder holds the fingerprint of all that it depends on, and only those are written that are missing or depend on
something that changed: another `--quantize` or `--format` adds folders to what is there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

from compressor.job import Job
from compressor.run import Run
from compressor.schedule import stage
from compressor.sizing import byte_limit, picks_types
from compressor.stages.elastic_sizes import elastic_source
from compressor.stages.healing import Healed, lineage_of, shipped_network
from compressor.stages.llama_types import bits_that_fit
from compressor.stages.measuring import Measurements, measure_packages
from compressor.stages.picking import MEND_ALIKE
from compressor.stages.picks import PickRecord, cut_out, is_uniform
from compressor.stages.quantized_base import base_inputs, write_base
from compressor.stages.quantizing import (
    by_gptq,
    own_group,
    quantize,
    quantize_by_architecture,
    quantizing_inputs,
    schemes_of,
)
from compressor.stages.subnet_files import Inputs, cut_inputs, held_dtype, is_good, is_made_from
from export.layouts.table import GGUF_MIXED, check_sizes, needs_uniform, write_layout
from export.network_check import TaskFiles
from export.package_record import RECORD, PackageEntry, read_record, update_record
from export.verify import prove_all
from supernet.architecture import Architecture
from supernet.common.errors import NotHeldError, RequestError, VerificationError
from supernet.common.files import fingerprint
from supernet.common.progress import Bar, bar, say
from supernet.streaming import StreamedNetwork
from supernet.training.data import Blocks

Proof = tuple[Path, Path | None]
"""A package that is to be proved, and the logits that it is compared with; None: its probe."""


def export(job: Job, healed: Sequence[Healed], blocks: Blocks) -> list[PackageEntry]:
    """Package, quantize, prove and score every pick; returns the packages' entries. `blocks` are what they healed on.

    One that its proof refuses says so in its entry, and the others are made all the same; so they are where a layout
    does not hold a pick. `check_proved` raises for both.
    """
    recipe, run = job.recipe, job.run
    run.packages.mkdir(exist_ok=True)
    written: list[str] = []
    left_out = without_uniform(job, [pick.picked["name"] for pick in healed])
    with tempfile.TemporaryDirectory(prefix="compressor-") as scratch:
        # 1. The packages of every pick.
        proofs: list[Proof] = []
        for number, pick in enumerate(healed):
            picked, name = pick.picked, pick.picked["name"]
            wanted = package_inputs(job, picked, pick.inputs, blocks)
            if number == 0 and "elastic" in recipe.formats:  # it has all sizes, so one is enough
                wanted[elastic_folder(job, name)] = elastic_inputs(job, picked)
            refused = refused_by_sizes(job, picked, wanted)
            wanted = {folder: inputs for folder, inputs in wanted.items() if folder not in refused}
            missing = {f: inputs for f, inputs in wanted.items() if job.redo == "export" or not is_good(f, inputs)}
            reference = Path(scratch) / f"{name}.safetensors"
            if missing:
                refused |= write_packages(job, pick, blocks, missing, reference)
            wanted = {folder: inputs for folder, inputs in wanted.items() if folder not in refused}
            written += [folder.name for folder in wanted]
            left_out |= {folder.name: reason for folder, reason in refused.items()}
            # An export that was interrupted may have left some unproved. What was there already, and copies of it, are
            # compared with its probe; so is what holds the super-network, of which nothing was healed.
            unproved = [folder for folder in wanted if not read_record(folder).entry.verified]
            remember_vocabulary(job, unproved)
            fresh = {*missing} - {elastic_folder(job, name)} if reference.is_file() else set()
            proofs += [(folder, reference if folder in fresh else None) for folder in unproved]
        for folder_name, reason in left_out.items():
            say(f"warning: {folder_name} is left out: {reason}")
        # 2. The base in few bits.
        picks = [pick.picked for pick in healed]
        bases = base_inputs(job, picks, blocks)
        missing = {f: inputs for f, inputs in bases.items() if job.redo == "export" or not is_made_from(f, inputs)}
        write_base(job, missing, picks, blocks)
        proofs += [(folder, None) for folder in bases if not read_record(folder).entry.verified]
        # 3. Numbers and proofs of all of them.
        measure_packages(job, written, [folder.name for folder in bases], left_out)
        if proofs:
            prove_packages(job, proofs)
    run.log(f"exported: {', '.join(written)}")
    entries = [read_record(run.packages / name).entry for name in written]
    say_what_is_too_large(job, entries)
    say_what_is_left(job, {*written, *(folder.name for folder in bases)})
    return entries


@stage("proving")
def prove_packages(job: Job, proofs: Sequence[Proof]) -> None:
    """Prove packages in fresh processes, and say which were refused."""
    # The proof is computed on the CPU: what took a GPU to score would take it hours.
    tasks = TaskFiles(job.recipe.include_path) if job.device.type == "cpu" else None
    with bar("proving", len(proofs)) as progress:
        proved = progress_by_name(progress)
        found = prove_all(proofs, record=True, log=job.run.debug_file, tasks=tasks, progress=proved)
        for refusal in (proof for proof in found if isinstance(proof, VerificationError)):
            say(f"warning: {refusal}")
        progress.advance(len(proofs) - progress.done)


def elastic_folder(job: Job, name: str) -> Path:
    """Where a pick's elastic package is."""
    return job.run.packages / f"{name}-elastic"


def without_uniform(job: Job, picks: Collection[str]) -> dict[str, str]:
    """The packages that want layers that are alike and for which nothing was picked, and why. A network that was picked
    by its key is its own answer."""
    recipe, config = job.recipe, job.checkpoint.config
    if "uniform" not in recipe.formats or recipe.key is not None:
        return {}
    missing = [f"{name}-uniform" for name in picks if not is_uniform(name) and f"{name}-uniform" not in picks]
    copies = ["", *(f"-{layout}" for layout in recipe.formats if needs_uniform(layout, config))]
    why = f"no measured network whose layers are alike meets what is asked for; {MEND_ALIKE}"
    return {f"{name}{copy}": why for name in missing for copy in copies}


def refused_by_sizes(job: Job, picked: PickRecord, wanted: Iterable[Path]) -> dict[Path, str]:
    """Which of a pick's folders are of a layout that does not hold its sizes, and why; nothing is read for it."""
    refused = {}
    for folder in wanted:
        try:
            check_sizes(folder.name.removeprefix(f"{picked['name']}-"), job.checkpoint.config, cut_out(picked))
        except NotHeldError as error:
            refused[folder] = str(error)
    return refused


def check_proved(run: Run) -> None:
    """Raise `VerificationError` where a package of the run was refused by its proof, or its proof did not end, and
    `RequestError` where one was left out."""
    measured = Measurements.read(run.packages / "base.json")
    entries = [read_record(run.packages / name).entry for name in (*measured.packages, *measured.quantized_base)]
    if unproved := [entry for entry in entries if not entry.verified]:
        first, others = unproved[0], [entry.name for entry in unproved[1:]]
        why = f"refused by its proof, do not ship it: {first.refused}"
        if first.refused is None:
            why = "not proved yet: run the same command again"
        more = f"; nor {'is' if len(others) == 1 else 'are'} {', '.join(others)} proved" if others else ""
        raise VerificationError(f"{run.packages / first.name}: {why}{more}; all others are proved")
    if measured.left_out:
        reasons = "; ".join(f"{name} is left out: {reason}" for name, reason in measured.left_out.items())
        raise RequestError(f"{reasons}; all other packages are made and proved")


def say_what_is_too_large(job: Job, entries: Iterable[PackageEntry]) -> None:
    """Name the llama.cpp files that are larger than what was asked for, and the smallest of the others where it is:
    what was picked was estimated."""
    limit = byte_limit(job)
    if limit is None:
        return
    others = [] if picks_types(job) else [entry for entry in entries if not entry.layout.startswith("gguf")]
    files = [entry for entry in entries if entry.layout.startswith("gguf")]
    mixed = next((entry for entry in files if entry.name.endswith(GGUF_MIXED)), None)
    for entry in [*sorted(others, key=lambda entry: entry.bytes)[:1], *files]:
        if entry.bytes > limit:
            less = "pick with fewer bytes"
            if entry.name.endswith(GGUF_MIXED):
                less = "none of its types takes less; pick a smaller network, with fewer bytes"
            elif entry in files and mixed is None:
                less = f"--format {GGUF_MIXED} chooses types that fit"
            elif entry in files and mixed is not None and mixed.bytes <= limit:
                less = f"{mixed.name} fits"
            say(f"warning: {entry.name} takes {entry.bytes:,} bytes, and {limit:,} were asked for; {less}")


def say_what_is_left(job: Job, made: Collection[str]) -> None:
    """Name the packages of the run that are not among those `made`: of earlier picks, sizes or schemes."""
    others = sorted(record.parent.name for record in job.run.packages.glob(f"*/{RECORD}"))
    if others := [name for name in others if name not in made]:
        say(f"note: of earlier picks or settings, and not in the report: {', '.join(others)} in {job.run.packages}")


def progress_by_name(progress: Bar) -> Callable[[str], None]:
    """Moves a bar on by one for each name but the first, whose work begins."""

    def begins(name: str) -> None:
        progress.advance(1 if progress.note else 0, name)

    return begins


def package_inputs(job: Job, picked: PickRecord, network: Inputs, blocks: Blocks) -> dict[Path, Inputs]:
    """Of every folder that one pick asks for: its own layout first, quantized ones, then copies in other layouts."""
    recipe, name = job.recipe, picked["name"]
    quantizing = quantizing_inputs(job, blocks)
    inputs: dict[str, Inputs] = {"": {"network": network}}
    for scheme, embedding in schemes_of(job, picked).items():
        rounding = quantizing | {"embedding": embedding} | by_gptq(job, scheme)
        inputs[f"-{scheme}"] = {"network": network, "quantizing": rounding}
        if is_uniform(name) and embedding not in (None, 16):  # earlier versions gave such a package a code file
            inputs[f"-{scheme}"]["plain"] = True
    if (architecture := Architecture.from_dict(picked["architecture"])).has_bits:
        inputs["-mixed"] = {"network": network, "bits": architecture.to_dict(), "group_size": own_group(job, picked)}
        if picked.get("bits") is not None:
            rounding = {key: value for key, value in quantizing.items() if key != "group_size"}
            inputs["-mixed"]["quantizing"] = rounding | by_gptq(job, "mixed")
    for layout in recipe.formats:
        if layout in ("uneven", "uniform", "elastic"):
            continue
        if needs_uniform(layout, job.checkpoint.config) == is_uniform(name):
            inputs[f"-{layout}"] = {"network": network}
            if layout.startswith("gguf-"):
                inputs[f"-{layout}"] |= {"quantizing": quantizing | {"embedding": recipe.quantizing.embedding}}
            if layout == GGUF_MIXED:
                inputs[f"-{layout}"] |= {"max_bytes": byte_limit(job)}
    return {job.run.packages / f"{name}{suffix}": read for suffix, read in inputs.items()}


def elastic_inputs(job: Job, picked: PickRecord) -> Inputs:
    """Of the elastic package: it is the super-network, which is not healed, with the sizes that the search found."""
    sizes = elastic_source(job, cut_out(picked)).sizes
    return cut_inputs(job, cut_out(picked).key) | {"sizes": [size.model_dump(mode="json") for size in sizes]}


@stage("quantizing")
def write_packages(
    job: Job, pick: Healed, blocks: Blocks, missing: Mapping[Path, Inputs], reference: Path
) -> dict[Path, str]:
    """Write the `missing` folders of one pick; returns those whose layout turned out not to hold it, and why.

    If the pick's own layout is among them, `reference` receives the logits that each folder is proved against.
    """
    refused: dict[Path, str] = {}
    quantizing, picked = job.recipe.quantizing, pick.picked
    name, architecture = picked["name"], cut_out(picked)
    own = job.run.packages / name
    embeddings = schemes_of(job, picked)
    schemes = {scheme: f for scheme in embeddings if (f := job.run.packages / f"{name}-{scheme}") in missing}
    mixed = job.run.packages / f"{name}-mixed"
    copies = [folder for folder in missing if folder not in (own, mixed, *schemes.values())]
    lineage = lineage_of(job, picked)
    network = cache(lambda: shipped_network(job, blocks, pick))
    entry = {"name": name, "architecture": architecture.to_dict()}
    write = partial(
        write_layout,
        architecture=architecture,
        tokenizer=job.tokenizer,
        dtype=job.stored_dtype,
        probe_ids=blocks.split()[1][:4].ids[:, :32],
    )
    say(f"packaging {name}")
    # 1. The pick's own package.
    if own in missing:
        own_lineage = lineage | {"inputs": fingerprint(missing[own])}
        write("uneven", network(), destination=own, entry=entry, lineage=own_lineage, reference=reference)
    # 2. The same in fewer bits.
    if schemes:
        seen = blocks[: quantizing.samples].ids
        quantize(job, own, len(architecture.kept), schemes, embeddings, seen, plain=is_uniform(name))
        for folder in schemes.values():
            update_record(folder, lineage={"inputs": fingerprint(missing[folder])})
    if mixed in missing:
        quantize_by_architecture(job, own, picked, mixed, blocks[: quantizing.samples].ids)
        update_record(mixed, lineage={"inputs": fingerprint(missing[mixed])})
    # 3. The same in other layouts.
    for folder in copies:
        own_lineage = lineage | {"inputs": fingerprint(missing[folder])}
        if folder != elastic_folder(job, name):
            own_lineage["copy_of"] = name
        layout = folder.name.removeprefix(f"{name}-")
        built = elastic_source(job, architecture) if layout == "elastic" else network()
        if isinstance(built, StreamedNetwork):  # other layouts are made of a network in memory
            built = built.built(held_dtype(job), job.device)
        named = entry | {"name": folder.name}
        write_copy = write
        if layout.startswith("gguf"):
            write_copy = partial(write, embedding=quantizing.embedding, calibration=blocks[: quantizing.samples].ids)
        if layout == GGUF_MIXED:
            write_copy = partial(write_copy, bits=bits_that_fit(job, architecture, folder.name))
        try:
            write_copy(layout, built, destination=folder, entry=named, lineage=own_lineage)
        except NotHeldError as error:
            refused[folder] = str(error)
    return refused


def remember_vocabulary(job: Job, packages: Iterable[Path]) -> None:
    """Let packages say what the base's vocabulary was cut to, and how texts are to be split: for their proof."""
    if job.vocabulary is None:
        return
    record, splits = job.vocabulary.record.model_dump(), [split.model_dump() for split in job.vocabulary.splits]
    for package in packages:
        update_record(package, entry={"vocabulary": record}, probe={"splits": splits})
