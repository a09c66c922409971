"""Ours beside published methods on a real language model: the same base, text, tokens, documents and size for all.

    python -m benchmarks.methods make FOLDER --checkpoint DIR --data FILE FILE --written 262144 --include-path DIR
        --tasks A,B --bits C,D [--sizes 0.8,0.67] [--heal-tokens 1000000] [--train-tokens 0] [--methods ours,sleb]
        [--speed-table FILE] [--vocabulary SIZE] [--workers 4]
    python -m benchmarks.methods time FOLDER --checkpoint DIR       # where the networks are to run, say on a CPU
    python -m benchmarks.methods table FOLDER --checkpoint DIR --include-path DIR --tasks A,B --bits C,D

`make` searches once for all sizes (not where FOLDER/picks.json holds them already, say of a search on another machine),
then cuts, heals and scores every method's network of every size, `--workers` at a time: a row each in FOLDER/rows, so
that it goes on where it was stopped. The text is that of the files and of what the base writes itself, shuffled; one
that lies in FOLDER as text.jsonl is taken as it is. `ours` is the pick, `ours-speed` and `ours-balanced` what these
preferences take, `ours-unrepaired` the pick sliced plainly, `NAME-repaired` a method's cut refitted as ours is,
`base-TYPE` the base in a type of llama.cpp's files. `--bits` are tasks whose bits per byte are measured beside the
scores. Speeds depend on sizes alone, so `time` cuts them out of the base, and times each in turn with it, in
transformers and in llama.cpp. `table` judges every row against `ours` by a paired bootstrap over documents.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import tempfile
import threading
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import Measurements, add_options, make_parser, print_header, print_row, timed
from benchmarks.jobs import speeds_in_llama_cpp, temporary_job, write_llama_cpp
from compressor import pipeline
from compressor.generated import generated_rows
from compressor.inputs import calibration_batches, training_blocks
from compressor.job import Job
from compressor.recipe import Recipe
from compressor.run import Run
from compressor.stages.choosing import choices
from compressor.stages.comparing import heal_as_ours, network_fingerprint, score_base, scored
from compressor.stages.comparison_methods import SizeComparison, methods
from compressor.stages.comparison_rows import BaseDocuments
from compressor.stages.picking import measured
from compressor.stages.quantized_base import untouched_ids
from compressor.stages.repairing import pick_variants
from evals.baselines import Cut, baselines
from evals.comparison import paired_interval, resampled, score_intervals
from evals.quality import QualityScale
from evals.scoring.tasks import ScoredTask, TaskSet
from evals.speed.measured import speed_beside
from export.layouts.gguf.file import take_stored_weights
from search.pareto import Target
from search.preference import PREFERENCES
from search.scores import Score
from supernet.architecture import Architecture
from supernet.common.errors import RequestError
from supernet.common.files import read_json, write_json
from supernet.common.formatting import parse_parameters
from supernet.device import release_cached_memory
from supernet.slicing import extract
from supernet.training.sources import GENERATED

OURS = {
    "ours": ("quality", True),
    "ours-speed": ("speed", True),
    "ours-balanced": ("balanced", True),
    "ours-unrepaired": ("quality", False),
}
"""Our rows: the preference that they are picked by, and whether what is cut is repaired where the run does so."""
OTHERS = {name: one for name, one in methods(repair=True).items() if name.removesuffix("-repaired") in baselines()}
"""Rows of published methods: as they are, and `NAME-repaired` by our repair where it suits them."""
DOCUMENTS = {"tasks": "documents", "bits": "bits_documents"}
"""Where a row keeps what it scored on each document, by the kind of tasks."""
GGUF = ("q8_0", "q4_0")
"""Types that the base is shown in; the first is also what networks are timed in."""


def main() -> None:
    parser = make_parser(__doc__, "checkpoint", "include_path", tasks=str, bits=("", "tasks, comma-separated"))
    parser.add_argument("what", choices=("make", "time", "table"))
    parser.add_argument("folder", type=Path)
    every = [*OURS, *baselines(), "base", *(f"base-{name}" for name in GGUF)]
    add_options(
        parser,
        data=([""], "training texts"),
        written=(0, "tokens of it that the base writes"),
        sizes=("0.8,0.67", "as in --max-params, comma-separated"),
        methods=(",".join(every), "comma-separated"),
        train_tokens=(0, "of the one fine-tuning"),
        heal_tokens=(1_000_000, "of healing; who is not fine-tuned gets both"),
        evaluations=(200, "of the search"),
        limit=(100, "documents per task in the search"),
        new=(128, "tokens that are read, and as many that are written, to time a network"),
        repeats=(7, "runs of which a speed is the median"),
        batch=(16, "sequences of 256 tokens in a step"),
        speed_table=(str, "a file of `compressor speed-table`"),
        vocabulary=(str, "as in compress"),
        workers=(1, "networks that are made at a time"),
        bits_limit=(int, "documents of each task of --bits; all by default"),
        as_cut=(False, "score what is not healed yet, too"),
    )
    arguments = parser.parse_args()
    {"make": make, "time": time_rows, "table": print_table}[arguments.what](arguments)


# -- make --


def make(arguments: Namespace) -> None:
    """Search, then a row for every method and size."""
    folder: Path = arguments.folder
    rows = folder / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(arguments, name) for name in ("train_tokens", "heal_tokens", "bits_limit")}
    if (kept := folder / "settings.json").is_file() and read_json(kept) != settings:
        raise SystemExit(
            f"{folder}: its rows are of {read_json(kept)}, which these would not compare with; name another"
        )
    write_json(kept, settings)
    if not (folder / "text.jsonl").is_file():
        write_text(arguments, folder / "text.jsonl")
    sizes = arguments.sizes.split(",")
    recipe = Recipe.model_validate(
        {
            "model": arguments.checkpoint,
            "data": str(folder / "text.jsonl"),
            "tasks": arguments.tasks,
            "include_path": arguments.include_path,
            "targets": {"max_params": sizes},
            "finetuning": {"tokens": arguments.train_tokens, "batch_size": arguments.batch},
            "searching": {"evaluations": arguments.evaluations, "limit": arguments.limit},
            "healing": {"tokens": arguments.heal_tokens},
            "speed_table": arguments.speed_table,
            "vocabulary": {"size": arguments.vocabulary},
        }
    )
    job = pipeline.start(recipe, folder / "run")
    pipeline.finetune(job)
    picks = folder / "picks.json"
    if picks.is_file() and not set(sizes) - read_json(picks).keys():
        print(f"nothing is searched: the picks are those of {picks}", flush=True)
    else:
        _, seconds = timed(partial(pipeline.search, job))
        write_json(folder / "searched.json", {"seconds": seconds, "times": read_json(job.run.times_file)})
        write_json(picks, {size: picked(job, size) for size in sizes})
        for file in (job.run.front, job.run.recipe_file, job.run.log_file):
            shutil.copy(file, folder)
    job.run.comparison.mkdir(exist_ok=True)
    score_base(job, job.load_untouched())
    wanted = [(size, name) for name in arguments.methods.split(",") for size in ("1" if is_base(name) else sizes)]
    missing = [(size, name) for size, name in wanted if not row_file(rows, size, name).is_file()]
    release_cached_memory(job.device)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, context, begin, (arguments,)) as pool:
        for done in as_completed([pool.submit(make_row, row) for row in missing]):
            print(done.result(), flush=True)


def write_text(arguments: Namespace, file: Path) -> None:
    """The texts of the files, and what the base writes, shuffled."""
    rows: list[dict[str, Any]] = []
    for source in filter(None, arguments.data):
        rows += [json.loads(line) for line in Path(source).read_text().splitlines()]
    if arguments.written:
        with temporary_job(arguments.checkpoint, f"{GENERATED}:{arguments.written}", device="auto") as job:
            rows += [{"text": row.text} for row in generated_rows(job, arguments.written)]
    random.Random(0).shuffle(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def picked(job: Job, size: str) -> dict[str, Any]:
    """What each preference takes at a size."""
    limit = parse_parameters(size, job.untouched_parameters)
    taken = choices(job, measured(job), Target(max_params=limit)).by_preference
    return {preference: taken[preference].evaluation.architecture.to_dict() for preference in PREFERENCES}


def is_base(name: str) -> bool:
    return name == "base" or name.startswith("base-")


def row_file(rows: Path, size: str, name: str) -> Path:
    return rows / f"{size}-{name}.json"


class Worker:
    """What a process makes rows with: the run as it was searched, and the networks that are cut."""

    def __init__(self, arguments: Namespace) -> None:
        folder: Path = arguments.folder
        self.rows, self.arguments = folder / "rows", arguments
        run = Run(folder / "run")
        self.job = job = Job(run, run.recipe().resolved())
        healing, training = job.recipe.healing.tokens or 0, job.recipe.finetuning.tokens or 0
        self.tokens = {True: healing, False: training + healing}
        self.blocks = {trained: training_blocks(job, tokens) for trained, tokens in self.tokens.items()}
        self.base, self.supernet = job.load_base(), job.load_supernet()
        self.calibration = tuple(calibration_batches(job, self.blocks[False]))
        self.picks = read_json(folder / "picks.json")
        self.bits = bits_tasks(job, arguments.bits)

    def pick(self, size: str, preference: str) -> Architecture:
        return Architecture.from_dict(self.picks[size][preference])

    def cut(self, size: str, name: str) -> Cut:
        """The network of a method, as cut."""
        if name not in OURS:
            best, text = self.pick(size, "quality"), self.blocks[False]
            same = SizeComparison(self.job, size, best, self.supernet, self.base, self.calibration, text)
            return OTHERS[name].make(same, 0)
        preference, repaired = OURS[name]
        architecture = self.pick(size, preference)
        variants = pick_variants(self.job, architecture, self.supernet) if repaired else None
        return extract(self.supernet.model, self.job.structure, architecture, variants), architecture

    def row(self, size: str, name: str) -> dict[str, Any]:
        job = self.job
        if is_base(name):
            network = job.load_untouched() if name == "base" else self.rounded(name.removeprefix("base-"))
            base = job.untouched.structure.base
            return self.described(network, base, job.untouched_tasks, self.bits) | {"tokens": 0}
        own = name in OURS
        (network, architecture), cutting = timed(partial(self.cut, size, name))
        if own and name != "ours" and OURS[name][1] and architecture == self.pick(size, "quality"):
            return {"same_as": "ours"}
        tokens, blocks = self.tokens[own], self.blocks[own]
        repaired = OURS[name][1] if own else OTHERS[name].repaired
        made = network_fingerprint(network)
        for file in self.rows.glob(f"{size}-*.json"):  # two methods may remove the same layers
            known = read_json(file)
            if not own and (known.get("made"), known.get("tokens")) == (made, tokens):
                return known | {"method": name, "made_as": known["method"]}
        unhealed = scored(job, network).quality(BaseDocuments.read(job).scale) if self.arguments.as_cut else None
        state = self.rows / f".{size}-{name}-{tokens}.safetensors"
        healing = 0.0
        if tokens:
            heal = partial(heal_as_ours, job, self.base, network, tokens, blocks, 0, state, repaired=repaired)
            _, healing = timed(heal)
        for left in self.rows.glob(f"{state.name}*"):
            left.unlink()
        bits = self.bits and self.bits.encoded_by(job.tasks.encoder)
        row = self.described(network, architecture, job.tasks, bits)
        return row | {
            "tokens": tokens,
            "made": made,
            "unhealed": unhealed,
            "seconds": {"cutting": cutting, "healing": healing},
        }

    def described(
        self, network: Any, architecture: Architecture, tasks: TaskSet, bits: TaskSet | None
    ) -> dict[str, Any]:
        """What a network is, and what it scores on the report documents."""
        self.job.threads(scoring=True)
        row: dict[str, Any] = {
            "params": sum(parameter.numel() for parameter in network.parameters()),
            "architecture": architecture.to_dict(),
        }
        for kind, asked, limit in (("tasks", tasks, None), ("bits", bits, self.arguments.bits_limit)):
            scorer = asked and self.job.scorer(network, asked)
            scores, documents = scorer.score_with_documents("report", limit) if scorer else ({}, {})
            row[kind] = {name: score.model_dump() for name, score in scores.items()}
            row[DOCUMENTS[kind]] = documents
        return row

    def rounded(self, gguf_type: str) -> Any:
        """The base with the weights that a file of llama.cpp holds, its scales chosen on the text as in a run."""
        job = self.job
        calibration = untouched_ids(job, self.blocks[False][: job.recipe.quantizing.samples].ids)
        network, base = job.untouched.load_model(job.stored_dtype, "cpu"), job.untouched.structure.base
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / gguf_type
            write_llama_cpp(job, network, base, folder, f"gguf-{gguf_type}", calibration)
            return take_stored_weights(network, folder).to(job.device, job.compute_dtype)


WORKER: Worker
"""Of this process."""


def begin(arguments: Namespace) -> None:
    global WORKER
    threading.Thread(target=end_with_parent, daemon=True).start()
    WORKER = Worker(arguments)


def end_with_parent() -> None:
    """Wait for the process that began this one, and end with it: a pool's workers outlive a parent that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def make_row(wanted: tuple[str, str]) -> str:
    """Make and keep a row; returns what to print."""
    size, name = wanted
    try:
        row, seconds = timed(partial(WORKER.row, size, name))
    except RequestError as error:  # it does not reach the size, or does not suit the family
        return f"{name} is left out at {size}: {error}"
    write_json(row_file(WORKER.rows, size, name), row | {"size": size, "method": name})
    release_cached_memory(WORKER.job.device)
    return f"{name} at {size}: {seconds:.0f} s"


def bits_tasks(job: Job, names: str) -> TaskSet | None:
    """The tasks whose bits per byte are measured, in the untouched base's tokens; None where none is named."""
    if not names:
        return None
    include = [job.recipe.include_path] if job.recipe.include_path else []
    return TaskSet.load(names.split(","), encoder=job.untouched_tasks.encoder, include_path=include)


# -- time --


def time_rows(arguments: Namespace) -> None:
    """Time every architecture of the rows in turn with the base; what was timed is kept in FOLDER/speeds.json."""
    with temporary_job(arguments.checkpoint) as job:
        job.threads(scoring=True)
        base = job.load_base()
        measurements = Measurements(arguments.folder / "speeds.json", 1e9)
        for row in read_table(arguments.folder):
            architecture = Architecture.from_dict(row["architecture"])
            time_row = partial(speeds_of, job, base, architecture, row["method"], arguments.new, arguments.repeats)
            key = row["method"] if is_base(row["method"]) else architecture.key
            measurements.measure(measurements.by_settings, key, time_row)


def speeds_of(job: Job, base: Any, architecture: Architecture, name: str, new: int, repeats: int) -> dict[str, float]:
    """Decode and prefill speed over the base's, in transformers and in llama.cpp: there over the base's first type."""
    speeds: dict[str, float] = {}
    network = base if is_base(name) else extract(base, job.structure, architecture)
    if not is_base(name):
        own, of_base = speed_beside(network, base, prompt=new, new=new, repeats=repeats)
        speeds["transformers"] = own.decode_tps / of_base.decode_tps
        speeds["transformers_prefill"] = own.prefill_tps / of_base.prefill_tps
    own_type = name.removeprefix("base-") if name.startswith("base-") else GGUF[0]
    both = [(network, architecture, f"gguf-{own_type}"), (base, job.structure.base, f"gguf-{GGUF[0]}")]
    work = {"prompt": new, "new": new, "threads": torch.get_num_threads(), "repeats": -(-repeats // 2)}
    pairs = speeds_in_llama_cpp(job, both, turns=3, **work)
    speeds["llama.cpp"] = median(own.decode_tps / of_base.decode_tps for own, of_base in pairs)
    speeds["llama.cpp_prefill"] = median(own.prefill_tps / of_base.prefill_tps for own, of_base in pairs)
    return speeds


# -- table --


def read_table(folder: Path) -> list[dict[str, Any]]:
    """The rows of networks of their own, ours first."""
    rows = [read_json(file) for file in sorted((folder / "rows").glob("*.json"))]
    order = [*OURS, *OTHERS]
    own = [row for row in rows if "same_as" not in row]
    return sorted(own, key=lambda row: (-float(row["size"]), [*order, row["method"]].index(row["method"])))


def print_table(arguments: Namespace) -> None:
    """A row for each network, and how sure its difference to ours is."""
    recipe = {"tasks": arguments.tasks, "include_path": arguments.include_path}
    file = arguments.folder / "speeds.json"
    speeds = read_json(file) if file.is_file() else {}
    with temporary_job(arguments.checkpoint, **recipe) as job:
        bits = bits_tasks(job, arguments.bits)
        print_rows(job, bits.tasks if bits else {}, read_table(arguments.folder), speeds)


def print_rows(
    job: Job, bits: Mapping[str, ScoredTask], rows: Sequence[dict[str, Any]], speeds: dict[str, Any]
) -> None:
    base = next((row for row in rows if row["method"] == "base"), None)
    if base is None:
        raise SystemExit("no row of the base, which all are measured against: make --methods base,...")
    scale = QualityScale(scores_of(base, "tasks"))
    names = [*job.tasks.tasks, *bits]
    runtimes = ("transformers", "llama.cpp")
    differences = ["ours less this", *(f"{name}: ours less this" for name in bits)]
    columns = ["network", "parameters", *names, "quality", "as cut", *differences, *runtimes]
    table: list[list[str]] = []
    drawn: dict[tuple[str, str], Any] = {}
    for row in rows:
        own = scale.resampled(resampled(job.tasks.tasks, row["documents"]))
        drawn[row["size"], row["method"]] = own, resampled(bits, row["bits_documents"])
    for row in rows:
        size, name = row["size"], row["method"]
        cells = [f"{row['params'] / base['params']:.3f}"]
        cells += [score.text for score in (scores_of(row, "tasks") | scores_of(row, "bits")).values()]
        cells.append(f"{scale.quality(scores_of(row, 'tasks')):.3f} ± {drawn[size, name][0].std():.3f}")
        cells.append(f"{row['unhealed']:.3f}" if row.get("unhealed") is not None else "")
        rival = next((row for row in rows if (row["size"], row["method"]) == (size, "ours")), None)
        cells += judged(scale, bits, rival, row, drawn) if rival and name != "ours" else [""] * len(differences)
        speed = speeds.get(name if is_base(name) else Architecture.from_dict(row["architecture"]).key, {})
        cells += [f"{speed[runtime]:.2f}" if runtime in speed else "" for runtime in runtimes]
        table.append([f"**{size}: {name}**" if name in OURS else f"{size}: {name}", *cells])
    told = [column for column in range(len(columns)) if any(cells[column] for cells in table)]
    print_header(*(columns[column] for column in told), right_from=1)
    for cells in table:
        print_row(*(cells[column] for column in told))


def judged(
    scale: QualityScale,
    bits: Mapping[str, ScoredTask],
    ours: dict[str, Any],
    row: dict[str, Any],
    drawn: dict[tuple[str, str], Any],
) -> Iterator[str]:
    """Ours less this row, with the central 95 % over the documents: quality, and the scores of `bits` as they are."""
    mine, theirs = (drawn[one["size"], one["method"]] for one in (ours, row))
    value = scale.quality(scores_of(ours, "tasks")) - scale.quality(scores_of(row, "tasks"))
    yield interval(value, paired_interval([mine[0]], [theirs[0]]))
    by_task = score_intervals(bits, mine[1], theirs[1])
    for name, of_task in by_task.items():
        value = ours["bits"][name]["value"] - row["bits"][name]["value"]
        if of_task and not bits[name].higher_is_better:  # its interval is positive where ours is better
            of_task = (-of_task[1], -of_task[0])
        yield interval(value, of_task)


def interval(value: float, bounds: tuple[float, float] | None) -> str:
    return f"{value:+.3f}" + (f" ({bounds[0]:+.3f} to {bounds[1]:+.3f})" if bounds else "")


def scores_of(row: dict[str, Any], kind: str) -> dict[str, Score]:
    return {name: Score.model_validate(score) for name, score in row[kind].items()}


if __name__ == "__main__":
    main()
