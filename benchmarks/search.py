"""What the search is worth, in four parts; each prints the Markdown table of docs/results.md and can draw its plot.

    python benchmarks/search.py space       evaluations to 90, 95 and 99 % of the true hypervolume of a listed space

Without options: the bundled checkpoint and one of its own tasks. Whatever is measured goes into `--run`, a run of the
product's own, so that a second call measures nothing again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np

sys.path.remove(str(Path(__file__).parent))  # this file's name would hide the package of the same name

from compressor import demo, pipeline
from compressor.architecture import Architecture
from compressor.job import Job
from compressor.recipe import Recipe, read_recipe
from compressor.run import Run
from compressor.stages.subnets import Board
from search.algorithms import ALGORITHMS
from search.objectives import Objective, computed
from search.pareto import hypervolume, non_dominated
from search.run import search
from search.store import EvaluationStore

Scores = dict[Architecture, float]
LEVELS = (0.90, 0.95, 0.99)


def open_run(arguments: argparse.Namespace, folder: Path, **given: Any) -> Job:
    """A run of the product's own at `folder`, its super-network ready to be searched."""
    data = arguments.data
    if data is None:
        data = str(folder.with_suffix(".jsonl"))
        folder.parent.mkdir(parents=True, exist_ok=True)
        demo.training_text(Path(data), n_documents=6000, seed=1)
    given = {
        "model": arguments.checkpoint,
        "data": data,
        "tasks": arguments.task,
        "include_path": arguments.include_path,
        "searching.limit": arguments.documents,
        "device": "cpu",
    } | given
    job = pipeline.start(read_recipe(None, given), folder)
    pipeline.finetune(job)
    job.run.search.mkdir(exist_ok=True)
    return job


def measured(job: Job, architectures: Iterable[Architecture]) -> Scores:
    """The task's score of each sub-network on the search documents, from the run's store where it is known."""
    (task,) = job.tasks.tasks
    weights = job.run.manifest(job.run.supernet)["weights"]
    with EvaluationStore(job.run.evaluations) as store, closing(Board(job, store, weights)) as board:
        return {architecture: values[task] for architecture, values in board.measure(list(architectures))}


# -- a listed space: how many evaluations to how much of the true hypervolume? --


class Reached(Exception):
    """The highest level is reached: the rest of the search would show nothing."""


def space(arguments: argparse.Namespace) -> None:
    """Evaluations to 90, 95 and 99 % of the true hypervolume, for every algorithm."""
    structure = Job(Run(Path()), Recipe(model=arguments.checkpoint), weights=False).structure
    layers = range(len(structure.base.layers))
    kept = [*([i for i in layers if i != gone] for gone in layers), list(layers)]
    genes = {"ffn.*": [int(width) for width in arguments.widths.split(",")], "depth": {"keep": kept}}
    job = open_run(arguments, arguments.run, space=genes, **{"finetuning.tokens": 0})
    scores = measured(job, job.space.architectures())
    (task,) = job.tasks.tasks.values()
    objectives = [computed(job.structure)["parameters"], Objective("score", "max" if task.higher_is_better else "min")]
    costs = {a: np.array([job.structure.parameters(a), objectives[1].cost(v)]) for a, v in scores.items()}
    everything = np.array(list(costs.values()))
    reference = everything.max(axis=0)
    whole = hypervolume(everything, reference)
    print(
        f"{job.space.distinct():,} architectures, {len(non_dominated(everything))} on the true front; "
        f"{task.name} {task.metric} on {job.recipe.searching.limit} documents from {min(scores.values()):.4f} to "
        f"{max(scores.values()):.4f}; population {job.recipe.searching.population}, {arguments.seeds} seeds\n"
    )
    print("| algorithm | " + " | ".join(f"{level:.0%}" for level in LEVELS) + " |\n" + "|---" * 4 + "|")
    for name in arguments.algorithms.split(","):
        curves = [
            climb(job, name, seed, objectives, scores, costs, reference, whole) for seed in range(arguments.seeds)
        ]
        cells = [reached_cell([first_at(curve, level) for curve in curves]) for level in LEVELS]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def climb(
    job: Job,
    algorithm: str,
    seed: int,
    objectives: Sequence[Objective],
    scores: Scores,
    costs: dict[Architecture, np.ndarray],
    reference: np.ndarray,
    whole: float,
) -> list[float]:
    """The share of the true hypervolume after each evaluation, until the highest level is reached."""
    front = np.empty((0, 2))
    curve: list[float] = []

    def measure(asked: list[Architecture]) -> Iterator[tuple[Architecture, dict[str, float]]]:
        nonlocal front
        for architecture in asked:
            front = np.vstack([front, costs[architecture]])
            front = front[non_dominated(front)]
            curve.append(hypervolume(front, reference) / whole)
            if curve[-1] >= LEVELS[-1]:
                raise Reached
            yield architecture, {"score": scores[architecture]}

    population = job.recipe.searching.population
    with suppress(Reached):
        search(
            job.space,
            objectives,
            measure,
            algorithm=algorithm,
            evaluations=len(scores),
            population=population,
            seed=seed,
        )
    return curve


def first_at(curve: Sequence[float], level: float) -> int | None:
    """Evaluations after which a curve is at `level`, None where it never is."""
    return next((number for number, share in enumerate(curve, 1) if share >= level), None)


def reached_cell(found: Sequence[int | None]) -> str:
    """Median and range of evaluations over seeds; a seed that never got there counts as infinitely many."""
    numbers = sorted(float("inf") if n is None else n for n in found)
    if numbers[0] == float("inf"):
        return "never"
    median = float(np.median(numbers))
    shown = "never" if median == float("inf") else f"{median:.0f}"
    missed = sum(n is None for n in found)
    last = f"never ({missed} of {len(found)})" if missed else f"{numbers[-1]:.0f}"
    return f"{shown} ({numbers[0]:.0f} to {last})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["space"])
    parser.add_argument("--checkpoint", default=str(demo.MODEL))
    parser.add_argument("--data", help="training text; default: generated")
    parser.add_argument("--include-path", default=str(demo.TASKS))
    parser.add_argument("--task", default=demo.TASK_NAMES[0])
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--run", type=Path, default=Path(tempfile.gettempdir()) / "search-benchmark")
    parser.add_argument("--widths", default="192,384", help="FFN widths of the listed space")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--algorithms", default=",".join(ALGORITHMS))
    arguments = parser.parse_args()
    {"space": space}[arguments.part](arguments)


if __name__ == "__main__":
    main()
