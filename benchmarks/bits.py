"""Size and bits together against size first, bits afterwards, and against bits alone: bits per byte at equal bytes.

    python -m benchmarks.bits RUN [RUN ...] --bytes 3.3MB 2.9MB 2.55MB --new FILE.jsonl [--heal-tokens 200000]
        [--genes RUN ...]

Each RUN is a run that was searched, of one seed each; measured losses and repaired weights are kept there. All ways
choose from the same evaluations, by losses on the same held-out text; what they choose is healed by the same tokens,
rounded without data, and measured on documents of FILE that no run has seen. `int8 after` and so on: the best
sub-network that fits with that scheme, whose embedding has 8 bits. `whole network`: the best scheme and embedding with
which all of it fits. `joint`: `compressor pick --bits joint`. `genes`: the lowest loss that fits of a run that searched
sizes and bits (`--space simq`, with held_out_loss and bytes as objectives), one of --genes for each RUN. A way that
fits nothing has no number.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from math import prod
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.common import make_parser, mean_spread, print_header, print_row
from benchmarks.quantization import bits_per_byte, logits_of
from compressor.inputs import training_blocks
from compressor.job import Job
from compressor.pipeline import resume
from compressor.sizing import bits_group, bits_storage
from compressor.stages.exporting import round_as_stored
from compressor.stages.joint_pick import (
    HEADER_BYTES,
    Bits,
    Candidate,
    RoundedLosses,
    candidates,
    pick_with_bits,
    whole_network,
)
from compressor.stages.picking import measured
from compressor.stages.quantizing import bits_by_module
from compressor.stages.repairing import pick_variants
from compressor.stages.subnet_scores import held_out_losses
from export.quantization.quantize import linear_layers_in, plan_scheme
from export.quantization.round_to_nearest import round_network
from export.quantization.schemes import OuterBits, SchemePlan
from search.objectives import Evaluation
from search.pareto import Target
from supernet.common.formatting import parse_bytes
from supernet.slicing import extract
from supernet.training.data import HELD_OUT_BLOCKS
from supernet.training.supernet_training import heal

AFTER = ("int8", "int4", "int3")
WAYS = (*(f"{scheme} after" for scheme in AFTER), "whole network", "joint", "genes")


def choose(job: Job, evaluations: list[Evaluation], limit: int) -> dict[str, Candidate]:
    """What each way chooses; without those that fit nothing."""
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
    # 3. Both.
    chosen["joint"] = pick_with_bits(job, evaluations, Target(max_bytes=limit), False).candidate
    return chosen


def choose_genes(job: Job, limit: int) -> Candidate | None:
    """What a search of sizes and bits chose; None where nothing that it measured fits."""
    rows = []
    for evaluation in measured(job):
        architecture, storage = evaluation.architecture, bits_storage(job)
        tensors = sum(job.structure.shape(tensor, architecture) is not None for tensor in job.structure.tensors)
        stored = job.structure.bytes(architecture, storage) + 3 * HEADER_BYTES * tensors
        if evaluation.full and stored <= limit:
            rows.append(Candidate(evaluation, Bits(None), storage, stored))
    return min(rows, key=lambda row: row.evaluation.values["held_out_loss"], default=None)


def bits_in_words(job: Job, candidate: Candidate) -> str:
    """How a candidate is stored; of bits of its own, the mean over the weights of its linear layers."""
    architecture, storage = candidate.architecture, candidate.storage
    if storage is None or not architecture.has_bits:
        return str(candidate.bits)
    weights, bits = 0, 0
    for tensor in job.structure.tensors:
        shape = job.structure.shape(tensor, architecture)
        if tensor.role == "linear" and shape is not None:
            weights, bits = weights + prod(shape), bits + prod(shape) * storage.bits_of(tensor, architecture)
    return f"{bits / max(1, weights):.1f} bits in the mean, embedding in {architecture.embedding_bits or 16} bits"


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
    scheme, storage = candidate.bits.scheme, candidate.storage
    searched = candidate.architecture
    if searched.has_bits:
        bits = bits_by_module(job.structure, job.checkpoint.config, searched, bits_storage(job))
        outer = OuterBits(searched.embedding_bits or 16, searched.head_bits or 16)
        round_network(network, SchemePlan("mixed", bits_group(job), [], outer, bits), linear_layers_in(network))
    elif scheme is not None and storage is not None:
        linear = linear_layers_in(network)
        plan = replace(plan_scheme(linear.widths, scheme), outer=OuterBits(storage.embedding, storage.head))
        round_network(network, plan, linear)
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
            chosen = choose(job, [e for e in measured(job) if e.full], parse_bytes(budget))
            jobs = dict.fromkeys(chosen, job)
            if genes := dict(zip(arguments.runs, arguments.genes, strict=False)).get(folder, ""):
                jobs["genes"] = resume(Path(genes), {})
                found_by_genes = choose_genes(jobs["genes"], parse_bytes(budget))
                chosen |= {} if found_by_genes is None else {"genes": found_by_genes}
            networks: dict[tuple[object, ...], float] = {}
            for way, candidate in chosen.items():
                key = (candidate.architecture, candidate.bits)
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
        "genes": ([""], "runs that searched sizes and bits, one for each RUN"),
    }
    parser = make_parser(__doc__, **own)
    parser.add_argument("runs", nargs="+", help="runs that were searched, one for each seed")
    arguments = parser.parse_args()
    if arguments.new is None:
        parser.error("--new is missing")
    torch.set_num_threads(1)
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
