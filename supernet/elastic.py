"""The code file of an elastic package: one set of weights, from which any of its sizes is loaded.

`elastic.json` beside it says, for every size, its configuration and which part of each tensor it takes. The file holds
the classes of `supernet.uneven` too, since most sizes are uneven. Needs no torch.
"""

from __future__ import annotations

from supernet.families import Family
from supernet.uneven import render

ELASTIC_PREFIX = "elastic_"
"""Starts the `model_type` of elastic packages; the family's follows."""
SIZES = "elastic.json"


def elastic_source(family: Family) -> str:
    """The code file of an elastic package of `family`; the same text for every package of a family."""
    return render("modeling_elastic.py.j2", family)


def elastic_file_name(family: Family) -> str:
    """The code file's name in a package."""
    return f"modeling_elastic_{family.model_type}.py"


def elastic_auto_map(family: Family) -> dict[str, str]:
    """The `auto_map` entry of config.json."""
    prefix = elastic_file_name(family).removesuffix(".py") + ".Elastic"
    return {
        "AutoConfig": prefix + family.class_name("Config"),
        "AutoModelForCausalLM": prefix + family.class_name("ForCausalLM"),
    }
