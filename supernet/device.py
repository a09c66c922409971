"""What a device can hold at once, and settings that a GPU needs before anything is computed on it.

Torch is imported when something is called: tables of timings are read where no network can run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from supernet.architecture import Structure

LOGITS = 2**25
"""Logits computed at a time on a CPU, tokens times vocabulary: 128 MiB in float32."""
CACHE_BYTES = 2**28
"""Bytes of layers' outputs that scoring keeps on a CPU for the next sub-network."""
ACTIVATION_BYTES = 3 * 2**30
"""Bytes that a step's backward pass may need on a CPU; larger batches are computed in parts."""
SHARE_FOR_LOGITS = 1 / 32
"""Share of a GPU's memory for logits: of all of it, since what is free changes, and rounding would change with it."""
SHARE_FOR_CACHE = 1 / 3
"""Share of a GPU's free memory for layers' outputs."""


def prepare(device: torch.device) -> None:
    """Call it before computing on a device. On a CPU it does nothing.

    torch (2.11) gives masked attention on Hopper to cuDNN first, which builds a plan for every shape. Scoring and
    generation meet hundreds of shapes, and a plan takes up to half a second.
    """
    import torch

    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def logits_at_once(device: torch.device) -> int:
    """Logits to compute at a time, tokens times vocabulary: on a GPU as its memory allows, in float32."""
    import torch

    if device.type != "cuda":
        return LOGITS
    return max(LOGITS, int(SHARE_FOR_LOGITS * torch.cuda.get_device_properties(device).total_memory) // 4)


def cache_bytes(device: torch.device) -> int:
    """Bytes of layers' outputs that scoring may keep for the next sub-network."""
    return max(CACHE_BYTES, int(SHARE_FOR_CACHE * free_bytes(device))) if device.type == "cuda" else CACHE_BYTES


def activation_bytes(structure: Structure, tokens: int, checkpointing: bool = False, logits: int = LOGITS) -> int:
    """Bytes, about, that the backward pass of so many tokens needs in float32: what the layers keep, and of the logits
    those that are computed at a time. With `checkpointing` a layer keeps its input, and one at a time all."""
    base, each = structure.base, structure.experts_per_token
    neurons = max(s.intermediate_size * min(s.num_experts, each) or s.intermediate_size for s in base.layers)
    layers, of_layer = len(base.layers), 10 * base.hidden_size + 4 * neurons
    kept = layers * base.hidden_size + of_layer if checkpointing else layers * of_layer
    return 4 * (tokens * kept + 4 * min(tokens * structure.vocab_size, logits))


def parts_of_batch(
    structure: Structure, rows: int, length: int, device: torch.device, checkpointing: bool = False
) -> int:
    """Equal parts that a batch is to be computed in, so that a CPU holds `ACTIVATION_BYTES`, or one row's."""
    if device.type == "cuda":
        return 1
    equal = (n for n in range(1, rows + 1) if rows % n == 0)
    fits = (n for n in equal if activation_bytes(structure, rows // n * length, checkpointing) <= ACTIVATION_BYTES)
    return next(fits, rows)


def pass_tokens(device: torch.device) -> int:
    """Tokens to score in one pass."""
    return 16384 if device.type == "cuda" else 2048


def device_name(device: torch.device) -> str:
    """The accelerator's name, or `cpu`."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def release_cached_memory(device: torch.device) -> None:
    """Give memory that torch keeps for later back to the GPU, before another process starts on it."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, with what torch holds for later."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
