"""Where a search may start: architectures found with the network's own outputs or gradients instead of task scores.

One file here is one method. It says how much each size of a half-block degrades the network, all else being whole;
`search.knapsack` assembles the best combination for every size from that.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from search.knapsack import Path, Variants

if TYPE_CHECKING:
    from supernet.activation import SuperNetwork
    from supernet.training.data import Batch


@dataclass(frozen=True)
class WarmStart:
    """A method by name. `propose` takes a super-network, the variants of its layers and some text, and returns
    architectures, each the best that it knows of its size."""

    name: str
    propose: Callable[[SuperNetwork, Variants, Sequence[Batch]], Path]


@cache
def warm_starts() -> dict[str, WarmStart]:
    """Every method of this folder by its name."""
    found: dict[str, WarmStart] = {}
    for module in pkgutil.iter_modules(__path__):
        for method in importlib.import_module(f"{__name__}.{module.name}").WARM_STARTS:
            found[method.name] = method
    return found
