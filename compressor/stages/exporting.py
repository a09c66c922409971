"""Slice, heal, package, quantize and prove every pick: fills `subnets/` and `packages/`.

Every folder holds the fingerprint of all that it depends on, and only those are written that are missing or depend on
something that changed: another `--quantize` or `--format` adds folders to what is there, and heals nothing again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from compressor.inputs import HEALING, training_blocks
from compressor.job import Job
from compressor.run import Run
from compressor.sizing import byte_limit, picks_types
from compressor.stages.elastic_sizes import elastic_source
from compressor.stages.finalists import Start, best_finalist
from compressor.stages.llama_types import bits_that_fit
from compressor.stages.measuring import Measurements, measure_packages
from compressor.stages.picks import PickRecord, cut_out, is_uniform, read_picks
from compressor.stages.quantized_base import base_inputs, write_base
from compressor.stages.quantizing import own_group, quantize, quantize_by_architecture, quantizing_inputs, schemes_of
from compressor.stages.reading import read_checked
from compressor.stages.repairing import pick_variants
from compressor.stages.subnet_files import Inputs, cut_inputs, held_dtype, is_made_from, load_healed
from export.layouts.table import GGUF_MIXED, needs_uniform, write_layout
from export.package import write_package
from export.package_record import RECORD, PackageEntry, read_record, update_record
from export.verify import TaskFiles, prove_all
from supernet.architecture import Architecture
from supernet.common.errors import VerificationError
from supernet.common.files import fingerprint, write_json
from supernet.common.progress import Bar, bar, say
from supernet.common.versions import versions
from supernet.streaming import StreamedNetwork
from supernet.training.data import Blocks
from supernet.training.loop import TrainSettings
from supernet.training.sources import is_generated
from supernet.training.supernet_training import heal


def export(job: Job) -> list[PackageEntry]:
    """Slice, heal, package, quantize, prove and score every pick; returns the packages' entries.

    One that its proof refuses says so in its entry, and the others are made all the same: `check_proved` raises.
    """
    recipe, run = job.recipe, job.run
    picks = read_picks(job)
    run.packages.mkdir(exist_ok=True)
    blocks = blocks_to_heal_on(job)
    written: list[str] = []
    with tempfile.TemporaryDirectory(prefix="compressor-") as scratch:
        proofs: list[tuple[Path, Path | None]] = []
        for number, row in enumerate(picks):
            picked, start = best_finalist(job, row, blocks)
            if picked != row:
                picks[number] = picked
                write_json(run.picks, picks)
            name = picked["name"]
            wanted = package_inputs(job, picked, network_inputs(job, cut_out(picked).key, blocks, start), blocks)
            if number == 0 and "elastic" in recipe.formats:  # it has all sizes, so one is enough
                wanted[elastic_folder(job, name)] = elastic_inputs(job, picked)
            written += [folder.name for folder in wanted]
            missing = {f: inputs for f, inputs in wanted.items() if job.redo == "export" or not is_good(f, inputs)}
            reference = Path(scratch) / f"{name}.safetensors"
            if missing:
                write_packages(job, picked, blocks, missing, reference, start)
                for left in run.subnets.glob(f".{name}-{'?' * 16}.training.safetensors*"):  # other inputs' too
                    left.unlink()
            # An export that was interrupted may have left some unproved. What was there already, and copies of it, are
            # compared with its probe; so is what holds the super-network, of which nothing was healed.
            unproved = [folder for folder in wanted if not read_record(folder).entry.verified]
            remember_vocabulary(job, unproved)
            fresh = {*missing} - {elastic_folder(job, name)} if reference.is_file() else set()
            proofs += [(folder, reference if folder in fresh else None) for folder in unproved]
        bases = base_inputs(job, picks, blocks)
        missing = {f: inputs for f, inputs in bases.items() if job.redo == "export" or not is_made_from(f, inputs)}
        write_base(job, missing, picks, blocks)
        proofs += [(folder, None) for folder in bases if not read_record(folder).entry.verified]
        measure_packages(job, written, [folder.name for folder in bases])
        if proofs:
            # The proof is computed on the CPU: what took a GPU to score would take it hours.
            tasks = TaskFiles(recipe.include_path) if job.device.type == "cpu" else None
            with job.schedule.stage("proving"), bar("proving", len(proofs)) as progress:
                proved = progress_by_name(progress)
                found = prove_all(proofs, record=True, log=run.debug_file, tasks=tasks, progress=proved)
                for refusal in (proof for proof in found if isinstance(proof, VerificationError)):
                    say(f"warning: {refusal}")
                progress.advance(len(proofs) - progress.done)
    run.log(f"exported: {', '.join(written)}")
    entries = [read_record(run.packages / name).entry for name in written]
    say_what_is_too_large(job, entries)
    say_what_is_left(job, {*written, *(folder.name for folder in bases)})
    return entries


def elastic_folder(job: Job, name: str) -> Path:
    """Where a pick's elastic package is."""
    return job.run.packages / f"{name}-elastic"


def blocks_to_heal_on(job: Job) -> Blocks:
    """The text that healing reads. What the base writes for it alone is written now, and so was not compared with the
    report yet."""
    tokens = job.recipe.healing.tokens or 0
    if is_generated(job.recipe.data or "") and tokens > (job.recipe.finetuning.tokens or 0):
        return read_checked(job, tokens)[0]
    return training_blocks(job, tokens)


def is_good(folder: Path, inputs: Inputs) -> bool:
    """Whether a package is there, made from these. An unquantized one that was refused is made again: a second proof
    would compare it with less."""
    if not is_made_from(folder, inputs):
        return False
    entry = read_record(folder).entry
    return entry.refused is None or entry.quantization is not None


def check_proved(run: Run) -> None:
    """Raise `VerificationError` where a package of the run was refused by its proof, or its proof did not end."""
    measured = Measurements.read(run.packages / "base.json")
    entries = [read_record(run.packages / name).entry for name in (*measured.packages, *measured.quantized_base)]
    if unproved := [entry for entry in entries if not entry.verified]:
        first, others = unproved[0], [entry.name for entry in unproved[1:]]
        why = f"refused by its proof, do not ship it: {first.refused}"
        if first.refused is None:
            why = "not proved yet: run the same command again"
        more = f"; nor {'is' if len(others) == 1 else 'are'} {', '.join(others)} proved" if others else ""
        raise VerificationError(f"{run.packages / first.name}: {why}{more}; all others are proved")


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


def network_inputs(job: Job, architecture: str, blocks: Blocks, start: Start | None = None) -> Inputs:
    """Of a sub-network as it ships: what it is cut out of and, where it is healed, all that healing reads."""
    cut = cut_inputs(job, architecture)
    if not job.recipe.healing.tokens:
        return cut
    settings = healing_settings(job, blocks, start)
    begun = {} if start is None else {"start": start.inputs}
    read = {"base": job.base_fingerprint, "data": blocks.fingerprint, "dtype": str(job.compute_dtype)}
    return {**cut, **read, **begun, "healing": asdict(settings)}


def healing_settings(job: Job, blocks: Blocks, start: Start | None) -> TrainSettings:
    """How a pick is healed; of several finalists the best one, with what is left of the tokens."""
    section, seed = job.recipe.healing, job.recipe.seed + 1
    if start is not None:
        section, seed = section.model_copy(update={"tokens": start.tokens_left}), start.seed
    return job.train_settings(section, blocks.length, seed)


def package_inputs(job: Job, picked: PickRecord, network: Inputs, blocks: Blocks) -> dict[Path, Inputs]:
    """Of every folder that one pick asks for: its own layout first, quantized ones, then copies in other layouts."""
    recipe, name = job.recipe, picked["name"]
    quantizing = quantizing_inputs(job, blocks)
    inputs: dict[str, Inputs] = {"": {"network": network}}
    for scheme, embedding in schemes_of(job, picked).items():
        inputs[f"-{scheme}"] = {"network": network, "quantizing": quantizing | {"embedding": embedding}}
        if is_uniform(name) and embedding not in (None, 16):  # earlier versions gave such a package a code file
            inputs[f"-{scheme}"]["plain"] = True
    if (architecture := Architecture.from_dict(picked["architecture"])).has_bits:
        inputs["-mixed"] = {"network": network, "bits": architecture.to_dict(), "group_size": own_group(job, picked)}
        if picked.get("bits") is not None:
            inputs["-mixed"]["quantizing"] = {key: value for key, value in quantizing.items() if key != "group_size"}
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


def write_packages(
    job: Job,
    picked: PickRecord,
    blocks: Blocks,
    missing: Mapping[Path, Inputs],
    reference: Path,
    start: Start | None = None,
) -> None:
    """Write the `missing` folders of one pick.

    If the pick's own layout is among them, `reference` receives the logits that each folder is proved against.
    """
    quantizing = job.recipe.quantizing
    name, architecture = picked["name"], cut_out(picked)
    own = job.run.packages / name
    embeddings = schemes_of(job, picked)
    schemes = {scheme: f for scheme in embeddings if (f := job.run.packages / f"{name}-{scheme}") in missing}
    mixed = job.run.packages / f"{name}-mixed"
    copies = [folder for folder in missing if folder not in (own, mixed, *schemes.values())]
    lineage: dict[str, object] = {
        "base": {
            "name": job.given.model,
            "fingerprint": job.untouched_fingerprint,
            "logit_differences": logit_differences(job),
        },
        "supernet": job.run.supernet_weights,
        "target": picked["target"],
        "versions": versions(),
    }
    network = cache(lambda: shipped_network(job, blocks, picked, lineage, start))
    entry = {"name": name, "architecture": architecture.to_dict()}
    write = partial(
        write_layout,
        architecture=architecture,
        tokenizer=job.tokenizer,
        dtype=job.stored_dtype,
        probe_ids=blocks.split()[1][:4].ids[:, :32],
    )
    say(f"packaging {name}")
    if own in missing:
        own_lineage = lineage | {"inputs": fingerprint(missing[own])}
        with job.schedule.stage("healing"):
            write("uneven", network(), destination=own, entry=entry, lineage=own_lineage, reference=reference)
    if schemes:
        with job.schedule.stage("quantizing"):
            seen = blocks[: quantizing.samples].ids
            quantize(job, own, len(architecture.kept), schemes, embeddings, seen, plain=is_uniform(name))
        for folder in schemes.values():
            update_record(folder, lineage={"inputs": fingerprint(missing[folder])})
    if mixed in missing:
        with job.schedule.stage("quantizing"):
            quantize_by_architecture(job, own, picked, mixed, blocks[: quantizing.samples].ids)
        update_record(mixed, lineage={"inputs": fingerprint(missing[mixed])})
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
        with job.schedule.stage("healing"):
            write_copy(layout, built, destination=folder, entry=named, lineage=own_lineage)


def logit_differences(job: Job) -> dict[str, float] | None:
    """By how much logits moved on the way to the super-network, as shares of the largest."""
    differences = (job.run.manifest(job.run.supernet) or {}).get("logit_differences")
    if job.vocabulary is None:
        return differences
    return {**(differences or {}), "vocabulary": job.vocabulary.logit_difference}


def remember_vocabulary(job: Job, packages: Iterable[Path]) -> None:
    """Let packages say what the base's vocabulary was cut to, and how texts are to be split: for their proof."""
    if job.vocabulary is None:
        return
    record, splits = job.vocabulary.record.model_dump(), [split.model_dump() for split in job.vocabulary.splits]
    for package in packages:
        update_record(package, entry={"vocabulary": record}, probe={"splits": splits})


def shipped_network(
    job: Job, blocks: Blocks, picked: PickRecord, lineage: Mapping[str, object], start: Start | None = None
) -> Any:
    """The sub-network as it ships: cut out (`subnets/NAME-sliced`), then healed (`subnets/NAME`), from `start` where
    it was one of several finalists.

    It is cut out of the super-network's files, of which no more than one tensor at a time is in memory. Where nothing
    is healed it stays a `StreamedNetwork`, which never is in memory as a whole. A repair, and routed weights, need the
    super-network in memory once.
    """
    recipe, run = job.recipe, job.run
    name, architecture = picked["name"], cut_out(picked)
    run.subnets.mkdir(exist_ok=True)
    variants = pick_variants(job, architecture)
    cut = StreamedNetwork(
        job.supernet_folder(architecture), job.checkpoint.config, job.structure, architecture, variants
    )
    write = partial(
        write_package,
        tokenizer=job.tokenizer,
        entry={"name": name, "architecture": architecture.to_dict()},
        dtype=job.stored_dtype,
    )
    sliced, healed = run.subnets / f"{name}-sliced", run.subnets / name
    source = cut_inputs(job, cut_out(picked).key)
    if not is_made_from(sliced, source):
        write(cut, sliced, lineage={**lineage, "inputs": fingerprint(source)})
    if not recipe.healing.tokens:
        return cut
    inputs = network_inputs(job, cut_out(picked).key, blocks, start)
    if is_made_from(healed, inputs) and (healed / HEALING).is_file():  # which is written last
        return load_healed(cut, healed, held_dtype(job)).to(job.device)
    state = run.subnets / f".{name}-{fingerprint(inputs)}.training.safetensors"
    settings = healing_settings(job, blocks, start)
    job.threads(scoring=False)
    if start is None:
        network = cut.built(torch.float32, job.device)
    else:
        network = load_healed(cut, start.folder, torch.float32).to(job.device)
    history = heal(network, job.load_base(), blocks, job.in_parts(settings), state=state, accelerator=job.accelerator)
    write(network, healed, lineage={**lineage, "inputs": fingerprint(inputs)})
    write_json(healed / HEALING, vars(history))
    round_as_stored(job, network)
    return network


def round_as_stored(job: Job, network: Any) -> None:
    """Give the weights the values that the stored dtype has, so that what is proved and scored is what ships."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(job.stored_dtype).to(held_dtype(job))
