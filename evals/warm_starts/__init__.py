"""Where a search may start: architectures proposed from the network's outputs or gradients instead of task scores.

One file here is one method. Most estimate how much each size of a half-block degrades the network with all else whole;
`search.layer_options` assembles the best combination for every size from that.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from search.layer_options import HalfSizes, Path, Variants
from supernet.architecture import Half

if TYPE_CHECKING:
    from search.space import SearchSpace
    from supernet.activation import SuperNetwork
    from supernet.architecture import Architecture
    from supernet.training.data import Batch


Halves = Mapping[tuple[int, Half], HalfSizes]
"""The sizes of every half-block, by (layer, half-block)."""


@dataclass(frozen=True)
class Proposals:
    """What a method finds."""

    path: Path
    """Architectures, the best of each size."""
    halves: Halves | None = None
    """Half-blocks' sizes on the scale of what was measured; None where they were not. `blockwise.refined` reads it."""


@dataclass(frozen=True)
class WarmStart:
    """A method by name."""

    name: str
    propose: Callable[[SuperNetwork, Variants, Sequence[Batch]], Proposals]
    """From a super-network, the variants of its layers and some text."""
    passes: Callable[[int], float]
    """About how many passes over the text it takes for so many layers."""


@dataclass(frozen=True)
class Shapes:
    """A method that knows networks of the sizes asked for, each to be measured as it is."""

    name: str
    propose: Callable[[SuperNetwork, SearchSpace, Sequence[Batch], Sequence[int]], list[Architecture]]
    """From a super-network, its space, some text, and sizes in parameters: what is to be measured first comes first."""
    passes: Callable[[int], float]
    """About how many passes over the text it takes for so many layers."""


@cache
def warm_starts() -> dict[str, WarmStart | Shapes]:
    """Every method of this folder by its name."""
    modules = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return {method.name: method for module in modules for method in module.WARM_STARTS}


GREEDY = "greedy"
"""Greedy perturbation: it measures, so the search itself carries it out."""


def warm_start_methods() -> tuple[str, ...]:
    """The name of every method; no folder is meant by one, even where one is called so."""
    return (GREEDY, *warm_starts())
