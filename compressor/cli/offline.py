"""Whether a command needs the network: a look-up on the hub can hang for minutes behind a firewall."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from supernet.common.files import read_text

if TYPE_CHECKING:
    from compressor.recipe import Recipe

LOCAL_DATASETS = {"json", "csv", "parquet", "text", "arrow"}
"""What a task file's `dataset_path` names where its data are files."""


def stay_offline() -> None:
    """Ask no network. Call it before any Hugging Face library is imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


def offline_if_local(recipe: Recipe) -> None:
    """Ask no network where everything that the recipe names lies on this machine."""
    from supernet.training.sources import is_generated  # here, as above

    data = recipe.data is not None and (is_generated(recipe.data) or Path(recipe.data).exists())
    if data and Path(recipe.model).expanduser().is_dir() and tasks_are_local(recipe.tasks, recipe.include_path):
        stay_offline()


def tasks_are_local(tasks: list[str], include_path: str | None) -> bool:
    """Whether every task is a file of `include_path`, and none of those files wants data from the hub."""
    if include_path is None:
        return not tasks
    text = "\n".join(read_text(file) for file in Path(include_path).rglob("*.yaml"))
    if set(re.findall(r"^dataset_path: *[\"']?([^\s\"']+)", text, re.M)) - LOCAL_DATASETS:
        return False
    return all(re.search(rf"^(task|group): *{re.escape(name.partition(':')[0])} *$", text, re.M) for name in tasks)
