"""The code file of an uneven package: the family's own classes, built layer by layer at the sizes of each.

`modeling_source` is the whole file as a package ships it; `uneven_classes` runs that same text in memory, so what is
tested in the super-network's process is what users load. Subclassing, not copying, keeps it about 60 lines and
independent of the family's forward pass.
"""

from __future__ import annotations

import hashlib
import sys
import types
from functools import cache
from typing import Any

from jinja2 import Environment, StrictUndefined

from compressor.families import Family

_TEMPLATE = '''\
"""{{ plain }} with sizes that differ by layer, written by nas-compressor. Needs transformers >= 5.15.

`config.per_layer_config` holds each layer's sizes; `skip` lists removed half-blocks, which add nothing to the residual.
Everything else is transformers' own {{ plain }}.
"""

from torch import nn
from transformers import PreTrainedConfig
from transformers.models.{{ module }}.configuration_{{ module }} import {{ plain }}Config
from transformers.models.{{ module }}.modeling_{{ module }} import (
    {{ plain }}DecoderLayer,
    {{ plain }}ForCausalLM,
    {{ plain }}Model,
)

if not hasattr(PreTrainedConfig, "per_layer_config"):
    raise ImportError("this checkpoint's layers differ in size: it needs transformers 5.15 or newer")


class Uneven{{ plain }}Config({{ plain }}Config):
    model_type = "uneven_{{ module }}"

    # {{ plain }} reads some sizes from the global configuration (as defaults only); its layers get their own below.
    allow_global_per_layer_attribute_access = property(lambda self: True, lambda self, value: None)


class RemovedAttention(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states.new_zeros(()), None


class RemovedMLP(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states.new_zeros(())


def build_layers(config):
    layers = nn.ModuleList()
    cached = 0  # layers with attention so far: the key-value cache counts those only
    for sizes in config.per_layer_config:
        layer = {{ plain }}DecoderLayer(sizes, len(layers))
        skip = getattr(sizes, "skip", [])
        if "attention" in skip:
            layer.{{ family.attention }} = RemovedAttention()
            {%- for norm in family.attention_norms %}
            layer.{{ norm }} = nn.Identity()
            {%- endfor %}
        else:
            layer.{{ family.attention }}.layer_idx = cached
            cached += 1
        if "mlp" in skip:
            layer.{{ family.mlp }} = RemovedMLP()
            {%- for norm in family.mlp_norms %}
            layer.{{ norm }} = nn.Identity()
            {%- endfor %}
        layers.append(layer)
    return layers


class Uneven{{ plain }}Model({{ plain }}Model):
    config_class = Uneven{{ plain }}Config

    def __init__(self, config):
        depth, config.num_hidden_layers = config.num_hidden_layers, 0
        super().__init__(config)  # everything but the layers
        config.num_hidden_layers = depth
        self.layers = build_layers(config)
        self.post_init()


class Uneven{{ plain }}ForCausalLM({{ plain }}ForCausalLM):
    config_class = Uneven{{ plain }}Config

    def __init__(self, config):
        depth, config.num_hidden_layers = config.num_hidden_layers, 0
        super().__init__(config)
        config.num_hidden_layers = depth
        self.model = Uneven{{ plain }}Model(config)
        self.post_init()
'''


def modeling_source(family: Family) -> str:
    """The code file of an uneven package of `family`; the same text for every package of a family."""
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(_TEMPLATE)
    return template.render(family=family, plain=family.class_prefix, module=family.model_type)


def modeling_file_name(family: Family) -> str:
    return f"modeling_uneven_{family.model_type}.py"


def auto_map(family: Family) -> dict[str, str]:
    """The `auto_map` entry of config.json that leads the Auto classes to the code file."""
    module = modeling_file_name(family).removesuffix(".py")
    prefix = f"{module}.Uneven{family.class_prefix}"
    return {
        "AutoConfig": f"{prefix}Config",
        "AutoModel": f"{prefix}Model",
        "AutoModelForCausalLM": f"{prefix}ForCausalLM",
    }


def code_hash(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()


@cache
def uneven_classes(family: Family) -> tuple[Any, Any]:
    """The configuration class and the causal language model class of the code file, run in memory."""
    name = f"nas_compressor_{modeling_file_name(family).removesuffix('.py')}"
    module = types.ModuleType(name)
    sys.modules[name] = module  # transformers looks a class's module up by name
    exec(compile(modeling_source(family), f"<{name}>", "exec"), module.__dict__)
    prefix = f"Uneven{family.class_prefix}"
    return getattr(module, f"{prefix}Config"), getattr(module, f"{prefix}ForCausalLM")
