"""The code file of an uneven package: the family's own classes, with every layer built at its sizes.

`modeling_source` is the whole file as a package ships it, rendered from `modeling_uneven.py.j2`. `uneven_classes` runs
the same text in memory, so networks in memory and loaded packages have the same code. The file subclasses the family's
classes instead of copying them, so it is about 100 lines long and does not depend on the family's forward pass.
"""

from __future__ import annotations

import sys
import types
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from supernet.families import Family, families

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

UNEVEN_PREFIX = "uneven_"
"""Starts the `model_type` of uneven packages; the family's follows."""


def family_of_standalone(config: PreTrainedConfig) -> Family:
    """The family of a network from `supernet.slicing`, plain or uneven. Raises KeyError where there is none."""
    return families()[config.model_type.removeprefix(UNEVEN_PREFIX)]


def modeling_source(family: Family) -> str:
    """The code file of an uneven package of `family`; the same text for every package of a family."""
    return render("modeling_uneven.py.j2", family)


def render(template: str, family: Family) -> str:
    """A code file from its template in this folder."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True)
    prefix = family.attention + "."
    return environment.get_template(template).render(
        family=family,
        plain=family.class_prefix,
        config=family.class_name("Config"),
        layer=family.class_name("DecoderLayer"),
        model=family.class_name("Model"),
        causal=family.class_name("ForCausalLM"),
        inner_layers=family.layers.partition(".")[2],
        # Where attention is resized, every query head has its own key and value: all cuts are by the number of heads.
        cuts=[
            (name.removeprefix(prefix), dimension)
            for name, axes in family.layer.items()
            for dimension, axis in enumerate(axes)
            if name.startswith(prefix) and axis not in ("hidden", "fixed")
        ],
        counts=[name.removeprefix(prefix) for name in family.counts if name.startswith(prefix)],
    )


def modeling_file_name(family: Family) -> str:
    """The code file's name in a package."""
    return f"modeling_uneven_{family.model_type}.py"


def auto_map(family: Family) -> dict[str, str]:
    """The `auto_map` entry of config.json, which tells transformers' Auto classes where the code file's classes are."""
    module = modeling_file_name(family).removesuffix(".py")
    prefix = f"{module}.Uneven"
    return {
        "AutoConfig": prefix + family.class_name("Config"),
        "AutoModel": prefix + family.class_name("Model"),
        "AutoModelForCausalLM": prefix + family.class_name("ForCausalLM"),
    }


@cache
def uneven_classes(family: Family) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """The configuration class and the causal language model class of the code file, run in memory."""
    name = f"nas_compressor_{modeling_file_name(family).removesuffix('.py')}"
    module = types.ModuleType(name)
    sys.modules[name] = module  # transformers looks a class's module up by name
    exec(compile(modeling_source(family), f"<{name}>", "exec"), module.__dict__)
    names = ("Uneven" + family.class_name("Config"), "Uneven" + family.class_name("ForCausalLM"))
    return getattr(module, names[0]), getattr(module, names[1])
