"""SliceGPT: rotate the residual stream onto its principal components and delete the least of them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from evals.baselines import Baseline, Cut, PruningContext, narrowed
from evals.baselines.depth import residuals
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, Structure
from supernet.common.errors import RequestError
from supernet.families import describe
from supernet.slicing import extract, placed


def slicegpt(context: PruningContext) -> Cut:
    """One rotation for all layers: the published one of each block would need a matrix on every residual path, for
    which no family's class has a place."""
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
    probe = context.calibration[0][:1]
    rotation = principal_components(covariance(supernet, context.calibration))
    with torch.no_grad():
        before = model(input_ids=probe, use_cache=False).logits
        fold_norms(supernet, readers)
        rotate(supernet, structure, rotation)
        after = model(input_ids=probe, use_cache=False).logits
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
        raise refusal
    mine = replace(context, model=model, structure=structure)
    architecture = narrowed(mine, replace(structure.base, hidden_size=width(mine)))
    small: Any = extract(model, structure, architecture)
    scale = (structure.base.hidden_size / architecture.hidden_size) ** 0.5
    with torch.no_grad():
        for tensor in structure.tensors:
            if is_norm(tensor):  # RMSNorm divides by the root mean square over the channels that are left
                small.get_parameter(tensor.name).mul_(scale)
    return small, architecture


def untied(model: nn.Module) -> nn.Module:
    """A copy whose head is its own: the final norm and the rotation act on it and on the embedding differently."""
    config: Any = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    parameter = next(model.parameters())
    copied: Any = placed(AutoModelForCausalLM.from_config(config), parameter.device, parameter.dtype).eval()
    copied.load_state_dict(model.state_dict())
    copied.generation_config = copy.deepcopy(model.generation_config)
    return copied


def covariance(supernet: SuperNetwork, batches: tuple[Tensor, ...]) -> Tensor:
    """Sum over tokens and layers of x x^T, with x the residual as the norms see it: scaled to unit mean square.

    Ashkboos et al., SliceGPT, arXiv 2401.15024, section 3.3 and appendix A, with the sum taken over blocks too.
    """
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


def is_norm(tensor: Any) -> bool:
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
    """Turn every weight's residual dimension by `rotation` Q: x Q in place of x, everywhere."""
    with torch.no_grad():
        for tensor in structure.tensors:
            parameter = supernet.model.get_parameter(tensor.name)
            turn = rotation.to(parameter.device)
            for dimension, axis in enumerate(tensor.axes):
                if axis.blocks == (("hidden", 1),) and not is_norm(tensor):
                    turned = torch.tensordot(parameter.double(), turn, dims=([dimension], [0]))
                    parameter.copy_(turned.movedim(-1, dimension))


def width(context: PruningContext) -> int:
    """The smallest residual width, in whole multiples that the family's class accepts, of at least the size."""
    base: Architecture = context.structure.base
    step = base.layers[0].num_attention_heads
    hidden = base.hidden_size
    while hidden > step:
        smaller = replace(base, hidden_size=hidden - step)
        if context.structure.parameters(smaller) < context.parameters * 0.995:
            break
        hidden -= step
    return hidden


BASELINES = (Baseline("slicegpt", "Ashkboos et al., arXiv 2401.15024", slicegpt),)
