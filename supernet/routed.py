"""Routed weights: matrices of FFNs that depend on the sizes of their layer.

Sub-networks share weights, so what one learns disturbs another. Mixture-of-Supernets (Jawahar et al., arXiv
2306.04845) gives every FFN several sets of weights, and a router from the sub-network's sizes to shares of each; what
is mixed is one matrix, so that a sub-network that is cut out costs nothing more. Whole sets are too many for a language
model. Here they are low-rank changes of the one that is there,

    W_a = W + Σᵢ (rᵢ(a) - rᵢ(base)) Bᵢ Aᵢ,    r(a) = softmax(V relu(U s(a))),

with s(a) the shares of its heads, groups and neurons that the layer keeps. B starts at zero, and a whole layer always
has W itself, bit for bit. The paper's router sees the sizes of all layers, ours those of its own: then layers that are
alike in two sub-networks compute alike, which activation, caches and slicing rely on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from supernet.activation import SuperNetwork, slice_parameter
from supernet.architecture import Axis, LayerSizes, Structure, TensorSpec, unit_counts
from supernet.common.errors import RequestError

EXPERTS, HIDDEN = 4, 64
"""Low-rank changes of each matrix, and the width of a router."""
FILE = "routed.safetensors"
"""Beside a super-network's weights."""


def routed(structure: Structure) -> list[TensorSpec]:
    """The weights that get routed changes: of linear layers in FFNs. Raises `RequestError` where there are none."""
    found = [tensor for tensor in structure.tensors if tensor.role == "linear" and tensor.half == "mlp"]
    if not found or any(tensor.role == "experts" for tensor in structure.tensors):
        raise RequestError("finetuning.parameters: routed needs FFNs made of linear layers; this network has none")
    return found


def routed_parameters(structure: Structure, rank: int) -> int:
    """Number of parameters of all changes of this rank, the routers' among them."""
    layers = {tensor.layer for tensor in routed(structure)}
    shapes = (structure.shape(tensor, structure.base) for tensor in routed(structure))
    return rank * sum(sum(shape) for shape in shapes if shape) + len(layers) * HIDDEN * (3 + EXPERTS)


def check_routed(structure: Structure, rank: int) -> None:
    """Raises `RequestError` for a network without FFNs of linear layers, or a rank that experts cannot share."""
    routed(structure)
    if rank % EXPERTS:
        raise RequestError(f"finetuning.lora_rank: routed changes share it among {EXPERTS}, so a multiple of that")


def stored_rank(tensors: Mapping[str, Tensor]) -> int:
    """The rank of stored changes. Raises ValueError where there are none."""
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".routed_A")}
    if len(ranks) != 1:
        raise ValueError("no routed changes of one rank")
    return int(ranks.pop())


def check_stored(structure: Structure, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for tensors that are not the changes of a network like this one."""
    count = sum(tensor.numel() for tensor in tensors.values())
    if count != routed_parameters(structure, stored_rank(tensors)):
        raise ValueError("routed changes of another network")


class RoutedDeltas:
    """The changes of a super-network's FFN matrices, as a provider of variants: of a layer that is not whole, its part
    of W_a. What it gives has gradients where they are recorded, so the same serves training, search and slicing.

    The full network must be active when it is made. `parameters` are trained, by name; `specs` are their axes and
    layers. `rank` is that of all changes of a matrix together.
    """

    def __init__(self, supernet: SuperNetwork, rank: int, seed: int = 0) -> None:
        """Untrained changes, which change nothing yet. Raises `RequestError` as `check_routed`."""
        check_routed(supernet.structure, rank)
        self.supernet, self.rank = supernet, rank
        self.parameters: dict[str, nn.Parameter] = {}
        self.specs: dict[str, TensorSpec] = {}
        self._matrices = {spec.name: spec for spec in routed(supernet.structure)}
        self._modules = {name: supernet.model.get_submodule(name.removesuffix(".weight")) for name in self._matrices}
        self._generator = torch.Generator().manual_seed(seed)
        for spec in self._matrices.values():
            outputs, inputs = spec.axes[::-1] if self._transposed(spec) else spec.axes
            within = Axis((("one", rank),))
            a = self._add(replace(spec, name=f"{spec.name}.routed_A", axes=(within, inputs)))
            nn.init.zeros_(self._add(replace(spec, name=f"{spec.name}.routed_B", axes=(outputs, within))))
            a.data /= a.shape[1] ** 0.5
        for layer in sorted({spec.layer for spec in self._matrices.values() if spec.layer is not None}):
            for name, shape in ((f"router.{layer}.U", (HIDDEN, 3)), (f"router.{layer}.V", (EXPERTS, HIDDEN))):
                axes = Axis((("one", shape[0]),)), Axis((("one", shape[1]),))
                start = self._add(TensorSpec(name, axes, layer, "mlp"))
                start.data *= (2 / shape[1]) ** 0.5

    def _transposed(self, spec: TensorSpec) -> bool:
        return isinstance(self._modules[spec.name], Conv1D)

    def _add(self, spec: TensorSpec) -> nn.Parameter:
        shape = self.supernet.structure.shape(spec, self.supernet.base)
        assert shape is not None
        start = torch.randn(shape, generator=self._generator)
        self.specs[spec.name] = spec
        self.parameters[spec.name] = nn.Parameter(start.to(self.supernet.model.device))
        return self.parameters[spec.name]

    @property
    def names(self) -> Collection[str]:
        return self._matrices.keys()

    @property
    def layers(self) -> dict[str, int]:
        """The layer of each matrix."""
        return {name: spec.layer for name, spec in self._matrices.items() if spec.layer is not None}

    def shares(self, layer: int, kept: LayerSizes) -> Tensor:
        """r(a) [experts] of a layer of these sizes."""
        full = self.supernet.base.layers[layer]
        counts = [
            (kept.num_attention_heads, full.num_attention_heads),
            (kept.num_key_value_heads, full.num_key_value_heads),
            (kept.intermediate_size, full.intermediate_size),
        ]
        u, v = self.parameters[f"router.{layer}.U"], self.parameters[f"router.{layer}.V"]
        sizes = torch.tensor([part / max(1, whole) for part, whole in counts], device=u.device, dtype=u.dtype)
        return (v @ (u @ sizes).relu()).softmax(0)

    def tensor(self, name: str, kept: LayerSizes) -> Tensor | None:
        spec, base = self._matrices[name], self.supernet.base
        assert spec.layer is not None
        full = base.layers[spec.layer]
        if kept == full or "mlp" in kept.skip:
            return None
        weight = self._modules[name]._parameters["weight"]
        assert weight is not None
        counts, left = (unit_counts(base.hidden_size, sizes) for sizes in (full, kept))
        a, b = (
            slice_parameter(self.parameters[half], self.specs[half].axes, counts, left)
            for half in (f"{name}.routed_A", f"{name}.routed_B")
        )
        gates = self.shares(spec.layer, kept) - self.shares(spec.layer, full)
        change = (b * gates.repeat_interleave(self.rank // EXPERTS)) @ a
        part = slice_parameter(weight, spec.axes, counts, left)
        return part + (change.T if self._transposed(spec) else change).to(part.dtype)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What is stored of it."""
        return {name: parameter.detach().to("cpu", dtype) for name, parameter in self.parameters.items()}

    @classmethod
    def stored(cls, supernet: SuperNetwork, tensors: Mapping[str, Tensor]) -> RoutedDeltas:
        """From what `tensors()` gave of a network like this one (`check_stored`)."""
        deltas = cls(supernet, stored_rank(tensors))
        with torch.no_grad():
            for name, parameter in deltas.parameters.items():
                parameter.copy_(tensors[name])
                parameter.requires_grad_(False)
        return deltas
