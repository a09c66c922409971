"""What the search is worth, in five parts; each prints the Markdown table of docs/results.md.

    python -m benchmarks.search space|fine|starts|ranks|overhead

`space` and `fine` can draw their plots. Scores go into `--run`, a run of the product, so that a second call measures
none again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from scipy.stats import kendalltau, spearmanr
from torch import nn

from benchmarks.common import add_options, make_parser, median_range, print_header, print_row, timed
from compressor import demo, pipeline
from compressor.inputs import training_blocks
from compressor.job import Job
from compressor.recipe import Recipe
from compressor.recipe_file import read_recipe
from compressor.run import Run
from compressor.stages.searching import GREEDY_SHARE
from compressor.stages.subnet_scores import SubnetEvaluator
from compressor.stages.warm_start import proposals, spread_over_sizes
from evals.warm_starts import warm_starts
from search.algorithms import algorithms
from search.objectives import Objective, computed
from search.pareto import hypervolume, non_dominated
from search.run import Measure, SearchResult, greedy_path, search
from search.sampling import sample_sizes
from search.store import EvaluationStore
from supernet.architecture import Architecture
from supernet.slicing import extract
from supernet.training.supernet_training import heal

LEVELS = (0.90, 0.95, 0.99)
SCREENING = 0.25
"""Share of the documents that candidates are screened on."""


class SearchedRun:
    """The benchmark's run, made where it is not there yet, to be searched by size and one score. `recipe` are further
    keys of its recipe."""

    def __init__(self, arguments: argparse.Namespace, space: str | dict[str, Any], **recipe: object) -> None:
        arguments.run.parent.mkdir(parents=True, exist_ok=True)
        text = arguments.run.with_name(arguments.run.name + ".jsonl")
        if arguments.data is None:
            demo.training_text(text, n_documents=6000, seed=1)
        keys = {
            "model": arguments.checkpoint,
            "data": arguments.data or str(text),
            "tasks": arguments.task,
            "include_path": arguments.include_path,
            "space": space,
            "finetuning.tokens": arguments.train_tokens,
            "finetuning.batch_size": 4,
            "searching.limit": arguments.documents,
            "device": "cpu",
        }
        self.job = pipeline.start(read_recipe(None, keys | recipe), arguments.run)
        weights = pipeline.finetune(self.job)["weights"]
        self.job.run.search.mkdir(exist_ok=True)
        self.evaluator = SubnetEvaluator(self.job, EvaluationStore(self.job.run.evaluations), weights)
        self.population = self.job.recipe.searching.population
        ((self.task, task),) = self.job.tasks.tasks.items()
        score = Objective(self.task, "max" if task.higher_is_better else "min")
        self.objectives = [computed(self.job.structure)["parameters"], score]

    def cost(self, architecture: Architecture, score: float) -> list[float]:
        """Both objectives, less is better."""
        return [self.job.structure.parameters(architecture), self.objectives[1].cost(score)]

    def costs(self, result: SearchResult) -> np.ndarray:
        """Both objectives of everything that was measured in full, [n, 2]."""
        return np.array([self.cost(e.architecture, e.values[self.task]) for e in result.evaluations if e.full])

    def scores(self, architectures: Sequence[Architecture]) -> list[float]:
        """The task's score of each in the super-network, on the search documents."""
        scores = dict(self.evaluator.measure(architectures))
        return [scores[architecture][self.task] for architecture in architectures]

    def score(self, network: nn.Module) -> float:
        """The task's score of a standalone network, on the same documents."""
        self.job.threads(scoring=True)
        with torch.no_grad():
            return self.job.scorer(network).score("search", self.job.recipe.searching.limit)[self.task].value

    def search(
        self, algorithm: str, seed: int, evaluations: int, measure: Measure | None = None, **options: Any
    ) -> SearchResult:
        """A search as shipped, with evaluations from the store where it has them; `search.run.search` has `options`."""
        options |= {"algorithm": algorithm, "evaluations": evaluations, "population": self.population, "seed": seed}
        return search(self.job.space, self.objectives, measure or self.evaluator.measure, **options)

    def seconds(self, architecture: Architecture) -> float:
        """What measuring it took, whenever that was."""
        name, documents = self.evaluator.keys["full"][self.task].place
        rows = self.evaluator.store.all(weights=self.evaluator.weights, task=name, documents=documents)
        row = next((row for measured, row in rows if measured == architecture), None)
        assert row is not None
        return row.seconds


class HypervolumeShare:
    """The share of the hypervolume of all `costs`, [n, 2], that some of them reach. Reference: the worst of each."""

    def __init__(self, costs: np.ndarray) -> None:
        self.reference = costs.max(axis=0)
        self.whole = hypervolume(costs, self.reference)

    def __call__(self, costs: np.ndarray) -> float:
        return hypervolume(costs, self.reference) / self.whole


def first_at(curve: Iterable[tuple[float, float]], level: float) -> float:
    """Evaluations after which a curve of (evaluations, share) is at `level`; infinity where it never is."""
    return next((evaluations for evaluations, share in curve if share >= level), float("inf"))


def reached_cell(evaluations: Sequence[float]) -> str:
    """Median and range of evaluations over seeds; a seed that never got there counts as infinitely many."""
    missed = evaluations.count(float("inf"))
    if missed == len(evaluations):
        return "never"
    most = f"never ({missed} of {len(evaluations)})" if missed else f"{max(evaluations):.0f}"
    return f"{np.median(evaluations):.0f} ({min(evaluations):.0f} to {most})".replace("inf", "never")


class Reached(Exception):
    """The highest level is reached: the rest of the search would show nothing."""


def space(arguments: argparse.Namespace) -> None:
    """Evaluations to 0.90, 0.95 and 0.99 of the true hypervolume of a listed space, for every algorithm."""
    structure = Job(Run(Path()), Recipe(model=arguments.checkpoint), weights=False).structure
    layers = range(len(structure.base.layers))
    kept = [*([i for i in layers if i != gone] for gone in layers), list(layers)]
    widths = [int(width) for width in arguments.widths.split(",")]
    run = SearchedRun(arguments, {"ffn.*": widths, "depth": {"keep": kept}})
    everything = list(run.job.space.architectures())
    scores = dict(zip(everything, run.scores(everything), strict=True))
    costs = np.array([run.cost(*row) for row in scores.items()])
    share = HypervolumeShare(costs)
    print(
        f"{len(scores):,} architectures, {len(non_dominated(costs))} on the true front; {run.task} from "
        f"{min(scores.values()):.4f} to {max(scores.values()):.4f} on {arguments.documents} documents; "
        f"population {run.population}, {arguments.seeds} seeds\n"
    )
    print_header("algorithm", *(f"{level:.0%}" for level in LEVELS))
    curves = {}
    for name in arguments.algorithms.split(","):
        curves[name] = [climb(run, name, seed, scores, share) for seed in range(arguments.seeds)]
        print_row(name, *(reached_cell([first_at(enumerate(c, 1), lv) for c in curves[name]]) for lv in LEVELS))
    if arguments.plot:
        longest = max(len(curve) for of_seeds in curves.values() for curve in of_seeds)
        padded = {k: [c + [c[-1]] * (longest - len(c)) for c in v] for k, v in curves.items()}
        plot(arguments.plot, {"evaluations": {k: (range(1, longest + 1), v) for k, v in padded.items()}}, log=True)


def climb(
    run: SearchedRun, algorithm: str, seed: int, scores: Mapping[Architecture, float], share: HypervolumeShare
) -> list[float]:
    """The share of the true hypervolume after each evaluation, until the highest level is reached."""
    front = np.empty((0, 2))
    curve: list[float] = []

    def measure(asked: Sequence[Architecture]) -> Iterator[tuple[Architecture, dict[str, float]]]:
        nonlocal front
        for architecture in asked:
            front = np.vstack([front, run.cost(architecture, scores[architecture])])
            front = front[non_dominated(front)]
            curve.append(share(front))
            if curve[-1] >= LEVELS[-1]:
                raise Reached
            yield architecture, {run.task: scores[architecture]}

    with suppress(Reached):
        run.search(algorithm, seed, len(scores), measure=measure)
    return curve


def fine(arguments: argparse.Namespace) -> None:
    """Hypervolume by evaluations and seconds in the space `fine`, as a share of what all runs together reached."""
    run = SearchedRun(arguments, "fine")
    names, seeds = arguments.algorithms.split(","), range(arguments.seeds)
    results = {(name, seed): run.search(name, seed, arguments.evaluations) for seed in seeds for name in names}
    share = HypervolumeShare(np.vstack([run.costs(result) for result in results.values()]))
    marks = [m for m in (30, 40, 60, 90, 120, 250) if m <= arguments.evaluations]
    print(
        f"{len({e.architecture for result in results.values() for e in result.evaluations}):,} sub-networks measured "
        f"on {arguments.documents} documents of {run.task}; population {run.population}, {arguments.seeds} seeds\n"
    )
    print_header("algorithm", *(f"{mark} evaluations" for mark in marks), "seconds, of them searching")
    panels: dict[str, Curves] = {"evaluations": {}, "seconds": {}}
    for name in names:
        shares, times, searching = [], [], []
        for result in (results[name, seed] for seed in seeds):
            costs = run.costs(result)
            shares.append([share(costs[: n + 1]) for n in range(len(costs))])
            overhead = {g["generation"]: g["seconds"]["overhead"] / g["new"] for g in result.generations}
            spent = [run.seconds(e.architecture) + overhead[e.generation] for e in result.evaluations]
            times.append(np.cumsum(spent))
            searching.append(sum(g["seconds"]["overhead"] for g in result.generations))
        seconds = f"{np.median([t[-1] for t in times]):.0f}, {np.median(searching):.1f}"
        print_row(name, *(median_range([curve[mark - 1] for curve in shares]) for mark in marks), seconds)
        panels["evaluations"][name] = (range(1, len(shares[0]) + 1), shares)
        panels["seconds"][name] = (np.median(times, axis=0), shares)
    if arguments.plot:
        plot(arguments.plot, panels, log=False)


def starts(arguments: argparse.Namespace) -> None:
    """Evaluations to shares of what all searches together reached: alone, with screening, and from warm starts.

    The earlier run is one of the same model whose units are ordered by magnitude: another super-network. What proposers
    and the earlier run spent before the search began stands in the last column and counts as no evaluation.
    """
    run = SearchedRun(arguments, "fine", **{"searching.screening": SCREENING})
    other = argparse.Namespace(**vars(arguments) | {"run": arguments.run.with_name(arguments.run.name + "-earlier")})
    earlier = SearchedRun(other, "fine", **{"finetuning.ordering": "magnitude"})
    screening = {"screening": partial(run.evaluator.measure, fidelity="screening"), "share": SCREENING}
    proposed, beforehand = {}, {"an earlier run": f"{arguments.evaluations} evaluations"}
    for name in warm_starts():
        run.job.recipe.searching.warm_start = [name]
        (run.job.run.search / f"proposals-{name}.json").unlink(missing_ok=True)  # asked anew, to be timed
        proposed[name], seconds = timed(partial(proposals, run.job))
        beforehand[name] = f"{seconds:.1f} s"

    def options(way: str, seed: int) -> dict[str, Any]:
        if way == "greedy":
            inputs = run.job.space, run.objectives, run.evaluator.measure
            budget = int(GREEDY_SHARE * arguments.evaluations)
            return {"known": greedy_path(*inputs, evaluations=budget, population=run.population, seed=seed)}
        if way == "an earlier run":
            front = earlier.search("linas", seed + arguments.seeds, arguments.evaluations).front
            return {"warm_start": spread_over_sizes(run.job, [e.architecture for e in front])}
        if way in proposed:
            return {"warm_start": proposed[way]}
        return screening if way == "screening" else {}

    results = {
        way: [run.search("linas", seed, arguments.evaluations, **options(way, seed)) for seed in range(arguments.seeds)]
        for way in ("nothing", "screening", "greedy", *warm_starts(), "an earlier run")
    }
    everything = [result for of_seeds in results.values() for result in of_seeds]
    share = HypervolumeShare(np.vstack([run.costs(result) for result in everything]))
    each = np.median([run.seconds(e.architecture) for result in everything for e in result.evaluations if e.full])
    print(
        f"LINAS, {arguments.evaluations} evaluations, {arguments.seeds} seeds; {run.task} on {arguments.documents} "
        f"documents, screening on {SCREENING:.0%} of them; population {run.population}; an evaluation takes "
        f"{each:.2f} s\n"
    )
    print_header("helped by", *(f"{level:.0%}" for level in LEVELS), "at the end", "beforehand, not counted")
    for way, of_seeds in results.items():
        curves = [spent_curve(run, result, share, way == "screening") for result in of_seeds]
        reached = [reached_cell([first_at(curve, level) for curve in curves]) for level in LEVELS]
        print_row(way, *reached, median_range([curve[-1][1] for curve in curves]), beforehand.get(way, ""))


def spent_curve(
    run: SearchedRun, result: SearchResult, share: HypervolumeShare, screened: bool
) -> list[tuple[float, float]]:
    """After each full measurement: evaluations spent, screenings among them by their share of the documents, and the
    share of the hypervolume."""
    costs, spent = run.costs(result), 0.0
    curve: list[tuple[float, float]] = []
    for generation, asked in groupby(result.evaluations, key=lambda e: e.generation):
        members = list(asked)
        spent += SCREENING * len(members) if screened and generation else 0
        for _ in filter(lambda e: e.full, members):
            spent += 1
            curve.append((spent, share(costs[: len(curve) + 1])))
    return curve


def ranks(arguments: argparse.Namespace) -> None:
    """Rank correlation of scores inside the super-network with scores after slicing, and after healing too."""
    run = SearchedRun(arguments, "fine")
    job = run.job
    full = job.structure.parameters(job.structure.base)
    genomes = sample_sizes(job.space, np.random.default_rng(0), arguments.networks, 0.5 * full, 0.95 * full)
    architectures = job.space.decode_all(genomes)
    inside = run.scores(architectures)
    job.threads(scoring=False)
    model, base = job.load_supernet().model.float(), job.load_base(torch.float32)
    blocks = training_blocks(job, arguments.heal_tokens)
    job.recipe.healing.tokens = arguments.heal_tokens
    settings = job.train_settings(job.recipe.healing, blocks.length, seed=0, repaired=False)
    sliced, healed = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, architecture in enumerate(architectures):
            network = extract(model, job.structure, architecture)
            sliced.append(run.score(network))
            state = Path(folder) / f"{number}.safetensors"
            heal(network, base, blocks, settings, state=state, accelerator=Accelerator(cpu=True))
            healed.append(run.score(network.eval()))
    sizes = np.array([job.structure.parameters(a) / full for a in architectures])
    print(
        f"{len(architectures)} sub-networks of {sizes.min():.2f} to {sizes.max():.2f} of the parameters; super-network "
        f"fine-tuned on {arguments.train_tokens:,} tokens, each healed on {arguments.heal_tokens:,}; {run.task} on "
        f"{arguments.documents} documents\n"
    )
    print_header("scores compared", "Kendall tau", "Spearman rho", "the same, size regressed out")
    for shipped, scores in (("sliced", sliced), ("healed", healed)):
        pairs = (inside, scores), (beyond_size(sizes, inside), beyond_size(sizes, scores))
        plain, beyond = ([f"{rank(*pair).statistic:.3f}" for rank in (kendalltau, spearmanr)] for pair in pairs)
        print_row(f"in the super-network, {shipped}", *plain, ", ".join(beyond))
    worst = max(abs(a - b) for a, b in zip(inside, sliced, strict=True))
    print(f"\nLargest difference between a score in the super-network and after slicing: {worst:.2g}")
    print(f"Median score in the super-network {np.median(inside):.3f}, healed {np.median(healed):.3f}")


def beyond_size(sizes: np.ndarray, scores: Sequence[float]) -> np.ndarray:
    """What a straight line through size does not explain: larger networks rank higher in any case."""
    return np.array(scores) - np.polyval(np.polyfit(sizes, scores, 1), sizes)


def overhead(arguments: argparse.Namespace) -> None:
    """The share of a search's time that is not evaluation; what the store knew counts with the time it once took."""
    run = SearchedRun(arguments, "fine")
    print_header("algorithm", "evaluations", "evaluating, s", "all else, s", "share")
    for name in arguments.algorithms.split(","):
        result = run.search(name, 0, arguments.evaluations)
        evaluating = sum(run.seconds(e.architecture) for e in result.evaluations)
        other = sum(g["seconds"]["overhead"] for g in result.generations)
        share = other / (evaluating + other)
        print_row(name, str(len(result.evaluations)), f"{evaluating:.0f}", f"{other:.1f}", f"{share:.1%}")


Curves = dict[str, tuple[Sequence[float], Sequence[Sequence[float]]]]
"""By algorithm: values on the horizontal axis, and a curve of hypervolume for each seed."""


def plot(file: Path, panels: Mapping[str, Curves], log: bool) -> None:
    """Median and quartiles over seeds, one panel for each horizontal axis, by its name."""
    import matplotlib  # slow to import, and only for plots

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "search", "svg.fonttype": "none"}  # the same file every time, and small
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.4 * len(panels), 4), squeeze=False, sharey=True)
    for axis, (name, curves) in zip(axes[0], panels.items(), strict=True):
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
    parser = make_parser(__doc__)
    subparsers = parser.add_subparsers(dest="part", required=True, metavar="part")
    svg = (Path, "an SVG file to draw")
    parts: dict[Callable[[argparse.Namespace], None], dict[str, object]] = {
        space: {"algorithms": ",".join(algorithms()), "widths": ("192,384", "FFN widths"), "seeds": 10, "plot": svg},
        fine: {"algorithms": "linas,ehvi,nsga2,random", "seeds": 3, "evaluations": 120, "plot": svg},
        starts: {"seeds": 3, "evaluations": 120},
        ranks: {"heal_tokens": (60_000, "for each sub-network"), "networks": (20, "how many")},
        overhead: {"algorithms": "linas", "evaluations": 250},
    }
    shared = {
        "task": demo.TASK_NAMES[0],
        "documents": 60,
        "train_tokens": (0, "for the super-network; 0: ordered, not trained"),
        "run": (Path, "default: a temporary folder's, by part, checkpoint and tokens"),
    }
    for part, options in parts.items():
        first_line, *_ = (part.__doc__ or "").splitlines()
        added = subparsers.add_parser(part.__name__, description=part.__doc__, help=first_line)
        added.set_defaults(measure=part)
        add_options(added, "checkpoint", "data", "include_path", **shared, **options)
    arguments = parser.parse_args()
    if arguments.run is None:
        name = f"search-{arguments.part}-{Path(arguments.checkpoint).resolve().name}-{arguments.train_tokens}"
        arguments.run = Path(tempfile.gettempdir()) / name
    arguments.measure(arguments)


if __name__ == "__main__":
    main()
