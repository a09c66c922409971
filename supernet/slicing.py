"""Extraction: cut a sub-network out of the super-network as a standalone model.

A uniform architecture becomes the family's plain class. An uneven one becomes the class of `supernet.uneven`, the code
that its package ships.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from supernet.activation import CACHE_MODES, mixed_cache, mixes_tokens, slice_parameter
from supernet.architecture import Architecture, Half, LayerSizes, Structure, TensorSpec, unit_counts
from supernet.families import Family, base_architecture, family_of, head_dim
from supernet.uneven import family_of_standalone, uneven_classes
from supernet.variants import Variants, variant_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def renumbered(name: str, family: Family, architecture: Architecture) -> str:
    """A parameter's name in the standalone model, where the kept layers count from 0."""
    prefix = family.layers + "."
    if not name.startswith(prefix):
        return name
    number, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{architecture.kept.index(int(number))}.{rest}"


def sliced(tensor: TensorSpec, full: Tensor, structure: Structure, architecture: Architecture) -> Tensor | None:
    """The part of a full parameter that `architecture` keeps, or None where its half-block is removed.

    A view or, where `slice_parameter` cannot make one, a copy.
    """
    if structure.shape(tensor, architecture) is None:
        return None
    counts, kept = (
        unit_counts(sizes.hidden_size, None if tensor.layer is None else sizes.layers[tensor.layer])
        for sizes in (structure.base, architecture)
    )
    return slice_parameter(full, tensor.axes, counts, kept)


def standalone_config(
    config: PreTrainedConfig, architecture: Architecture, always_uneven: bool = False
) -> PreTrainedConfig:
    """The configuration of the extracted model: the family's where the architecture is uniform, else the uneven one.

    `always_uneven` gives the uneven one of a uniform architecture too: its code file holds a quantized embedding.

    Kept layers count from 0. Global sizes of an uneven configuration are the base's; `per_layer_config` has the sizes
    of each layer.
    """
    # 1. What both have in common: the number of layers, the residual width, and lists over layers.
    family, base = family_of(config), base_architecture(config)
    kept = [(architecture.layers[i], base.layers[i]) for i in architecture.kept]
    new = copy.deepcopy(config)
    if not family.attention_resized:
        # Set explicitly, since families derive it from the number of heads where it is not given.
        new.head_dim = head_dim(config)
    for listed in family.layer_lists:
        if getattr(new, listed, None) is not None:
            setattr(new, listed, [getattr(config, listed)[i] for i in architecture.kept])
    if family.dense_ffn:
        new.mlp_only_layers = [i for i, (_, full) in enumerate(kept) if not full.num_experts]
        new.decoder_sparse_step = 1
    new.num_hidden_layers = len(kept)
    new.hidden_size = architecture.hidden_size
    # 2. The family's configuration.
    if fits_plain_class(config, architecture) and not always_uneven:
        for sizes, _ in kept:
            for name, value in _settings(config, family, sizes).items():
                setattr(new, name, value)
        return new
    # 3. The uneven configuration.
    config_class, _ = uneven_classes(family)
    values = {k: v for k, v in new.to_dict().items() if k not in ("model_type", "architectures", "auto_map")}
    held = [mixes_tokens(*pair) for pair in kept]
    if mixed_cache(new) and not all(held):
        values[CACHE_MODES] = [None if holds else "reuse" for holds in held]
    per_layer: dict[int, dict[str, int | list[Half]]] = {}
    for index, (sizes, full) in enumerate(kept):
        skip = [half for half in sizes.skip if half not in full.skip]
        per_layer[index] = ({"skip": skip} if skip else {}) | _settings(config, family, sizes)
    return config_class(**values, per_layer_config=per_layer)


def fits_plain_class(config: PreTrainedConfig, architecture: Architecture) -> bool:
    """Whether the family's plain class can hold it: all layers alike, and head counts that its configuration accepts.

    Llama's configuration requires the residual width to be a multiple of the number of heads, even where `head_dim`
    is given. The rule is applied to all families, since other loaders have it too.
    """
    base = base_architecture(config)
    if not architecture.is_uniform_in(base):
        return False
    heads = {architecture.layers[i].num_attention_heads for i in architecture.kept} - {0}
    full = {base.layers[i].num_attention_heads for i in architecture.kept} - {0}
    if heads == full:
        return True
    return not family_of(config).head_width_follows and architecture.hidden_size % heads.pop() == 0


def _settings(config: PreTrainedConfig, family: Family, sizes: LayerSizes) -> dict[str, int]:
    """A layer's sizes under their names in the family's configuration."""
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


def build_standalone(config: PreTrainedConfig) -> PreTrainedModel:
    """An empty (meta device) standalone model for a configuration from `standalone_config`."""
    from transformers import AutoModelForCausalLM

    family = family_of_standalone(config)
    with torch.device("meta"):
        if family.model_type != config.model_type:
            _, model_class = uneven_classes(family)
            return model_class(config)
        return AutoModelForCausalLM.from_config(config)


def extract(
    model: PreTrainedModel, structure: Structure, architecture: Architecture, variants: Variants | None = None
) -> PreTrainedModel:
    """A standalone copy of a sub-network, in evaluation mode, with contiguous weights.

    `model` is the (ordered) super-network's model. Its dtype and device are kept. `variants` say which tensors are not
    simply parts of its own. Raises ValueError for an architecture with bits: they come when it is packaged.
    """
    check_without_bits(architecture)
    family = family_of(model.config)
    standalone = build_standalone(standalone_config(model.config, architecture))
    weights: dict[str, Tensor] = {}
    for tensor in structure.tensors:
        full = model.get_parameter(tensor.name).detach()
        part = sliced(tensor, full, structure, architecture)
        if part is not None:
            variant = variant_of(variants, tensor, architecture, structure.base)
            part = part if variant is None else variant.to(full)
            weights[renumbered(tensor.name, family, architecture)] = part.clone(memory_format=torch.contiguous_format)
    standalone.generation_config = copy.deepcopy(model.generation_config)
    return fill(standalone, weights)


def check_without_bits(architecture: Architecture) -> None:
    if architecture.has_bits:
        raise ValueError("sizes are cut out; bits come when the network is packaged")


def fill(standalone: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
    """The empty (meta device) standalone model with these weights, not copied; a tied head needs none.

    Raises RuntimeError where names are missing or unknown.
    """
    first = next(iter(weights.values()))
    missing, unexpected = standalone.load_state_dict(weights, strict=False, assign=True)
    tied = {family_of_standalone(standalone.config).head} if standalone.config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise RuntimeError(f"the network misses {missing} and does not know {unexpected}")
    standalone.tie_weights()
    materialise_buffers(standalone, first.device)
    standalone.config.dtype = first.dtype
    return standalone.eval()


def placed(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model itself on `device`, its parameters in `dtype`.

    Buffers keep their precision: `model.to(dtype)` would round rotary frequencies too, and give wrong angles.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    return model.to(device)


def materialise_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Fill the buffers that are in no checkpoint (rotary frequencies, Gemma's scale) and still on the meta device.

    They are filled by transformers' initialisation, which skips the weights, since those are marked as initialised.
    """
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        if any(buffer.is_meta for buffer in buffers.values()):
            for name, buffer in buffers.items():
                setattr(module, name, torch.empty_like(buffer, device=device))
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = True
            with torch.no_grad():
                model._init_weights(module)
