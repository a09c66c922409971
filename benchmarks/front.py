"""Ours by each preference beside the baselines at one size, quality and decode speed; and what finalists gain.

    python -m benchmarks.front [--checkpoint DIR --data FILE.jsonl --include-path DIR --tasks A,B] [--size 0.67]
        [--seeds 3] [--baselines A,B] [--finalists 2,4] [--runs DIR] [--output FILE.json] [--plot FILE.svg]

For every seed one run: fine-tuned, searched, picked by each preference, every network healed on equal tokens. Decode
speed is over the base's, timed in turn with it, in transformers and (where it holds the network) in llama.cpp. Not
worse: in how many seeds the paired bootstrap over documents does not put that network of ours below the baseline.
Beyond: whether one of ours is not larger, at least as fast within 3 % in transformers, and in no seed worse. The second
table heals finalists: the same tokens in all. With `--runs`, what was made there is gone on with.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.common import Measurements, make_parser, mean_spread, print_header, print_row
from benchmarks.jobs import speeds_in_llama_cpp
from compressor import demo, pipeline
from compressor.inputs import calibration_batches, training_blocks
from compressor.job import Job
from compressor.recipe import Recipe
from compressor.stages.comparing import prove, run_method, score_base, time_beside_base
from compressor.stages.comparison_methods import Method, SizeComparison, published
from compressor.stages.comparison_rows import FinishedRow, comparison_rows
from compressor.stages.measuring import load_package
from compressor.stages.picks import PickRecord, cut_out
from compressor.stages.repairing import pick_variants
from evals.baselines import Cut, baselines
from export.report.comparison import OURS
from search.preference import PREFERENCES
from supernet.architecture import Architecture
from supernet.common.errors import RequestError
from supernet.common.progress import say
from supernet.slicing import extract

TURNS = 7
"""How often a network and the base are timed in turn in llama.cpp, where the smallest networks take milliseconds."""
AS_FAST = 0.97
"""Share of a baseline's speed that counts as fast as it."""


def main() -> None:
    parser = make_parser(
        __doc__,
        "checkpoint",
        "data",
        "include_path",
        "output",
        "minutes",
        tasks=(",".join(demo.TASK_NAMES), "lm-eval tasks, comma-separated"),
        size=("0.67", "the most parameters, as in --max-params"),
        seeds=(1, "runs, each from another seed"),
        baselines=(",".join(baselines()), "published methods, comma-separated; none: an empty word"),
        finalists=("2,4", "numbers of finalists, comma-separated; none: an empty word"),
        train_tokens=(34_000, "of the one fine-tuning"),
        heal_tokens=(90_000, "of healing"),
        evaluations=(60, "of the search"),
        limit=(60, "documents per task in the search"),
        batch=(4, "sequences in a step"),
        runs=(Path, "folder of the runs; default: a temporary one"),
        plot=(Path, "an SVG file to draw"),
    )
    arguments = parser.parse_args()
    measurements = Measurements(arguments.output, arguments.minutes)
    # Equal settings are the same measurement; where and for how long it is kept is none of them.
    kept = {"output", "minutes", "runs", "plot", "seeds", "baselines", "finalists"}
    settings = "; ".join(f"{name} {value}" for name, value in vars(arguments).items() if name not in kept)
    results = measurements.by_settings.setdefault(settings, {})
    with folder_of(arguments.runs) as folder:
        names = [name for name in arguments.baselines.split(",") if name]
        counts = [int(word) for word in arguments.finalists.split(",") if word]
        for seed in range(arguments.seeds):
            job = partial(run_of, arguments, folder, seed)
            measurements.measure(results, f"{seed} {','.join(names)}", partial(compared, job, names))
            for count in [1, *counts] if counts else []:
                key = f"{seed} finalists {count}"
                measurements.measure(results, key, partial(finalists, job, count))
    seeds = [row for key, row in results.items() if key.split()[1:] == [",".join(names)][: len(names)]]
    by_count: dict[int, list[dict[str, Any]]] = {}
    for key, row in results.items():
        if key.split()[1:2] == ["finalists"]:
            by_count.setdefault(int(key.split()[2]), []).append(row)
    if seeds:
        print_front(seeds)
        if arguments.plot:
            plot(arguments.plot, seeds)
    if by_count:
        print_finalists(by_count)


@contextmanager
def folder_of(named: Path | None) -> Iterator[Path]:
    """The folder of the runs; a temporary one where none is named."""
    if named is not None:
        named.mkdir(parents=True, exist_ok=True)
        yield named
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def run_of(arguments: argparse.Namespace, folder: Path, seed: int) -> Job:
    """The run of a seed, fine-tuned and searched."""
    recipe = Recipe.model_validate(settings_of(arguments, arguments.size, folder, seed))
    path = folder / f"seed-{seed}"
    job = pipeline.start(recipe, path)
    pipeline.finetune(job)
    pipeline.search(job)
    return job


def settings_of(arguments: argparse.Namespace, size: str, folder: Path, seed: int) -> dict[str, Any]:
    """The recipe of a run for one size; its text, where none is given, is written into `folder`."""
    text = folder / "text.jsonl"
    if arguments.data is None and not text.is_file():
        demo.training_text(text, 6000, seed=1)
    return {
        "model": arguments.checkpoint,
        "data": arguments.data or str(text),
        "tasks": arguments.tasks,
        "include_path": arguments.include_path,
        "targets": {"max_params": size},
        "finetuning": {"tokens": arguments.train_tokens, "batch_size": arguments.batch},
        "searching": {"evaluations": arguments.evaluations, "population": 15, "limit": arguments.limit},
        "healing": {"tokens": arguments.heal_tokens},
        "effort": "quick",
        "device": "cpu",
        "seed": seed,
    }


def picked(job: Job, preference: str, count: int = 1) -> PickRecord:
    """The pick by a preference, and with so many finalists."""
    job.recipe.prefer = preference  # type: ignore[assignment]
    job.recipe.healing.finalists = count
    return pipeline.pick(job)[0]


def compared(run: Callable[[], Job], names: list[str]) -> dict[str, Any]:
    """Ours by each preference and the baselines: what each is, its speeds, and how sure the differences are."""
    job = run()
    # 1. Make, heal and score them.
    picks = {preference: Architecture.from_dict(picked(job, preference)["architecture"]) for preference in PREFERENCES}
    total = (job.recipe.finetuning.tokens or 0) + (job.recipe.healing.tokens or 0)
    long, short = training_blocks(job, total), training_blocks(job, job.recipe.healing.tokens or 0)
    base, calibration = job.load_base(), tuple(calibration_batches(job, long))
    job.run.comparison.mkdir(exist_ok=True)
    score_base(job, base)
    size = job.recipe.targets.max_params[0]
    comparison = SizeComparison(job, size, picks["quality"], job.load_supernet(), base, calibration, long)
    files: dict[str, Path] = {}
    same = {architecture: preference for preference, architecture in reversed(picks.items())}  # made and healed once
    for preference, architecture in picks.items():
        if same[architecture] != preference:
            continue
        method = Method(
            named(preference), f"ours, {preference} preferred", cut_to(architecture), trained=True, repaired=True
        )
        (files[method.name],) = run_method(comparison, method, 1, job.recipe.healing.tokens or 0, short)
    for name in names:
        try:
            (files[name],) = run_method(comparison, published(baselines()[name]), 1, total, long)
        except RequestError as error:
            say(f"{name} is left out: {error}")
    prove(job, list(files.values()))
    # 2. Time them beside the base.
    time_beside_base(job, base, list(files.values()))
    speeds = {name: in_llama_cpp(job, base, file) for name, file in files.items()}
    # 3. How sure the differences are, ours by each preference against every other.
    sure = {
        preference: judged(job, list(files.values()), named(same[architecture]))
        for preference, architecture in picks.items()
    }
    rows: dict[str, Any] = {}
    for name, file in files.items():
        row = FinishedRow.read(file).row
        assert row.speed is not None and row.base_speed is not None
        rows[name] = {
            "params": row.params / job.structure.parameters(job.structure.base),
            "quality": row.quality,
            "unhealed": row.quality_before_healing,
            "transformers": row.speed.decode_tps / row.base_speed.decode_tps,
            "llama.cpp": speeds[name],
            "worse": {preference: sure[preference].get(name) for preference in PREFERENCES},
        }
    return {named(preference): rows[named(same[architecture])] for preference, architecture in picks.items()} | rows


def named(preference: str) -> str:
    """The row of a preference: the one of quality is what the others are judged against first."""
    return OURS if preference == "quality" else f"{OURS}-{preference}"


def cut_to(architecture: Architecture) -> Any:
    """Makes the sub-network of the fine-tuned super-network of this architecture."""

    def make(comparison: SizeComparison, seed: int) -> Cut:
        variants = pick_variants(comparison.job, architecture, comparison.supernet)
        return extract(comparison.supernet.model, comparison.job.structure, architecture, variants), architecture

    return make


def judged(job: Job, files: list[Path], ours: str) -> dict[str, bool]:
    """Whether `ours` is worse than each other row by more than the choice of documents explains."""
    before = {file: FinishedRow.read(file) for file in files}
    try:
        for file, finished in before.items():  # what is called ours is what all are judged against
            name = finished.row.method
            finished.with_row(method=OURS if name == ours else "ours-quality" if name == OURS else name).write(file)
        rows = comparison_rows(job)
    finally:
        for file, finished in before.items():
            finished.write(file)
    return {row.method: row.ours_minus_this.meaning == "worse" for row in rows if row.ours_minus_this is not None}


def in_llama_cpp(job: Job, base: Any, file: Path) -> float | None:
    """Decode speed over the base's in llama.cpp, both timed in turn; None where it does not hold the network."""
    row = FinishedRow.read(file).row
    assert row.speed is not None
    work = {"prompt": row.speed.prompt, "new": row.speed.new, "threads": row.speed.threads or 1}
    assert row.architecture is not None
    network = load_package(job.run.path / row.path, job.compute_dtype, job.device)
    both = [(base, job.structure.base, "gguf"), (network, row.architecture, "gguf")]
    try:
        turns = speeds_in_llama_cpp(job, both, TURNS, **work)
    except RequestError as error:
        say(f"{row.method} is not timed in llama.cpp: {error}")
        return None
    return median(speed.decode_tps / of_base.decode_tps for of_base, speed in turns)


def finalists(run: Callable[[], Job], count: int) -> dict[str, Any]:
    """What healing `count` finalists makes of the pick, with equal tokens in all."""
    job = run()
    row = picked(job, "quality", count)
    (entry,) = pipeline.export(job)
    return {
        "candidates": min(count, len(row["finalists"])),
        "changed": entry.architecture != cut_out(row),
        "quality": entry.quality,
        "loss": entry.held_out_loss,
    }


def print_front(seeds: list[dict[str, Any]]) -> None:
    """One row for each network, the means over seeds and their spread."""
    rows = {name: [seed[name] for seed in seeds if name in seed] for name in dict.fromkeys(n for s in seeds for n in s)}
    own = [named(preference) for preference in PREFERENCES]
    columns = ["transformers, base 1", "llama.cpp, base 1"]
    verdicts = [f"{preference} not worse" for preference in PREFERENCES]
    print_header("network", "share", "quality", "unhealed", *columns, *verdicts, "beyond", right_from=1)
    for name, measured in rows.items():
        speeds = [row["llama.cpp"] for row in measured if row["llama.cpp"] is not None]
        cells = [
            mean_spread([row["params"] for row in measured]),
            mean_spread([row["quality"] for row in measured]),
            mean_spread([row["unhealed"] for row in measured]),
            mean_spread([row["transformers"] for row in measured], ".2f"),
            mean_spread(speeds, ".2f") if speeds else "",
        ]
        beyond = ""
        for preference in PREFERENCES:
            known = [row["worse"][preference] for row in measured if row["worse"].get(preference) is not None]
            fine = sum(not worse for worse in known)
            cells.append("" if name in own else f"{fine} of {len(known)}")
            ours = rows[named(preference)]
            fast = average(ours, "transformers") >= AS_FAST * average(measured, "transformers")
            small = average(ours, "params") <= 1.005 * average(measured, "params")
            if name not in own and known and fine == len(known) and fast and small:
                beyond = beyond or preference
        label = label_of(name)
        print_row(f"**{label}**" if name in own else label, *cells, beyond if beyond or name in own else "none")
    print(f"\n{len(seeds)} seed(s).\n")


def label_of(name: str) -> str:
    """A row's name as tables and plots show it."""
    return "ours, quality" if name == OURS else name.replace(f"{OURS}-", "ours, ")


def average(rows: list[dict[str, Any]], name: str) -> float:
    return mean(row[name] for row in rows)


def print_finalists(by_count: dict[int, list[dict[str, Any]]]) -> None:
    """One row for each number of finalists."""
    print_header("finalists", "seeds", "another than the pick", "quality", "held-out loss", right_from=0)
    for count, rows in sorted(by_count.items()):
        changed = f"{sum(row['changed'] for row in rows)} of {len(rows)}"
        cells = [mean_spread([row[name] for row in rows], form) for name, form in (("quality", ".3f"), ("loss", ".4f"))]
        print_row(str(count), str(len(rows)), changed if count > 1 else "", *cells)


def plot(file: Path, seeds: list[dict[str, Any]]) -> None:
    """Quality against decode speed, in transformers and in llama.cpp: means over seeds, and each seed as a dot."""
    import matplotlib  # slow to import, and only for plots

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "front", "svg.fonttype": "none"}
    from matplotlib import pyplot

    shared: dict[str, list[str]] = {}  # networks that several methods end at are one mark
    for name in dict.fromkeys(name for seed in seeds for name in seed):
        made = str([[seed[name][key] for key in ("params", "quality")] for seed in seeds if name in seed])
        shared.setdefault(made, []).append(name)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for axis, runtime in zip(axes, ("transformers", "llama.cpp"), strict=True):
        for names, mark, number in zip(shared.values(), "*XPosD^v<>hpd", range(13), strict=False):
            rows = [seed[names[0]] for seed in seeds if names[0] in seed and seed[names[0]][runtime] is not None]
            if not rows:
                continue
            colour, label = f"C{number % 10}", " = ".join(map(label_of, names))
            axis.scatter([row[runtime] for row in rows], [row["quality"] for row in rows], s=9, color=colour)
            at = average(rows, runtime), average(rows, "quality")
            axis.scatter(*at, s=100, marker=mark, color=colour, edgecolor="black", linewidth=0.5, label=label)
        axis.set_xlabel(f"decode speed in {runtime}, base 1")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("quality, base 1")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
