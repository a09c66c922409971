"""The whole job and everything else that a command does: the stages in order, and what needs no run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich import box
from rich.table import Table

from compressor.checks import check, check_formats, check_group_size, check_targets, check_tasks
from compressor.inputs import data_fingerprint
from compressor.job import Job
from compressor.recipe import Recipe, read_recipe, write_recipe
from compressor.run import Run
from compressor.stages import comparing, exporting, finetuning, searching
from compressor.stages.finetuning import check_unchanged
from compressor.stages.picking import pick
from compressor.stages.reporting import report
from compressor.stages.searching import check_searching, check_speedup
from supernet.common.errors import RequestError
from supernet.common.files import write_json
from supernet.common.progress import console, say
from supernet.common.versions import versions
from supernet.training.accelerator import processes

Result = TypeVar("Result")


def explain_oom(stage: Callable[[Job], Result]) -> Callable[[Job], Result]:
    """A stage that, out of memory, says which batch sizes to try."""

    @functools.wraps(stage)
    def run(job: Job) -> Result:
        try:
            return stage(job)
        except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
            if type(error) is RuntimeError and "can't allocate memory" not in str(error):
                raise
            batch = max(1, (job.recipe.finetuning.batch_size or 2) // 2)
            raise RequestError(
                f"out of memory; put batch_tokens: {max(64, job.recipe.batch_tokens // 2)} and finetuning.batch_size: "
                f"{batch} into a recipe and run again; what was done is kept"
            ) from error

    return run


finetune = explain_oom(finetuning.finetune)
search = explain_oom(searching.search)
export = explain_oom(exporting.export)


def start(recipe: Recipe, output: Path, *, redo: str | None = None, tasks_needed: bool = True) -> Job:
    """Check everything that can be checked before work begins, then create or continue the run at `output`.

    Raises `RequestError` without leaving anything behind where the request is wrong.
    """
    recipe = recipe.resolved()
    job = Job(Run(output), recipe, redo)
    if tasks_needed and not recipe.tasks:
        raise RequestError("--tasks is missing; name at least one lm-eval task to search for")
    job.run.check_free()
    job.run.settle()
    check(job)
    job.fill_in()
    check_unchanged(job)
    if recipe.tasks:
        check_searching(job)
    check_speedup(job)
    provenance = {
        "versions": versions(),
        "model": job.base_fingerprint,
        "data": data_fingerprint(recipe.data or ""),
    }
    job.run = Run.create(output, recipe, provenance)
    if recipe.tasks:
        job.tasks.keep(job.run.requests)
    job.run.log(f"started: {recipe.model}")
    return job


def check_alone() -> None:
    """Only the fine-tuning is for several processes."""
    if processes() > 1:
        raise RequestError(
            "several processes only fine-tune: run torchrun with compressor finetune, then go on in one process"
        )


def compress(recipe: Recipe, output: Path | str, *, redo: str | None = None) -> dict[str, Any]:
    """The whole job; returns what report.json holds."""
    check_alone()
    job = start(recipe, Path(output), redo=redo)
    finetune(job)
    search(job)
    pick(job)
    export(job)
    return report(job)


def resume(path: Path, given: dict[str, Any], *, redo: str | None = None, replace_targets: bool = False) -> Job:
    """An existing run, with the options of a stage command put into its recipe."""
    check_alone()
    run = Run.open(path)
    overrides = {name: value for name, value in given.items() if value is not None}
    recipe = read_recipe(run.recipe_file, overrides, new_targets=replace_targets and bool(overrides)).resolved()
    job = Job(run, recipe, redo)
    check_targets(job)
    if overrides:  # whatever is wrong with them must not get into the run's recipe
        check_formats(job)
        check_group_size(job)
        if recipe.tasks:
            check_tasks(job)
            check_searching(job)
        provenance = {
            "versions": versions(),
            "model": job.base_fingerprint,
            "data": data_fingerprint(recipe.data or ""),
        }
        write_recipe(recipe, run.recipe_file, provenance)
    return job


def compare(
    job: Job, *, baselines: Sequence[str], sizes: Sequence[str], seeds: int, others: Sequence[str]
) -> list[dict[str, Any]]:
    """Put ours beside pruning baselines; prints the table, and writes the report anew where there is one."""
    from export.report.comparison import summarize, summary, terminal_table

    rows = explain_oom(partial(comparing.compare, baselines=baselines, sizes=sizes, seeds=seeds, others=others))(job)
    if job.run.report.is_file():
        report(job)
    tables = summarize(rows)
    console.print(terminal_table(tables))
    for table in tables:
        say(summary(table))
    return [row.model_dump(mode="json") for row in rows]


DEMO = {
    "effort": "quick",
    "targets.max_params": "0.67",
    "finetuning.tokens": 34_000,
    "searching.evaluations": 60,
    "searching.population": 15,
    "searching.limit": 60,
    "healing.tokens": 90_000,
    "quantizing.schemes": "int8,int4",
    "quantizing.iterations": 10,
    "quantizing.samples": 16,
}
"""Budgets that fit three minutes on two cores."""


def demo(output: Path) -> dict[str, Any]:
    """The whole job on the bundled checkpoint, offline; its training text is generated beside the run."""
    from compressor import demo as bundled

    Run(output).check_free()
    output.parent.mkdir(parents=True, exist_ok=True)
    data = output.with_suffix(".jsonl")
    bundled.training_text(data, n_documents=6000, seed=1)
    given = {
        "model": str(bundled.MODEL),
        "data": str(data),
        "tasks": list(bundled.TASK_NAMES),
        "include_path": str(bundled.TASKS),
    }
    return compress(read_recipe(None, given | DEMO), output)


def inspect(recipe: Recipe, quiet: bool = False) -> dict[str, Any]:
    """Facts about a model and what a run would need; prints them unless `quiet`."""
    from compressor.inspection import inspect_job, print_inspection

    recipe = recipe.model_copy(update={"device": "auto"})  # a recipe for a GPU may be looked at without one
    found = inspect_job(Job(Run(Path()), recipe.resolved(), weights=False))
    if not quiet:
        print_inspection(found)
    return found


def evaluate(
    path_or_repo: str,
    tasks: str,
    *,
    output: Path | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score any checkpoint; lm-eval's result format. Prints the scores unless `quiet`."""
    from evals.scoring.evaluate import evaluate as run_evaluation

    results = run_evaluation(
        path_or_repo,
        tasks.split(","),
        include_path=include_path,
        limit=limit,
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if output is not None:
        write_json(output, results)
    if not quiet:
        table = Table(box=box.SIMPLE)
        for column in ("task", "metric", "score", "± standard error", "documents"):
            table.add_column(column, justify="left" if column in ("task", "metric") else "right")
        for name, score in results["scores"].items():
            error = "" if score["stderr"] is None else f"{score['stderr']:.4f}"
            note = " (near chance)" if score["near_chance"] else ""
            table.add_row(name, score["metric"], f"{score['value']:.4f}{note}", error, f"{score['n']:,}")
        console.print(table)
    return results


def verify(
    package: Path, *, scores: bool = False, include_path: str | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Prove a package again in a fresh process; with `scores` or task files also what it scores."""
    from export.verify import TaskFiles
    from export.verify import verify as run_verification

    found = run_verification(package, tasks=TaskFiles(include_path) if scores or include_path else None)
    if not quiet:
        say(f"{package}: verified ({', '.join(f'{k} {v}' for k, v in found.items() if not isinstance(v, dict))})")
    return found


def push(package: Path, repo_id: str, *, private: bool, dry_run: bool) -> dict[str, Any]:
    """Upload a verified package."""
    from export.push import push as run_push

    return run_push(package, repo_id, private=private, dry_run=dry_run)
