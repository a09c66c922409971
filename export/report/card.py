"""The model card of a package: README.md with the hub's metadata, how to load it, what it scores, how it was made."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import yaml
from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData

from export.package_record import ElasticSize, PackageEntry, PackageRecord
from export.report.comparison import summarize, summary
from export.report.page import TEMPLATES, flattened
from export.report.schema import Base, BaseCard, Package, Report
from export.report.table import ABOUT_QUALITY, DECOMPRESSED, decompressed_at_load, measured_in, metric_name, notes
from export.report.verdict import verdict
from supernet.architecture import Architecture
from supernet.common.formatting import shell_word
from supernet.common.progress import say

Known = TypeVar("Known")
UNEVEN_TRANSFORMERS = "5.15"
"""The oldest transformers that reads `per_layer_config`, which uneven packages need."""


def read_base_card(folder: Path) -> BaseCard:
    """What README.md in the base's local folder states about license, language and data; empty without one, and, with
    a warning, where its metadata cannot be read."""
    data = _metadata(folder)
    if data is None:
        return BaseCard()

    def text(key: str) -> str | None:
        value = data.get(key)
        return value if isinstance(value, str) else None

    def texts(key: str) -> list[str]:
        value = data.get(key) or []
        return [str(item) for item in (value if isinstance(value, list) else [value])]

    return BaseCard(
        license=text("license"),
        license_name=text("license_name"),
        license_link=text("license_link"),
        language=texts("language"),
        datasets=texts("datasets"),
    )


def _metadata(folder: Path) -> CardData | None:
    """The metadata of README.md in a folder; None without one, and, with a warning, where it cannot be read."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    try:
        return ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (ValueError, TypeError, yaml.YAMLError) as error:  # whoever wrote it; the hub is as strict as that
        say(f"warning: {readme}: its metadata cannot be read ({type(error).__name__}); its license is not kept")
        return None


def render_slice_card(package: PackageEntry, elastic: PackageRecord, size: ElasticSize, whole: Architecture) -> str:
    """README.md of a size that was cut out of an elastic package; `whole` is the architecture of its super-network."""
    known = _metadata(elastic.folder) or ModelCardData(library_name="transformers", pipeline_tag="text-generation")
    data = known.to_dict()
    data.pop("model-index", None)  # scores of another network
    data |= {"model_name": package.name, "tags": [tag for tag in data.get("tags") or [] if tag != "elastic"]}
    if package.layout != "uniform":
        data["tags"].append(package.layout)
    return TEMPLATES.get_template("slice.md.j2").render(
        metadata=ModelCardData(**data).to_yaml(),
        title=package.name,
        package=package,
        elastic=elastic,
        size=size,
        whole=whole,
        picture=picture(package.architecture, whole),
        licensed=known.get("license"),
        **loading(f"path/to/{package.name}", package, "Once upon a time"),
    )


def loading(place: str, package: PackageEntry, prompt: str) -> dict[str, object]:
    """What `loading.md.j2` shows: how the package in `place`, a folder or a name on the hub, is loaded."""
    return {
        "location": _literal(place),
        "place": shlex.quote(place),
        "in_vllm": in_vllm(package),
        "prompt": _literal(prompt),
        "remote_code": package.layout in ("uneven", "elastic"),
        "unpacked": DECOMPRESSED if decompressed_at_load(package) else "",
        "uneven_transformers": UNEVEN_TRANSFORMERS,
        "quantized_form": quantized_form(package),
    }


def render_card(report: Report, package_name: str, repo_id: str | None = None) -> str:
    """README.md of one package of the report. `repo_id` is its name on the hub, if that is known already.

    Raises KeyError where the report has no such package.
    """
    package = report.package(package_name)
    prompt = report.samples[0].prompt if report.samples else "Once upon a time"
    proved = [base for base in report.quantized_base if base.verified]
    alone = report.model_copy(update={"packages": [package], "quantized_base": proved})
    siblings = [row for row in report.packages if row.architecture == package.architecture]
    compared = [
        table for table in summarize(report.comparison) if any(o.ours and o.params == package.params for o in table)
    ]
    if package.layout == "elastic":  # what is compared was healed, and it was not
        compared = []
    return TEMPLATES.get_template("card.md.j2").render(
        metadata=card_data(report, package).to_yaml(),
        report=report,
        base=report.base,
        package=package,
        title=repo_id or f"{report.base.name} {package.label}",
        file=package.file,
        file_location=_literal(f"{repo_id or f'path/to/{package.name}'}/{package.file}"),
        shell_prompt=shell_word(" ".join(prompt.split())),
        verdict=" ".join(verdict(alone)),
        rows=[report.base, *report.quantized_base, *siblings],
        metric=lambda task: metric_name(report, task),
        measured_in=measured_in,
        about_quality=ABOUT_QUALITY,
        notes=notes(report.model_copy(update={"packages": siblings})),
        picture=picture(package.architecture, report.base.architecture),
        shown=_shown(report, package, siblings),
        checks=list(flattened(package.verified or {"proof": package.refused or "still to be made"})),
        healed_tokens=(report.recipe.get("healing") or {}).get("tokens"),
        refitted_tokens=refitted_tokens(report, package),
        healing=of_network(report.healing, package),
        compared=compared[0] if compared else None,
        summary=summary,
        **loading(repo_id or f"path/to/{package.name}", package, prompt),
    )


def in_vllm(package: PackageEntry) -> bool:
    """Whether vLLM should load the package, by its source: its Transformers backend wants attention in every layer of
    an uneven package, and the code of an elastic one asks for a size that it does not pass on."""
    if package.quantization == "int8-dynamic" or package.layout not in ("uneven", "uniform", "padded"):
        return False
    return package.layout != "uneven" or all(
        layer.num_key_value_heads or not layer.intermediate_size for layer in package.architecture.layers
    )


def of_network(known: Mapping[str, Known], package: Package) -> Known | None:
    """What is known of the network that a package holds, whatever its form; None where nothing is."""
    names = [name for name in known if package.name == name or package.name.startswith(f"{name}-")]
    return known[max(names, key=len)] if names else None


def refitted_tokens(report: Report, package: Package) -> int:
    """The tokens that the package's projections were refitted on, 0 where they were not; by the recipe where the report
    does not say."""
    if report.repaired is not None:
        return of_network(report.repaired, package) or 0
    repair = report.recipe.get("repair") or {}
    return int(repair.get("tokens", 0)) if repair.get("enabled") else 0


def _literal(text: str) -> str:
    """The text as a Python string in double quotes, on one line."""
    return json.dumps(text, ensure_ascii=False)


def _shown(report: Report, package: Package, siblings: list[Package]) -> set[str]:
    """Names of those whose continuations the card shows: base and package, or its siblings if it has none."""
    if any(package.name in sample.continuations for sample in report.samples):
        return {"base", package.name}
    return {"base", *(row.name for row in siblings)}


def card_data(report: Report, package: Package) -> ModelCardData:
    """The card's metadata. What is not known, such as the license of a base without a card, is left out."""
    base = report.base
    tags = ["nas-compressor", "neural-architecture-search", "pruned"]
    in_transformers = package.layout in ("uneven", "uniform", "padded", "elastic")
    if package.quantization:
        tags += [package.quantization, *([quantized_form(package)] if in_transformers else [])]
    datasets = list(base.card.datasets)
    if report.hub_dataset and report.hub_dataset not in datasets:
        datasets.append(report.hub_dataset)
    # The hub knows no relation "pruned": what is not quantized is further trained weights of the base.
    relation = "quantized" if package.quantization else "finetune"
    return ModelCardData(
        base_model=base.hub_id,
        base_model_relation=relation if base.hub_id else None,
        license=base.card.license,
        license_name=base.card.license_name,
        license_link=_license_link(base),
        language=base.card.language or None,
        datasets=list(dict.fromkeys(datasets)) or None,
        library_name="transformers" if in_transformers else None,
        pipeline_tag="text-generation",
        tags=tags if package.layout == "uniform" else [*tags, package.layout],
        model_name=f"{base.name} {package.label}",
        eval_results=eval_results(package),
    )


def quantized_form(package: PackageEntry) -> str:
    """The form of a quantized package that transformers loads; also the name of the package that it needs."""
    return "auto-round" if (package.quantization or "").endswith("auto-round") else "compressed-tensors"


def _license_link(base: Base) -> str | None:
    """The base's license link; if it names a file of the base's repository, that file's address."""
    link = base.card.license_link
    if link and base.hub_id and "://" not in link:
        return f"https://huggingface.co/{base.hub_id}/blob/main/{link}"
    return link


def eval_results(package: Package) -> list[EvalResult]:
    """Every number that the report has for the package, as entries of the hub's model-index."""
    results: list[EvalResult] = []

    def add(dataset: str, description: str, metric: str, value: float | None, name: str | None = None) -> None:
        if value is not None:
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=dataset,
                    dataset_name=description,
                    metric_type=metric,
                    metric_value=value,
                    metric_name=name or metric,
                )
            )

    for task, score in package.tasks.items():
        documents = f"{task} ({score.n} documents, {score.split} split)"
        stamp = f" ({score.stamp})" if score.stamp else ""
        add(task, documents, score.metric, score.value, f"{score.metric}{stamp}")
        add(task, documents, f"{score.metric}_stderr", score.stderr)
    about = ("nas-compressor", "size and quality")
    add(*about, "quality", package.quality, "share of the base's scores that is kept, above chance")
    add(*about, "parameters", package.params)
    add(*about, "bytes", package.bytes, "bytes of weights on disk")
    if report := package.quantization_report:
        add(*about, "bits_per_weight", report.bits_per_weight, "bits per quantized weight")
        add(*about, "bits_per_parameter", report.bits_per_parameter, "bits of the file per parameter")
    if speed := package.speed:
        work = ("speed", speed.workload)
        add(*work, "prefill_tps", speed.prefill_tps, f"prefill tokens per second ({speed.where})")
        add(*work, "decode_tps", speed.decode_tps, f"decode tokens per second ({speed.where})")
    return results


def inline(text: object) -> str:
    """Text escaped into one line of Markdown: nothing in it is markup, also not within a table."""
    line = re.sub(r"\s+", " ", str(text))
    line = re.sub(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def fenced(text: str, language: str = "text") -> str:
    """A code block that the text itself cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def picture(architecture: Architecture, base: Architecture) -> str:
    """The sizes of every layer as text: `█` is kept, `░` is removed."""
    rows = [f"layer  {'KV heads':<26}FFN width"]
    most_heads = max(layer.num_key_value_heads for layer in base.layers)
    most_neurons = max(layer.intermediate_size for layer in base.layers)
    for index, (layer, full) in enumerate(zip(architecture.layers, base.layers, strict=True)):
        heads = _bar(layer.num_key_value_heads, full.num_key_value_heads, most_heads, 12)
        width = _bar(layer.intermediate_size, full.intermediate_size, most_neurons, 24)
        experts = f"  {layer.num_experts} of {full.num_experts} experts" if full.num_experts else ""
        rows.append(f"{index:>5}  {heads:<26}{width}{experts}".rstrip())
    return "\n".join(rows)


def _bar(kept: int, full: int, most: int, cells: int) -> str:
    """A bar `cells` wide for the largest size `most`: what is kept of `full`, and the two numbers."""
    if not full:
        return " " * cells
    outline = max(1, round(cells * full / most))
    # At least one cell shows that something is left, and at least one that something is removed.
    filled = 0 if not kept else outline if kept == full else min(max(1, round(cells * kept / most)), outline - 1)
    return f"{'█' * filled}{'░' * (outline - filled)}{' ' * (cells - outline)} {kept} of {full}"


TEMPLATES.filters |= {"inline": inline, "fenced": fenced}
