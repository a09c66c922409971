"""The report as one HTML page without external resources, written beside `report.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from export.report.alternatives import alternatives
from export.report.comparison import comparison_plots, summarize, summary
from export.report.front_view import front_view, quality_text, speed_text
from export.report.plots import Line, architecture_picture, lines, usage_map
from export.report.schema import Generation, Package, Report, Sample
from export.report.table import ABOUT_QUALITY, measured_in, metric_name, notes, runtimes, trainings
from export.report.verdict import change, verdict
from supernet.architecture import Architecture
from supernet.common.files import write_json, write_text
from supernet.common.formatting import count, duration, percent, rate, size


def write_report(report: Report, folder: Path) -> Path:
    """Write `report.html` and then `report.json` into `folder`, each whole or not at all. Returns the page's path."""
    page = folder / "report.html"
    write_text(page, render_html(report))
    data = report.model_dump(mode="json", by_alias=True, exclude_none=False)
    write_json(folder / "report.json", data)
    return page


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,
    autoescape=lambda name: name is not None and ".html" in name,
    trim_blocks=True,
    lstrip_blocks=True,
)


TEMPLATES.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}


def breakable(name: str) -> Markup:
    """A task's name that a browser may break after underscores."""
    return Markup("_<wbr>").join(name.split("_"))


def sentence(line: str) -> str:
    """A line that the terminal shows, as a sentence."""
    return f"{line[:1].upper()}{line[1:]}."


TEMPLATES.filters |= {filter.__name__: filter for filter in (breakable, count, size, percent, rate, duration, sentence)}


def render_html(report: Report) -> str:
    """The page: one file, no external resources, all text from outside escaped."""
    return TEMPLATES.get_template("report.html.j2").render(
        trainings=trainings(report),
        report=report,
        base=report.base,
        tasks=report.tasks,
        metric=lambda task: metric_name(report, task),
        change=lambda row, task: change(
            report.base.tasks[task], row.tasks[task], row.change and row.change.tasks.get(task)
        ),
        verdict=[*verdict(report), *alternatives(report)],
        about_quality=ABOUT_QUALITY,
        notes=notes(report),
        where=measured_in,
        runtimes=runtimes(report),
        compared=summarize(report.comparison),
        summary=summary,
        is_package=lambda row: isinstance(row, Package),
        front=front_view(report),
        quality_text=quality_text,
        speed_text=speed_text,
        pictures=_pictures(report),
        plots=_plots(report),
        usage=_usage(report),
        checks=lambda package: list(flattened(checked(package))),
        space_size=_space_size(report),
        written=written,
        recipe=yaml.safe_dump(_plain(report.recipe), sort_keys=False, allow_unicode=True),
        fingerprints=list(flattened(report.recipe.get("fingerprints") or {})),
    )


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data as JSON holds it, which YAML can write."""
    return json.loads(json.dumps(data, default=str))


def flattened(data: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
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


def checked(package: Package) -> dict[str, object]:
    """What was proved of a package. What it does not have, such as the quantization of one without, is left out."""
    claims = package.verified or {"proof": package.refused or "still to be made"}
    return {name: value for name, value in claims.items() if value is not None or name != "quantization"}


def written(sample: Sample) -> list[tuple[list[str], str]]:
    """What was written to a prompt, each text once, with the names of all that wrote it."""
    names: dict[str, list[str]] = {}
    for name, text in sample.continuations.items():
        names.setdefault(text.strip(), []).append(name)
    return [(who, text) for text, who in names.items()]


def _pictures(report: Report) -> list[tuple[str, Architecture, Markup]]:
    """Names of the packages that share an architecture, the architecture, and its picture."""
    named: dict[Architecture, list[str]] = {}
    for package in report.packages:
        named.setdefault(package.architecture, []).append(package.name)
    base = report.base.architecture
    return [(", ".join(names), sizes, architecture_picture(sizes, base)) for sizes, names in named.items()]


def _plots(report: Report) -> dict[str, Markup]:
    """The plots that the report's data allow, by name."""
    plots: dict[str, Markup] = {}
    if report.search and len(report.search.generations) > 1:
        plots |= _search_plots(report.search.generations)
    if report.finetune:
        curve = report.finetune.curve
        losses = _named_lines(
            (name, [(point.tokens, getattr(point, name)) for point in curve])
            for name in ("largest", "middle", "smallest")
        )
        if losses:
            plots["training"] = lines(losses, "training tokens", "loss")
    plots |= comparison_plots(summarize(report.comparison), report.base.params)
    return {name: plot for name, plot in plots.items() if plot}


def _search_plots(generations: Sequence[Generation]) -> dict[str, Markup]:
    """How the front grew, and how well the predictor ranked, generation by generation."""
    hypervolume = [(generation.evaluations, generation.hypervolume) for generation in generations]
    plots = {"hypervolume": lines([Line("hypervolume", hypervolume)], "measured sub-networks", "hypervolume")}
    predictors = [(generation.generation, generation.predictor) for generation in generations if generation.predictor]
    correlations = _named_lines(
        (name, [(number, getattr(predictor, key)) for number, predictor in predictors])
        for name, key in (("Kendall tau", "kendall"), ("Spearman rho", "spearman"))
    )
    if correlations:
        plots["predictor"] = lines(correlations, "generation", "rank correlation")
    errors = [(number, predictor.mae) for number, predictor in predictors if predictor.mae is not None]
    if errors:
        plots["predictor_error"] = lines([Line("error", errors)], "generation", "mean absolute error", height=160)
    return plots


def _named_lines(curves: Iterable[tuple[str, Sequence[tuple[int, float | None]]]]) -> list[Line]:
    """A line of another colour for every named curve. Points without a value and curves without points are left out."""
    named = [
        Line(name, [(x, y) for x, y in points if y is not None], colour)
        for colour, (name, points) in enumerate(curves, start=1)
    ]
    return [line for line in named if line.points]


def _usage(report: Report) -> list[tuple[str, Markup]]:
    """Name and usage map of every size that varies on the front."""
    if not report.front:
        return []
    architectures = [candidate.architecture for candidate in report.front]
    everything = [*architectures, report.base.architecture]
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
    """Values of the genes of this size, and the base's."""
    kind = {"intermediate_size": "ffn", "num_key_value_heads": "kv", "num_experts": "experts"}[attribute]
    values = {getattr(layer, attribute) for layer in report.base.architecture.layers}
    for gene in report.search.space.genes if report.search else []:
        if gene.name.partition(".")[0] == kind:
            values |= {value for value in gene.values if isinstance(value, int)}
    return sorted(values)


def _space_size(report: Report) -> str | Markup:
    """Number of genomes in the search space, as a power of ten if it is large; empty if it is unknown."""
    if report.search is None or not report.search.space.genes:
        return ""
    genomes = math.prod(len(gene.values) for gene in report.search.space.genes)
    return f"{genomes:,}" if genomes < 10**6 else Markup("10<sup>{:.0f}</sup>").format(math.log10(genomes))
