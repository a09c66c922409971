"""lm-eval tasks by name: found in an index, built, and prepared as lm-eval's own evaluation does. No torch."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind

from evals.scoring.documents import FEWSHOT_SEED
from supernet.common.errors import RequestError, did_you_mean, reading
from supernet.common.files import read_text


def index_tasks(names: Sequence[str], include_path: Sequence[str | Path]) -> tuple[TaskManager, dict[str, str | None]]:
    """A task manager that has all `names` in its index, and their parts, and {name: metric asked for}.

    lm-eval's own tasks are indexed, which takes seconds, only if a name is not found without. Raises RequestError for
    an unknown name, one that is asked for twice, and a path that is no folder.
    """
    paths = [Path(path) for path in include_path]
    for path in paths:
        if not path.is_dir():
            raise RequestError(f"--include-path {path} is not a folder")
        for file in path.rglob("*.yaml"):
            try:
                read_text(file)  # lm-eval would wait for a pipe, and fail at what is no text
            except RequestError as error:
                raise RequestError(f"--include-path {path}: {error}") from error
    unknown: list[str] = []
    for defaults in (False, True):
        with reading("--include-path: a task file cannot be read"):
            manager = TaskManager(include_path=[*paths], include_defaults=defaults)
        wanted: dict[str, str | None] = {}
        unknown = []
        for spec in names:
            name, metric = spec, None
            if spec not in manager.task_index and ":" in spec:
                name, _, metric = spec.rpartition(":")
            if name in wanted:
                raise RequestError(f"task {name} is asked for twice: name it once")
            wanted[name] = metric or None
            if not _complete(name, manager.task_index):
                unknown.append(name)
        if not unknown:
            return manager, wanted
    name = unknown[0]
    raise RequestError(
        f"tasks: unknown task '{name}'{did_you_mean(name, manager.all_tasks)}; give the folder of your own task "
        "files with --include-path"
    )


def _complete(name: str, index: dict[str, Entry]) -> bool:
    """Whether a task, and everything that a group or tag refers to by name, is in the index."""
    entry = index.get(name)
    if entry is None:
        return False
    if entry.kind is Kind.TAG:
        return all(_complete(member, index) for member in entry.tags)
    if entry.kind is Kind.GROUP:
        members = (entry.cfg or {}).get("task") or []
        for member in [members] if isinstance(members, str) else members:
            reference, defined_here = member, False
            if isinstance(member, dict):
                reference = member.get("group") or member.get("task")
                defined_here = reference not in index and len(member) > 2
            if isinstance(reference, str) and not defined_here and not _complete(reference, index):
                return False
    return True


def build(manager: TaskManager, name: str) -> Task | Group | list[Task]:
    """The task or group of this name, or the tasks of a tag. Raises RequestError where its file or data is faulty."""
    entry = manager.task_index[name]
    try:
        return manager._load_spec(name)
    except RequestError:
        raise
    except Exception as error:  # a task file is foreign code: what it raises is about that file
        reason = " ".join(str(error).split()) or type(error).__name__
        where = f" ({entry.yaml_path})" if entry.yaml_path else ""
        raise RequestError(f"task {name}{where} cannot be built: {reason[:300]}") from error


def scored_items(item: Task | Group | list[Task]) -> Iterable[Task | Group]:
    """What gets one score each: tasks, and groups that say how to aggregate."""
    if isinstance(item, list):
        return item
    if isinstance(item, Group) and not item.has_aggregation:
        return [scored for child in item for scored in scored_items(child)]
    return [item]


def prepare(task: Task, num_fewshot: int | None) -> None:
    """Set the number of few-shot examples and their seed as `lm_eval.evaluator.simple_evaluate` does. Raises
    RequestError for a task that cannot be scored here."""
    if getattr(task, "MULTIMODAL", False):
        raise RequestError(f"task {task.task_name} needs images or sound: only text tasks can be scored")
    if getattr(task, "UNSAFE_CODE", False):
        raise RequestError(f"task {task.task_name} runs code that the network writes: choose another task")
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


@contextmanager
def lm_eval_seeds() -> Iterator[None]:
    """Within, the global seeds that simple_evaluate sets, for tasks that shuffle while they load."""
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
