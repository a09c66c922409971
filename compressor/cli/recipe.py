"""`compressor recipe RUN > mine.yaml`"""

from __future__ import annotations

from compressor.cli.options import RunFolder


def recipe(run: RunFolder) -> None:
    """Print the recipe that makes a run again, as YAML."""
    from compressor.again import recipe_text  # imports pydantic

    print(recipe_text(run), end="")
