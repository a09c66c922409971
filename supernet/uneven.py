"""The code file of an uneven package: the family's own classes, built layer by layer at the sizes of each.

`modeling_source` is the whole file as a package ships it; `uneven_classes` runs that same text in memory, so what is
tested in the super-network's process is what users load. Subclassing, not copying, keeps it about 60 lines and
independent of the family's forward pass.
"""

from __future__ import annotations

import sys
import types
from functools import cache
from typing import Any

from jinja2 import Environment, StrictUndefined

from supernet.families import Family

_TEMPLATE = '''\
"""{{ plain }} with sizes that differ by layer, written by nas-compressor. Needs transformers >= 5.15.

`config.per_layer_config` holds each layer's sizes; `skip` lists removed half-blocks, which add nothing to the residual.
Everything else is transformers' own {{ plain }}.
"""

{% if family.attention_resized -%}
import copy

{% elif family.model_type == "llama" -%}
from types import SimpleNamespace

{% endif -%}
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.{{ family.module }}.configuration_{{ family.module }} import {{ config }}
from transformers.models.{{ family.module }}.modeling_{{ family.module }} import (
    {{ layer }},
    {{ causal }},
    {{ model }},
)

if not hasattr(PreTrainedConfig, "per_layer_config"):
    raise ImportError("this checkpoint's layers differ in size: it needs transformers 5.15 or newer")


class Uneven{{ config }}({{ config }}):
    model_type = "uneven_{{ family.model_type }}"

    # {{ plain }} reads some sizes from the global configuration (as defaults only); its layers get their own below.
    allow_global_per_layer_attribute_access = property(lambda self: True, lambda self, value: None)
    {%- if family.model_type == "llama" %}

    @property
    def block_configs(self):
        """The sizes as vLLM's DeciLMForCausalLM reads them; None where query heads differ by layer."""
        blocks = []
        for sizes in self.per_layer_config:
            skip, heads = getattr(sizes, "skip", []), sizes.num_attention_heads
            if "attention" not in skip and heads != self.num_attention_heads:
                return None
            attention = SimpleNamespace(
                no_op="attention" in skip, n_heads_in_group=heads // sizes.num_key_value_heads
            )
            ffn = SimpleNamespace(no_op="mlp" in skip, intermediate_size=sizes.intermediate_size)
            blocks.append(SimpleNamespace(attention=attention, ffn=ffn))
        return blocks
    {%- endif %}


class RemovedAttention(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states.new_zeros(()), None


class RemovedMLP(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states.new_zeros(())

{% if family.attention_resized %}
def keep_heads(attention, heads, full):
    # {{ plain }} derives the width of a head from their number, so attention is built in full and cut here.
    for name, dimension in {{ cuts }}:
        module_name, _, attribute = name.rpartition(".")
        module = attention.get_submodule(module_name)
        parameter = getattr(module, attribute)
        if parameter is not None:
            shape = list(parameter.shape)
            shape[dimension] = shape[dimension] * heads // full
            setattr(module, attribute, nn.Parameter(parameter.new_empty(shape)))
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = module.weight.shape
    {%- for name in counts %}
    attention.{{ name }} = attention.{{ name }} * heads // full
    {%- endfor %}

{% endif %}
def build_layers(config):
    layers = nn.ModuleList()
    marked = getattr(config, "kv_sharing_modes", None) is not None
    if marked and tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23):
        raise ImportError("layers of this checkpoint are cached differently: it needs transformers 5.23 or newer")
    cached = 0  # layers with attention so far: a key-value cache counts only those, unless the others are marked
    for sizes in config.per_layer_config:
        {%- if family.attention_resized %}
        heads, sizes = sizes.num_attention_heads, copy.copy(sizes)
        sizes.num_attention_heads = config.num_attention_heads
        {%- endif %}
        layer = {{ layer }}(sizes, len(layers))
        skip = getattr(sizes, "skip", [])
        if "attention" in skip:
            layer.{{ family.attention }} = RemovedAttention()
            {%- for norm in family.attention_norms %}
            layer.{{ norm }} = nn.Identity()
            {%- endfor %}
        else:
            {%- if family.attention_resized %}
            keep_heads(layer.{{ family.attention }}, heads, config.num_attention_heads)
            {%- endif %}
            if cached < len(layers) and not marked:
                layer.{{ family.attention }}.layer_idx = cached
            cached += 1
        if "mlp" in skip:
            layer.{{ family.mlp }} = RemovedMLP()
            {%- for norm in family.mlp_norms %}
            layer.{{ norm }} = nn.Identity()
            {%- endfor %}
        layers.append(layer)
    return layers


class Uneven{{ model }}({{ model }}):
    config_class = Uneven{{ config }}

    def __init__(self, config):
        depth, config.num_hidden_layers = config.num_hidden_layers, 0
        super().__init__(config)  # everything but the layers
        config.num_hidden_layers = depth
        self.{{ inner_layers }} = build_layers(config)
        self.post_init()


class Uneven{{ causal }}({{ causal }}):
    config_class = Uneven{{ config }}

    def __init__(self, config):
        depth, config.num_hidden_layers = config.num_hidden_layers, 0
        super().__init__(config)
        config.num_hidden_layers = depth
        self.{{ family.layers }} = build_layers(config)
        self.post_init()
'''


def modeling_source(family: Family) -> str:
    """The code file of an uneven package of `family`; the same text for every package of a family."""
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(_TEMPLATE)
    prefix = family.attention + "."
    return template.render(
        family=family,
        plain=family.class_prefix,
        config=family.class_name("Config"),
        layer=family.class_name("DecoderLayer"),
        model=family.class_name("Model"),
        causal=family.class_name("ForCausalLM"),
        inner_layers=family.layers.partition(".")[2],
        # Every query head has its own key and value where attention is resized, so all these follow one number.
        cuts=[
            (name.removeprefix(prefix), dimension)
            for name, axes in family.layer.items()
            for dimension, axis in enumerate(axes)
            if name.startswith(prefix) and axis not in ("hidden", "fixed")
        ],
        counts=[name.removeprefix(prefix) for name in family.counts if name.startswith(prefix)],
    )


def modeling_file_name(family: Family) -> str:
    return f"modeling_uneven_{family.model_type}.py"


def auto_map(family: Family) -> dict[str, str]:
    """The `auto_map` entry of config.json that leads the Auto classes to the code file."""
    module = modeling_file_name(family).removesuffix(".py")
    prefix = f"{module}.Uneven"
    return {
        "AutoConfig": prefix + family.class_name("Config"),
        "AutoModel": prefix + family.class_name("Model"),
        "AutoModelForCausalLM": prefix + family.class_name("ForCausalLM"),
    }


@cache
def uneven_classes(family: Family) -> tuple[Any, Any]:
    """The configuration class and the causal language model class of the code file, run in memory."""
    name = f"nas_compressor_{modeling_file_name(family).removesuffix('.py')}"
    module = types.ModuleType(name)
    sys.modules[name] = module  # transformers looks a class's module up by name
    exec(compile(modeling_source(family), f"<{name}>", "exec"), module.__dict__)
    names = ("Uneven" + family.class_name("Config"), "Uneven" + family.class_name("ForCausalLM"))
    return getattr(module, names[0]), getattr(module, names[1])
