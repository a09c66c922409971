"""Extraction: cut a sub-network out of the super-network as a standalone model.

A uniform architecture becomes the family's plain class. An uneven one becomes the class written by
`supernet.uneven`, in memory the very code that a package ships.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from supernet.activation import CACHE_MODES, mixed_cache, mixes_tokens, slice_parameter
from supernet.architecture import Architecture, LayerSizes, Structure, TensorSpec, unit_counts
from supernet.families import Family, base_architecture, families, family_of, head_dim
from supernet.uneven import uneven_classes


def renumbered(name: str, family: Family, architecture: Architecture) -> str:
    """A parameter's name in the standalone model, where the layers that are left count from 0."""
    prefix = family.layers + "."
    if not name.startswith(prefix):
        return name
    number, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{architecture.kept.index(int(number))}.{rest}"


def sliced(tensor: TensorSpec, full: Tensor, structure: Structure, architecture: Architecture) -> Tensor | None:
    """The part of a full parameter that `architecture` keeps, or None where its half-block is removed.

    A view, except of parameters that hold several things in one (`leading`).
    """
    if structure.shape(tensor, architecture) is None:
        return None
    mine = full_sizes = None
    if tensor.layer is not None:
        mine, full_sizes = architecture.layers[tensor.layer], structure.base.layers[tensor.layer]
    counts, kept = unit_counts(structure.base.hidden_size, full_sizes), unit_counts(architecture.hidden_size, mine)
    return slice_parameter(full, tensor.axes, counts, kept)


def standalone_config(config: Any, architecture: Architecture) -> Any:
    """The configuration of the extracted model: the family's own where uniform, else the uneven one.

    Kept layers count from 0. Global sizes of an uneven configuration are the base's; `per_layer_config` holds each
    layer's own.
    """
    family, base = family_of(config), base_architecture(config)
    kept = [(architecture.layers[i], base.layers[i]) for i in architecture.kept]
    new = copy.deepcopy(config)
    if not family.attention_resized:
        # Said outright, since families derive it from the number of heads where it is not given.
        new.head_dim = head_dim(config)
    for listed in family.layer_lists:
        if getattr(new, listed, None) is not None:
            setattr(new, listed, [getattr(config, listed)[i] for i in architecture.kept])
    if family.dense_ffn:
        new.mlp_only_layers = [i for i, (_, full) in enumerate(kept) if not full.num_experts]
        new.decoder_sparse_step = 1
    new.num_hidden_layers = len(kept)
    new.hidden_size = architecture.hidden_size
    if fits_plain_class(config, architecture):
        for sizes, _ in kept:
            for name, value in _settings(config, family, sizes).items():
                setattr(new, name, value)
        return new
    config_class, _ = uneven_classes(family)
    values = {k: v for k, v in new.to_dict().items() if k not in ("model_type", "architectures", "auto_map")}
    held = [mixes_tokens(*pair) for pair in kept]
    if mixed_cache(new) and not all(held):
        values[CACHE_MODES] = [None if holds else "reuse" for holds in held]
    own = {}
    for index, (sizes, full) in enumerate(kept):
        skip = [half for half in sizes.skip if half not in full.skip]
        own[index] = ({"skip": skip} if skip else {}) | _settings(config, family, sizes)
    return config_class(**values, per_layer_config=own)


def fits_plain_class(config: Any, architecture: Architecture) -> bool:
    """Whether the family's own class can hold it: all layers alike, and head counts that its configuration accepts.

    Llama's configuration wants the residual width to be a multiple of the number of heads, even where `head_dim`
    is given; the rule is applied to all families, since other loaders share it.
    """
    base = base_architecture(config)
    if not architecture.is_uniform_in(base):
        return False
    heads = {architecture.layers[i].num_attention_heads for i in architecture.kept} - {0}
    full = {base.layers[i].num_attention_heads for i in architecture.kept} - {0}
    if heads == full:
        return True
    return not family_of(config).head_width_follows and architecture.hidden_size % heads.pop() == 0


def _settings(config: Any, family: Family, sizes: LayerSizes) -> dict[str, Any]:
    """A layer's sizes under the names that its family's configuration has for them."""
    names, values = family.settings, {}
    if sizes.num_key_value_heads:
        values[names["query"]] = sizes.num_attention_heads
        if "kv" in names:
            values[names["kv"]] = sizes.num_key_value_heads
    if sizes.num_experts:
        values |= {names["ffn"]: sizes.intermediate_size, names["experts"]: sizes.num_experts}
        values["num_experts_per_tok"] = min(config.num_experts_per_tok, sizes.num_experts)
    elif sizes.intermediate_size:
        values[family.dense_ffn or names["ffn"]] = sizes.intermediate_size
    return values


def build_standalone(config: Any) -> nn.Module:
    """An empty (meta device) standalone model for a configuration from `standalone_config`."""
    from transformers import AutoModelForCausalLM

    family = family_of_standalone(config)
    with torch.device("meta"):
        if family.model_type != config.model_type:
            _, model_class = uneven_classes(family)
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
    standalone.generation_config = copy.deepcopy(model.generation_config)
    return fill(standalone, weights)


def fill(standalone: Any, weights: dict[str, Tensor]) -> nn.Module:
    """Give an empty (meta device) standalone model its weights, which it keeps; a tied head needs none of its own."""
    first = next(iter(weights.values()))
    missing, unexpected = standalone.load_state_dict(weights, strict=False, assign=True)
    tied = {family_of_standalone(standalone.config).head} if standalone.config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise RuntimeError(f"the network misses {missing} and does not know {unexpected}")
    standalone.tie_weights()
    materialise_buffers(standalone, first.device)
    standalone.config.dtype = first.dtype
    return standalone.eval()


def family_of_standalone(config: Any) -> Family:
    """The family of a configuration from `standalone_config`, plain or uneven."""
    return families()[config.model_type.removeprefix("uneven_")]


def placed(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model itself on `device`, its parameters in `dtype`.

    Buffers keep their precision: `model.to(dtype)` would round rotary frequencies too, and give wrong angles.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    return model.to(device)


def materialise_buffers(model: nn.Module, device: torch.device) -> None:
    """Fill the buffers that no checkpoint holds (rotary frequencies, Gemma's scale): they are on the meta device.

    By transformers' own initialisation, which leaves alone what is marked as initialised: the weights.
    """
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        if any(buffer.is_meta for buffer in buffers.values()):
            for name, buffer in buffers.items():
                setattr(module, name, torch.empty_like(buffer, device=device))
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            with torch.no_grad():
                model._init_weights(module)  # type: ignore[operator]
