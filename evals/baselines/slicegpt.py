"""SliceGPT: rotate the residual stream onto its principal components and delete the least of them.

Ashkboos et al., SliceGPT, arXiv 2401.15024: theorem 1 (an RMSNorm network computes the same in a rotated residual
stream) and section 3.3 (the rotation from principal components), with one rotation for all layers. The published one
of each block would need a matrix on every residual path, for which no family's class has a place.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from evals.baselines import TOLERANCE, Baseline, Cut, PruningContext, narrowed
from evals.baselines.depth import residuals
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, Structure, TensorSpec
from supernet.common.errors import RequestError
from supernet.families import describe
from supernet.slicing import extract, placed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def slicegpt(context: PruningContext) -> Cut:
    """The base with its residual stream rotated, and as many components deleted as the size asks for.

    Raises RequestError where the rotated network is not the same function.
    """
    # 1. Only families whose norms are read by known weights.
    model = untied(context.model)
    structure = describe(model.config)
    supernet = SuperNetwork(model, structure=structure)
    refusal = RequestError(
        f"slicegpt: the residual stream of {supernet.family.model_type} cannot be rotated (its norms or residual paths "
        "are not those of Llama); leave it out of --baselines"
    )
    readers = norm_readers(supernet)
    touched = {name for norm, names in readers.items() for name in (norm, *names)}
    if structure.fixed_hidden or not touched <= {tensor.name for tensor in structure.tensors}:
        raise refusal
    # 2. Rotate, and prove that nothing changed.
    probe = context.calibration[0][:1]
    rotation = principal_components(covariance(supernet, context.calibration))
    with torch.no_grad():
        before = model(input_ids=probe, use_cache=False).logits
        fold_norms(supernet, readers)
        rotate(supernet, structure, rotation)
        after = model(input_ids=probe, use_cache=False).logits
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
        raise refusal
    # 3. Delete the last components.
    rotated = replace(context, model=model, structure=structure)
    architecture = narrowed(rotated, replace(structure.base, hidden_size=width(rotated)))
    small = extract(model, structure, architecture)
    scale = (structure.base.hidden_size / architecture.hidden_size) ** 0.5
    with torch.no_grad():
        for tensor in structure.tensors:
            if is_norm(tensor):  # RMSNorm divides by the root mean square over the channels that are left
                small.get_parameter(tensor.name).mul_(scale)
    return small, architecture


def untied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose head is not tied: the final norm and the rotation act differently on head and embedding."""
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    parameter = next(model.parameters())
    copied: Any = placed(AutoModelForCausalLM.from_config(config), parameter.device, parameter.dtype).eval()
    copied.load_state_dict(model.state_dict())
    copied.generation_config = copy.deepcopy(model.generation_config)
    return copied


def covariance(supernet: SuperNetwork, batches: tuple[Tensor, ...]) -> Tensor:
    """Sum over tokens and layers of x x^T, [hidden, hidden], with x the residual as the norms see it: scaled to unit
    mean square (section 3.3 and appendix A, with the sum taken over blocks too)."""
    hidden = supernet.base.hidden_size
    total = torch.zeros(hidden, hidden, dtype=torch.float64)
    for ids in batches:
        for stream in residuals(supernet, ids):
            rows = stream.flatten(0, -2).double().cpu()
            rows = rows / rows.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
            total += rows.T @ rows
    return total


def principal_components(matrix: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix as columns, of the largest eigenvalue first."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors[:, torch.argsort(values, descending=True)]


def is_norm(tensor: TensorSpec) -> bool:
    """Whether it is the weight of a norm of the residual stream."""
    return len(tensor.axes) == 1 and tensor.axes[0].blocks == (("hidden", 1),) and tensor.name.endswith("norm.weight")


def norm_readers(supernet: SuperNetwork) -> dict[str, list[str]]:
    """Names of the norms' weights, each with the names of the weights that read what it gives."""
    family = supernet.family
    readers = {name: [family.head] for name in family.outer if name.endswith("norm.weight")}
    for index in range(len(supernet.base.layers)):
        prefix = f"{family.layers}.{index}."
        for norms, block in ((family.attention_norms, family.attention), (family.mlp_norms, family.mlp)):
            inward = [
                prefix + name
                for name, axes in family.layer.items()
                if name.startswith(block + ".") and len(axes) == 2 and axes[-1] == "hidden"
            ]
            readers |= {f"{prefix}{norm}.weight": inward for norm in norms}
    return readers


def fold_norms(supernet: SuperNetwork, readers: dict[str, list[str]]) -> None:
    """Multiply every norm's weight into the projections that read it, and set it to one: W diag(g)."""
    with torch.no_grad():
        for norm, names in readers.items():
            gain = supernet.model.get_parameter(norm)
            for name in names:
                supernet.model.get_parameter(name).mul_(gain)
            gain.fill_(1.0)


def rotate(supernet: SuperNetwork, structure: Structure, rotation: Tensor) -> None:
    """Rotate every weight's residual dimension by `rotation` Q: x Q in place of x (theorem 1)."""
    with torch.no_grad():
        for tensor in structure.tensors:
            parameter = supernet.model.get_parameter(tensor.name)
            on_device = rotation.to(parameter.device)
            for dimension, axis in enumerate(tensor.axes):
                if axis.blocks == (("hidden", 1),) and not is_norm(tensor):
                    rotated = torch.tensordot(parameter.double(), on_device, dims=([dimension], [0]))
                    parameter.copy_(rotated.movedim(-1, dimension))


def width(context: PruningContext) -> int:
    """The smallest residual width of at least the size, in multiples that the family's class accepts."""
    base: Architecture = context.structure.base
    step = base.layers[0].num_attention_heads
    hidden = base.hidden_size
    while hidden > step:
        smaller = replace(base, hidden_size=hidden - step)
        if context.structure.parameters(smaller) < context.parameters * (1 - TOLERANCE / 2):
            break
        hidden -= step
    return hidden


BASELINES = (Baseline("slicegpt", "Ashkboos et al., arXiv 2401.15024", slicegpt),)
