"""Where the evaluation store keeps what the objectives and targets of a recipe need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from compressor.inputs import rows_fingerprint
from compressor.job import Job
from search.objectives import Direction
from search.scores import ScoreKey, Split
from supernet.common.files import fingerprint
from supernet.training.data import HELD_OUT_BLOCKS

if TYPE_CHECKING:
    from evals.scoring.tasks import ScoredTask

HELD_OUT = ("held_out_loss", "kl_to_base")

Fidelity = Literal["full", "screening"]
"""How much is scored: all documents of the search, or part of them first."""

Keys = dict[str, ScoreKey]
"""The store's key of everything that an evaluation measures, by the name of the objective."""


def precision(job: Job) -> str:
    """What a score's name says of the dtype that it was computed in; nothing for float32."""
    return "" if job.compute_dtype == torch.float32 else f" in {str(job.compute_dtype).removeprefix('torch.')}"


def scored_tasks(job: Job) -> dict[str, ScoredTask]:
    """Everything that tasks are scored on, by name of the objective: each task's own metric, and as `TASK:METRIC` the
    further ones that the objectives name. Raises `RequestError` for a metric that a task does not have."""
    tasks = dict(job.tasks.tasks)
    for name in job.recipe.searching.objectives:
        task, _, metric = name.partition(":")
        if metric and task in job.tasks.tasks:
            tasks[name] = job.tasks.by_metric(task, metric)
    return tasks


def measurable(job: Job) -> dict[str, Direction]:
    """What an evaluation can measure, and which way is better."""
    directions: dict[str, Direction] = {"quality": "max"}
    for name, task in scored_tasks(job).items():
        directions[name] = "max" if task.higher_is_better else "min"
    for name in HELD_OUT:
        directions[name] = "min"
    return directions


def fidelities(job: Job) -> list[Fidelity]:
    """The fidelities at which the search measures."""
    return ["full"] if job.recipe.searching.screening is None else ["full", "screening"]


def document_limit(job: Job, fidelity: Fidelity) -> int | None:
    """Documents per task of the search at a fidelity; None: all."""
    limit, share = job.recipe.searching.limit, job.recipe.searching.screening
    if fidelity == "full" or share is None:
        return limit
    sizes = [sum(subtask.size("search") for subtask in task.subtasks) for task in job.tasks.tasks.values()]
    return math.ceil(share * min(limit or max(sizes), max(sizes)))


def score_keys(job: Job, fidelity: Fidelity) -> Keys:
    """Where the store keeps what the recipe's objectives and targets need, at a fidelity."""
    limit = document_limit(job, fidelity)
    keys = {name: task_key(job, task, "search", limit) for name, task in scored_tasks(job).items()}
    return keys | held_out_keys(job, [name for name in HELD_OUT if name in job.recipe.searching.objectives])


def task_key(job: Job, task: ScoredTask, split: Split, limit: int | None = None) -> ScoreKey:
    """Where the store keeps a task's score on `limit` documents of a split (None: all). Its name has the metric, and
    what is computed in."""
    return ScoreKey(
        f"{task.name}:{task.key}{precision(job)}",
        job.tasks.fingerprint(task.name, split, limit),
        task.metric,
        split,
        task.higher_is_better,
        task.chance(task.documents(split, limit)),
    )


def held_out_keys(job: Job, names: Sequence[str], blocks: int = HELD_OUT_BLOCKS) -> Keys:
    """Where the store keeps what is measured on so many blocks of held-out text."""
    settings = job.recipe.finetuning
    text = [rows_fingerprint(job, settings.tokens or 0), settings.sequence_length, settings.tokens, blocks]
    documents = fingerprint(text)
    return {name: ScoreKey(name + precision(job), documents, name, higher_is_better=False) for name in names}
