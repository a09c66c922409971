"""Size and bits picked together: the sub-network and the bits of the lowest loss that fit.

Candidates are the best sub-networks of each size that were measured, and the whole network. Each is taken with every
scheme of `JOINT` and embedding of `JOINT_EMBEDDINGS`, and once `mixed`: with bits of its own for every half-block and
the embedding, those that fit and lose least by what each alone, rounded to nearest, costs the whole network
(`search.bit_assignment`). What a scheme costs is measured on the largest network that fits with it, and added to the
loss of every other; what mixed bits cost is the sum over them, times what the largest network that fits shows of it.
That is good enough to rank (`docs/results.md`): the best `MEASURED` of both kinds are measured as rounded, and the best
of these is picked. Losses are on text that the fine-tuning held out, before healing, of weights that are rounded as
those of packages are that nobody tunes: below 8 bits by GPTQ, on less text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from compressor.inputs import training_blocks
from compressor.job import Job
from compressor.sizing import (
    JOINT,
    can_hold,
    joint_embeddings,
    package_bytes,
    smallest_storage,
    storage_of,
)
from compressor.stages.bit_losses import in_groups_of, losses_by_bits
from compressor.stages.picks import BitsRecord
from compressor.stages.quantizing import mixed_plan
from compressor.stages.repairing import search_variants, searched_weights
from compressor.stages.score_keys import held_out_keys
from compressor.stages.subnet_scores import FIRST_BLOCKS, held_out_losses
from export.quantization.gptq import round_in_sequence
from export.quantization.plan import linear_layers_in, plan_scheme
from export.quantization.round_to_nearest import Rounded, round_network
from export.quantization.schemes import EmbeddingBits, FormName, OuterBits, SchemePlan
from export.shards import header_bytes
from search.bit_assignment import Losses, best_within
from search.genes import AS_STORED, BITS, Gene
from search.objectives import Evaluation
from search.pareto import Target, ranks
from search.scores import ScoreKey
from search.store import EvaluationStore
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, StorageFormat, Structure
from supernet.common.formatting import size
from supernet.common.progress import bar
from supernet.slicing import extract
from supernet.training.data import HELD_OUT_BLOCKS
from supernet.training.losses import held_out_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CANDIDATES = 24
"""Sub-networks that are compared, at least, where so many were measured."""
MEASURED = 6
"""Sub-networks with bits that are measured as rounded: so many under one scheme, and so many with bits of their own."""
CALIBRATED = 16
"""Blocks of text that what is measured is rounded on: GPTQ loses hardly more on few (`docs/results.md`)."""


@dataclass(frozen=True)
class Bits:
    """How a package is stored. `scheme` None: unquantized; `mixed`: as its architecture says; `gguf-mixed`: in types of
    llama.cpp."""

    scheme: FormName | Literal["gguf-mixed"] | None
    embedding: EmbeddingBits | None = None
    mean: float | None = None
    """Of a mixed one, bits of a weight of its linear layers, codes only; of types of llama.cpp, bits of the file for
    each parameter."""

    def __str__(self) -> str:
        if self.scheme is None:
            return "unquantized"
        if self.scheme == "gguf-mixed":
            return f"types of llama.cpp, {self.mean:.1f} bits a parameter"
        mean = "" if self.mean is None else f", {self.mean:.1f} bits in the mean"
        return f"{self.scheme}{mean}, embedding in {self.embedding} bits"


@dataclass(frozen=True)
class Candidate:
    """A sub-network with bits. `bytes` are those of the weight files, headers too."""

    evaluation: Evaluation
    bits: Bits
    storage: StorageFormat | None
    bytes: int
    own_bits: Architecture | None = None
    """Where every half-block has its own bits, the sub-network with these and those of the embedding."""
    harm: float = 0.0
    """Then the sum of what each of these bits alone costs the whole network, nats per token."""

    @property
    def sizes(self) -> Architecture:
        """The sub-network, without bits."""
        return self.evaluation.architecture

    @property
    def architecture(self) -> Architecture:
        """The sub-network, with bits where it is mixed."""
        return self.own_bits or self.sizes

    @property
    def stored(self) -> Bits:
        """How its package is stored: a plain class has an embedding of more bits than were asked for."""
        if self.storage is None or self.storage.by_architecture:
            return self.bits
        return replace(self.bits, embedding=embedding_bits(self.storage.embedding))


@dataclass(frozen=True)
class JointPick:
    """What was picked, and its held-out loss as rounded, nats per token."""

    candidate: Candidate
    loss: float

    def __str__(self) -> str:
        bytes_ = size(self.candidate.bytes)
        return f"{self.candidate.stored}: about {bytes_}, held-out loss {self.loss:.4f} nats per token"

    def to_json(self) -> BitsRecord:
        bits, storage = self.candidate.bits, self.candidate.storage
        record: BitsRecord = {
            "scheme": bits.scheme,
            "embedding": bits.embedding,
            "bytes": self.candidate.bytes,
            "held_out_loss": self.loss,
        }
        if bits.scheme == "mixed" and storage is not None and storage.group_size is not None:
            record["group_size"] = storage.group_size
        return record


def pick_with_bits(job: Job, evaluations: Sequence[Evaluation], target: Target, uniform: bool) -> JointPick:
    """The lowest held-out loss that fits the target's bytes, of these sub-networks and the whole one, with any bits.

    `uniform`: the package must be of the family's plain class. Raises ValueError, naming the smallest, where nothing
    meets the target.
    """
    # 1. Everything that fits.
    assert target.max_bytes is not None
    sizes = sizes_within(job, evaluations, target)
    rows = [row for evaluation in sizes for row in candidates(job, evaluation, uniform)]
    fitting = [row for row in rows if row.bytes <= target.max_bytes]
    if not fitting:
        least = min(rows, key=lambda row: row.bytes)
        raise ValueError(
            f"no measured architecture fits {target.max_bytes:,} bytes; the smallest file has {least.bytes:,} "
            f"({least.stored})"
        )
    # 2. With bits of their own for every half-block.
    costs = losses_by_bits(job, bit_genes(job), in_groups_of(group_of(job, job.structure.base)))
    if uniform:  # the plain class of a tied network holds no quantized embedding
        costs = {gene: cost for gene, cost in costs.items() if gene.kind != "embedding_bits"}
    found = [mixed_candidate(job, evaluation, costs, target.max_bytes) for evaluation in sizes]
    mixed = [row for row in found if row is not None]
    # 3. What each loses by its size, and by its bits.
    architectures = list(dict.fromkeys(row.sizes for row in [*fitting, *mixed]))
    unrounded = dict(zip(architectures, held_out_losses(job, architectures, FIRST_BLOCKS), strict=True))
    measure, cost = RoundedLosses(job), dict[Bits, float]()
    most = max(mixed, key=lambda row: job.structure.parameters(row.sizes), default=None)
    by_size = sorted(fitting, key=lambda row: row.bytes) + [row for row in [most] if row is not None]
    largest = {row.bits: row for row in by_size}  # of each the largest that fits, as that may be picked
    with bar("what bits cost", len(largest)) as progress:
        for bits, row in largest.items():
            cost[bits] = measure(row, FIRST_BLOCKS) - unrounded[row.sizes]
            progress.advance()
    fitting.sort(key=lambda row: (unrounded[row.sizes] + cost[row.bits], row.bytes, row.architecture.key))
    # Of the sum for mixed bits, what is lost: less by GPTQ than to nearest, more where errors add up.
    share = max(0.0, cost[most.bits]) / most.harm if most is not None and most.harm else 1.0
    mixed.sort(key=lambda row: (unrounded[row.sizes] + share * row.harm, row.bytes, row.architecture.key))
    # 4. The best by the sum, as rounded.
    return lowest(fitting[:MEASURED] + mixed[:MEASURED], measure)


def lowest(finalists: Sequence[Candidate], measure: RoundedLosses) -> JointPick:
    """The one of the lowest held-out loss as rounded."""
    with bar("held-out loss with bits", len(finalists)) as progress:
        losses = []
        for row in finalists:
            losses.append(measure(row, HELD_OUT_BLOCKS))
            progress.advance()
    best = min(range(len(finalists)), key=lambda number: (losses[number], finalists[number].bytes))
    return JointPick(finalists[best], losses[best])


def sizes_within(job: Job, evaluations: Sequence[Evaluation], target: Target) -> list[Evaluation]:
    """The best of these sub-networks and the whole one of each size that meets the target but for its bytes. Raises
    ValueError where nothing does."""
    unlimited = replace(target, max_bytes=None)
    base = job.structure.base
    whole = next((row for row in evaluations if row.architecture == base and row.full), None) or whole_network(job)
    others = [row for row in evaluations if row.architecture != base]
    able = [row for row in [whole, *others] if row.full and not unlimited.misses(row)]
    if not able:
        raise ValueError(f"no measured architecture has {unlimited}")
    found = best_of_each_size(able)
    if whole in able and whole not in found:  # hidden by a smaller one of a quality above its own, by chance
        found.append(whole)
    return found


def whole_network(job: Job) -> Evaluation:
    """The whole network where the search did not measure it: nothing was lost to a cut."""
    base = job.structure.base
    values = {
        "quality": 1.0,
        "parameters": job.structure.parameters(base),
        "bytes": job.structure.bytes(base, smallest_storage(job, base)),
        "speedup": 1.0,
    }
    return Evaluation(base, values, generation=0, index=0)


def best_of_each_size(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The front of quality and parameters, and the next ones behind it up to `CANDIDATES`: quality is noisy."""
    costs = np.array([[-row.values["quality"], row.values["parameters"]] for row in evaluations])
    chosen: list[Evaluation] = []
    for front in ranks(costs):
        chosen += [evaluations[number] for number in front]
        if len(chosen) >= CANDIDATES:
            break
    return chosen


def candidates(job: Job, evaluation: Evaluation, uniform: bool) -> list[Candidate]:
    """A sub-network with all bits that its package can hold, each way to store it once."""
    structure, architecture = job.structure, evaluation.architecture
    rows = [Candidate(evaluation, Bits(None), None, package_bytes(structure, architecture, None))]
    for scheme in (scheme for scheme in JOINT if can_hold(job, scheme, architecture)):
        for embedding in joint_embeddings(job):
            storage = storage_of(job, scheme, architecture, embedding, uniform)
            if storage not in [row.storage for row in rows]:
                stored = package_bytes(structure, architecture, storage)
                rows.append(Candidate(evaluation, Bits(scheme, embedding), storage, stored))
    return rows


def bit_genes(job: Job, inner: Sequence[int] = BITS["ffn_bits"]) -> list[Gene]:
    """A gene of bits, `inner` or as stored, for every half-block of the base, and one for its embedding and for a head
    with a weight of its own: of the bits that the recipe says, or else those that are compared and as stored."""
    genes = []
    for index, layer in enumerate(job.structure.base.layers):
        if layer.num_key_value_heads:
            genes.append(Gene(f"attention_bits.{index}", (*inner, AS_STORED)))
        if layer.intermediate_size:
            genes.append(Gene(f"ffn_bits.{index}", (*inner, AS_STORED)))
    outer = tuple(sorted({bits for bits in joint_embeddings(job) if bits < AS_STORED}))
    if outer:
        values = outer if job.recipe.quantizing.embedding is not None else (*outer, AS_STORED)
        genes.append(Gene("embedding_bits", values))
        if not job.structure.tied:
            genes.append(Gene("head_bits", values))
    return genes


def group_of(job: Job, architecture: Architecture) -> int:
    """Input channels that share a scale in a mixed package of a sub-network."""
    return job.recipe.quantizing.group_size or job.structure.group_size(architecture)


def mixed_candidate(job: Job, evaluation: Evaluation, losses: Losses, limit: int) -> Candidate | None:
    """A sub-network with the bits of its own that fit and lose least; None where no bits fit, or none are needed."""
    structure, architecture = job.structure, evaluation.architecture
    storage = StorageFormat(AS_STORED, group_of(job, architecture), by_architecture=True)
    headers = header_bytes(structure, architecture, storage)

    def bytes_of(one: Architecture) -> int:
        return structure.bytes(one, storage) + headers

    found = best_within(architecture, losses, bytes_of, limit)
    if found is None:
        return None
    own, harm = found
    if not own.has_bits:
        return None
    bits = Bits("mixed", embedding_bits(own.embedding_bits or 16), mean_bits(structure, own, storage))
    return Candidate(evaluation, bits, storage, bytes_of(own), own, harm)


def embedding_bits(number: int) -> EmbeddingBits:
    """Bits of an embedding, as the recipe knows them."""
    return next(bits for bits in get_args(EmbeddingBits) if bits == number)


def mean_bits(structure: Structure, architecture: Architecture, storage: StorageFormat) -> float:
    """Bits of a weight of the linear layers inside blocks, codes only."""
    sizes = [
        (prod(shape), storage.bits_of(tensor, architecture))
        for tensor in structure.tensors
        if tensor.role == "linear" and (shape := structure.shape(tensor, architecture)) is not None
    ]
    return sum(weights * bits for weights, bits in sizes) / max(1, sum(weights for weights, _ in sizes))


def form_of(candidate: Candidate) -> str | None:
    """How the weights of a candidate are stored, beside its architecture; None: unquantized."""
    scheme, storage = candidate.bits.scheme, candidate.storage
    if scheme is None or storage is None:
        return None
    by = "" if scheme == "int8" else "-gptq"  # earlier versions measured what is rounded to nearest
    return f"{scheme}-{storage.group_size}-{storage.embedding}-{storage.head}{by}"


def round_as_packaged(job: Job, network: PreTrainedModel, candidate: Candidate) -> None:
    """Give a network the values that a package of the candidate holds."""
    scheme, storage = candidate.bits.scheme, candidate.storage
    assert scheme is not None and scheme != "gguf-mixed" and storage is not None
    linear = linear_layers_in(network)
    if scheme == "mixed":
        assert storage.group_size is not None
        plan = mixed_plan(job, candidate.architecture, storage.group_size)
    else:
        plan = plan_scheme(linear.widths, scheme, job.recipe.quantizing.group_size if storage.bits < 8 else None)
        plan = replace(plan, outer=OuterBits(storage.embedding, storage.head))
    round_by_plan(job, network, plan)


def round_by_plan(job: Job, network: PreTrainedModel, plan: SchemePlan) -> None:
    """Give a network the values that a package of the plan holds: below 8 bits rounded by GPTQ, on the first
    `CALIBRATED` blocks of the training text, else to nearest. Raises `RequestError` where its states are not finite."""
    linear, done = linear_layers_in(network), dict[str, Rounded]()
    if any(plan.format_of(name, shape)[0] < 8 for name, shape in linear.widths.items()):
        training, _ = training_blocks(job, job.recipe.finetuning.tokens or 0).split()
        ids = training[: min(CALIBRATED, job.recipe.quantizing.samples or CALIBRATED)].ids
        done = round_in_sequence(network, plan, linear, ids)
    round_network(network, plan, linear, done)


@dataclass(frozen=True)
class Storing:
    """A way to store weights: its name among scores (None: unquantized), and what it makes of a network's weights."""

    form: Callable[[Candidate], str | None]
    apply: Callable[[Job, PreTrainedModel, Candidate], None]


AS_PACKAGED = Storing(form_of, round_as_packaged)


class RoundedLosses:
    """Held-out losses of rounded sub-networks, from the store, or else measured and recorded there."""

    def __init__(self, job: Job, storing: Storing = AS_PACKAGED) -> None:
        self._job, self._weights, self._storing = job, searched_weights(job), storing
        self._opened: tuple[Path, SuperNetwork] | None = None

    def __call__(self, candidate: Candidate, blocks: int) -> float:
        """On the first blocks, in nats per token."""
        architecture, form = candidate.architecture, self._storing.form(candidate)
        if form is None:
            return held_out_losses(self._job, [architecture], blocks)[0]
        plain = held_out_keys(self._job, ["held_out_loss"], blocks)["held_out_loss"]
        key = ScoreKey(f"{plain.name} as {form}", plain.documents, plain.metric, higher_is_better=False)
        with EvaluationStore(self._job.run.evaluations) as store:
            score = store.get(architecture, self._weights, key)
            if score is None:
                began = time.monotonic()
                score = key.score(self._measure(candidate, blocks), None, blocks).or_worst()
                store.put(architecture, self._weights, key, score, time.monotonic() - began)
        return score.value

    @torch.no_grad()
    def _measure(self, candidate: Candidate, blocks: int) -> float:
        job, architecture = self._job, candidate.architecture
        folder = job.supernet_folder(architecture)
        if self._opened is None or self._opened[0] != folder:
            job.threads(scoring=True)
            self._opened = None  # two would be in memory
            supernet = job.load_supernet(architecture)
            supernet.use(search_variants(job, supernet))
            self._opened = folder, supernet
        supernet = self._opened[1]
        network = extract(supernet.model, job.structure, architecture.without_bits(), supernet.variants)
        self._storing.apply(job, network, candidate)
        _, held_out = training_blocks(job, job.recipe.finetuning.tokens or 0).split()
        return held_out_loss(network, held_out.part(0, blocks), 1, job.device)
