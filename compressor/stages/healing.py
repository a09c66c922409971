"""Cut every pick out of the super-network and heal it: fills `subnets/`, from which packages are written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from compressor.inputs import HEALING, training_blocks
from compressor.job import Job
from compressor.stages.finalists import Start, best_finalist
from compressor.stages.picks import PickRecord, cut_out, read_picks
from compressor.stages.reading import read_checked
from compressor.stages.subnet_files import (
    Inputs,
    cut_inputs,
    cut_network,
    held_dtype,
    is_good,
    is_made_from,
    load_healed,
)
from export.package import write_package
from supernet.common.files import fingerprint, write_json
from supernet.common.progress import say
from supernet.common.versions import versions
from supernet.training.data import Blocks
from supernet.training.settings import TrainSettings
from supernet.training.sources import is_generated
from supernet.training.supernet_training import heal


@dataclass(frozen=True)
class Healed:
    """A pick that is ready to be packaged."""

    picked: PickRecord
    start: Start | None
    """Where its healing began, if it was one of several finalists."""
    inputs: Inputs
    """All that the network depends on."""


def blocks_to_heal_on(job: Job) -> Blocks:
    """The text that healing reads. What the base writes for it alone is written now, and so was not compared with the
    report yet."""
    tokens = job.recipe.healing.tokens or 0
    if is_generated(job.recipe.data or "") and tokens > (job.recipe.finetuning.tokens or 0):
        return read_checked(job, tokens)[0]
    return training_blocks(job, tokens)


def heal_picks(job: Job, blocks: Blocks) -> list[Healed]:
    """Choose among the finalists of every pick, cut it out and heal it, where its own package is not there yet.

    All of them before the first is packaged: what rounding may cost is known only then. What was healed is not healed
    again where the export is done again.
    """
    run, picks, healed = job.run, read_picks(job), list[Healed]()
    if job.redo == "export" and job.recipe.healing.tokens:
        say(f"what was healed is kept; without {run.subnets} it would be healed again")
    with job.schedule.stage("healing"):
        for number, row in enumerate(picks):
            picked, start = best_finalist(job, row, blocks)
            if picked != row:
                picks[number] = picked
                write_json(run.picks, picks)
            pick = Healed(picked, start, network_inputs(job, cut_out(picked).key, blocks, start))
            if job.redo == "export" or not is_good(run.packages / picked["name"], {"network": pick.inputs}):
                shipped_network(job, blocks, pick)
            for left in run.subnets.glob(f".{picked['name']}-{'?' * 16}.training.safetensors*"):  # other inputs' too
                left.unlink()
            healed.append(pick)
    return healed


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


def shipped_network(job: Job, blocks: Blocks, pick: Healed) -> Any:
    """The sub-network as it ships: cut out (`subnets/NAME-sliced`), then healed (`subnets/NAME`); read from there where
    it was made before.

    It is cut out of the super-network's files, of which no more than one tensor at a time is in memory. Where nothing
    is healed it stays a `StreamedNetwork`, which never is in memory as a whole. A repair, and routed weights, need the
    super-network in memory once.
    """
    run, name, architecture, start = job.run, pick.picked["name"], cut_out(pick.picked), pick.start
    run.subnets.mkdir(exist_ok=True)
    cut = cut_network(job, architecture)

    def write(network: Any, name: str, inputs: Inputs) -> None:
        write_package(
            network,
            run.subnets / name,
            tokenizer=job.tokenizer,
            entry={"name": pick.picked["name"], "architecture": architecture.to_dict()},
            dtype=job.stored_dtype,
            lineage=lineage_of(job, pick.picked) | {"inputs": fingerprint(inputs)},
        )

    # 1. As it is cut.
    sliced, healed = run.subnets / f"{name}-sliced", run.subnets / name
    source = cut_inputs(job, architecture.key)
    if not is_made_from(sliced, source):
        write(cut, sliced.name, source)
    if not job.recipe.healing.tokens:
        return cut
    # 2. Healed, where it was not.
    if is_made_from(healed, pick.inputs) and (healed / HEALING).is_file():  # which is written last
        return load_healed(cut, healed, held_dtype(job)).to(job.device)
    state = run.subnets / f".{name}-{fingerprint(pick.inputs)}.training.safetensors"
    settings = healing_settings(job, blocks, start)
    job.threads(scoring=False)
    if start is None:
        network = cut.built(torch.float32, job.device)
    else:
        network = load_healed(cut, start.folder, torch.float32).to(job.device)
    history = heal(network, job.load_base(), blocks, job.in_parts(settings), state=state, accelerator=job.accelerator)
    write(network, healed.name, pick.inputs)
    write_json(healed / HEALING, vars(history))
    round_as_stored(job, network)
    return network


def round_as_stored(job: Job, network: Any) -> None:
    """Give the weights the values that the stored dtype has, so that what is proved and scored is what ships."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(job.stored_dtype).to(held_dtype(job))


def lineage_of(job: Job, picked: PickRecord) -> dict[str, object]:
    """Where a pick's packages come from, as they record it."""
    return {
        "base": {
            "name": job.given.model,
            "fingerprint": job.untouched_fingerprint,
            "logit_differences": logit_differences(job),
        },
        "supernet": job.run.supernet_weights,
        "target": picked["target"],
        "versions": versions(),
    }


def logit_differences(job: Job) -> dict[str, float] | None:
    """By how much logits moved on the way to the super-network, as shares of the largest."""
    differences = (job.run.manifest(job.run.supernet) or {}).get("logit_differences")
    if job.vocabulary is None:
        return differences
    return {**(differences or {}), "vocabulary": job.vocabulary.logit_difference}
