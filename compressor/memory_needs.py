"""How much memory every stage of a run is expected to hold, and which trainings a GPU has no room for."""

from __future__ import annotations

import math

from compressor.job import Job
from compressor.rates import orthogonal_shapes
from supernet.device import activation_bytes, free_bytes, logits_at_once
from supernet.routed import routed, routed_parameters
from supernet.training.accelerator import processes
from supernet.training.adapters import adapter_parameters

HEALED = 0.7
"""Size of the sub-network that is healed where no target says it, beside the base that teaches it."""


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
    trained = 16 * total - 4 * sum(map(math.prod, orthogonal_shapes(job)))  # Muon has one moment, AdamW two
    tokens, checkpointing = rows * job.length, recipe.finetuning.gradient_checkpointing
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
    kept = (recipe.quantizing.samples or 0) * job.length * base.hidden_size * 4
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
        "quantizing": weight_bytes + 3 * kept + 8 * 6 * (base.hidden_size**2 + neurons**2),  # GPTQ's moments
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
