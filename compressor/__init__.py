"""nas-compressor: one-shot neural architecture search that turns a checkpoint into smaller, proven checkpoints."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.interface import Result, compress
    from compressor.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "Result", "__version__", "compress"]


def _check_siblings() -> None:
    """Raise ImportError where another package is found under the name of one of ours: they are common names."""
    root = Path(__file__).resolve().parent.parent
    for name in ("export", "evals", "search", "supernet"):
        spec = importlib.util.find_spec(name)
        # A folder that is no package has no origin.
        places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
        origin = next((Path(path).resolve() for path in places if path), None)
        if origin != root / name / "__init__.py":
            raise ImportError(
                f"the package '{name}' of nas-compressor is shadowed by {origin or 'nothing that can be found'}: "
                "rename that or run from another folder"
            )


_check_siblings()


def __getattr__(name: str) -> Any:
    if name == "Recipe":
        from compressor.recipe import Recipe

        return Recipe
    if name in ("compress", "Result"):
        from compressor.quiet import quiet_libraries

        with quiet_libraries():  # some warn as soon as they are imported
            from compressor import interface

        return getattr(interface, name)
    raise AttributeError(f"module 'compressor' has no attribute '{name}'")
