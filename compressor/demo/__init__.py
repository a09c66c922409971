"""The bundled checkpoint, its tasks, and text to fine-tune it on: all that `compressor demo` needs, offline."""

from itertools import islice
from pathlib import Path

from compressor.demo.world import TASK_NAMES, documents, write_jsonl

__all__ = ["MODEL", "RECIPE", "TASKS", "TASK_NAMES", "training_text"]

MODEL: Path = Path(__file__).parent / "world-1.7m"
"""Folder of the pre-trained checkpoint."""

TASKS: Path = Path(__file__).parent / "tasks"
"""Folder of the lm-eval task files, for `--include-path`."""


RECIPE: Path = Path(__file__).parent / "recipe.yaml"
"""What `compressor demo` runs, but for the paths."""


def training_text(path: Path, n_documents: int, seed: int) -> None:
    """Write documents from the distribution that the checkpoint was pre-trained on, one `{"text": ...}` a line.

    No question of the tasks occurs in them, whatever the seed.
    """
    write_jsonl(path, [{"text": text} for text in islice(documents(seed), n_documents)])
