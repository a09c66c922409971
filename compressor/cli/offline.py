"""Whether a command needs the network: a look-up on the hub can hang for minutes behind a firewall."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

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
    """Whether every task is a file of `include_path`, every member of a group too, and the data of all are files. Of
    what cannot be told, no."""
    if include_path is None:
        return not tasks
    own: dict[str, dict[str, Any]] = {}
    for file in Path(include_path).rglob("*.yaml"):
        try:
            config = yaml.load(read_text(file), _Plain)
        except yaml.YAMLError:
            return False
        if isinstance(config, dict):
            own[str(config.get("group") or config.get("task"))] = config

    def local(member: object) -> bool:
        config = own.get(member) if isinstance(member, str) else member
        if not isinstance(config, dict) or "include" in config:
            return False
        if isinstance(config.get("task"), list):
            return all(local(one) for one in config["task"])
        data = config.get("dataset_path")
        if data is None and "custom_dataset" in config:
            return True  # a function of the folder's own makes them
        return data in LOCAL_DATASETS and "://" not in str(config.get("dataset_kwargs"))

    return all(local(name.partition(":")[0]) for name in tasks)


class _Plain(yaml.SafeLoader):
    """Reads task files without running what they name."""


_Plain.add_multi_constructor("!", lambda loader, suffix, node: None)
