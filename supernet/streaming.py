"""A sub-network that is never built: cut tensor by tensor out of the super-network's files.

What `supernet.slicing.extract` does in memory, for networks that do not fit there: from the family's table
(`Structure`) it is known which part of which tensor a sub-network keeps, so each is read, cut and handed on by itself.
Memory for one tensor is enough to save the sub-network, and for two layers (one is read while another runs) to run it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig

from supernet.architecture import Architecture, Structure
from supernet.families import family_of
from supernet.slicing import (
    build_standalone,
    fill,
    materialise_buffers,
    renumbered,
    sliced,
    standalone_config,
)


class WeightFiles:
    """The tensors of a checkpoint's safetensors files, by name; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        names = json.loads(index.read_text())["weight_map"].values() if index.is_file() else ["model.safetensors"]
        self._files: dict[str, Path] = {}
        for file in dict.fromkeys(folder / name for name in names):
            with safe_open(file, "pt") as tensors:
                self._files |= dict.fromkeys(tensors.keys(), file)

    def __iter__(self) -> Iterator[str]:
        """The tensors' names, shard by shard."""
        return iter(self._files)

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own. Read, not mapped: pages of a mapped file would count as ours."""
        with safe_open(self._files[name], "pt", backend="pread") as tensors:
            return tensors.get_tensor(name)


class StreamedNetwork:
    """A sub-network of the checkpoint in `folder`, whose `model` has no weights (it is on the meta device).

    `weight` reads one parameter of it, by its name in the standalone network, and `logits` runs it. `config` is the
    checkpoint's. LookupError where the files name their tensors otherwise than transformers names the parameters.
    """

    def __init__(self, folder: Path, config: Any, structure: Structure, architecture: Architecture) -> None:
        self._files, self._structure, self._architecture = WeightFiles(folder), structure, architecture
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
        model: Any = build_standalone(standalone_config(config, architecture))
        model.tie_weights()
        materialise_buffers(model, torch.device("cpu"))
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        self.model: Any = model.eval()

    def weight(self, name: str) -> Tensor:
        """One parameter as it is stored, contiguous."""
        tensor = self._tensors[name]
        part = sliced(tensor, self._files.read(tensor.name), self._structure, self._architecture)
        assert part is not None
        return part.contiguous()

    def built(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The network with its weights, in memory after all."""
        network: Any = build_standalone(copy.deepcopy(self.model.config))
        network.generation_config = copy.deepcopy(self.model.generation_config)
        names = [name for name, _ in self.model.named_parameters()]
        return fill(network, {name: self.weight(name).to(device, dtype) for name in names})

    @torch.no_grad()
    def logits(self, ids: Tensor, dtype: torch.dtype, each: Callable[[str, Tensor], None] | None = None) -> Tensor:
        """Float32 logits [sequences, length, vocabulary] of weights rounded to `dtype`, computed in float32.

        A decoder layer's weights are dropped after its turn and read while the one before it is run; those of every
        module outside the layers are read and dropped at its turn. `each` is handed all parameters once, as they pass
        by: the files are read once to be copied and run.
        """
        given: set[str] = set()
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}  # a tied head: the embedding
        layers = list(self.model.get_submodule(self._layers))
        within = {module for layer in layers for module in layer.modules()}
        units = {layer: list(layer.modules()) for layer in layers}
        units |= {module: [module] for module in self.model.modules() if module not in within}
        absent = {
            unit: [(m, key, p) for m in modules for key, p in m._parameters.items() if p is not None]
            for unit, modules in units.items()
        }

        following = dict(pairwise(layers))
        coming: dict[nn.Module, Future[list[Tensor]]] = {}

        def read(unit: nn.Module) -> list[Tensor]:
            return [self.weight(names[id(parameter)]) for _, _, parameter in absent[unit]]

        def fill(unit: nn.Module, _: Any) -> None:
            values = coming.pop(unit).result() if unit in coming else read(unit)
            if unit in following:
                coming[following[unit]] = reader.submit(read, following[unit])
            for (module, key, parameter), value in zip(absent[unit], values, strict=True):
                name = names[id(parameter)]
                if each is not None and name not in given:
                    each(name, value)
                    given.add(name)
                module._parameters[key] = nn.Parameter(value.to(dtype).to(torch.float32), requires_grad=False)

        def drop(unit: nn.Module, *_: Any) -> None:
            for module, key, parameter in absent[unit]:
                module._parameters[key] = parameter

        hooks = [unit.register_forward_pre_hook(fill) for unit in absent]
        hooks += [unit.register_forward_hook(drop) for unit in absent]
        try:
            with ThreadPoolExecutor(1) as reader:
                logits = self.model(input_ids=ids, use_cache=False).logits.float()
        finally:
            for hook in hooks:
                hook.remove()
        if each is not None:
            for name in names.values():
                if name not in given:  # of a module that these tokens had no use for
                    each(name, self.weight(name))
        return logits
