"""What every stage of a run costs here: seconds, memory and disk.

A stage's seconds are counts (tokens, passes, networks) of the recipe's budgets, times `compressor.rates`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from compressor.generated import is_written, rows_at_once, rows_to_read
from compressor.inputs import calibration_blocks, few_blocks
from compressor.job import Job
from compressor.memory_needs import HEALED, expected_memory
from compressor.rates import DISK_RATE, Rates
from compressor.schedule import STAGES
from compressor.sizing import JOINT, JOINT_EMBEDDINGS, parameter_limits, picks_bits, picks_types
from compressor.stages.joint_pick import CALIBRATED, MEASURED, bit_genes
from compressor.stages.llama_types import SAMPLES, llama_genes
from compressor.stages.quantized_base import base_layouts, base_schemes
from compressor.stages.quantizing import gains_by_text
from compressor.stages.subnet_scores import FINALISTS, FIRST_BLOCKS
from compressor.stages.warm_start import expected_passes
from evals.speed.measured import runs_within
from evals.speed.table import SpeedTable
from export.layouts.table import GGUF_MIXED
from export.quantization.schemes import SCHEMES
from search.genes import AS_STORED, Gene
from search.scores import Split
from supernet.training.adapters import adapter_parameters
from supernet.training.data import HELD_OUT_BLOCKS
from supernet.training.sources import is_generated
from supernet.training.watch import points_of

SCORED_TOKENS = 120
"""Tokens that scoring one document is taken to need, all its choices together, where the tasks are not known."""
ROUNDING_START, ROUNDING_LOAD = 3.0, 1e-7
"""Seconds that AutoRound needs for each scheme beside its steps, and those for each parameter: some 17 for 135 M on an
H200."""
GPTQ_LOAD = {"cpu": 2.5e-7, "cuda": 2.5e-8}
"""Seconds that GPTQ needs for each parameter beside its two passes over the samples: some 35 for 135 M on a core. On a
GPU not measured."""
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
PACKED, PACKED_ONCE = 1e-6, 2e-7
"""Seconds to pack a weight in every type of llama.cpp's whose scales are searched, and in one of them."""


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
        self.repaired_tokens = (recipe.repair.tokens or 0) if job.repairs else 0
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

    @property
    def gptq(self) -> float:
        """Seconds of rounding the base by GPTQ, beside its passes over text."""
        return GPTQ_LOAD["cpu" if self.job.device.type == "cpu" else "cuda"] * self.base

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
        # Some on a few blocks to know what bits cost, and the best on all, nearly each rounded by GPTQ; and each
        # half-block's bits in the whole network, from the first layer that has fewer on.
        schemes, best = len(JOINT) * len(JOINT_EMBEDDINGS), 2 * MEASURED
        blocks = schemes * FIRST_BLOCKS + best * HELD_OUT_BLOCKS + 2 * (schemes + best) * CALIBRATED
        seconds += (blocks * counts.length * rates.teach + (schemes + best) * counts.gptq) * counts.searched
        of_bits = _measuring_bits(counts, rates, bit_genes(job))
    return StageCost("picking", "", rates.load + of_bits + counts.limits * seconds)


def _measuring_bits(counts: _Counts, rates: Rates, genes: Iterable[Gene]) -> float:
    """Each value of each gene in the whole network, from the first layer that has fewer bits on."""
    passes = sum(bits < AS_STORED for gene in genes for bits in gene.values) / 2
    return passes * few_blocks(counts.job) * counts.length * rates.teach


def _measuring_types(counts: _Counts, rates: Rates) -> float:
    """The same in types of llama.cpp."""
    return rates.load + PACKED * counts.base + _measuring_bits(counts, rates, llama_genes(counts.job))


def _healing(counts: _Counts, rates: Rates) -> StageCost:
    """The cost of each pick, with the slicing before it."""
    tokens, share = counts.heal_tokens, counts.share
    bytes_ = counts.base * share * counts.job.stored_dtype.itemsize
    each = 3 * rates.load + 2 * bytes_ / DISK_RATE
    if counts.repaired_tokens:
        each += IN_SEQUENCE * counts.repaired_tokens * rates.teach + counts.cubes(JUDGED, each_expert=True)
    if tokens:
        steps = counts.steps(tokens)
        each += tokens * (share * rates.train + rates.teach) + steps * share * rates.step
        each += len(points_of(steps)) * HELD_OUT_BLOCKS * counts.length * rates.teach * share
    disk = bytes_ * counts.picks * (2 if tokens else 1)
    return StageCost("healing", f"{tokens:,} tokens" if tokens else "no tokens", counts.picks * each, disk=disk)


def _quantizing(counts: _Counts, rates: Rates) -> StageCost:
    """The unquantized packages are written too. AutoRound and GPTQ read the samples twice; AutoRound then tunes each
    block by its own steps (`export.quantization.cost`)."""
    quantizing, weight = counts.recipe.quantizing, counts.job.stored_dtype.itemsize
    copies = counts.packages - counts.elastic - counts.picks * counts.forms
    disk = counts.base * weight * (counts.share * (counts.picks + copies) + counts.elastic)
    seconds = (counts.picks + copies + counts.elastic) * rates.load + 2 * disk / DISK_RATE
    if GGUF_MIXED in counts.recipe.formats and not picks_types(counts.job):
        seconds += _measuring_types(counts, rates)
    if not counts.bases:
        return StageCost("quantizing", "packages only", seconds, disk=disk)
    samples = 2 * (quantizing.samples or 0) * counts.length * rates.teach
    iterations = (quantizing.iterations or 0) if counts.schemes else 0  # where only the base is rounded, none is tuned
    if iterations:
        process, start = rates.process, ROUNDING_START + ROUNDING_LOAD * counts.base + 2 * rates.load
    else:
        process, start = 0.0, counts.gptq + 2 * rates.load
    tuned = iterations * counts.layers * rates.rounding
    # Schemes of 8 bits are rounded without data, tensor by tensor.
    several = sum(gains_by_text(name) for name in counts.schemes)
    several_bases = sum(gains_by_text(name) for name in base_schemes(counts.job, []))
    plain = 2 * rates.load + 2 * counts.base / DISK_RATE
    seconds += counts.picks * (process * bool(several) + several * (start + counts.share * (samples + tuned)))
    seconds += process + several_bases * (start + samples + tuned)
    seconds += plain * (counts.picks * (len(counts.schemes) - several) + counts.bases - several_bases)
    bits = sum(SCHEMES[name].bits for name in counts.schemes)
    disk += counts.picks * counts.base * counts.share * bits / 8 + counts.bases * counts.base
    rounding = f"{iterations} rounding steps" if iterations else "by GPTQ" if counts.schemes else "of the base"
    return StageCost("quantizing", rounding, seconds, disk=disk)


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
