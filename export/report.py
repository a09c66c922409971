"""The report: what `report.json` holds, key by key, and how it is shown in a terminal and as one HTML page.

The pipeline assembles the dictionary from what the stages left on disk; this module types it, judges what can be
said about it (`verdict`), and writes `report.json` and a self-contained `report.html`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from rich import box
from rich.table import Table
from rich.text import Text

from compressor.architecture import Architecture
from compressor.errors import nearest
from export.comparison import plots as comparison_plots
from export.comparison import said, standings
from export.plots import (
    Dot,
    Line,
    architecture_picture,
    count,
    duration,
    lines,
    percent,
    rate,
    scatter,
    size,
    sizes_text,
    usage_map,
)
from export.schemes import SchemeName

SCHEMA = 1

Layout = Literal["uneven", "uniform", "padded", "gguf", "onnx", "openvino"]
Quantization = SchemeName | Literal["q8_0", "q4_0"]


def _is_architecture(data: dict[str, Any]) -> dict[str, Any]:
    try:
        Architecture.from_dict(data)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not an architecture ({error})") from error
    return data


ArchitectureDict = Annotated[dict[str, Any], AfterValidator(_is_architecture)]
"""`Architecture.to_dict()`."""


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finite_scores(tasks: Any) -> Any:
    if not isinstance(tasks, Mapping):
        return tasks
    return {
        task: score
        for task, score in tasks.items()
        if not (isinstance(score, Mapping) and _finite_or_none(score.get("value", 0)) is None)
    }


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class TaskScore(_Model):
    """What one task said about one checkpoint."""

    metric: str
    """lm-eval's name of the metric, such as `acc_norm`."""
    value: float
    """The score in the metric's own unit; an accuracy lies between 0 and 1."""
    stderr: float | None = None
    """One standard error over documents; None where lm-eval knows none."""
    n: int
    """Number of documents scored."""
    split: Literal["search", "report", "all"]
    """Which documents: those of the search, the others, or (evaluated outside a run) all."""
    higher_is_better: bool = True
    chance: float | None = None
    """What guessing scores, in the metric's unit; None where that has no meaning."""

    @property
    def stamp(self) -> str:
        """`near chance` where the score is within two standard errors of chance, `below chance` where it is worse."""
        if self.chance is None:
            return ""
        above = (self.value - self.chance) * (1 if self.higher_is_better else -1)
        margin = 2 * (self.stderr or 0.0) + 1e-9
        return "near chance" if abs(above) <= margin else "below chance" if above < 0 else ""

    @property
    def text(self) -> str:
        """The score with its standard error: `0.810 ± 0.005`."""
        decimals = 3 if abs(self.value) < 10 else 2 if abs(self.value) < 100 else 1
        error = "" if self.stderr is None else f" ± {self.stderr:.{decimals}f}"
        return f"{self.value:.{decimals}f}{error}"


class Speed(_Model):
    """Measured speed, and in what: numbers of different runtimes say nothing about each other."""

    runtime: str
    """Such as `transformers`, `transformers (decompressed at load)` or `llama.cpp`."""
    device: str
    """`cpu`, `cuda`, or the accelerator's name."""
    threads: int | None = None
    """CPU threads; None on an accelerator."""
    dtype: str
    batch: int
    prompt: int
    """Tokens in the prompt."""
    new: int
    """Tokens generated."""
    prefill_tps: float
    """Prompt tokens per second, over the whole batch."""
    decode_tps: float
    """Generated tokens per second, over the whole batch."""
    throughput_tps: float | None = None
    """Generated tokens per second of the whole run, reading the prompt counted, over the whole batch."""
    ttft_ms: float | None = None
    """Milliseconds to the first new token."""
    latency_ms: float | None = None
    """Milliseconds of the whole run."""
    peak_memory_bytes: int | None = None
    """Weights, cache and working memory at their highest."""
    warmup: int | None = None
    repeats: int | None = None
    """Runs of which these are medians, after so many for warming up."""
    prefill_spread: float | None = None
    decode_spread: float | None = None
    """Interquartile range of the runs' times as a share of their median."""

    @property
    def where(self) -> str:
        threads = "" if self.threads is None else f", {self.threads} thread{'s' * (self.threads != 1)}"
        return f"{self.runtime}, {self.device}{threads}, {self.dtype}"

    @property
    def workload(self) -> str:
        return f"batch {self.batch}, prompt of {self.prompt}, {self.new} new tokens"

    def comparable(self, other: Speed) -> bool:
        """Whether the two were measured in the same runtime, on the same device, at the same work."""
        keys = ("runtime", "device", "threads", "batch", "prompt", "new")
        return all(getattr(self, key) == getattr(other, key) for key in keys)


class BaseCard(_Model):
    """What the base's own model card states and a derived card carries over; every key as on the hub."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: list[str] = []
    datasets: list[str] = []


class Base(_Model):
    """The checkpoint that was compressed."""

    name: str
    path: str
    """Path or hub name, as the user gave it."""
    hub_id: str | None = None
    """Its name on the hub, where it was loaded from there; only then can a card link to it."""
    params: int
    """Embeddings counted, tied ones once."""
    bytes: int
    """Of the safetensors files."""
    dtype: str
    architecture: ArchitectureDict
    tasks: dict[str, TaskScore]
    """Scores on the report split."""
    held_out_loss: float | None = None
    """Nats per token on some of the user's text that was not trained on; None where it was not measured."""
    speed: Speed | None = None
    quality: float = 1.0
    """1.0 by definition."""
    card: BaseCard = BaseCard()

    @cached_property
    def sizes(self) -> Architecture:
        return Architecture.from_dict(self.architecture)


class QuantizationReport(_Model):
    """What the quantizer really did to a package."""

    scheme: Quantization
    group_size: int
    """Input channels that share a scale; -1: all of an output channel's."""
    iterations: int
    """Rounds of tuning; 0: rounded to nearest."""
    bits_per_weight: float
    """Stored bits (codes, scales, shapes) for each weight of the linear layers inside blocks."""
    bits_per_parameter: float
    """Stored bits of the whole file for each parameter, embeddings counted."""
    exceptions: dict[str, str] = {}
    """Linear layers and embeddings that are not under the scheme, and what became of each."""


class GraphCache(_Model):
    """The key-value cache that a graph takes and gives."""

    key_value_heads: list[int]
    """Of every layer with attention."""
    head_dim: int


class Package(_Model):
    """One folder that was written, reloaded and checked."""

    name: str
    """Folder name: `best`, `best-0.67`, `best-int4` and so on."""
    path: str
    layout: Layout
    quantization: Quantization | None = None
    architecture: ArchitectureDict
    params: int
    bytes: int
    """Of the weight files as they are on disk."""
    quality: float
    """Mean over tasks of score / base's score (inverted where lower is better), on the report split."""
    tasks: dict[str, TaskScore]
    """Scores on the report split."""
    held_out_loss: float | None = None
    """As the base's."""
    speed: Speed | None = None
    verified: dict[str, Any]
    """What was proved in a fresh process: checks by name with true, false or a number (`max_logit_difference`,
    `bound`), nested where that helps."""
    quantization_report: QuantizationReport | None = None
    """What quantization really did; None for an unquantized package."""
    file: str | None = None
    """The one file of a gguf package."""
    cache: GraphCache | None = None
    """What a graph caches; None where there is no graph."""

    @cached_property
    def sizes(self) -> Architecture:
        return Architecture.from_dict(self.architecture)

    @property
    def label(self) -> str:
        """The name as a table shows it: `best-0.67-int4` is `compressed 0.67 INT4`."""
        label = re.sub(r"^best\b", "compressed", self.name)
        label = re.sub(r"-int(\d)", lambda match: f" INT{match[1]}", label)
        return re.sub("-(?!round)", " ", label)


class Candidate(_Model):
    """A measured sub-network of the search. Its scores are those of the search split, before healing."""

    key: str
    """`Architecture.key`."""
    architecture: ArchitectureDict
    params: int
    quality: float
    decode_tps: float | None = None
    """Computed from speed.json."""
    tasks: Annotated[dict[str, TaskScore], BeforeValidator(_finite_scores)] = {}
    """A score that is not finite, such as the perplexity of a collapsed network, is left out: JSON cannot hold it."""
    further: dict[str, float] = {}
    """Whatever else the search measured, such as `held_out_loss`."""

    @cached_property
    def sizes(self) -> Architecture:
        return Architecture.from_dict(self.architecture)


class Point(Candidate):
    """A candidate with where it came from."""

    generation: int
    on_front: bool
    full: bool = True
    """False where only part of the documents were looked at: scores are then what these foretold."""


class PredictorScore(_Model):
    """How well a predictor foretold the newest measurements before it was trained on them."""

    name: str
    kendall: Annotated[float | None, BeforeValidator(_finite_or_none)] = None
    """Rank correlation tau; None (or not a number) where all measurements are equal."""
    spearman: Annotated[float | None, BeforeValidator(_finite_or_none)] = None
    mae: Annotated[float | None, BeforeValidator(_finite_or_none)] = None
    """Mean absolute error, in the objective's unit."""
    used: bool
    """False where it ranked no better than chance and was set aside."""


class Generation(_Model):
    generation: int
    evaluations: int
    """Measured so far, this generation included."""
    hypervolume: float
    predictor: PredictorScore | None = None
    """None in generations without one, such as the first."""
    seconds_evaluating: float
    seconds_other: float


class Gene(_Model):
    name: str
    values: list[Any]


class Space(_Model):
    name: str | None = None
    genes: list[Gene]


class Search(_Model):
    algorithm: str
    evaluations: int
    generations: list[Generation]
    points: list[Point]
    """Every measured sub-network."""
    space: Space
    targets: dict[str, Any] = {}
    """As resolved in the recipe: `max_params`, `max_bytes`, `min_speedup`, `max_drop`."""


class CurvePoint(_Model):
    """Held-out losses at one step, nats per token."""

    step: int
    tokens: int
    largest: float | None = None
    middle: float | None = None
    """Mean over the random sub-networks."""
    smallest: float | None = None


class Finetune(_Model):
    curve: list[CurvePoint]
    tokens: int
    seconds: float
    sampler: str
    loss: str
    data: str | None = None
    """The user's data, as given."""


class Sample(_Model):
    prompt: str
    continuations: dict[str, str]
    """Greedy continuation by `base` and by package name."""


class Difference(_Model):
    """Quality of ours minus another's over the same documents, by paired bootstrap."""

    value: float
    low: float
    """The central 95 % of the resamples begins here,"""
    high: float
    """and ends here."""

    @property
    def meaning(self) -> Literal["better", "worse", "unclear"]:
        """`better`: ours, beyond what the choice of documents explains."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "unclear"


class Comparison(_Model):
    """One method at one size and seed, healed and scored as ours."""

    method: str
    about: str
    """The paper that defines it, or what it is."""
    size: str | None
    """As asked for, such as `0.67`; None for a checkpoint from elsewhere."""
    seed: int | None
    path: str
    architecture: ArchitectureDict | None = None
    params: int
    bytes: int | None = None
    tokens: int | None = None
    """Read in healing; None where that is not known."""
    quality: float
    """On the report split, as for packages."""
    quality_stderr: float | None = None
    """One standard error over documents, bootstrapped."""
    quality_before_healing: float | None = None
    """As published: cut, not trained."""
    tasks: Annotated[dict[str, TaskScore], BeforeValidator(_finite_scores)] = {}
    speed: Speed | None = None
    base_speed: Speed | None = None
    """The base's, measured in turn with this one's."""
    ours_minus_this: Difference | None = None
    """Over all seeds of this method and size; None for ours."""


class Report(_Model):
    """`report.json`."""

    schema_: int = Field(SCHEMA, alias="schema")
    """Version of this schema."""
    versions: dict[str, str]
    """Of Python and of the packages that matter."""
    recipe: dict[str, Any]
    """recipe.yaml: every default filled in, seeds, fingerprints of model, data and tasks."""
    base: Base
    front: list[Candidate]
    """The Pareto front of fully measured sub-networks."""
    packages: list[Package]
    comparison: list[Comparison] = []
    search: Search | None = None
    finetune: Finetune | None = None
    hub_dataset: str | None = None
    """Name of what was fine-tuned or healed on, where it was loaded from the hub."""
    samples: list[Sample] = []

    @property
    def tasks(self) -> list[str]:
        """Names of all tasks, in the base's order."""
        return list(dict.fromkeys(task for row in self.rows for task in row.tasks))

    @property
    def rows(self) -> list[Base | Package]:
        """The base, then the packages: the rows of every table."""
        return [self.base, *self.packages]

    def package(self, name: str) -> Package:
        """The package called `name`. KeyError where there is none."""
        for package in self.packages:
            if package.name == name:
                return package
        raise KeyError(f"no package {name!r} in the report; there are {[package.name for package in self.packages]}")


def validate_report(data: Mapping[str, Any]) -> Report:
    """The typed report. ValueError with one line that names the first wrong key, as in `report.json: base.params is
    missing`."""
    try:
        return Report.model_validate(data)
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        more = f" (and {len(others)} more)" if others else ""
        if first["type"] == "missing":
            said = "is missing"
        elif first["type"] == "extra_forbidden":
            known = {str(f.alias or n) for m in _models() for n, f in m.model_fields.items()}
            said = f"is not a key of the report{nearest(str(first['loc'][-1]), known)}"
        else:
            said = f"is wrong: {first['msg'].removeprefix('Value error, ')}"
        raise ValueError(f"report.json: {where} {said}{more}") from None


def _models() -> Iterator[type[_Model]]:
    waiting = [_Model]
    while waiting:
        model = waiting.pop()
        waiting += model.__subclasses__()
        yield model


def write_report(report: Report, folder: Path) -> Path:
    """Write `report.html` and then `report.json` into `folder`, each whole or not at all. Returns the page's path."""
    page = folder / "report.html"
    _write_whole(page, render_html(report))
    data = report.model_dump(mode="json", by_alias=True, exclude_none=False)
    _write_whole(folder / "report.json", json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return page


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Change:
    """A score beside the base's. `delta` is positive where the score is better, whichever way the metric goes."""

    delta: float
    stderr: float | None

    @property
    def meaning(self) -> Literal["better", "worse", "unclear", "unknown"]:
        """`unclear` within two standard errors, `unknown` without a standard error (and not equal)."""
        if self.stderr is None:
            return "unknown" if self.delta else "unclear"
        if abs(self.delta) <= 2 * self.stderr:
            return "unclear"
        return "better" if self.delta > 0 else "worse"

    @property
    def text(self) -> str:
        decimals = 3 if abs(self.delta) < 10 else 2
        return f"{self.delta:+.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def change(base: TaskScore, score: TaskScore) -> Change:
    """How `score` differs from the base's, the two taken as independent."""
    delta = (score.value - base.value) * (1 if score.higher_is_better else -1)
    if base.stderr is None or score.stderr is None:
        return Change(delta, None)
    return Change(delta, math.hypot(base.stderr, score.stderr))


def decompressed_at_load(package: Package) -> bool:
    """Whether the measured speed is that of floats: plain transformers on a CPU unpacks compressed-tensors at load."""
    speed = package.speed
    if speed is None or package.quantization is None:
        return False
    return "decompress" in speed.runtime or (speed.runtime.startswith("transformers") and speed.device == "cpu")


DECOMPRESSED = (
    "Plain transformers decompresses quantized weights when it loads them on a CPU: the speed there is that of floats."
)


def verdict(report: Report) -> list[str]:
    """The result in a few plain sentences: how much smaller, how fast, what it costs, and whether that is noise."""
    if not report.packages:
        return [f"No package of {report.base.name} has been written yet."]
    base = report.base
    said: list[str] = []
    for package in report.packages:
        plain = _unquantized(report, package)
        if plain is None:
            said += _size_sentences(package, base, first=not said)
            said += _losses("It loses", base.tasks, package.tasks, say_none=True)
            said += _text_loss(package, base)
        else:
            said.append(
                f"{_sentence(package.label)} takes {size(package.bytes)} on disk "
                f"({percent(package.bytes / base.bytes)} of the base) and keeps {percent(package.quality)} "
                "of the quality."
            )
            said += _losses("Quantization loses", plain.tasks, package.tasks, say_none=False)
        fallen = [t for t, s in package.tasks.items() if s.stamp and t in base.tasks and not base.tasks[t].stamp]
        if fallen:
            said.append(f"It has fallen to chance on {_listed(fallen)}, which the base solves.")
        if package.quality < 0.9:
            said.append(
                "That is a heavy loss: a larger size, more training, more healing or a search on more documents may "
                "keep more."
            )
    blind = [task for task, score in base.tasks.items() if score.stamp]
    if blind:
        said.append(f"The base itself only guesses on {_listed(blind)}: there the scores tell nothing about quality.")
    return said


def _text_loss(package: Package, base: Base) -> list[str]:
    """What happened to the prediction of text, which tasks of few choices may not show."""
    if package.held_out_loss is None or base.held_out_loss is None:
        return []
    said = [
        f"On text that was not trained on, its loss is {package.held_out_loss:.3g} nats per token, the base's "
        f"{base.held_out_loss:.3g}."
    ]
    if package.held_out_loss > base.held_out_loss + math.log(2):
        said.append("So it is less than half as sure of the next token as the base is, whatever the tasks say.")
    return said


def _unquantized(report: Report, package: Package) -> Package | None:
    """The package that `package` was quantized from, where the report has it; None for an unquantized one."""
    if package.quantization is None:
        return None
    same = [p for p in report.packages if p.quantization is None and p.sizes == package.sizes]
    return next((p for p in same if p.layout == package.layout), same[0] if same else None)


def _size_sentences(package: Package, base: Base, first: bool) -> list[str]:
    quality = f"{percent(package.quality)} of its quality"
    if first:
        tasks = len(package.tasks)
        quality += f", measured by {tasks} task{'s' * (tasks != 1)} on documents that the search never saw"
    said = [
        f"{_sentence(package.label)} has {percent(package.params / base.params)} of the parameters of {base.name} "
        f"({count(package.params)} of {count(base.params)}), takes {size(package.bytes)} on disk instead of "
        f"{size(base.bytes)}, and keeps {quality}."
    ]
    if package.speed and base.speed and package.speed.comparable(base.speed):
        ratio = package.speed.decode_tps / base.speed.decode_tps
        said.append(
            f"It generates tokens {ratio:.2f} times as fast ({base.speed.where})."
            if ratio >= 1.02
            else f"It is not faster: {ratio:.2f} times the base's tokens per second ({base.speed.where})."
        )
    return said


def _losses(opening: str, before: Mapping[str, TaskScore], after: Mapping[str, TaskScore], say_none: bool) -> list[str]:
    """On which tasks a loss is beyond noise, and for which that cannot be said."""
    changes = {task: change(score, after[task]) for task, score in before.items() if task in after}
    figures = {task: f"{task} ({before[task].value:.3g} → {after[task].value:.3g})" for task in changes}
    worse = [figures[task] for task, it in changes.items() if it.meaning == "worse"]
    unknown = [figures[task] for task, it in changes.items() if it.meaning == "unknown" and it.delta < 0]
    said = []
    if worse:
        said.append(f"{opening} more than noise explains on {_listed(worse)}.")
    elif say_none and any(it.stderr is not None for it in changes.values()):
        said.append("No loss stands out from the noise of measuring (two standard errors).")
    if unknown and say_none:
        said.append(f"How much of the loss is noise is not known for {_listed(unknown)}.")
    return said


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def terminal_table(report: Report) -> Table:
    """Base and packages: parameters and bytes with their share, scores on the report split, speed and its runtime.

    Cells hold two or three short lines, so that four tasks fit in 80 columns; runtimes are numbered, and what the
    numbers mean is in `footnotes`, to be printed below.
    """
    padding = 1 if len(report.tasks) < 4 else 0
    table = Table(box=box.SIMPLE, padding=(0, padding), collapse_padding=True)
    table.add_column("", min_width=10 + 2 * padding, style="bold")
    table.add_column("params", justify="right", min_width=7)
    table.add_column("on disk", justify="right", min_width=7)
    for task in report.tasks:
        heading = Text(f"{_broken(task)}\n", justify="right", overflow="fold")
        heading.append(_broken(metric_name(report, task)), style="dim")
        table.add_column(heading, justify="right", min_width=7, overflow="fold")
    table.add_column("prefill\ntok/s", justify="right", min_width=7)
    table.add_column("decode\ntok/s", justify="right", min_width=6)
    base = report.base
    marks = _marks(report)
    for row in report.rows:
        speed = row.speed
        mark = f" {marks[measured_in(row)]}" if speed else ""
        table.add_row(
            Text(row.label if isinstance(row, Package) else "base"),
            f"{count(row.params)}\n{percent(row.params / base.params)}",
            f"{size(row.bytes)}\n{percent(row.bytes / base.bytes)}",
            *(_score_cell(row.tasks.get(task)) for task in report.tasks),
            rate(speed.prefill_tps) + mark if speed else "-",
            rate(speed.decode_tps) + mark if speed else "-",
        )
    return table


def _broken(name: str, width: int = 9) -> str:
    """A task's name on several lines, broken after underscores, so that narrow columns can hold it."""
    lines = [""]
    for part in re.findall(r"[^_]*_|[^_]+", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _marks(report: Report) -> dict[str, str]:
    """A superscript number for every runtime that speed was measured in."""
    return {where: str(number).translate(_SUPERSCRIPT) for number, where in enumerate(_runtimes(report), start=1)}


_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def measured_in(row: Base | Package) -> str:
    """What a row's speed was measured in; a star refers to the note on decompressed weights. Empty: not measured."""
    said = row.speed.where if row.speed else ""
    return f"{said} *" if isinstance(row, Package) and decompressed_at_load(row) else said


def _runtimes(report: Report) -> list[str]:
    return list(dict.fromkeys(measured_in(row) for row in report.rows if row.speed))


def footnotes(report: Report) -> list[str]:
    """What must be read below the terminal table: the runtimes by their marks, and what the numbers are."""
    return [*(f"{mark} {where}" for where, mark in _marks(report).items()), *notes(report)]


def notes(report: Report) -> list[str]:
    """What the numbers of the table are."""
    speeds = [row.speed for row in report.rows if row.speed]
    said = ["Scores on documents that the search never saw, ± one standard error."]
    if speeds:
        said.append(f"Speed at {' or '.join(dict.fromkeys(speed.workload for speed in speeds))}.")
    if any(decompressed_at_load(package) for package in report.packages):
        said.append(f"* {DECOMPRESSED}")
    stamps = {score.stamp for row in report.rows for score in row.tasks.values()}
    if "near chance" in stamps:
        said.append("near chance: within two standard errors of what guessing scores.")
    if "below chance" in stamps:
        said.append("below chance: worse than guessing by more than two standard errors.")
    return said


def metric_name(report: Report, task: str) -> str:
    """The metric of a task, marked `↓` where lower is better."""
    score = next(row.tasks[task] for row in report.rows if task in row.tasks)
    return score.metric if score.higher_is_better else f"{score.metric} ↓"


def _score_cell(score: TaskScore | None) -> Text:
    if score is None:
        return Text("-")
    cell = Text(score.text.replace(" ± ", "\n± "))
    if score.stamp:
        cell.append(f"\n{score.stamp}", style="yellow")
    return cell


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,
    autoescape=lambda name: name is not None and ".html" in name,
    trim_blocks=True,
    lstrip_blocks=True,
)


def breakable(name: str) -> Markup:
    """A task's name that a browser may break after underscores."""
    return Markup("_<wbr>").join(name.split("_"))


TEMPLATES.filters |= {filter.__name__: filter for filter in (breakable, count, size, percent, rate, duration)}


def render_html(report: Report) -> str:
    """The page: one file, no external resources, all text from outside escaped."""
    return TEMPLATES.get_template("report.html.j2").render(
        report=report,
        base=report.base,
        tasks=report.tasks,
        metric=lambda task: metric_name(report, task),
        change=change,
        verdict=verdict(report),
        notes=notes(report),
        where=measured_in,
        runtimes=_runtimes(report),
        compared=standings(report.comparison),
        said=said,
        is_package=lambda row: isinstance(row, Package),
        crowded=_crowded(report),
        pictures=_pictures(report),
        plots=_plots(report),
        usage=_usage(report),
        checks=lambda package: list(flattened(package.verified)),
        space_size=_space_size(report),
        recipe=yaml.safe_dump(_plain(report.recipe), sort_keys=False, allow_unicode=True),
        fingerprints=list(flattened(report.recipe.get("fingerprints") or {})),
    )


def _plain(data: Any) -> Any:
    return json.loads(json.dumps(data, default=str))


def flattened(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested keys as `outer: inner`, and their values; lists become comma-separated."""
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flattened(value, f"{name}: ")
        elif isinstance(value, list):
            yield name, ", ".join(str(item) for item in value)
        elif isinstance(value, float):
            yield name, f"{value:.3g}"
        else:
            yield name, value


def _pictures(report: Report) -> list[tuple[str, Architecture, Markup]]:
    """Names of the packages that share an architecture, the architecture, and its picture."""
    named: dict[Architecture, list[str]] = {}
    for package in report.packages:
        named.setdefault(package.sizes, []).append(package.name)
    base = report.base.sizes
    return [(", ".join(names), sizes, architecture_picture(sizes, base)) for sizes, names in named.items()]


def _candidates(report: Report) -> list[Candidate]:
    if report.search is None:
        return list(report.front)
    return [*report.search.points]


def _dots(report: Report, against_speed: bool) -> list[Dot]:
    names: dict[str, list[str]] = {}
    for package in report.packages:
        if package.quantization is None:
            names.setdefault(package.sizes.key, []).append(package.name)
    front = {candidate.key for candidate in report.front}
    dots = []
    crowded = _crowded(report)
    for one in _candidates(report):
        if against_speed and one.decode_tps is None:
            continue
        chosen = names.get(one.sizes.key)
        on_front = one.key in front or (isinstance(one, Point) and one.on_front)
        dots.append(
            Dot(
                x=one.decode_tps if against_speed and one.decode_tps is not None else one.params / report.base.params,
                y=one.quality,
                title=_hover(
                    one,
                    report,
                    scores=not (crowded and against_speed),
                    sizes=not against_speed and (on_front or bool(chosen) or not crowded),
                ),
                kind="chosen" if chosen else "front" if on_front else "point",
                label=", ".join(chosen) if chosen else "",
            )
        )
    return dots


def _crowded(report: Report) -> bool:
    """Whether the sizes of every measured sub-network would make the page heavy; then only the front's are told."""
    return len(_candidates(report)) * len(report.base.sizes.layers) > 20_000


def _hover(one: Candidate, report: Report, scores: bool, sizes: bool) -> str:
    """What a measured sub-network is, and where wanted its score on every task and its sizes."""
    text = [f"quality {one.quality:.4g}, {percent(one.params / report.base.params)} of the parameters"]
    if one.decode_tps is not None:
        text[0] += f", {rate(one.decode_tps)} tokens/s"
    if isinstance(one, Point):
        text[0] += f", generation {one.generation}" + ("" if one.full else " (a first look only)")
    if scores:
        text += [f"{task} {s.text}{' (' + s.stamp + ')' if s.stamp else ''}" for task, s in one.tasks.items()]
        text += [f"{name} {value:.4g}" for name, value in one.further.items()]
    if sizes:
        text.append(sizes_text(one.sizes))
    return "\n".join(text)


def _plots(report: Report) -> dict[str, Markup]:
    """The plots that the report's data allow, by name."""
    plots: dict[str, Markup] = {}
    base = Dot(1.0, 1.0, f"{report.base.name}: the base", "base", "base")
    if dots := _dots(report, against_speed=False):
        plots["params"] = scatter(
            [*dots, base],
            "parameters, share of the base's",
            "quality on the search split",
            less_is_better=True,
            limits=_size_limits(report),
            x_is_share=True,
        )
    if dots := _dots(report, against_speed=True):
        plots["speed"] = scatter(
            dots, "decode tokens per second, from speed.json", "quality on the search split", less_is_better=False
        )
    if report.search and len(report.search.generations) > 1:
        generations = report.search.generations
        plots["hypervolume"] = lines(
            [Line("hypervolume", [(g.evaluations, g.hypervolume) for g in generations])],
            "measured sub-networks",
            "hypervolume",
        )
        judged = [(g.generation, g.predictor) for g in generations if g.predictor]
        curves = [
            Line(name, [(at, value) for at, p in judged if (value := getattr(p, key)) is not None], colour)
            for colour, (name, key) in enumerate((("Kendall tau", "kendall"), ("Spearman rho", "spearman")), start=1)
        ]
        if curves := [curve for curve in curves if curve.points]:
            plots["predictor"] = lines(curves, "generation", "rank correlation")
        errors = [(at, p.mae) for at, p in judged if p.mae is not None]
        if errors:
            plots["predictor_error"] = lines([Line("error", errors)], "generation", "mean absolute error", height=160)
    if report.finetune and report.finetune.curve:
        curve = report.finetune.curve
        trained = [
            Line(
                f"{name} network", [(p.tokens, value) for p in curve if (value := getattr(p, name)) is not None], colour
            )
            for colour, name in enumerate(("largest", "middle", "smallest"), start=1)
        ]
        if trained := [line for line in trained if line.points]:
            plots["training"] = lines(trained, "training tokens", "loss")
    return plots | comparison_plots(standings(report.comparison), report.base.params)


def _size_limits(report: Report) -> list[float]:
    """The sizes that were asked for, as shares of the base: `0.67`, `67%` and `450M` are read as the command does."""
    asked = (report.search.targets.get("max_params") if report.search else None) or []
    limits = []
    for size_asked in asked if isinstance(asked, list) else [asked]:
        match = re.fullmatch(r"([\d.]+)\s*([%kMGB]?)", str(size_asked))
        if match:
            number = float(match[1]) * {"": 1, "%": 0.01, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}[match[2]]
            limits.append(number if number <= 1 else number / report.base.params)
    return limits


def _usage(report: Report) -> list[tuple[str, Markup]]:
    """A map for every size that the front varies."""
    if not report.front:
        return []
    architectures = [candidate.sizes for candidate in report.front]
    everything = [*architectures, report.base.sizes]
    maps = []
    for name, attribute in (
        ("FFN width", "intermediate_size"),
        ("KV heads", "num_key_value_heads"),
        ("experts", "num_experts"),
    ):
        if len({getattr(layer, attribute) for sizes in everything for layer in sizes.layers}) > 1:
            maps.append((name, usage_map(architectures, attribute, _declared(report, attribute))))
    return maps


def _declared(report: Report, attribute: str) -> list[int]:
    """Values of the genes of this size, together with the base's own."""
    kind = {"intermediate_size": "ffn", "num_key_value_heads": "kv", "num_experts": "experts"}[attribute]
    values = {getattr(layer, attribute) for layer in report.base.sizes.layers}
    for gene in report.search.space.genes if report.search else []:
        if gene.name.partition(".")[0] == kind:
            values |= {value for value in gene.values if isinstance(value, int)}
    return sorted(values)


def _space_size(report: Report) -> str | Markup:
    """Number of genomes in the search space, as a power of ten where it is large; empty where it is unknown."""
    if report.search is None or not report.search.space.genes:
        return ""
    genomes = math.prod(len(gene.values) for gene in report.search.space.genes)
    return f"{genomes:,}" if genomes < 10**6 else Markup("10<sup>{:.0f}</sup>").format(math.log10(genomes))
