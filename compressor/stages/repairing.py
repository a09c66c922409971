"""What a run's search scores sub-networks with, and what a pick is sliced with, beside prefixes: repaired weights, or
routed ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.inputs import text_fingerprint, training_blocks
from compressor.job import Job
from compressor.sizing import bits_group
from export.quantization.rounded_variants import Round, RoundedVariants, in_groups
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture
from supernet.common.errors import reading
from supernet.common.files import fingerprint, replacing
from supernet.common.formatting import parse_bytes, size
from supernet.common.progress import bar, say
from supernet.moments import gather, layer_file, load_moments, save_moments
from supernet.repair import RepairedVariants, experts_bytes, repair_in_sequence
from supernet.routed import FILE as ROUTED
from supernet.routed import RoutedDeltas, check_stored
from supernet.variants import FixedVariants, Variants

BATCH = 8
"""Blocks of calibration text in a pass."""
METHOD = "halves"
"""Changes with what is refitted, so that scores of repaired networks are of one kind."""
SEARCHED = "last"
"""The same of what a search alone does: it makes up for no removed last MLP."""


class RoundingRecord(TypedDict):
    """What picks and searches record of rounded weights: nothing where no bits are searched."""

    rounding: NotRequired[int | None]
    """Group size."""


def repair_inputs(job: Job) -> dict[str, object]:
    """What a repaired pick depends on beside the super-network's weights; empty where repair is off."""
    if not job.recipe.repair.enabled:
        return {}
    settings = job.recipe.finetuning
    text = [text_fingerprint(job, settings.tokens or 0), job.recipe.text_key, settings.sequence_length]
    return {"repair": [METHOD, job.recipe.repair.tokens, fingerprint(text), str(job.compute_dtype)]}


def search_repair_inputs(job: Job) -> dict[str, object]:
    """The same of the repaired sub-networks of a search, in which experts may be sliced plainly."""
    repair = repair_inputs(job)
    return repair and {**repair, "search": SEARCHED, **({"experts": METHOD} if repairs_experts(job) else {})}


def repairs_experts(job: Job) -> bool:
    """Whether a search repairs stacked experts: where there are some, and all of them fit in what it may keep."""
    needed = experts_bytes(job.structure)
    return bool(repair_inputs(job)) and 0 < needed <= parse_bytes(job.recipe.repair.memory)


def rounding_inputs(job: Job) -> RoundingRecord:
    """What rounded weights depend on beside those that are rounded and the bits; empty where no bits are searched."""
    return {"rounding": bits_group(job)} if job.declared_space.bits else {}


def repaired_weights(job: Job) -> str:
    """Fingerprint of the super-network's weights and of how they are repaired in a search."""
    weights, repair = job.run.supernet_weights, search_repair_inputs(job)
    return fingerprint([weights, repair]) if repair else weights


def searched_weights(job: Job) -> str:
    """Fingerprint of what the search scores: repaired weights and, where bits are searched, how they are rounded."""
    weights, rounding = repaired_weights(job), rounding_inputs(job)
    return fingerprint([weights, rounding]) if rounding else weights


def calibration_text(job: Job) -> list[Tensor]:
    """Token ids of the first blocks of what the fine-tuning trains on, [rows, length] each: as many as the recipe says
    or as there are, and none of those that held-out losses are measured on."""
    training, _ = training_blocks(job, job.recipe.finetuning.tokens or 0).split()
    rows = max(1, (job.recipe.repair.tokens or 0) // training.length)
    return [batch.ids for batch in training[:rows].to(job.device).split(BATCH)]


def search_variants(job: Job, supernet: SuperNetwork) -> Variants | None:
    """Weights for every sub-network: of its sizes, and where the space has genes of bits, rounded to these."""
    if job.declared_space.bits:
        return rounded_variants(job, supernet, partial(in_groups, group_size=bits_group(job)))
    return variants_by_size(job, supernet)


def load_searched(job: Job, architecture: Architecture | None = None) -> SuperNetwork:
    """The super-network with the weights that the search scores; of several bands of sizes, that of the architecture's
    (`Job.load_supernet`)."""
    supernet = job.load_supernet(architecture)
    supernet.use(search_variants(job, supernet))
    return supernet


def rounded_variants(job: Job, supernet: SuperNetwork, round_: Round) -> RoundedVariants:
    """Weights for every sub-network, rounded to the bits that it says."""
    variants = variants_by_size(job, supernet)
    return RoundedVariants(supernet, variants, round_, parse_bytes(job.recipe.repair.memory))


def variants_by_size(job: Job, supernet: SuperNetwork) -> Variants | None:
    """Weights for the sizes of every sub-network: repaired ones, from moments that are gathered once a run
    (`moments/`), or routed ones, where the super-network was trained with such."""
    if (file := job.run.supernet / ROUTED).is_file():
        return routed_deltas(file, supernet)
    if not repair_inputs(job) or job.recipe.data is None:
        return None
    folder, of = job.run.path / "moments", repaired_weights(job)
    if not job.run.whole(folder, of):
        if experts_bytes(job.structure) and not repairs_experts(job):
            needed = size(experts_bytes(job.structure))
            say(f"note: experts are sliced plainly in the search, as their repair takes {needed} (repair.memory)")
        text = calibration_text(job)
        with job.run.stage(folder, of) as (partial, _), bar("gathering moments", len(supernet.layers)) as progress:
            for index, moments in gather(supernet, text, experts=repairs_experts(job)):
                save_moments(moments, layer_file(partial, index), of)
                progress.advance()
    memory = parse_bytes(job.recipe.repair.memory)
    return RepairedVariants(supernet, lambda index: load_moments(layer_file(folder, index), of), memory)


def routed_deltas(file: Path, supernet: SuperNetwork) -> RoutedDeltas:
    """Raises `RequestError` for a file that cannot be read, or does not fit the network."""
    with reading(f"{file}: damaged; remove {file.parent} to fine-tune again"):
        tensors = load_file(file)
        check_stored(supernet.structure, tensors)
    return RoutedDeltas.stored(supernet, tensors)


@torch.no_grad()
def trained_variants(job: Job, architecture: Architecture, supernet: SuperNetwork) -> FixedVariants | None:
    """The weights that one sub-network of a super-network was trained with, where they are no prefixes: routed ones."""
    file = job.run.supernet / ROUTED
    if not file.is_file():
        return None
    deltas, changed = routed_deltas(file, supernet), {}
    for name, layer in deltas.layers.items():
        if (
            not architecture.layers[layer].removed
            and (tensor := deltas.tensor(name, architecture.layers[layer])) is not None
        ):
            changed[name] = tensor.cpu()
    return FixedVariants(changed)


def pick_variants(job: Job, architecture: Architecture, supernet: SuperNetwork | None = None) -> Variants | None:
    """Weights of one sub-network: repaired in sequence, kept in `repair/`, or routed. `supernet` where it is in memory
    already."""
    architecture = architecture.without_bits()
    if (job.run.supernet / ROUTED).is_file():
        return trained_variants(job, architecture, supernet or job.load_supernet())
    if not repair_inputs(job):
        return None
    if job.recipe.data is None:
        say("warning: repair: no text to fit to (--data); sliced plainly, and all that the removed units said is lost")
        return None
    if architecture.hidden_size != job.structure.base.hidden_size:
        say("warning: repair: a network of another residual width is sliced plainly; all that was cut is lost to it")
        return None
    file = repair_file(job, architecture)
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        job.threads(scoring=False)
        supernet = supernet or job.load_supernet()
        text = calibration_text(job)
        with bar("repairing", len(supernet.layers)) as progress:
            variants = repair_in_sequence(supernet, architecture, text, progress.advance)
        tensors = {name: tensor.cpu() for name, tensor in variants.tensors.items()}
        if not tensors and architecture != job.structure.base:
            say("warning: repair: the calibration text refits nothing of it; sliced plainly (more: repair.tokens)")
        with replacing(file) as temporary:
            save_file(tensors, temporary, {"tokens": str(sum(map(torch.Tensor.numel, text)))})
    with reading(f"{file}: damaged; remove it to repair again"):
        return FixedVariants(load_file(file))


def repair_file(job: Job, architecture: Architecture) -> Path:
    """Where the repaired weights of a pick are kept."""
    # Before experts were repaired, those of networks with experts had the name without the last part.
    kind = "-experts" if any(layer.num_experts for layer in job.structure.base.layers) else ""
    of = fingerprint([job.run.supernet_weights, repair_inputs(job)])
    return job.run.path / "repair" / f"{architecture.key}-{of}{kind}.safetensors"


def repaired_on(job: Job, architecture: Architecture) -> int:
    """The tokens that a pick's projections were refitted on; 0 where none was."""
    file = repair_file(job, architecture.without_bits())
    if not repair_inputs(job) or not file.is_file():
        return 0
    with reading(f"{file}: damaged; remove it to repair again"), safe_open(file, "pt") as stored:
        refitted, facts = bool(stored.keys()), stored.metadata() or {}
    return int(facts.get("tokens", job.recipe.repair.tokens or 0)) if refitted else 0
