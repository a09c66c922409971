"""Extraction: cut a sub-network out of the super-network as a standalone model.

A uniform architecture becomes the family's plain class. An uneven one becomes the class written by
`compressor.elastic.uneven`, in memory the very code that a package ships.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from compressor.architecture import Architecture, LayerSizes, Structure
from compressor.architecture import Tensor as TensorEntry
from compressor.elastic.uneven import uneven_classes
from compressor.families import Family, families, family_of, head_dim


def renumbered(name: str, family: Family, architecture: Architecture) -> str:
    """A parameter's name in the standalone model, where the layers that are left count from 0."""
    prefix = family.layers + "."
    if not name.startswith(prefix):
        return name
    number, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{architecture.kept.index(int(number))}.{rest}"


def sliced(tensor: TensorEntry, full: Tensor, structure: Structure, architecture: Architecture) -> Tensor | None:
    """The part of a full parameter that `architecture` keeps, as a view, or None where its half-block is removed."""
    shape = structure.shape(tensor, architecture)
    if shape is None:
        return None
    for dimension, size in enumerate(shape):
        if size != full.shape[dimension]:
            full = full.narrow(dimension, 0, size)
    return full


def standalone_config(config: Any, architecture: Architecture) -> Any:
    """The configuration of the extracted model: the family's own where uniform, else the uneven one.

    Kept layers count from 0. Global sizes of an uneven configuration are the base's; `per_layer_config` holds each
    layer's own.
    """
    kept = [architecture.layers[i] for i in architecture.kept]
    new = copy.deepcopy(config)
    # Said outright, since families derive it from the number of heads where it is not given.
    new.head_dim = head_dim(config)
    for listed in ("layer_types",):
        if getattr(new, listed, None) is not None:
            setattr(new, listed, [getattr(config, listed)[i] for i in architecture.kept])
    new.num_hidden_layers = len(kept)
    new.hidden_size = architecture.hidden_size
    if fits_plain_class(config, architecture):
        new.num_attention_heads = kept[0].num_attention_heads
        new.num_key_value_heads = kept[0].num_key_value_heads
        new.intermediate_size = kept[0].intermediate_size
        return new
    config_class, _ = uneven_classes(family_of(config))
    values = {k: v for k, v in new.to_dict().items() if k not in ("model_type", "architectures", "auto_map")}
    return config_class(**values, per_layer_config={i: _overrides(sizes) for i, sizes in enumerate(kept)})


def fits_plain_class(config: Any, architecture: Architecture) -> bool:
    """Whether the family's own class can hold it: all layers alike, and head counts that its configuration accepts.

    Llama's configuration wants the residual width to be a multiple of the number of heads, even where `head_dim`
    is given; the rule is applied to all families, since other loaders share it.
    """
    if not architecture.is_uniform:
        return False
    heads = architecture.layers[architecture.kept[0]].num_attention_heads
    base_heads = config.num_attention_heads
    return heads == base_heads or architecture.hidden_size % heads == 0


def _overrides(sizes: LayerSizes) -> dict[str, Any]:
    skip = sizes.skip
    values: dict[str, Any] = {"skip": skip} if skip else {}
    if "attention" not in skip:
        values |= {
            "num_attention_heads": sizes.num_attention_heads,
            "num_key_value_heads": sizes.num_key_value_heads,
        }
    if "mlp" not in skip:
        values["intermediate_size"] = sizes.intermediate_size
    return values


def build_standalone(config: Any) -> nn.Module:
    """An empty (meta device) standalone model for a configuration from `standalone_config`."""
    from transformers import AutoModelForCausalLM

    plain = config.model_type.removeprefix("uneven_")
    with torch.device("meta"):
        if plain != config.model_type:
            _, model_class = uneven_classes(families()[plain])
            return model_class(config)
        return AutoModelForCausalLM.from_config(config)


def extract(model: nn.Module, structure: Structure, architecture: Architecture) -> nn.Module:
    """A standalone copy of a sub-network, in evaluation mode, with its own contiguous weights.

    `model` is the (ordered) super-network's model. Its dtype and device are kept.
    """
    config: Any = model.config
    family = family_of(config)
    standalone: Any = build_standalone(standalone_config(config, architecture))
    weights: dict[str, Tensor] = {}
    for tensor in structure.tensors:
        part = sliced(tensor, model.get_parameter(tensor.name).detach(), structure, architecture)
        if part is not None:
            weights[renumbered(tensor.name, family, architecture)] = part.clone(memory_format=torch.contiguous_format)
    device = next(iter(weights.values())).device
    dtype = next(iter(weights.values())).dtype
    missing, unexpected = standalone.load_state_dict(weights, strict=False, assign=True)
    tied = {family.head} if structure.tied else set()
    if unexpected or set(missing) - tied:
        raise RuntimeError(f"the extracted network misses {missing} and does not know {unexpected}")
    standalone.tie_weights()
    materialise_buffers(standalone, device)
    standalone.config.dtype = dtype
    standalone.generation_config = copy.deepcopy(model.generation_config)
    return standalone.eval()


def materialise_buffers(model: nn.Module, device: torch.device) -> None:
    """Rebuild the buffers that no checkpoint holds (rotary frequencies): they were left on the meta device."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent = model.get_submodule(name.rpartition(".")[0])
            with torch.device(device):
                rebuilt = type(module)(config=module.config)
            setattr(parent, name.rpartition(".")[2], rebuilt)
