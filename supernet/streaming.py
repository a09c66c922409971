"""A sub-network that is read tensor by tensor from the super-network's files and never built in memory.

The same as `supernet.slicing.extract`, for networks that do not fit into memory. `Structure` says which part of each
tensor a sub-network keeps, so tensors are read and cut one by one. Saving the sub-network needs memory for one tensor,
running it for two layers, of which one is read while the other runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig

from supernet.architecture import Architecture, Structure
from supernet.families import family_of
from supernet.hooks import Hooks
from supernet.raw_config import loaded_files
from supernet.slicing import (
    build_standalone,
    check_without_bits,
    fill,
    materialise_buffers,
    renumbered,
    sliced,
    standalone_config,
)
from supernet.variants import Variants, variant_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Names of dtypes in safetensors files."""


class WeightFiles:
    """The tensors of a checkpoint's safetensors files, by name; each is read by `read`."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for file in loaded_files(folder):
            with safe_open(file, "pt") as tensors:
                self._files |= dict.fromkeys(tensors.keys(), file)

    def __iter__(self) -> Iterator[str]:
        """The tensors' names, shard by shard."""
        return iter(self._files)

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor of floats; float32 where there is none."""
        for name, file in self._files.items():
            with safe_open(file, "pt") as tensors:
                stored = tensors.get_slice(name).get_dtype()
            if stored in FLOATS:
                return FLOATS[stored]
        return torch.float32

    def read(self, name: str) -> Tensor:
        """One tensor. It is read and not mapped, since the pages of a mapped file would count as this process's."""
        with safe_open(self._files[name], "pt", backend="pread") as tensors:
            return tensors.get_tensor(name)


class StreamedNetwork:
    """A sub-network of the checkpoint in `folder`; its `model` is on the meta device and has no weights.

    `weight` reads one parameter, by its name in the standalone network, and `logits` runs the network. `config` is the
    checkpoint's. `variants` say which tensors are not simply parts of those in the files. Raises LookupError where
    tensors in the files have other names than transformers' parameters.
    """

    def __init__(
        self,
        folder: Path,
        config: PreTrainedConfig,
        structure: Structure,
        architecture: Architecture,
        variants: Variants | None = None,
    ) -> None:
        check_without_bits(architecture)
        self._files, self._structure, self._architecture = WeightFiles(folder), structure, architecture
        self._variants = variants
        present = set(self._files)
        family = family_of(config)
        self._layers = family.layers
        self._tensors = {
            renumbered(tensor.name, family, architecture): tensor
            for tensor in structure.tensors
            if structure.shape(tensor, architecture) is not None
        }
        absent = [tensor.name for tensor in structure.tensors if tensor.name not in present]
        if absent:
            raise LookupError(f"{folder} holds no tensor named {absent[0]}")
        model = build_standalone(standalone_config(config, architecture))
        model.tie_weights()
        materialise_buffers(model, torch.device("cpu"))
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        self.model: PreTrainedModel = model.eval()

    def weight(self, name: str) -> Tensor:
        """One parameter in the dtype of the files, contiguous."""
        tensor = self._tensors[name]
        full = self._files.read(tensor.name)
        part = sliced(tensor, full, self._structure, self._architecture)
        assert part is not None
        variant = variant_of(self._variants, tensor, self._architecture, self._structure.base)
        return (part if variant is None else variant.to(full)).contiguous()

    def built(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The network with its weights, in memory."""
        network = build_standalone(copy.deepcopy(self.model.config))
        network.generation_config = copy.deepcopy(self.model.generation_config)
        names = [name for name, _ in self.model.named_parameters()]
        return fill(network, {name: self.weight(name).to(device, dtype) for name in names})

    @torch.no_grad()
    def logits(self, ids: Tensor, dtype: torch.dtype, each: Callable[[str, Tensor], None] | None = None) -> Tensor:
        """Float32 logits [sequences, length, vocabulary] of weights rounded to `dtype`, computed in float32.

        A decoder layer's weights are read while the layer before it runs and dropped after its own pass. Those of every
        module outside the layers are read before its pass and dropped after it. `each` is called once with the name and
        value of every parameter, so that one reading serves to copy the files and to run the network.
        """
        # 1. The units that are read at once, layers and modules outside them, and the parameters of each.
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}  # a tied head: the embedding
        layers = list(self.model.get_submodule(self._layers))
        within = {module for layer in layers for module in layer.modules()}
        units = {layer: list(layer.modules()) for layer in layers}
        units |= {module: [module] for module in self.model.modules() if module not in within}
        parameters = {
            unit: [(m, key, p) for m in modules for key, p in m._parameters.items() if p is not None]
            for unit, modules in units.items()
        }
        # 2. Hooks that put the weights in place before a unit's pass and the empty parameters after it.
        seen: set[str] = set()
        next_layer = dict(pairwise(layers))
        pending: dict[nn.Module, Future[list[Tensor]]] = {}

        def read(unit: nn.Module) -> list[Tensor]:
            return [self.weight(names[id(parameter)]) for _, _, parameter in parameters[unit]]

        def load(unit: nn.Module, _: object) -> None:
            values = pending.pop(unit).result() if unit in pending else read(unit)
            if unit in next_layer:
                pending[next_layer[unit]] = reader.submit(read, next_layer[unit])
            for (module, key, parameter), value in zip(parameters[unit], values, strict=True):
                name = names[id(parameter)]
                if each is not None and name not in seen:
                    each(name, value)
                    seen.add(name)
                module._parameters[key] = nn.Parameter(value.to(dtype).to(torch.float32), requires_grad=False)

        def drop(unit: nn.Module, *_: object) -> None:
            for module, key, parameter in parameters[unit]:
                module._parameters[key] = parameter

        hooks = [unit.register_forward_pre_hook(load) for unit in parameters]
        hooks += [unit.register_forward_hook(drop) for unit in parameters]
        # 3. The pass, and the parameters of modules that it did not call.
        with Hooks(hooks), ThreadPoolExecutor(1) as reader:
            logits = self.model(input_ids=ids, use_cache=False).logits.float()
        if each is not None:
            for name in names.values():
                if name not in seen:
                    each(name, self.weight(name))
        return logits
