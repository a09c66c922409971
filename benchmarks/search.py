"""What the search is worth, in five parts; each prints the Markdown table of docs/results.md.

    python -m benchmarks.search space       evaluations to 90, 95 and 99 % of the true hypervolume of a listed space
    python -m benchmarks.search fine        hypervolume against evaluations and seconds in the space `fine`
    python -m benchmarks.search starts      evaluations saved by first looks and by warm starts in the space `fine`
    python -m benchmarks.search ranks       scores inside the super-network against scores after slicing and healing
    python -m benchmarks.search overhead    the share of a search's time that is not evaluation

Without options: the bundled checkpoint and one of its own tasks. `--help` behind a part names its options; `space` and
`fine` can draw their plots. Scores go into `--run`, a run of the product's own, so that a second call measures none
again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from scipy.stats import kendalltau, spearmanr

from compressor import demo, pipeline
from compressor.inputs import training_blocks
from compressor.job import Job
from compressor.recipe import Recipe, read_recipe
from compressor.run import Run
from compressor.stages.searching import GREEDY_SHARE
from compressor.stages.subnet_scores import SubnetEvaluator
from compressor.stages.warm_start import proposals, spread_over_sizes
from evals.warm_starts import warm_starts
from search.algorithms import algorithms
from search.objectives import Objective, computed
from search.pareto import hypervolume, non_dominated
from search.run import SearchResult, greedy_path, search
from search.sampling import sample_sizes
from search.store import EvaluationStore
from supernet.architecture import Architecture
from supernet.slicing import extract
from supernet.training.supernet_training import heal

LEVELS = (0.90, 0.95, 0.99)
FIRST_LOOK = 0.25
"""Share of the documents that a first look is on."""


@dataclass
class Bench:
    """A run of the product's own with its super-network made, and everything to search it by size and one score."""

    job: Job
    board: SubnetEvaluator

    @property
    def task(self) -> str:
        return next(iter(self.job.tasks.tasks))

    @property
    def objectives(self) -> list[Objective]:
        up = self.job.tasks.tasks[self.task].higher_is_better
        return [computed(self.job.structure)["parameters"], Objective(self.task, "max" if up else "min")]

    def cost(self, architecture: Architecture, score: float) -> list[float]:
        """Both objectives, less is better."""
        return [self.job.structure.parameters(architecture), self.objectives[1].cost(score)]

    def scores(self, architectures: Sequence[Architecture]) -> list[float]:
        """The task's score of each in the super-network, on the search documents."""
        found = dict(self.board.measure(architectures))
        return [found[architecture][self.task] for architecture in architectures]

    def search(self, algorithm: str, seed: int, evaluations: int, **more: Any) -> SearchResult:
        """A search as shipped, its evaluations from the store where it has them; `more` is for `search.run.search`."""
        population = self.job.recipe.searching.population
        return search(
            self.job.space,
            self.objectives,
            self.board.measure,
            algorithm=algorithm,
            evaluations=evaluations,
            population=population,
            seed=seed,
            **more,
        )

    def seconds(self, architecture: Architecture) -> float:
        """What measuring it took, whenever that was."""
        place = self.board.keys["full"][self.task].place
        rows = self.board.store.all(weights=self.board.weights, task=place[0], documents=place[1])
        row = next((row for measured, row in rows if measured == architecture), None)
        assert row is not None
        return row.seconds


def open_bench(arguments: argparse.Namespace, space: Any, **more: Any) -> Bench:
    """The benchmark's run, made where it is not there yet; `more` goes into its recipe."""
    data = arguments.data
    if data is None:
        data = str(arguments.run.with_name(arguments.run.name + ".jsonl"))
        arguments.run.parent.mkdir(parents=True, exist_ok=True)
        demo.training_text(Path(data), n_documents=6000, seed=1)
    given = {
        "model": arguments.checkpoint,
        "data": data,
        "tasks": arguments.task,
        "include_path": arguments.include_path,
        "space": space,
        "finetuning.tokens": arguments.train_tokens,
        "finetuning.batch_size": 4,
        "searching.limit": arguments.documents,
        "device": "cpu",
        **more,
    }
    job = pipeline.start(read_recipe(None, given), arguments.run)
    weights = pipeline.finetune(job)["weights"]
    job.run.search.mkdir(exist_ok=True)
    return Bench(job, SubnetEvaluator(job, EvaluationStore(job.run.evaluations), weights))


# -- a listed space: how many evaluations to how much of the true hypervolume? --


class Reached(Exception):
    """The highest level is reached: the rest of the search would show nothing."""


def space(arguments: argparse.Namespace) -> None:
    """Evaluations to 90, 95 and 99 % of the true hypervolume, for every algorithm."""
    structure = Job(Run(Path()), Recipe(model=arguments.checkpoint), weights=False).structure
    layers = range(len(structure.base.layers))
    kept = [*([i for i in layers if i != gone] for gone in layers), list(layers)]
    widths = [int(width) for width in arguments.widths.split(",")]
    bench = open_bench(arguments, {"ffn.*": widths, "depth": {"keep": kept}})
    everything = list(bench.job.space.architectures())
    scores = dict(zip(everything, bench.scores(everything), strict=True))
    costs = np.array([bench.cost(*row) for row in scores.items()])
    reference = costs.max(axis=0)
    whole = hypervolume(costs, reference)
    print(
        f"{len(scores):,} architectures, {len(non_dominated(costs))} on the true front; {bench.task} from "
        f"{min(scores.values()):.4f} to {max(scores.values()):.4f} on {bench.job.recipe.searching.limit} documents; "
        f"population {bench.job.recipe.searching.population}, {arguments.seeds} seeds\n"
    )
    print("| algorithm | " + " | ".join(f"{level:.0%}" for level in LEVELS) + " |\n" + "|---" * 4 + "|")
    curves = {}
    for name in arguments.algorithms.split(","):
        curves[name] = [climb(bench, name, seed, scores, reference, whole) for seed in range(arguments.seeds)]
        cells = [reached_cell([first_at(curve, level) for curve in curves[name]]) for level in LEVELS]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    if arguments.plot:
        longest = max(len(curve) for of_seeds in curves.values() for curve in of_seeds)
        levelled = {k: [c + [c[-1]] * (longest - len(c)) for c in v] for k, v in curves.items()}
        plot(arguments.plot, [("evaluations", {k: (range(1, longest + 1), v) for k, v in levelled.items()})], log=True)


def climb(
    bench: Bench,
    algorithm: str,
    seed: int,
    scores: dict[Architecture, float],
    reference: np.ndarray,
    whole: float,
) -> list[float]:
    """The share of the true hypervolume after each evaluation, until the highest level is reached."""
    front = np.empty((0, 2))
    curve: list[float] = []

    def measure(asked: Sequence[Architecture]) -> Iterator[tuple[Architecture, dict[str, float]]]:
        nonlocal front
        for architecture in asked:
            front = np.vstack([front, bench.cost(architecture, scores[architecture])])
            front = front[non_dominated(front)]
            curve.append(hypervolume(front, reference) / whole)
            if curve[-1] >= LEVELS[-1]:
                raise Reached
            yield architecture, {bench.task: scores[architecture]}

    with suppress(Reached):
        search(
            bench.job.space,
            bench.objectives,
            measure,
            algorithm=algorithm,
            evaluations=len(scores),
            population=bench.job.recipe.searching.population,
            seed=seed,
        )
    return curve


def first_at(curve: Sequence[float], level: float) -> int | None:
    """Evaluations after which a curve is at `level`, None where it never is."""
    return next((number for number, share in enumerate(curve, 1) if share >= level), None)


def reached_cell(found: Sequence[float | None]) -> str:
    """Median and range of evaluations over seeds; a seed that never got there counts as infinitely many."""
    numbers = sorted(float("inf") if n is None else n for n in found)
    if numbers[0] == float("inf"):
        return "never"
    median = float(np.median(numbers))
    shown = "never" if median == float("inf") else f"{median:.0f}"
    missed = sum(n is None for n in found)
    last = f"never ({missed} of {len(found)})" if missed else f"{numbers[-1]:.0f}"
    return f"{shown} ({numbers[0]:.0f} to {last})"


# -- a space too large to list: hypervolume against evaluations and seconds --


def fine(arguments: argparse.Namespace) -> None:
    """Hypervolume by evaluations and seconds, as a share of what all runs together reached."""
    bench = open_bench(arguments, "fine")
    names = arguments.algorithms.split(",")
    runs = {
        (name, seed): bench.search(name, seed, arguments.evaluations)
        for seed in range(arguments.seeds)
        for name in names
    }
    costs = {
        key: np.array([bench.cost(e.architecture, e.values[bench.task]) for e in run.evaluations])
        for key, run in runs.items()
    }
    union = np.vstack(list(costs.values()))
    reference = union.max(axis=0)
    whole = hypervolume(union, reference)
    marks = [m for m in (30, 60, 90, 120, 250) if m <= arguments.evaluations]
    print(
        f"{len({e.architecture for run in runs.values() for e in run.evaluations}):,} sub-networks measured on "
        f"{arguments.documents} documents of {bench.task}; population {bench.job.recipe.searching.population}, "
        f"{arguments.seeds} seeds\n"
    )
    heads = [f"{mark} evaluations" for mark in marks]
    print("| algorithm | " + " | ".join(heads) + " | seconds, of them searching |\n" + "|---" * (len(marks) + 2) + "|")
    by_evaluations: Curves = {}
    by_seconds: Curves = {}
    for name in names:
        shares, times, searching = [], [], []
        for seed in range(arguments.seeds):
            rows, run = costs[name, seed], runs[name, seed]
            shares.append([hypervolume(rows[: n + 1], reference) / whole for n in range(len(rows))])
            overhead = {g["generation"]: g["seconds"]["overhead"] / g["new"] for g in run.generations}
            spent = [bench.seconds(e.architecture) + overhead[e.generation] for e in run.evaluations]
            times.append(np.cumsum(spent))
            searching.append(sum(g["seconds"]["overhead"] for g in run.generations))
        cells = [median_cell([share[mark - 1] for share in shares], ".3f") for mark in marks]
        cells.append(f"{np.median([t[-1] for t in times]):.0f}, {np.median(searching):.1f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        by_evaluations[name] = (range(1, len(shares[0]) + 1), shares)
        by_seconds[name] = (np.median(times, axis=0), shares)
    if arguments.plot:
        plot(arguments.plot, [("evaluations", by_evaluations), ("seconds", by_seconds)], log=False)


def median_cell(values: Sequence[float], form: str) -> str:
    return f"{np.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


# -- what first looks and warm starts save --


def starts(arguments: argparse.Namespace) -> None:
    """Evaluations to shares of what all searches together reached: alone, with first looks, and from warm starts.

    The earlier run is one of the same model whose units are ordered by magnitude: another super-network. What proposers
    and the earlier run spent before the search began stands in a column of its own and counts as no evaluation.
    """
    bench = open_bench(arguments, "fine", **{"searching.screening": FIRST_LOOK})
    other_run = arguments.run.with_name(arguments.run.name + "-earlier")
    earlier_arguments = argparse.Namespace(**vars(arguments) | {"run": other_run})
    earlier = open_bench(earlier_arguments, "fine", **{"finetuning.ordering": "magnitude"})
    looking = {"screening": partial(bench.board.measure, fidelity="screening"), "share": FIRST_LOOK}
    proposed, beforehand = {}, {"an earlier run": f"{arguments.evaluations} evaluations"}
    for name in warm_starts():
        bench.job.recipe.searching.warm_start = [name]
        (bench.job.run.search / f"proposals-{name}.json").unlink(missing_ok=True)  # asked anew, to be timed
        began = time.monotonic()
        proposed[name] = proposals(bench.job)
        beforehand[name] = f"{time.monotonic() - began:.1f} s"

    def options(way: str, seed: int) -> dict[str, Any]:
        if way == "greedy":
            budget = int(GREEDY_SHARE * arguments.evaluations)
            population = bench.job.recipe.searching.population
            path = greedy_path(
                bench.job.space,
                bench.objectives,
                bench.board.measure,
                evaluations=budget,
                population=population,
                seed=seed,
            )
            return {"known": path}
        if way == "an earlier run":
            front = earlier.search("linas", seed + arguments.seeds, arguments.evaluations).front
            return {"warm_start": spread_over_sizes(bench.job, [e.architecture for e in front])}
        if way in warm_starts():
            return {"warm_start": proposed[way]}
        return looking if way == "first looks" else {}

    runs = {
        way: [
            bench.search("linas", seed, arguments.evaluations, **options(way, seed)) for seed in range(arguments.seeds)
        ]
        for way in ("nothing", "first looks", "greedy", *warm_starts(), "an earlier run")
    }
    everything = [run for of_seeds in runs.values() for run in of_seeds]
    union = np.vstack([_full_costs(bench, run) for run in everything])
    reference = union.max(axis=0)
    whole = hypervolume(union, reference)
    each = np.median([bench.seconds(e.architecture) for run in everything for e in run.evaluations if e.full])
    print(
        f"LINAS, {arguments.evaluations} evaluations, {arguments.seeds} seeds; {bench.task} on {arguments.documents} "
        f"documents, first looks on {FIRST_LOOK:.0%} of them; population {bench.job.recipe.searching.population}; "
        f"an evaluation takes {each:.2f} s\n"
    )
    heads = " | ".join(f"{level:.0%}" for level in LEVELS)
    print(f"| helped by | {heads} | at the end | beforehand, not counted |\n" + "|---" * 6 + "|")
    for way, of_seeds in runs.items():
        curves = [spent_curve(bench, run, reference, whole, way == "first looks") for run in of_seeds]
        reached = [[next((n for n, share in curve if share >= level), None) for curve in curves] for level in LEVELS]
        end = median_cell([curve[-1][1] for curve in curves], ".3f")
        cells = [way, *map(reached_cell, reached), end, beforehand.get(way, "")]
        print("| " + " | ".join(cells) + " |", flush=True)


def _full_costs(bench: Bench, run: SearchResult) -> np.ndarray:
    """Both objectives of everything that was measured in full, [n, 2]."""
    return np.array([bench.cost(e.architecture, e.values[bench.task]) for e in run.evaluations if e.full])


def spent_curve(
    bench: Bench, run: SearchResult, reference: np.ndarray, whole: float, looked: bool
) -> list[tuple[float, float]]:
    """After each full measurement: evaluations spent, first looks among them by their share of the documents, and the
    share of the hypervolume."""
    costs, spent = _full_costs(bench, run), 0.0
    curve: list[tuple[float, float]] = []
    for generation, asked in groupby(run.evaluations, key=lambda e: e.generation):
        members = list(asked)
        spent += FIRST_LOOK * len(members) if looked and generation else 0
        for _ in filter(lambda e: e.full, members):
            spent += 1
            curve.append((spent, hypervolume(costs[: len(curve) + 1], reference) / whole))
    return curve


# -- is what is searched what ships? --


def ranks(arguments: argparse.Namespace) -> None:
    """Rank correlation of scores inside the super-network with scores after slicing, and after healing too."""
    bench = open_bench(arguments, "fine")
    job = bench.job
    full = job.structure.parameters(job.structure.base)
    genomes = sample_sizes(job.space, np.random.default_rng(0), arguments.networks, 0.5 * full, 0.95 * full)
    architectures = job.space.decode_all(genomes)
    inside = bench.scores(architectures)
    job.threads(scoring=False)
    model, base = job.load_supernet().model.float(), job.load_base(torch.float32)
    blocks = training_blocks(job, arguments.heal_tokens)
    job.recipe.healing.tokens = arguments.heal_tokens
    settings = job.train_settings(job.recipe.healing, blocks.length, seed=0)
    sliced, healed = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, architecture in enumerate(architectures):
            network = extract(model, job.structure, architecture)
            sliced.append(scored(bench, network))
            state = Path(folder) / f"{number}.safetensors"
            heal(network, base, blocks, settings, state=state, accelerator=Accelerator(cpu=True))
            healed.append(scored(bench, network.eval()))
    sizes = np.array([job.structure.parameters(a) / full for a in architectures])
    print(
        f"{len(architectures)} sub-networks of {sizes.min():.2f} to {sizes.max():.2f} of the parameters; super-network "
        f"fine-tuned on {arguments.train_tokens:,} tokens, each healed on {arguments.heal_tokens:,}; {bench.task} on "
        f"{arguments.documents} documents\n"
    )
    print("| scores compared | Kendall tau | Spearman rho | the same, size regressed out |\n" + "|---" * 4 + "|")
    for what, first, second in (
        ("in the super-network, sliced", inside, sliced),
        ("in the super-network, healed", inside, healed),
    ):
        left, right = beyond_size(sizes, first), beyond_size(sizes, second)
        print(
            f"| {what} | {kendalltau(first, second).statistic:.3f} | {spearmanr(first, second).statistic:.3f} | "
            f"{kendalltau(left, right).statistic:.3f}, {spearmanr(left, right).statistic:.3f} |"
        )
    worst = max(abs(a - b) for a, b in zip(inside, sliced, strict=True))
    print(f"\nLargest difference between a score in the super-network and after slicing: {worst:.2g}")
    print(f"Median score in the super-network {np.median(inside):.3f}, healed {np.median(healed):.3f}")


def scored(bench: Bench, network: Any) -> float:
    bench.job.threads(scoring=True)
    with torch.no_grad():
        return bench.job.scorer(network).score("search", bench.job.recipe.searching.limit)[bench.task].value


def beyond_size(sizes: np.ndarray, scores: Sequence[float]) -> np.ndarray:
    """What a straight line through size does not explain: larger networks rank higher in any case."""
    return np.array(scores) - np.polyval(np.polyfit(sizes, scores, 1), sizes)


# -- overhead --


def overhead(arguments: argparse.Namespace) -> None:
    """The share of a search's time that is not evaluation; what the store knew counts with the time it once took."""
    bench = open_bench(arguments, "fine")
    print("| algorithm | evaluations | evaluating, s | all else, s | share |\n" + "|---" * 5 + "|")
    for name in arguments.algorithms.split(","):
        result = bench.search(name, 0, arguments.evaluations)
        evaluating = sum(bench.seconds(e.architecture) for e in result.evaluations)
        other = sum(g["seconds"]["overhead"] for g in result.generations)
        share = other / (evaluating + other)
        print(f"| {name} | {len(result.evaluations)} | {evaluating:.0f} | {other:.1f} | {share:.1%} |", flush=True)


# -- the options --

Curves = dict[str, tuple[Sequence[float], Sequence[Sequence[float]]]]
"""By algorithm: values on the horizontal axis, and a curve of hypervolume for each seed."""
Panel = tuple[str, Curves]
"""A name for the horizontal axis, and what is drawn over it."""


def plot(file: Path, panels: Sequence[Panel], log: bool) -> None:
    """Median and quartiles over seeds, one panel for each horizontal axis."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "search", "svg.fonttype": "none"}  # the same file every time, and small
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.4 * len(panels), 4), squeeze=False, sharey=True)
    for axis, (name, curves) in zip(axes[0], panels, strict=True):
        for label, (x, shares) in curves.items():
            steps = np.geomspace if log else np.linspace
            at = np.unique(steps(1, len(x), 60).astype(int)) - 1  # no finer than the eye, so that the file is small
            low, middle, high = np.quantile(np.array(shares)[:, at], [0.25, 0.5, 0.75], axis=0)
            (line,) = axis.plot(np.array(x)[at], middle, label=label)
            axis.fill_between(np.array(x)[at], low, high, alpha=0.15, color=line.get_color())
        axis.set(xlabel=name, xscale="log" if log else "linear", ylim=(0.8, 1.005))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("share of the hypervolume")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="part", required=True, metavar="part")
    parts = {}
    for part in (space, fine, starts, ranks, overhead):
        added = parts[part] = subparsers.add_parser(part.__name__, description=part.__doc__)
        added.set_defaults(measure=part)
        added.add_argument("--checkpoint", default=str(demo.MODEL))
        added.add_argument("--data", help="training text; default: generated")
        added.add_argument("--include-path", default=str(demo.TASKS))
        added.add_argument("--task", default=demo.TASK_NAMES[0])
        added.add_argument("--documents", type=int, default=60)
        added.add_argument("--train-tokens", type=int, default=0, help="for the super-network; 0: ordered, not trained")
        added.add_argument("--run", type=Path, help="default: a temporary folder's, by part, checkpoint and tokens")
    parts[space].add_argument("--widths", default="192,384", help="FFN widths")
    parts[ranks].add_argument("--heal-tokens", type=int, default=60_000, help="for each sub-network")
    parts[ranks].add_argument("--networks", type=int, default=20, help="how many")
    for part, names in ((space, algorithms()), (fine, ("linas", "nsga2", "random")), (overhead, ("linas",))):
        parts[part].add_argument("--algorithms", default=",".join(names), help="comma-separated")
    for part, seeds in ((space, 10), (fine, 3), (starts, 3)):
        parts[part].add_argument("--seeds", type=int, default=seeds)
    for part, evaluations in ((fine, 120), (starts, 120), (overhead, 250)):
        parts[part].add_argument("--evaluations", type=int, default=evaluations)
    for part in (space, fine):
        parts[part].add_argument("--plot", type=Path, help="an SVG file to draw")
    arguments = parser.parse_args()
    if arguments.run is None:
        name = f"search-{arguments.part}-{Path(arguments.checkpoint).resolve().name}-{arguments.train_tokens}"
        arguments.run = Path(tempfile.gettempdir()) / name
    arguments.measure(arguments)


if __name__ == "__main__":
    main()
