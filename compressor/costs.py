"""What every stage of a run costs here: seconds, memory and disk, from a few rates and the recipe's budgets.

A stage's seconds are counts (tokens, passes, networks) times rates. `measure_rates` times this network on this device
for some seconds; `estimate_rates` needs no weights, only what a matrix product and a copy reach here.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from compressor.generated import is_written, rows_at_once, rows_to_read
from compressor.inputs import calibration_blocks
from compressor.job import Job
from compressor.schedule import STAGES
from compressor.sizing import JOINT, JOINT_EMBEDDINGS, parameter_limits, picks_bits, picks_types
from compressor.stages.joint_pick import MEASURED, bit_genes
from compressor.stages.llama_types import SAMPLES, llama_genes
from compressor.stages.quantized_base import base_layouts, base_schemes
from compressor.stages.quantizing import is_tuned
from compressor.stages.subnet_scores import FINALISTS, FIRST_BLOCKS
from compressor.stages.warm_start import blocks_to_read, expected_passes
from evals.speed.measured import runs_within
from evals.speed.table import SpeedTable
from export.layouts.table import GGUF_MIXED
from export.models import Model
from export.quantization.autoround_child import BATCH
from export.quantization.cost import step_seconds
from export.quantization.schemes import SCHEMES
from search.genes import AS_STORED, Gene
from search.scores import Split
from supernet.common.progress import IMPORTED
from supernet.device import activation_bytes, free_bytes, logits_at_once
from supernet.routed import routed, routed_parameters
from supernet.training import muon
from supernet.training.accelerator import processes
from supernet.training.adapters import adapter_parameters
from supernet.training.data import HELD_OUT_BLOCKS, Batch
from supernet.training.loop import points_of
from supernet.training.losses import Loss
from supernet.training.sources import is_generated
from supernet.training.traces import trace

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

EFFICIENCY = 0.5
"""Share of a plain matrix product's rate that a whole training or scoring step is taken to reach."""
GPU_RATE, GPU_BANDWIDTH = 400e12, 2e12
"""Bfloat16 operations and bytes per second that a current data-centre GPU keeps up; for recipes that ask for a GPU
elsewhere."""
DISK_RATE = 500e6
"""Bytes per second that are taken to be read from, or written to, a disk."""
HEALED = 0.7
"""Size of the sub-network that is healed where no target says it, beside the base that teaches it."""
SCORED_TOKENS = 120
"""Tokens that scoring one document is taken to need, all its choices together, where the tasks are not known."""
STEP_BYTES = 28
"""Bytes that a step of AdamW reads and writes for each weight: four numbers read, three of them written. Muon's
products of matrices come on top."""
PROCESS, TASKS = 12.0, 18.0
"""Seconds that a fresh process needs at most to import torch and transformers, and then to build lm-eval's tasks and to
render their documents."""
ROUNDING_START, ROUNDING_LOAD = 3.0, 1e-7
"""Seconds that AutoRound needs for each scheme beside its steps, and those for each parameter: some 17 for 135 M on an
H200."""
GPU_TIMED, GPU_SPOKEN = 0.75, 6.0
"""Seconds on a GPU to capture and time a network of the speed table, and to time a package beside the base: passes are
replayed as graphs there (23 seconds for 32 networks of 135 M parameters on an H200)."""
COUNTING = 30.0
"""Seconds to count the tokens of a text, where the vocabulary is cut, and to prove the cut."""
SOLVED = {"cpu": 4e-10, "cuda": 2e-12}
"""Seconds that removing the neurons of a layer one behind the other takes for each cube of its width: measured on two
cores; on a GPU a guess from its rate in double precision."""
JUDGED = {"cpu": 3e-10, "cuda": 1e-12}
"""The same for choosing the ridges of a layer's projections."""
GATHERED, IN_SEQUENCE = 2.0, 4.0
"""What it costs to gather the moments of text, and to repair in sequence on it, in passes over the text."""
MEASURED_MORE, PROFILED = 1.0, 0.2
"""Seconds of measuring a package beside its scores, its speed and loading it once more; and what profiling its memory
takes, over a turn of timing it and the base."""
PROBE_SECONDS = 1.0
"""A rate is measured on growing batches until one takes so long."""


class Rates(Model):
    """Seconds that the base takes on this device, in what it is computed in."""

    load: float
    """To load it."""
    read: float
    """To score a token: a forward pass over many."""
    teach: float
    """To read a token in training, without gradients: what a teacher does."""
    train: float
    """A token forward and backward."""
    step: float
    """An optimizer's step over all weights."""
    decode: float
    """One more token after a prompt, with a cache."""
    rounding: float
    """A step of AutoRound's over one block."""
    write: float = 1.0
    """To write text, over what a pass for each token of many rows would take; known when some was written."""
    start: float = PROCESS + TASKS
    """Until a fresh process can score: no more than this one needed until here."""

    @property
    def process(self) -> float:
        """Until a fresh process can load networks."""
        return min(PROCESS, self.start)

    def times(self, **factors: float) -> Rates:
        """The same rates, some of them multiplied."""
        return self.model_copy(update={name: getattr(self, name) * factor for name, factor in factors.items()})


@dataclass(frozen=True)
class StageCost:
    """What one stage is expected to cost."""

    name: str
    budget: str
    """Its budget in words; nothing where it has none."""
    seconds: float
    memory: float = 0.0
    """Bytes of memory (a GPU's, where networks are computed there)."""
    disk: float = 0.0
    """Bytes that it leaves on disk."""


def stage_costs(job: Job, rates: Rates) -> list[StageCost]:
    """Every stage of the whole job under the recipe's budgets, in order; those without work left out."""
    counts = _Counts(job)
    costs = [COSTS[name](counts, rates) for name in STAGES]
    memory = expected_memory(job)
    return [
        StageCost(cost.name, cost.budget, cost.seconds, memory[cost.name], cost.disk) for cost in costs if cost.seconds
    ]


class _Counts:
    """What the recipe asks for, in numbers."""

    def __init__(self, job: Job) -> None:
        recipe, structure = job.recipe, job.structure
        self.job, self.recipe = job, recipe
        self.base = structure.parameters(structure.base)
        self.layers = len(structure.base.layers)
        self.length = job.length
        self.train_tokens = recipe.finetuning.tokens or 0
        self.heal_tokens = recipe.healing.tokens or 0
        self.repaired_tokens = recipe.repair.tokens if job.repairs else 0
        self.evaluations = recipe.searching.evaluations or 0
        limits = [limit for _, limit in parameter_limits(job)]
        self.limits = len(limits)
        both = 2 if "uniform" in recipe.formats and set(recipe.formats) - {"uniform"} else 1
        self.picks = both * len(limits)
        sizes = [limit / self.base for limit in limits if limit is not None] or [HEALED]
        self.share = sum(sizes) / len(sizes)
        """Mean size of the picks, as a share of the base."""
        smallest = structure.parameters(job.declared_space.smallest()) / self.base
        self.searched = (max(sizes) + max(min(sizes) * 0.85, smallest)) / 2
        """Mean size of the sub-networks that the search measures."""
        self.judging = self.cubes(JUDGED, each_expert=True) if self.repaired_tokens else 0.0
        """Seconds that choosing the ridges of a repair takes."""
        self.schemes = list(recipe.quantizing.schemes)
        if picks_bits(job) and not picks_types(job) and "int4" not in self.schemes:
            self.schemes.append("int4")  # which one is picked with the size is not known yet
        copies = set(recipe.formats) - {"uneven", "uniform", "elastic"}
        self.elastic = int("elastic" in recipe.formats)
        """One for all picks, as large as the base; beside its own scores three sizes are scored."""
        self.forms = 1 + len(self.schemes) + job.declared_space.bits  # of each pick; bits that are searched make one
        self.packages = self.picks * self.forms + len(limits) * len(copies) + self.elastic
        self.bases = len(base_schemes(job, [])) + len(base_layouts(job))
        """Packages of the base itself in few bits."""
        self.scored_packages = self.packages - len(limits) * len(copies & {"onnx", "openvino"}) + 3 * self.elastic

    def cubes(self, seconds: dict[str, float], each_expert: bool = False) -> float:
        """Seconds of what grows with the cube of the layers' widths, or of each of their experts'."""
        layers = self.job.structure.base.layers
        cubes = sum(layer.intermediate_size**3 * max(1, layer.num_experts * each_expert) for layer in layers)
        return seconds["cpu" if self.job.device.type == "cpu" else "cuda"] * cubes

    def steps(self, tokens: int) -> int:
        return math.ceil(tokens / ((self.recipe.finetuning.batch_size or 1) * self.length))

    def tokens_of(self, split: Split) -> tuple[float, float]:
        """Tokens that scoring a network on the documents of a split reads, and those that it writes."""
        recipe, job = self.recipe, self.job
        if not recipe.tasks or not job.weights:
            documents = (recipe.searching.limit if split == "search" else 0) or 1000
            return documents * SCORED_TOKENS * max(1, len(recipe.tasks)), 0.0
        limit = recipe.searching.limit if split == "search" else None
        return job.tasks.tokens(split, limit)


def _preparing(counts: _Counts, rates: Rates) -> StageCost:
    if counts.recipe.vocabulary.size is None:
        return StageCost("preparing", "", rates.process + 2 * rates.load)
    disk = float(counts.base * counts.job.stored_dtype.itemsize)  # of a base with fewer tokens
    seconds = rates.process + COUNTING + 4 * rates.load + 2 * disk / DISK_RATE
    return StageCost("preparing", "a smaller vocabulary", seconds, disk=disk)


def _writing(counts: _Counts, rates: Rates) -> StageCost:
    """The training text, where the base writes it: a pass for each token of many rows at once."""
    if not is_generated(counts.recipe.data or ""):
        return StageCost("writing text", "", 0.0)
    return _written("writing text", counts, rates, _rows_written(counts, counts.train_tokens))


def _writing_more(counts: _Counts, rates: Rates) -> StageCost:
    """What healing reads beyond what was written before."""
    job, stage = counts.job, "writing more text"
    if not is_generated(counts.recipe.data or ""):
        return StageCost(stage, "", 0.0)
    if stage not in job.schedule.times and job.run.data.is_dir() and is_written(job, counts.heal_tokens):
        return StageCost(stage, "", 0.0)  # in a run of an earlier version
    first = _rows_written(counts, counts.train_tokens)
    return _written(stage, counts, rates, max(first, _rows_written(counts, counts.heal_tokens)) - first)


def _rows_written(counts: _Counts, tokens: int) -> int:
    """Rows of whole portions, as they are written."""
    at_once = rows_at_once(counts.job)
    return -(-rows_to_read(counts.job, tokens) // at_once) * at_once


def _written(stage: str, counts: _Counts, rates: Rates, rows: int) -> StageCost:
    if not rows:
        return StageCost(stage, "", 0.0)
    tokens = rows * counts.length
    seconds = rates.write * (rates.load + tokens * (rates.teach + rates.decode / rows_at_once(counts.job)))
    return StageCost(stage, f"{tokens:,} tokens", seconds, disk=10.0 * tokens)


def _ordering(counts: _Counts, rates: Rates) -> StageCost:
    """Once over the calibration text, for the units' importance and the layers' together; some criteria go back too."""
    tokens = calibration_blocks(counts.job) * counts.length
    dearer = {"taylor": rates.train, "learned": rates.train, "surgeon": 2 * rates.teach}
    each = dearer.get(counts.job.ordering, rates.teach)
    solving = 0.0
    if counts.job.ordering == "surgeon":
        solving = counts.cubes(SOLVED) + counts.cubes(JUDGED)
    stored = 0.0 if counts.train_tokens else float(counts.base * counts.job.stored_dtype.itemsize)
    return StageCost(
        "ordering", f"{tokens:,} tokens", 2 * rates.load + tokens * each + solving + stored / DISK_RATE, disk=stored
    )


def _finetuning(counts: _Counts, rates: Rates) -> StageCost:
    """The members of a step, the teacher, and the held-out losses on the way: of the largest, the middle, the smallest
    and those of the sizes that were asked for."""
    finetuning, tokens = counts.recipe.finetuning, counts.train_tokens
    disk = float(finetuning.bands * counts.base * counts.job.stored_dtype.itemsize)
    if not tokens:  # what is stored then is the ordered base
        return StageCost("fine-tuning", "no tokens", 0.0)
    others = {"sandwich": 1 + finetuning.random_members, "joint": finetuning.random_members}
    smaller = others.get(finetuning.sampler, 0) * counts.searched
    train = rates.train - (rates.teach if finetuning.parameters == "lora" else 0.0)  # frozen weights have no gradients
    each = train * (1 + smaller) + rates.teach * finetuning.strong_teacher
    steps, members = counts.steps(tokens), 3 + counts.limits
    watched = len(points_of(steps)) * members * HELD_OUT_BLOCKS * counts.length * rates.teach * counts.searched
    moved = 1.0  # share of the weights that a step moves
    if finetuning.parameters == "lora":
        moved = adapter_parameters(counts.job.structure, finetuning.lora_rank) / counts.base
    seconds = tokens * each + steps * moved * rates.step + watched + 3 * disk / DISK_RATE
    return StageCost("fine-tuning", f"{tokens:,} tokens", seconds, disk=disk)


def _timing(counts: _Counts, rates: Rates) -> StageCost:
    if counts.recipe.speed_table is not None:
        return StageCost("timing the layers", "", 0.0)
    networks = SpeedTable.steps(counts.job.structure, counts.job.device)
    read, decoded = SpeedTable.work()
    each = (read * rates.read + decoded * rates.decode) * (1 + counts.searched) + rates.load / 2
    if counts.job.device.type == "cuda":
        each = GPU_TIMED
    return StageCost("timing the layers", f"{networks} networks", networks * each)


def _proposals(counts: _Counts, rates: Rates) -> StageCost:
    passes, blocks = expected_passes(counts.job)
    return StageCost("proposals", f"{passes:.0f} passes", passes * blocks * counts.length * rates.teach)


def _search(counts: _Counts, rates: Rates) -> StageCost:
    read, written = counts.tokens_of("search")
    held_out = {"held_out_loss", "kl_to_base"} & set(counts.recipe.searching.objectives)
    if held_out:
        read += HELD_OUT_BLOCKS * counts.length
    each = read * rates.read + written * rates.decode
    networks = 1 + counts.evaluations * counts.searched
    limit = counts.recipe.searching.limit
    budget = f"{counts.evaluations} sub-networks, {'all' if limit is None else limit} documents"
    moments = GATHERED * counts.repaired_tokens * rates.teach + counts.judging
    return StageCost("search", budget, 2 * rates.load + moments + networks * each, disk=1e4 * counts.evaluations)


def _picking(counts: _Counts, rates: Rates) -> StageCost:
    """The held-out loss of those that tasks do not tell from the best, taken to be half of all: on a few blocks, and of
    the finalists on all."""
    blocks = FIRST_BLOCKS * counts.evaluations / 2 + 2 * FINALISTS * HELD_OUT_BLOCKS
    seconds = blocks * counts.length * rates.teach * counts.searched
    of_bits, job = 0.0, counts.job
    if picks_types(job):
        file = SAMPLES * counts.length * rates.teach + PACKED_ONCE * counts.base
        read = HELD_OUT_BLOCKS * counts.length * rates.teach
        seconds += MEASURED * (file + read) * counts.searched
        of_bits = _measuring_types(counts, rates)
    elif picks_bits(job):
        # Some on a few blocks to know what bits cost, the best on all; and each half-block's bits in the whole network,
        # from the first layer that has fewer on.
        blocks = len(JOINT) * len(JOINT_EMBEDDINGS) * FIRST_BLOCKS + 2 * MEASURED * HELD_OUT_BLOCKS
        seconds += blocks * counts.length * rates.teach * counts.searched
        of_bits = _measuring_bits(counts, rates, bit_genes(job))
    return StageCost("picking", "", rates.load + of_bits + counts.limits * seconds)


PACKED, PACKED_ONCE = 1e-6, 2e-7
"""Seconds to pack a weight in every type of llama.cpp's whose scales are searched, and in one of them."""


def _measuring_bits(counts: _Counts, rates: Rates, genes: Iterable[Gene]) -> float:
    """Each value of each gene in the whole network, from the first layer that has fewer bits on."""
    passes = sum(bits < AS_STORED for gene in genes for bits in gene.values) / 2
    return passes * blocks_to_read(counts.job) * counts.length * rates.teach


def _measuring_types(counts: _Counts, rates: Rates) -> float:
    """The same in types of llama.cpp."""
    return rates.load + PACKED * counts.base + _measuring_bits(counts, rates, llama_genes(counts.job))


def _healing(counts: _Counts, rates: Rates) -> StageCost:
    """Of each pick, with the slicing before and the packaging after it."""
    tokens, share = counts.heal_tokens, counts.share
    bytes_ = counts.base * share * counts.job.stored_dtype.itemsize
    each = 4 * rates.load + 4 * bytes_ / DISK_RATE
    if counts.repaired_tokens:
        each += IN_SEQUENCE * counts.repaired_tokens * rates.teach + counts.cubes(JUDGED, each_expert=True)
    if tokens:
        steps = counts.steps(tokens)
        each += tokens * (share * rates.train + rates.teach) + steps * share * rates.step
        each += len(points_of(steps)) * HELD_OUT_BLOCKS * counts.length * rates.teach * share
    copies = counts.packages - counts.elastic - counts.picks * counts.forms
    disk = bytes_ * (counts.picks * (3 if tokens else 2) + copies)
    disk += counts.elastic * counts.base * counts.job.stored_dtype.itemsize
    return StageCost("healing", f"{tokens:,} tokens" if tokens else "no tokens", counts.picks * each, disk=disk)


def _quantizing(counts: _Counts, rates: Rates) -> StageCost:
    """AutoRound reads the samples twice, then tunes each block by its own steps (`export.quantization.cost`)."""
    quantizing, seconds = counts.recipe.quantizing, 0.0
    if GGUF_MIXED in counts.recipe.formats and not picks_types(counts.job):
        seconds += _measuring_types(counts, rates)
    if not counts.bases:
        return StageCost("quantizing", "", seconds)
    if not counts.schemes:  # only the base is rounded, without data
        seconds += 2 * rates.load + counts.bases * (rates.load + 2 * counts.base / DISK_RATE)
        return StageCost("quantizing", "of the base", seconds, disk=counts.bases * counts.base)
    iterations = quantizing.iterations or 0
    samples = 2 * (quantizing.samples or 0) * counts.length * rates.teach
    tuned = iterations * counts.layers * rates.rounding
    start = ROUNDING_START + ROUNDING_LOAD * counts.base + 2 * rates.load
    # Schemes of 8 bits are rounded without data, tensor by tensor.
    several = sum(is_tuned(name) for name in counts.schemes)
    several_bases = sum(is_tuned(name) for name in base_schemes(counts.job, []))
    plain = 2 * rates.load + 2 * counts.base / DISK_RATE
    seconds += counts.picks * (rates.process * bool(several) + several * (start + counts.share * (samples + tuned)))
    seconds += rates.process + several_bases * (start + samples + tuned)
    seconds += plain * (counts.picks * (len(counts.schemes) - several) + counts.bases - several_bases)
    bits = sum(SCHEMES[name].bits for name in counts.schemes)
    disk = counts.picks * counts.base * counts.share * bits / 8 + counts.bases * counts.base
    return StageCost("quantizing", f"{iterations} rounding steps", seconds, disk=disk)


def _measuring(counts: _Counts, rates: Rates) -> StageCost:
    """Scores on the report documents, held-out loss, speed in turn with the base, three samples of text."""
    read, written = counts.tokens_of("report")
    read += HELD_OUT_BLOCKS * counts.length
    each = read * rates.read + (written + 3 * 48) * rates.decode + rates.load
    turn = (128 * rates.read + 128 * rates.decode) * (1 + counts.share)
    spoken = (1 + runs_within(turn, 7)) * turn
    if counts.job.device.type == "cuda":
        spoken = GPU_SPOKEN
    networks = 1 + counts.scored_packages * counts.share + counts.bases
    packages = counts.packages + counts.bases
    return StageCost(
        "measuring",
        _packages(packages),
        rates.load + networks * each + packages * (spoken + MEASURED_MORE + rates.load + PROFILED * turn),
    )


def _packages(count: int) -> str:
    return f"{count} package{'s' * (count != 1)}"


def _proving(counts: _Counts, rates: Rates) -> StageCost:
    """In a fresh process on the CPU; where networks are computed there, scores are measured again."""
    packages = counts.packages + counts.bases
    seconds = rates.process + packages * 2 * rates.load
    if counts.job.device.type == "cpu":
        read, written = counts.tokens_of("report")
        networks = counts.packages * counts.share + counts.bases
        seconds += rates.start - rates.process + networks * (read * rates.read + written * rates.decode)
    return StageCost("proving", _packages(packages), seconds)


COSTS: dict[str, Callable[[_Counts, Rates], StageCost]] = {
    "preparing": _preparing,
    "writing text": _writing,
    "ordering": _ordering,
    "fine-tuning": _finetuning,
    "timing the layers": _timing,
    "proposals": _proposals,
    "search": _search,
    "picking": _picking,
    "writing more text": _writing_more,
    "healing": _healing,
    "quantizing": _quantizing,
    "measuring": _measuring,
    "proving": _proving,
}


def expected_memory(job: Job) -> dict[str, float]:
    """Bytes that each stage is expected to hold at once, from counts of weights, gradients, moments and activations."""
    recipe, structure = job.recipe, job.structure
    base = structure.base
    total = structure.parameters(base)
    rows = -(-(recipe.finetuning.batch_size or 1) // (processes() * job.parts_of_batch))
    neurons = max(
        s.intermediate_size * min(s.num_experts, structure.experts_per_token) or s.intermediate_size
        for s in base.layers
    )
    weight_bytes = total * job.compute_dtype.itemsize
    trained = 16 * total - 4 * sum(map(math.prod, _orthogonal_shapes(job)))  # Muon has one moment, AdamW two
    tokens, checkpointing = rows * recipe.finetuning.sequence_length, recipe.finetuning.gradient_checkpointing
    activations = activation_bytes(structure, tokens, checkpointing, logits_at_once(job.device))
    if recipe.finetuning.parameters == "lora":
        training = weight_bytes + 16 * adapter_parameters(structure, recipe.finetuning.lora_rank)
    else:
        training = trained + (weight_bytes if recipe.finetuning.strong_teacher else 0)
    scoring = weight_bytes + 4 * job.batch_tokens * (6 * base.hidden_size + 3 * neurons)
    if recipe.finetuning.parameters == "routed":  # beside the weights, every FFN of the active network and its gradient
        changed = sum(math.prod(structure.shape(tensor, base) or ()) for tensor in routed(structure))
        training += 16 * routed_parameters(structure, recipe.finetuning.lora_rank) + 8 * changed
        scoring += weight_bytes * changed // total
    kept = (recipe.quantizing.samples or 0) * recipe.finetuning.sequence_length * base.hidden_size * 4
    return {
        "preparing": (weight_bytes if recipe.finetuning.parameters == "lora" else 4 * total) + activations,
        "writing text": scoring,
        "writing more text": scoring,
        "ordering": scoring,
        "fine-tuning": training + activations,
        "timing the layers": 2 * weight_bytes,
        "proposals": 2 * scoring,
        "search": scoring * recipe.finetuning.bands,  # each band's super-network stays open
        "picking": scoring * recipe.finetuning.bands,
        "healing": weight_bytes + (HEALED * trained + activations if recipe.healing.tokens else 0),
        "quantizing": weight_bytes + 3 * kept,
        "measuring": 2 * scoring,
        "proving": scoring,
    }


def without_room(job: Job) -> dict[str, tuple[float, int]]:
    """Trainings that are still to come and that a GPU has no memory for: the bytes that each is expected to hold, and
    those that are free."""
    if job.device.type != "cuda" or job.recipe.finetuning.shard:
        return {}
    free, expected = free_bytes(job.device), expected_memory(job)
    trained = job.run.manifest(job.run.supernet) is not None and job.redo != "finetune"
    tokens = {"fine-tuning": 0 if trained else job.recipe.finetuning.tokens, "healing": job.recipe.healing.tokens}
    return {stage: (expected[stage], free) for stage, number in tokens.items() if number and expected[stage] > free}


def estimate_rates(job: Job, flops: float | None = None, bandwidth: float | None = None) -> Rates:
    """Rates from counts: operations over what a matrix product reaches here, halved for everything that is not one, and
    bytes over what a copy reaches; or over `flops` and `bandwidth` of another device."""
    structure = job.structure
    flops = (flops or matrix_rate(job.device, job.compute_dtype)) * EFFICIENCY
    bandwidth = bandwidth or copy_rate(job.device)
    total = structure.parameters(structure.base)
    read = 2 * structure.macs(structure.base, job.recipe.finetuning.sequence_length // 2) / flops
    weights = total * job.compute_dtype.itemsize
    return Rates(
        load=1.0 + weights / DISK_RATE,
        read=read,
        teach=read,
        train=3 * read,
        step=STEP_BYTES * total / bandwidth + EFFICIENCY * sum(map(muon.operations, _orthogonal_shapes(job))) / flops,
        decode=max(weights / bandwidth, len(structure.base.layers) * 2e-4),  # what launching a layer takes
        rounding=BATCH * job.length * 3 * read / len(structure.base.layers),
    )


def _orthogonal_shapes(job: Job) -> list[tuple[int, ...]]:
    """Shapes of the base's matrices where Muon trains them; none where another optimizer does."""
    if job.optimizer != "muon":
        return []
    structure = job.structure
    shapes = [structure.shape(tensor, structure.base) for tensor in structure.tensors if tensor.layer is not None]
    return [shape for shape in shapes if shape is not None and muon.is_matrix(shape)]


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Floating-point operations per second of a square matrix product, the best of a few."""
    size = 8192 if device.type == "cuda" else size
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / min(_seconds(device, lambda: a @ a) for _ in range(4))


def copy_rate(device: torch.device, size: int = 2**25) -> float:
    """Bytes per second that a large tensor is read and written with, the best of a few."""
    a, b = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / min(_seconds(device, lambda: b.copy_(a)) for _ in range(4))


def measure_rates(job: Job) -> Rates:
    """Rates of this network on this device, each measured until a batch takes a second: half a minute for a network of
    135 M parameters on two cores. What is held at once is the network in float32, or in what is computed in where
    weights are not trained, and the activations of a batch; no gradients and moments of weights."""
    start = min(PROCESS + TASKS, time.monotonic() - IMPORTED)
    began = time.perf_counter()
    trains = job.recipe.finetuning.tokens != 0 or job.recipe.healing.tokens != 0
    in_full = trains and job.recipe.finetuning.parameters != "lora"
    model = job.load_base(torch.float32 if in_full else job.compute_dtype)
    load = time.perf_counter() - began
    job.threads(scoring=False)
    teach, train = training_rates(model, job.accelerator, job.length, job.recipe.finetuning.batch_size or 1)
    job.threads(scoring=True)
    model = model.to(job.compute_dtype)
    read, decode = _scoring_rate(job, model) or teach, decoding_rate(model, job.length)
    job.threads(scoring=False)
    rounding = step_seconds(model, job.length) if tunes(job) else 0.0
    step = STEP_BYTES * job.structure.parameters(job.structure.base) / copy_rate(job.device)
    for shape, number in Counter(_orthogonal_shapes(job)).items():
        together = min(number, muon.in_a_stack(math.prod(shape), job.device))
        stack = torch.randn(*([together] if together > 1 else []), *shape, device=job.device)
        step += number / together * min(_seconds(job.device, partial(muon.orthogonal, stack)) for _ in range(2))
    return Rates(
        load=load, read=read, teach=teach, train=train, step=step, decode=decode, rounding=rounding, start=start
    )


def tunes(job: Job) -> bool:
    """Whether weights may be rounded by AutoRound."""
    return bool(job.recipe.quantizing.schemes) or (picks_bits(job) and not picks_types(job))


def training_rates(model: PreTrainedModel, accelerator: Accelerator, length: int, most: int) -> tuple[float, float]:
    """Seconds for each token of a teacher's pass, and of a student's forward and backward, as healing does them, on up
    to `most` rows of `length` tokens. The network's matrices are frozen by this.

    Gradients of matrices are counted as one more forward pass (they cost 0.5 to 1 of one on prose-7m, 1.2 on SmolLM2):
    to hold them, and moments, would take four times the memory of a network of which perhaps nothing will be trained.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim <= 1)
    loss, device, vocabulary = Loss({"kl": 1.0}), model.device, model.config.get_text_config().vocab_size

    def teach(batch: Batch) -> None:
        with torch.no_grad(), accelerator.autocast():
            trace(model, batch)

    def train(batch: Batch) -> None:
        with accelerator.autocast():
            states = trace(model, batch)
            loss(states, states.detached()).backward()
        model.zero_grad(set_to_none=True)

    rows = [_per_row(device, work, most, length, vocabulary) / length for work in (teach, train)]
    return rows[0], rows[0] + rows[1]


def decoding_rate(model: PreTrainedModel, length: int) -> float:
    """Seconds of one more token behind a prompt, with a cache; both together are at most `length` tokens."""
    ids = torch.ones((1, max(1, min(32, length // 2))), dtype=torch.long, device=model.device)
    new = max(2, min(8, length // 2))
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}

    def generate(tokens: int) -> float:
        return _seconds(
            ids.device, lambda: model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, **options)
        )

    with torch.no_grad():
        generate(1)  # the first time is slow
        return max(generate(new) - generate(1), 1e-6) / (new - 1)


def _scoring_rate(job: Job, model: torch.nn.Module) -> float | None:
    """Seconds for each token of the tasks' requests; None where there are no tasks, or none that are read."""
    if not job.recipe.tasks:
        return None
    lm = job.scorer(model).lm
    spans = sorted(set(job.tasks.requests("search", job.recipe.searching.limit).spans), key=lambda span: span.tokens)
    many = 16
    while spans:
        plan = lm.plan(spans[:many])
        lm.answer(plan)  # new shapes are slow once
        seconds = _seconds(job.device, lambda plan=plan: lm.answer(plan))  # type: ignore[misc]
        if seconds > PROBE_SECONDS or many >= len(spans):
            return seconds / plan.tokens
        many *= 2
    return None


def _per_row(device: torch.device, work: Callable[[Batch], object], most: int, length: int, vocabulary: int) -> float:
    """Seconds for each row of random tokens, in batches that grow until one takes a second, to `most` rows."""
    work(_random_rows(1, length, vocabulary).to(device))  # the first pass allocates and compiles
    rows = 1
    while True:
        batch = _random_rows(rows, length, vocabulary).to(device)
        seconds = _seconds(device, lambda batch=batch: work(batch))  # type: ignore[misc]
        if seconds < PROBE_SECONDS and rows >= most:  # other work on the machine only ever adds time
            seconds = min(seconds, *(_seconds(device, lambda batch=batch: work(batch)) for _ in range(2)))  # type: ignore[misc]
        if seconds > PROBE_SECONDS or rows >= most:
            return seconds / rows
        rows = min(most, 2 * rows)


def _random_rows(rows: int, length: int, vocabulary: int) -> Batch:
    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    return Batch(ids, ids, torch.arange(length).repeat(rows, 1))


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of one call, what it started on a GPU included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
