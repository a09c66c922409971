"""Where the evaluation store keeps what the objectives and targets of a recipe need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from compressor.job import Job
from compressor.stages.finetuning import data_fingerprint
from supernet.common.files import fingerprint
from supernet.training.data import HELD_OUT_BLOCKS

if TYPE_CHECKING:
    from evals.scoring.tasks import ScoredTask
    from search.objectives import Direction


HELD_OUT = ("held_out_loss", "kl_to_base")

Keys = dict[str, tuple[str, str]]
"""The store's (task, documents) of everything that an evaluation measures, by the name of the objective."""


def row_key(job: Job, name: str) -> str:
    """The store's name of a task's score: the metric belongs to it, and what is computed in."""
    task = scored_tasks(job)[name]
    return f"{task.name}:{task.key}{precision(job)}"


def precision(job: Job) -> str:
    """What a score's name says of the dtype that it was computed in; float32 goes without saying."""
    return "" if job.compute_dtype == torch.float32 else f" in {str(job.compute_dtype).removeprefix('torch.')}"


def scored_tasks(job: Job) -> dict[str, ScoredTask]:
    """Everything that tasks are scored on, by name of the objective: each task's own metric, and as `TASK:METRIC` the
    further ones that the objectives name. Raises `RequestError` for a metric that a task does not have."""
    found = dict(job.tasks.tasks)
    for name in job.recipe.searching.objectives:
        task, _, metric = name.partition(":")
        if metric and task in job.tasks.tasks:
            found[name] = job.tasks.by_metric(task, metric)
    return found


def measurable(job: Job) -> dict[str, Direction]:
    """What an evaluation can measure, and which way is better."""
    found: dict[str, Direction] = {"quality": "max"}
    for name, task in scored_tasks(job).items():
        found[name] = "max" if task.higher_is_better else "min"
    for name in HELD_OUT:
        found[name] = "min"
    return found


def first_look_limit(job: Job) -> int | None:
    """Documents per task of a first look, or None where there is none."""
    share = job.recipe.searching.first_look
    if share is None:
        return None
    sizes = [sum(leaf.size("search") for leaf in task.leaves) for task in job.tasks.tasks.values()]
    return math.ceil(share * min(job.recipe.searching.limit or max(sizes), max(sizes)))


def score_keys(job: Job, first_look: bool) -> Keys:
    """Where the store keeps what the recipe's objectives and targets need, at one of the two fidelities."""
    limit = first_look_limit(job) if first_look else job.recipe.searching.limit
    keys = {}
    for name, task in scored_tasks(job).items():
        keys[name] = row_key(job, name), job.tasks.fingerprint(task.name, "search", limit)
    return keys | held_out_keys(job, [name for name in HELD_OUT if name in job.recipe.searching.objectives])


def held_out_keys(job: Job, names: Sequence[str]) -> Keys:
    """Where the store keeps what is measured on held-out text."""
    settings = job.recipe.finetuning
    text = [data_fingerprint(job.recipe.data or ""), settings.sequence_length, settings.tokens, HELD_OUT_BLOCKS]
    return {name: (name + precision(job), fingerprint(text)) for name in names}
