"""What can be refused of a request within a second: names, files and folders, before torch or transformers is imported.

`compressor.checks` looks at the rest, for which the network, its tokenizer or the tasks must be known.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from compressor import names
from compressor.recipe import Recipe
from compressor.trackers import check_trackers
from export.layouts.installed import check_installed
from supernet.common.errors import RequestError, reading, unknown
from supernet.common.files import load_yaml, read_text
from supernet.raw_config import files_like_weights, loaded_files, local_folder, read_raw_config
from supernet.training.accelerator import check_device
from supernet.training.sources import GENERATED, hub_dataset, is_generated, local_files


def check_request(recipe: Recipe, redo: str | None = None) -> None:
    """Raises `RequestError` for the first thing that is wrong with a recipe as it was asked for."""
    check_names(recipe, redo)
    check_places(recipe)
    check_tasks(recipe)
    if recipe.device == "cuda":
        check_device(recipe.device)  # imports torch, which takes a second, and nothing beside it


def check_names(recipe: Recipe, redo: str | None = None) -> None:
    """Refuse what no table knows."""
    finetuning, space = recipe.finetuning, recipe.space
    named: list[tuple[str, str, Iterable[str]]] = [
        ("finetuning.sampler", finetuning.sampler, names.SAMPLERS),
        ("finetuning.draw", finetuning.draw, names.DRAWS),
        *(("finetuning.loss", loss, names.LOSSES) for loss in finetuning.losses),
        ("finetuning.parameters", finetuning.parameters, names.TRAINED),
        ("searching.algorithm", recipe.searching.algorithm, names.ALGORITHMS),
    ]
    if finetuning.optimizer is not None:
        named.append(("finetuning.optimizer", finetuning.optimizer, names.OPTIMIZERS))
    if redo is not None:
        named.append(("--redo", redo, names.REDOABLE))
    for key, name, known in named:
        if name not in known:
            raise unknown(key, name, known)
    ordering = finetuning.ordering
    if ordering is not None and Path(ordering).suffix != ".safetensors" and ordering not in names.ORDERINGS:
        raise unknown("finetuning.ordering", ordering, names.ORDERINGS, also=", or a .safetensors file")
    if isinstance(space, str) and Path(space).suffix not in (".yaml", ".yml") and space not in names.SPACES:
        raise unknown("--space", space, names.SPACES, also=", or a YAML file")
    for layout in recipe.formats:
        check_installed(layout)
    check_trackers(recipe)


def check_places(recipe: Recipe) -> None:
    """Refuse files and folders that are not there, or not what they should be."""
    if (folder := local_folder(recipe.model)) is not None:
        read_raw_config(recipe.model, folder)
        if files_like_weights(folder):  # `inspect` also takes a folder that holds none
            loaded_files(folder)
    if isinstance(recipe.space, str) and Path(recipe.space).suffix in (".yaml", ".yml"):
        if not Path(recipe.space).is_file():
            raise RequestError(f"--space {recipe.space}: no such file")
        with reading(f"--space {recipe.space}: not valid YAML"):
            load_yaml(read_text(Path(recipe.space)))
    if recipe.data is not None and not is_generated(recipe.data):
        if (named := hub_dataset(recipe.data)) is None:
            local_files(recipe.data)
        elif get_close_matches(named.lower(), [GENERATED], cutoff=0.85):  # no dataset of the hub is called so
            raise unknown("--data", recipe.data, [recipe.data.replace(named, GENERATED)])
    if recipe.speed_table is not None and not Path(recipe.speed_table).is_file():
        raise RequestError(f"speed_table: {recipe.speed_table}: no such file")
    for start in recipe.searching.warm_start:
        if start not in names.WARM_STARTS and not Path(start).exists():
            raise unknown("--warm-start", start, names.WARM_STARTS, also=", or the folder of an earlier run")


def check_tasks(recipe: Recipe) -> None:
    """Refuse a folder of task files that is none, and a task that neither it nor lm-eval says anything of."""
    files: list[Path] = []
    if recipe.include_path is not None:
        folder = Path(recipe.include_path).expanduser()
        if not folder.is_dir():
            raise RequestError(f"--include-path {recipe.include_path}: no such folder")
        files = task_files(folder)
    own = tasks_of(files)
    for spec in recipe.tasks:
        name = spec.partition(":")[0]
        if name in own or names.in_lm_eval(name) or said_in(files, name):
            continue
        also = "; give the folder of your own task files with --include-path"
        raise unknown("--tasks", name, own or names.lm_eval_tasks(), also=also)


def task_files(folder: Path) -> list[Path]:
    """The files of a folder, however deep, that may define tasks."""
    return [file for file in sorted(folder.rglob("*.yaml")) if file.is_file()]


def tasks_of(files: Iterable[Path]) -> list[str]:
    """The tasks and groups that files name at the beginning of a line, as most do."""
    named = re.compile(r"^(?:task|group): *[\"']?([^\s\"'#\[\]]+)", re.M)
    return [name for file in files for name in named.findall(read_text(file))]


def said_in(files: Iterable[Path], name: str) -> bool:
    """Whether a file says this name anywhere as a word: a group may define tasks in place, and a file may be JSON."""
    word = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
    return any(word.search(read_text(file)) for file in files)
