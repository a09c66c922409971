"""What `compressor inspect` tells before any work: structure, space, memory and time to expect. Trains nothing.

Memory and time are estimates from counts: bytes of weights, gradients, moments and activations; floating-point
operations over what a matrix product reaches on this device, halved for everything that is not one.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from rich import box
from rich.table import Table

from compressor.generated import block_length, rows_at_once, rows_to_read
from compressor.job import Job
from supernet.architecture import HALVES
from supernet.common.formatting import duration, size
from supernet.common.progress import console, say
from supernet.training.adapters import adapter_parameters
from supernet.training.sources import is_generated

EFFICIENCY = 0.5
"""Share of a plain matrix product's rate that a whole training or scoring step is taken to reach."""
GPU_RATE = 400e12
"""Bfloat16 operations per second that a current data-centre GPU keeps up; for recipes that ask for a GPU elsewhere."""
HEALED = 0.7
"""Size of the sub-network that is healed, beside the base that teaches it."""
LAYER_SECONDS = 0.7e-3
"""What launching the kernels of one layer takes, below which a pass of few tokens on a GPU does not get
(`docs/results.md`, on a GPU: 21.6 ms for 30 layers)."""
SCORED_TOKENS = 120
"""Tokens that scoring one document is taken to need, all its choices together."""


def inspect_job(job: Job) -> dict[str, Any]:
    """Facts about the model and the run that its recipe asks for, as plain JSON types."""
    structure, recipe = job.structure, job.recipe
    base = structure.base
    total = structure.parameters(base)
    layer = max(base.layers)  # one with attention, where some layers have linear attention instead
    by_part = {"embedding": 0, "head": 0, "attention": 0, "mlp": 0, "other": 0}
    for tensor in structure.tensors:
        count = math.prod(structure.shape(tensor, base) or ())
        part = tensor.role if tensor.role in ("embedding", "head") else tensor.half
        by_part[part if part in HALVES or part in by_part else "other"] += count
    smallest = structure.parameters(job.declared_space.smallest())
    return {
        "model": recipe.model,
        "family": job.checkpoint.config.model_type,
        "dtype": str(job.stored_dtype).removeprefix("torch."),
        "parameters": total,
        "bytes": structure.bytes(base),
        "by_part": by_part,
        "layers": len(base.layers),
        "hidden_size": base.hidden_size,
        "num_attention_heads": layer.num_attention_heads,
        "num_key_value_heads": layer.num_key_value_heads,
        "intermediate_size": layer.intermediate_size,
        "num_experts": layer.num_experts,
        "vocab_size": structure.vocab_size,
        "tied_embeddings": structure.tied,
        "kv_cache_bytes_per_token": structure.kv_cache_bytes(base),
        "space": {
            "name": job.declared_space.name,
            "genes": {gene.name: list(gene.values) for gene in job.declared_space.genes},
            "size": job.declared_space.size,
            "smallest_parameters": smallest,
            "smallest_share": smallest / total,
        },
        "effort": recipe.effort,
        "device": str(job.device),
        **_expectation(job, total),
    }


def _expectation(job: Job, total: int) -> dict[str, Any]:
    recipe, structure = job.recipe, job.structure
    base = structure.base
    rate = matrix_rate(job.device, job.compute_dtype) * EFFICIENCY
    macs = structure.macs(base, recipe.finetuning.sequence_length // 2)
    random = recipe.finetuning.random_members
    members = {"sandwich": 2 + random, "joint": 1 + random}.get(recipe.finetuning.sampler, 1)
    taught = 2 * recipe.finetuning.strong_teacher  # the frozen base only goes forward
    adapted = recipe.finetuning.parameters == "lora"
    backward = 2 if adapted else 4  # frozen weights need no gradients of their own
    train = ((2 + backward) * members * 0.8 + taught) * macs * (recipe.finetuning.tokens or 0)
    documents = (recipe.searching.limit or 1000) * max(1, len(recipe.tasks))
    search = 2 * macs * documents * SCORED_TOKENS * (recipe.searching.evaluations or 0) * 0.8
    heal = (6 * HEALED + 2) * macs * (recipe.healing.tokens or 0)
    flop = {"fine-tuning": train, "search": search, "healing": heal}
    written, passes = _writing(job)
    if written:
        flop = {"writing text": 2 * macs * written} | flop
    seconds, on_gpu = ({stage: work / pace for stage, work in flop.items()} for pace in (rate, GPU_RATE * EFFICIENCY))
    for times in (on_gpu, *([seconds] if job.device.type != "cpu" else [])):
        if written:
            times["writing text"] = max(times["writing text"], passes * len(base.layers) * LAYER_SECONDS)
    return {
        "budget": {
            **({"written_tokens": written} if written else {}),
            "train_tokens": recipe.finetuning.tokens,
            "evaluations": recipe.searching.evaluations,
            "heal_tokens": recipe.healing.tokens,
            "documents_per_task": recipe.searching.limit,
        },
        "memory": expected_memory(job),
        "petaflop": {stage: work / 1e15 for stage, work in flop.items()},
        "seconds": seconds,
        "seconds_on_gpu": on_gpu,
        "matrix_rate": rate / EFFICIENCY,
    }


def _writing(job: Job) -> tuple[int, float]:
    """Tokens of training text that the base is to write, and in how many passes of a GPU; none where there is other
    text."""
    recipe = job.recipe
    if recipe.data is None or not is_generated(recipe.data):
        return 0, 0.0
    rows = rows_to_read(job, max(recipe.finetuning.tokens or 0, recipe.healing.tokens or 0))
    length = block_length(job)
    return rows * length, math.ceil(rows / rows_at_once(job, "cuda")) * length


def expected_memory(job: Job) -> dict[str, float]:
    """Bytes that each stage is expected to hold at once, from counts of weights, gradients, moments and activations."""
    recipe, structure = job.recipe, job.structure
    base = structure.base
    total = structure.parameters(base)
    rows = (recipe.finetuning.batch_size or 1) * recipe.finetuning.sequence_length
    neurons = max(
        s.intermediate_size * min(s.num_experts, structure.experts_per_token) or s.intermediate_size
        for s in base.layers
    )
    per_token = len(base.layers) * (10 * base.hidden_size + 4 * neurons) + 4 * structure.vocab_size
    weight_bytes = total * job.compute_dtype.itemsize
    training_bytes = 4 * rows * per_token
    if recipe.finetuning.parameters == "lora":
        training_bytes += weight_bytes + 16 * adapter_parameters(structure, recipe.finetuning.lora_rank)
    else:
        training_bytes += 16 * total + (weight_bytes if recipe.finetuning.strong_teacher else 0)
    healing_bytes = weight_bytes + 16 * HEALED * total + 4 * rows * per_token
    scoring_bytes = weight_bytes + 4 * job.batch_tokens * (6 * base.hidden_size + 3 * neurons)
    return {"fine-tuning": training_bytes, "search": scoring_bytes, "healing": healing_bytes}


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Floating-point operations per second of a square matrix product, the best of a few."""
    size = 8192 if device.type == "cuda" else size
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def print_inspection(facts: dict[str, Any]) -> None:
    """The facts of `inspect_job` as a few tables on stderr."""
    total = facts["parameters"]
    say(f"{facts['model']} ({facts['family']}, {facts['dtype']})")
    model = Table(box=box.SIMPLE)
    model.add_column("part")
    model.add_column("parameters", justify="right")
    model.add_column("share", justify="right")
    for part, count in facts["by_part"].items():
        if count:
            model.add_row(part, f"{count:,}", f"{count / total:.1%}")
    model.add_row("all", f"{total:,}", "100.0%", end_section=True)
    console.print(model)
    console.print(
        f"{facts['layers']} layers of width {facts['hidden_size']}, {facts['num_attention_heads']} query and "
        f"{facts['num_key_value_heads']} key-value heads, FFN {facts['intermediate_size']}"
        f"{' of ' + str(facts['num_experts']) + ' experts' if facts['num_experts'] else ''}, "
        f"vocabulary {facts['vocab_size']:,}{' (tied)' if facts['tied_embeddings'] else ''}; {size(facts['bytes'])} on "
        f"disk; {size(facts['kv_cache_bytes_per_token'])} of KV cache for each token"
    )
    space = facts["space"]
    kinds: dict[tuple[str, tuple[int, ...]], int] = {}
    for gene, values in space["genes"].items():
        kind = (gene.partition(".")[0], tuple(values))
        kinds[kind] = kinds.get(kind, 0) + 1
    say(f"\nsearch space '{space['name']}'")
    genes = Table(box=box.SIMPLE)
    genes.add_column("gene")
    genes.add_column("times", justify="right")
    genes.add_column("values", overflow="fold")
    for (name, values), times in kinds.items():
        genes.add_row(name, str(times), " ".join(map(str, values)))
    console.print(genes)
    console.print(
        f"10^{math.log10(space['size']):.1f} genomes; the smallest sub-network has {space['smallest_parameters']:,} "
        f"parameters ({space['smallest_share']:.3f} of the base)"
    )
    say(f"\nto expect of --effort {facts['effort']} on {facts['device']}")
    cost = Table(box=box.SIMPLE)
    for column in ("stage", "budget", "memory", "petaFLOP", "time here", f"at {GPU_RATE / 1e12:.0f} TFLOP/s"):
        cost.add_column(column, justify="left" if column == "stage" else "right")
    budget = facts["budget"]
    asked = {
        "fine-tuning": f"{budget['train_tokens']:,} tokens",
        "search": f"{budget['evaluations']} sub-networks",
        "writing text": f"{budget.get('written_tokens', 0):,} tokens",
        "healing": f"{budget['heal_tokens']:,} tokens",
    }
    for stage, seconds in facts["seconds"].items():
        memory = size(facts["memory"][stage]) if seconds and stage in facts["memory"] else ""
        on_gpu = facts["seconds_on_gpu"][stage]
        cost.add_row(
            stage, asked[stage], memory, f"{facts['petaflop'][stage]:.3g}", duration(seconds), duration(on_gpu)
        )
    console.print(cost)
    console.print(
        f"estimates: a matrix product reaches {facts['matrix_rate'] / 1e12:.3g} TFLOP/s here; half of that is assumed"
    )
