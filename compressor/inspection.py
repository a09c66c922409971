"""What `compressor inspect` tells before any work: structure, space, memory and time to expect. Trains nothing.

Costs are estimates from counts (`compressor.costs`).
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from compressor.costs import stage_costs
from compressor.job import Job
from compressor.rates import GPU_BANDWIDTH, GPU_RATE, estimate_rates
from compressor.recipe import OPEN
from supernet.architecture import HALVES
from supernet.common.formatting import count, duration, size
from supernet.common.progress import console, say


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
        "time": recipe.time,
        "effort": recipe.effort,
        "device": str(job.device),
        **_expectation(job),
    }


def _expectation(job: Job) -> dict[str, Any]:
    """Every stage under the recipe's budgets: here, and on a current GPU; rates are estimated from counts."""
    on_gpu = {cost.name: cost for cost in stage_costs(job, estimate_rates(job, GPU_RATE, GPU_BANDWIDTH))}
    here = stage_costs(job, estimate_rates(job))
    stages = [asdict(cost) | {"seconds_on_gpu": on_gpu[cost.name].seconds} for cost in here]
    return {
        "budget": {name: job.recipe.budget(name) for name in OPEN},
        "stages": stages,
        "all": {
            "seconds": sum(row["seconds"] for row in stages),
            "seconds_on_gpu": sum(row["seconds_on_gpu"] for row in stages),
            "memory": max(row["memory"] for row in stages),
            "disk": sum(row["disk"] for row in stages),
        },
    }


def print_inspection(facts: dict[str, Any]) -> None:
    """The facts of `inspect_job` as a few tables on stderr."""
    print_structure(facts)
    if "vocabulary" in facts:
        print_vocabulary(facts)
    print_space(facts["space"])
    print_costs(facts)


def print_structure(facts: dict[str, Any]) -> None:
    """What the network is, and where its parameters are."""
    total = facts["parameters"]
    say(f"{facts['model']} ({facts['family']}, {facts['dtype']})")
    model = Table(box=box.SIMPLE)
    model.add_column("part")
    model.add_column("parameters", justify="right")
    model.add_column("share", justify="right")
    for part, number in facts["by_part"].items():
        if number:
            model.add_row(part, f"{number:,}", f"{number / total:.1%}")
    model.add_row("all", f"{total:,}", "100.0%", end_section=True)
    console.print(model)
    console.print(
        f"{facts['layers']} layers of width {facts['hidden_size']}, {facts['num_attention_heads']} query and "
        f"{facts['num_key_value_heads']} key-value heads, FFN {facts['intermediate_size']}"
        f"{' of ' + str(facts['num_experts']) + ' experts' if facts['num_experts'] else ''}, "
        f"vocabulary {facts['vocab_size']:,}{' (tied)' if facts['tied_embeddings'] else ''}; {size(facts['bytes'])} on "
        f"disk; {size(facts['kv_cache_bytes_per_token'])} of KV cache for each token"
    )


def print_space(space: dict[str, Any]) -> None:
    """The search space's genes, those with the same values once, and how small it goes."""
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


def print_costs(facts: dict[str, Any]) -> None:
    """What every stage would take under the recipe's budgets."""
    say(f"\nto expect of --effort {facts['effort']} on {facts['device']}")
    cost = Table(box=box.SIMPLE)
    for column in ("stage", "budget", "memory", "disk", "time here", f"at {GPU_RATE / 1e12:.0f} TFLOP/s"):
        cost.add_column(column, justify="left" if column in ("stage", "budget") else "right", overflow="fold")
    stages = facts["stages"]
    for row in stages:
        disk = size(row["disk"]) if row["disk"] else ""
        each = [duration(row[name]) for name in ("seconds", "seconds_on_gpu")]
        cost.add_row(row["name"], row["budget"], size(row["memory"]), disk, *each)
    cost.add_section()
    whole = facts["all"]
    sums = [duration(whole[name]) for name in ("seconds", "seconds_on_gpu")]
    cost.add_row("all", "", size(whole["memory"]), size(whole["disk"]), *sums)
    console.print(cost)
    console.print("estimates from counts; compress --plan measures rates here, and --time sets budgets by them")
    if facts["time"] is not None:
        console.print(f"the recipe names a time ({facts['time']}): compress --plan tells its budgets, not these")


def print_vocabulary(facts: dict[str, Any]) -> None:
    """What sizes of the vocabulary would keep and save (`compressor.stages.trimming.sizes`)."""
    say("\nvocabulary, on text that was not counted")
    sizes = Table(box=box.SIMPLE)
    sizes.add_column("size")
    for column in ("tokens", "of the text", "of the tasks", "parameters saved", "bytes saved", "tokens per byte"):
        sizes.add_column(column, justify="right", overflow="fold")
    for row in facts["vocabulary"]:
        tasks = "" if row["tasks_coverage"] is None else f"{row['tasks_coverage']:.2%}"
        saved = f"{count(row['parameters_saved'])} ({row['share_saved']:.1%})", size(row["bytes_saved"])
        each = f"{row['tokens_per_byte']:.4f}"
        sizes.add_row(row["size"], f"{row['tokens']:,}", f"{row['coverage']:.2%}", tasks, *saved, each)
    console.print(sizes)
