"""Size and bits picked together: the sub-network, the scheme and the embedding's bits of the lowest loss that fit.

Candidates are the best sub-networks of each size that were measured, and the whole network, each with every scheme of
`JOINT` and embedding of `JOINT_EMBEDDINGS`. What bits cost is measured on the largest network that fits with them, and
added to the loss of every other: good enough to rank (`docs/results.md`), so the best `MEASURED` by that sum are
measured as rounded, and the best of these is picked. Losses are on text that the fine-tuning held out, before healing,
and rounding is to nearest: what a package holds that is rounded without data.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from compressor.inputs import training_blocks
from compressor.job import Job
from compressor.sizing import JOINT, can_hold, joint_embeddings, smallest_storage, storage_of
from compressor.stages.repairing import search_variants, searched_weights
from compressor.stages.score_keys import held_out_keys
from compressor.stages.subnet_scores import FIRST_BLOCKS, held_out_losses
from export.quantization.quantize import linear_layers_in, plan_scheme
from export.quantization.round_to_nearest import round_network
from export.quantization.schemes import EmbeddingBits, OuterBits, SchemeName
from search.objectives import Evaluation
from search.pareto import Target, ranks
from search.scores import ScoreKey
from search.store import EvaluationStore
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, StorageFormat
from supernet.common.formatting import size
from supernet.common.progress import bar
from supernet.slicing import extract
from supernet.training.data import HELD_OUT_BLOCKS
from supernet.training.losses import held_out_loss

CANDIDATES = 24
"""Sub-networks that are compared, at least, where so many were measured."""
MEASURED = 12
"""Pairs of a sub-network and bits that are measured as rounded."""
HEADER_BYTES = 128
"""Of a safetensors header for each tensor: its name, type, shape and place."""


@dataclass(frozen=True)
class Bits:
    """How a package is stored. `scheme` None: unquantized."""

    scheme: SchemeName | None
    embedding: EmbeddingBits | None = None

    def __str__(self) -> str:
        return "unquantized" if self.scheme is None else f"{self.scheme}, embedding in {self.embedding} bits"


@dataclass(frozen=True)
class Candidate:
    """A sub-network with bits. `bytes` are those of the weight files, headers too."""

    evaluation: Evaluation
    bits: Bits
    storage: StorageFormat | None
    bytes: int

    @property
    def architecture(self) -> Architecture:
        return self.evaluation.architecture


@dataclass(frozen=True)
class JointPick:
    """What was picked, and its held-out loss as rounded, nats per token."""

    candidate: Candidate
    loss: float

    def __str__(self) -> str:
        bytes_ = size(self.candidate.bytes)
        return f"{self.candidate.bits}: about {bytes_}, held-out loss {self.loss:.4f} nats per token"

    def to_json(self) -> dict[str, object]:
        bits = self.candidate.bits
        return {
            "scheme": bits.scheme,
            "embedding": bits.embedding,
            "bytes": self.candidate.bytes,
            "held_out_loss": self.loss,
        }


def pick_with_bits(job: Job, evaluations: Sequence[Evaluation], target: Target, uniform: bool) -> JointPick:
    """The lowest held-out loss that fits the target's bytes, of these sub-networks and the whole one, with any bits.

    `uniform`: the package must be of the family's plain class. Raises ValueError, naming the smallest, where nothing
    meets the target.
    """
    # 1. Everything that fits.
    assert target.max_bytes is not None
    unlimited = replace(target, max_bytes=None)
    able = [row for row in [*evaluations, whole_network(job)] if row.full and not unlimited.misses(row)]
    if not able:
        raise ValueError(f"no measured architecture has {unlimited}")
    rows = [row for evaluation in best_of_each_size(able) for row in candidates(job, evaluation, uniform)]
    fitting = [row for row in rows if row.bytes <= target.max_bytes]
    if not fitting:
        least = min(rows, key=lambda row: row.bytes)
        raise ValueError(
            f"no measured architecture fits {target.max_bytes:,} bytes; the smallest file has {least.bytes:,} "
            f"({least.bits})"
        )
    # 2. What each loses by its size, and by its bits.
    architectures = list(dict.fromkeys(row.architecture for row in fitting))
    unrounded = dict(zip(architectures, held_out_losses(job, architectures, FIRST_BLOCKS), strict=True))
    measure, cost = RoundedLosses(job), dict[Bits, float]()
    for row in sorted(fitting, key=lambda row: -row.bytes):  # of each the largest that fits, as that may be picked
        if row.bits not in cost:
            cost[row.bits] = measure(row, FIRST_BLOCKS) - unrounded[row.architecture]
    fitting.sort(key=lambda row: (unrounded[row.architecture] + cost[row.bits], row.bytes, row.architecture.key))
    # 3. The best by the sum, as rounded.
    finalists = fitting[:MEASURED]
    with bar("held-out loss with bits", len(finalists)) as progress:
        losses = []
        for row in finalists:
            losses.append(measure(row, HELD_OUT_BLOCKS))
            progress.advance()
    best = min(range(len(finalists)), key=lambda number: (losses[number], finalists[number].bytes))
    return JointPick(finalists[best], losses[best])


def whole_network(job: Job) -> Evaluation:
    """The whole network as a measured sub-network: every quality is measured against it."""
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
    tensors = sum(structure.shape(tensor, architecture) is not None for tensor in structure.tensors)
    unquantized = structure.bytes(architecture) + HEADER_BYTES * tensors
    rows = [Candidate(evaluation, Bits(None), None, unquantized)]
    for scheme in (scheme for scheme in JOINT if can_hold(job, scheme, architecture)):
        for embedding in joint_embeddings(job):
            storage = storage_of(job, scheme, architecture, embedding, uniform)
            if storage not in [row.storage for row in rows]:
                # A quantized weight is stored as three tensors.
                stored = structure.bytes(architecture, storage) + 3 * HEADER_BYTES * tensors
                rows.append(Candidate(evaluation, Bits(scheme, embedding), storage, stored))
    return rows


class RoundedLosses:
    """Held-out losses of rounded sub-networks, from the store, or else measured and recorded there."""

    def __init__(self, job: Job) -> None:
        self._job, self._weights = job, searched_weights(job)
        self._opened: tuple[Path, SuperNetwork] | None = None

    def __call__(self, candidate: Candidate, blocks: int) -> float:
        """On the first blocks, in nats per token."""
        architecture, bits, storage = candidate.architecture, candidate.bits, candidate.storage
        if bits.scheme is None or storage is None:
            return held_out_losses(self._job, [architecture], blocks)[0]
        plain = held_out_keys(self._job, ["held_out_loss"], blocks)["held_out_loss"]
        form = f"{bits.scheme}-{storage.group_size}-{storage.embedding}-{storage.head}"
        key = ScoreKey(f"{plain.name} as {form}", plain.documents, plain.metric, higher_is_better=False)
        with EvaluationStore(self._job.run.evaluations) as store:
            score = store.get(architecture, self._weights, key)
            if score is None:
                began = time.monotonic()
                score = key.score(self._measure(architecture, bits.scheme, storage, blocks), None, blocks).or_worst()
                store.put(architecture, self._weights, key, score, time.monotonic() - began)
        return score.value

    @torch.no_grad()
    def _measure(self, architecture: Architecture, scheme: SchemeName, storage: StorageFormat, blocks: int) -> float:
        job = self._job
        folder = job.supernet_folder(architecture)
        if self._opened is None or self._opened[0] != folder:
            job.threads(scoring=True)
            self._opened = None  # two would be in memory
            supernet = job.load_supernet(architecture)
            supernet.use(search_variants(job, supernet))
            self._opened = folder, supernet
        supernet = self._opened[1]
        network = extract(supernet.model, job.structure, architecture, supernet.variants)
        linear = linear_layers_in(network)
        group_size = job.recipe.quantizing.group_size if storage.bits < 8 else None
        plan = plan_scheme(linear.widths, scheme, group_size)
        round_network(network, replace(plan, outer=OuterBits(storage.embedding, storage.head)), linear)
        _, held_out = training_blocks(job, job.recipe.finetuning.tokens or 0).split()
        return held_out_loss(network, held_out.part(0, blocks), 1, job.device)
