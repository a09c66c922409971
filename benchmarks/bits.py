"""Size and bits together against size first, bits afterwards, and against bits alone: bits per byte at equal bytes.

    python -m benchmarks.bits RUN [RUN ...] --bytes 3.3MB 2.9MB 2.55MB --new FILE.jsonl [--heal-tokens 200000]
        [--genes RUN ...] [--embeddings 0.618]

Each RUN is a run that was searched, of one seed each; measured losses and repaired weights are kept there. All ways
choose from the same evaluations, by losses on the same held-out text; what they choose is healed by the same tokens,
rounded as packages are that nobody tunes, below 8 bits by GPTQ, and measured on documents of FILE that no run has seen.
`int8 after` and so on: the best sub-network that fits with that scheme, whose embedding has 8 bits. `whole network`:
the best scheme and embedding with which all of it fits. `mixed after` and `whole, mixed`: the network of `int4 after`
or `int3 after`, whichever is better so, and the whole one, each layer in the bits that AutoRound's AutoScheme gives it,
as many in the mean as fit. `joint`: `compressor pick --bits joint`. `genes`: the lowest loss that fits of a run that
searched sizes and bits (`--space simq`, with held_out_loss and bytes as objectives), one of --genes for each RUN,
rounded to nearest, as it was scored. A way that fits nothing has no number.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.auto_scheme import LEFT_OUT, bits_by_auto_scheme
from benchmarks.common import make_parser, mean_spread, print_header, print_row
from benchmarks.quantization import bits_per_byte, logits_of
from compressor.inputs import training_blocks
from compressor.job import Job
from compressor.pipeline import resume
from compressor.sizing import bits_group, bits_storage, package_bytes, storage_of
from compressor.stages.healing import round_as_stored
from compressor.stages.joint_pick import (
    Bits,
    Candidate,
    RoundedLosses,
    candidates,
    form_of,
    mean_bits,
    pick_with_bits,
    round_as_packaged,
    round_by_plan,
    whole_network,
)
from compressor.stages.picking import measured
from compressor.stages.quantizing import mixed_plan
from compressor.stages.repairing import pick_variants
from compressor.stages.subnet_scores import held_out_losses
from export.quantization.plan import linear_layers_in, plan_scheme
from export.quantization.round_to_nearest import round_network
from export.quantization.schemes import EmbeddingBits, OuterBits, SchemePlan, weight_format
from export.shards import header_bytes
from search.objectives import Evaluation
from search.pareto import Target
from supernet.common.formatting import parse_bytes
from supernet.slicing import extract
from supernet.training.data import HELD_OUT_BLOCKS
from supernet.training.losses import held_out_loss
from supernet.training.supernet_training import heal

AFTER = ("int8", "int4", "int3")
WAYS = (*(f"{way} after" for way in AFTER), "whole network", "mixed after", "whole, mixed", "joint", "genes")
CALIBRATION = 64
"""Blocks of training text that AutoScheme reads from."""


@dataclass(frozen=True, kw_only=True)
class MixedCandidate(Candidate):
    """A sub-network with bits for each of its linear layers, by name in the network that is cut out."""

    plan: SchemePlan
    weights: Mapping[str, int]
    """How many each layer has."""
    loss: float
    """Held-out, as rounded, not healed."""


def choose(job: Job, evaluations: list[Evaluation], limit: int, mixed: bool) -> dict[str, Candidate]:
    """What each way chooses, those with `mixed` bits too if asked for; without those that fit nothing."""
    chosen: dict[str, Candidate] = {}
    whole = whole_network(job)
    # 1. Size first: of those that fit with a scheme the lowest loss before rounding.
    for scheme in AFTER:
        rows = [
            row
            for evaluation in evaluations
            if evaluation.architecture != whole.architecture
            for row in candidates(job, evaluation, False)
            if (row.bits.scheme, row.bits.embedding) == (scheme, 8) and row.bytes <= limit
        ]
        if rows:
            own = held_out_losses(job, [row.architecture for row in rows], HELD_OUT_BLOCKS)
            chosen[f"{scheme} after"] = rows[min(range(len(rows)), key=own.__getitem__)]
    # 2. Bits only.
    losses = RoundedLosses(job)
    fitting = [row for row in candidates(job, whole, False) if row.bits.scheme and row.bytes <= limit]
    if fitting:
        chosen["whole network"] = min(fitting, key=lambda row: losses(row, HELD_OUT_BLOCKS))
    # 3. Bits of each layer, afterwards or alone.
    if mixed:
        after = [chosen[way].evaluation for way in ("int4 after", "int3 after") if way in chosen]
        embeddings: list[EmbeddingBits] = [8, 4]
        tried = {
            "mixed after": [with_auto_scheme(job, evaluation, 8, limit) for evaluation in after],
            "whole, mixed": [with_auto_scheme(job, whole, embedding, limit) for embedding in embeddings],
        }
        for way, found in tried.items():
            if fits := [row for row in found if row is not None]:
                chosen[way] = min(fits, key=lambda row: row.loss)
    # 4. Both.
    chosen["joint"] = pick_with_bits(job, evaluations, Target(max_bytes=limit), False).candidate
    return chosen


@torch.no_grad()
def with_auto_scheme(job: Job, evaluation: Evaluation, embedding: EmbeddingBits, limit: int) -> MixedCandidate | None:
    """A sub-network with the bits that AutoScheme gives its layers; None where 2 bits each do not fit."""
    architecture, structure = evaluation.architecture, job.structure
    network = made(job, Candidate(evaluation, Bits(None), None, 0), 0)
    linear, storage = linear_layers_in(network), storage_of(job, "int4", architecture, embedding)
    group_size = plan_scheme(linear.widths, "int4").group_size

    def of_layers(bits: Mapping[str, int]) -> int:
        formats = {name: weight_format(shape, bits[name], group_size) for name, shape in linear.widths.items()}
        return sum(storage.rows_bytes(*shape, *formats[name]) for name, shape in linear.widths.items())

    # 1. The mean of the bits that fit.
    rest = structure.bytes(architecture, storage) - of_layers(dict.fromkeys(linear.widths, 4))
    rest += header_bytes(structure, architecture, storage)
    counts = {name: prod(shape) for name, shape in linear.widths.items()}
    room = 8 * (limit - rest - of_layers(dict.fromkeys(linear.widths, 2))) / sum(counts.values())
    if room < 0:
        return None
    # 2. Bits of that mean; less, where rows that end in the middle of a word took too much.
    training, held_out = training_blocks(job, job.recipe.finetuning.tokens or 0).split()
    texts = [job.tokenizer.decode(row) for batch in training[:CALIBRATION].split(8) for row in batch.ids]
    mean_bits = min(2 + room, 8.0)
    while True:
        found = bits_by_auto_scheme(network, job.tokenizer, texts, mean_bits, group_size)
        bits = {name: found.get(name, LEFT_OUT) for name in linear.widths}
        stored = rest + of_layers(bits)
        if stored <= limit:
            break
        mean_bits -= 0.05
        if mean_bits < 2:
            return None
    # 3. What it loses.
    plan = SchemePlan("mixed", group_size, [], OuterBits(storage.embedding, storage.head), bits)
    round_by_plan(job, network, plan)
    loss = held_out_loss(network, held_out.part(0, HELD_OUT_BLOCKS), 1, job.device)
    return MixedCandidate(
        evaluation=evaluation, bits=Bits(None), storage=storage, bytes=stored, plan=plan, weights=counts, loss=loss
    )


def choose_genes(job: Job, limit: int) -> Candidate | None:
    """What a search of sizes and bits chose; None where nothing that it measured fits."""
    rows = []
    for evaluation in measured(job):
        architecture, storage = evaluation.architecture, bits_storage(job)
        stored = package_bytes(job.structure, architecture, storage)
        if evaluation.full and stored <= limit:
            rows.append(Candidate(evaluation, Bits(None), storage, stored))
    return min(rows, key=lambda row: row.evaluation.values["held_out_loss"], default=None)


def bits_in_words(job: Job, candidate: Candidate) -> str:
    """How a candidate is stored; of bits of its own, the mean over the weights of its linear layers."""
    architecture, storage = candidate.architecture, candidate.storage
    if isinstance(candidate, MixedCandidate):
        weights = sum(candidate.weights.values())
        of_layers = candidate.plan.bits or {}
        own = sum(candidate.weights[name] * bits for name, bits in of_layers.items()) / weights
        return f"{own:.1f} bits in the mean, embedding in {candidate.plan.outer.embedding} bits"
    if storage is None or candidate.bits.scheme is not None or not architecture.has_bits:
        return str(candidate.bits)
    own = mean_bits(job.structure, architecture, storage)
    return f"{own:.1f} bits in the mean, embedding in {architecture.embedding_bits or 16} bits"


def print_embeddings(job: Job, share: float, texts: list[str]) -> None:
    """INT4 of the measured network, or the whole one, that is nearest to a share of the parameters, rounded to nearest,
    with its embedding in 16, 8 and 4 bits, beside the same unquantized."""
    of_base = job.untouched_parameters
    known = [whole_network(job), *measured(job)]
    nearest = min(known, key=lambda evaluation: abs(evaluation.values["parameters"] / of_base - share))
    architecture = nearest.architecture
    print_header("parameters", "embedding", "bytes", "bits per byte", right_from=0)
    forms: list[EmbeddingBits | None] = [None, 16, 8, 4]
    for embedding in forms:
        storage = None if embedding is None else storage_of(job, "int4", architecture, embedding)
        bits = Bits(None if embedding is None else "int4", embedding)
        network = made(job, Candidate(nearest, bits, storage, 0), 0)
        score, length = logits_of(network), min(256, network.config.max_position_embeddings)
        stored = job.structure.bytes(architecture, storage)
        name = "unquantized" if embedding is None else f"{embedding} bits"
        found = f"{bits_per_byte(score, length, job.tokenizer, texts):.4f}"
        print_row(f"{nearest.values['parameters'] / of_base:.3f}", name, f"{stored:,}", found)


def made(job: Job, candidate: Candidate, tokens: int) -> Any:
    """The network of a candidate, healed and rounded."""
    architecture = candidate.architecture.without_bits()
    variants = pick_variants(job, architecture)
    network = extract(job.load_supernet().model, job.structure, architecture, variants)
    if tokens:
        blocks = training_blocks(job, tokens)
        section = job.recipe.healing.model_copy(update={"tokens": tokens})
        job.threads(scoring=False)
        settings = job.train_settings(section, blocks.length, job.recipe.seed + 1)
        with tempfile.TemporaryDirectory() as folder:
            state = Path(folder) / "training.safetensors"
            heal(network, job.load_base(), blocks, settings, state=state, accelerator=job.accelerator)
        round_as_stored(job, network)
        job.threads(scoring=True)
    if isinstance(candidate, MixedCandidate):
        round_by_plan(job, network, candidate.plan)
    elif candidate.bits.scheme is None and candidate.architecture.has_bits:
        plan = mixed_plan(job, candidate.architecture, bits_group(job))
        round_network(network, plan, linear_layers_in(network))
    elif form_of(candidate) is not None:
        round_as_packaged(job, network, candidate)
    return network.eval()


def compare(arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Bits per byte of every way, by budget, of all runs; a row is printed for each."""
    texts = [json.loads(line)["text"] for line in Path(arguments.new).read_text(encoding="utf-8").splitlines()]
    results: dict[str, dict[str, list[float]]] = {budget: {} for budget in arguments.bytes}
    print_header("budget", "way", "parameters", "bits", "bytes", "bits per byte", right_from=2)
    for budget in arguments.bytes:
        rows: dict[str, list[Candidate]] = {}
        for folder in arguments.runs:
            job = resume(Path(folder), {})
            chosen = choose(job, [e for e in measured(job) if e.full], parse_bytes(budget), arguments.mixed)
            jobs = dict.fromkeys(chosen, job)
            if genes := dict(zip(arguments.runs, arguments.genes, strict=False)).get(folder, ""):
                jobs["genes"] = resume(Path(genes), {})
                found_by_genes = choose_genes(jobs["genes"], parse_bytes(budget))
                chosen |= {} if found_by_genes is None else {"genes": found_by_genes}
            networks: dict[tuple[object, ...], float] = {}
            for way, candidate in chosen.items():
                key = (candidate.architecture, bits_in_words(jobs[way], candidate), candidate.bytes)
                if key not in networks:
                    network = made(jobs[way], candidate, arguments.heal_tokens)
                    length = min(256, network.config.max_position_embeddings)
                    score = logits_of(network)
                    networks[key] = bits_per_byte(score, length, job.tokenizer, texts[: arguments.documents])
                rows.setdefault(way, []).append(candidate)
                results[budget].setdefault(way, []).append(networks[key])
        for way in WAYS:
            if found := rows.get(way):
                parameters = mean(job.structure.parameters(row.architecture) for row in found)
                bits = ", ".join(dict.fromkeys(bits_in_words(job, row) for row in found))
                stored = mean(row.bytes for row in found)
                cells = [f"{parameters:,.0f}", bits, f"{stored:,.0f}", mean_spread(results[budget][way], ".4f")]
                print_row(budget, way, *cells)
    return results


def main() -> None:
    own = {
        "bytes": ["3.3MB"],
        "new": (str, "documents that no run has seen, .jsonl with a text each"),
        "documents": (200, "how many of them"),
        "heal_tokens": 0,
        "mixed": (False, "also the bits that AutoRound's AutoScheme chooses, some minutes for each budget and RUN"),
        "genes": ([""], "runs that searched sizes and bits, one for each RUN"),
        "embeddings": (float, "share of the parameters: INT4 of the first RUN's network of that size instead"),
    }
    parser = make_parser(__doc__, **own)
    parser.add_argument("runs", nargs="+", help="runs that were searched, one for each seed")
    arguments = parser.parse_args()
    if arguments.new is None:
        parser.error("--new is missing")
    torch.set_num_threads(1)
    if arguments.embeddings is not None:
        texts = [json.loads(line)["text"] for line in Path(arguments.new).read_text(encoding="utf-8").splitlines()]
        print_embeddings(resume(Path(arguments.runs[0]), {}), arguments.embeddings, texts[: arguments.documents])
        return
    results = compare(arguments)
    against = []
    for ways in results.values():
        # A way that fits nothing in one of the runs is no alternative.
        others = [mean(values) for way, values in ways.items() if way != "joint" and len(values) == len(ways["joint"])]
        if others:
            against.append(100 * (mean(ways["joint"]) / min(others) - 1))
    print(f"\njoint against the best other way: {min(against):+.1f} % to {max(against):+.1f} %")


if __name__ == "__main__":
    main()
