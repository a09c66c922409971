"""Assemble report.json from what the stages left, write report.html and the model cards, print the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from compressor.again import command_line
from compressor.inputs import HEALING, text_fingerprint
from compressor.job import Job
from compressor.shown_report import show_report
from compressor.stages.comparison_rows import comparison_rows, documents_scored
from compressor.stages.control import control_of, likeness_of
from compressor.stages.front import FrontRecord, scored_weights
from compressor.stages.measuring import Measurements, ReportDocuments
from compressor.stages.repairing import repaired_on
from compressor.stages.requalify import current_front
from compressor.stages.score_keys import HELD_OUT, fidelities, score_keys
from compressor.stages.subnet_scores import known_scores
from evals.comparison import paired_interval, resampled, score_intervals
from evals.quality import QualityScale, Resampled
from export.package_record import PackageRecord, read_record, update_record, write_card
from export.report.card import render_card
from export.report.page import write_report
from export.report.schema import (
    SCHEMA,
    Again,
    Alternative,
    Base,
    Difference,
    Gene,
    Generation,
    Package,
    PairedChange,
    Point,
    PredictorScore,
    QualityBasis,
    Report,
    Search,
    Space,
    validate_report,
)
from search.algorithms import JudgedPredictor
from search.objectives import Evaluation
from search.store import EvaluationStore
from supernet.architecture import Architecture
from supernet.common.errors import RequestError, reading
from supernet.common.files import read_json
from supernet.common.formatting import shell_word
from supernet.common.progress import say
from supernet.common.versions import machine, versions
from supernet.device import device_name
from supernet.training.history import History


def measured_record(package: Path) -> PackageRecord:
    """A package's record. Raises `RequestError` where an export was interrupted before it measured it."""
    record = read_record(package)
    if record.entry.held_out_loss is None:
        raise RequestError(f"{package}: not measured yet; run compressor export {shell_word(package.parent.parent)}")
    return record


def shown_entry(record: PackageRecord, scale: QualityScale) -> dict[str, Any]:
    """A package's entry as the report has it, with its quality by today's definition. A record that an earlier version
    wrote gets it too."""
    entry = record.entry.model_dump(exclude_unset=True)
    for size in entry.get("sizes", []):  # what only the proof reads
        size.pop("proof", None)
    entry["quality"] = scale.quality(record.entry.tasks, record.entry.held_out_loss)
    if entry["quality"] != record.entry.quality:
        update_record(record.folder, entry={"quality": entry["quality"]})
    return entry


def report(job: Job) -> Report:
    """Assemble report.json, write report.html and the cards, print the table."""
    run, recipe = job.run, job.recipe
    base_file = run.packages / "base.json"
    if not base_file.is_file():
        raise RequestError(f"{run.path}: nothing was exported yet; run compressor export")
    exported = Measurements.read(base_file)
    scale = QualityScale(exported.base.tasks, exported.base.held_out_loss)
    records = [measured_record(run.packages / name) for name in exported.packages]
    fingerprints = {
        "model": job.untouched_fingerprint,
        "data": text_fingerprint(job, recipe.finetuning.tokens or 0),
        "tasks": documents_scored(job),
    }
    search = searched(job, current_front(job)) if run.front.is_file() else None
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "versions": versions(),
        "recipe": job.given.model_dump(mode="json") | {"fingerprints": fingerprints},
        "base": exported.base,
        "quality": QualityBasis.of(scale),
        "front": [point for point in search.points if point.on_front] if search else [],
        "packages": [shown_entry(record, scale) for record in records],
        "quantized_base": [
            measured_record(run.packages / name).entry.model_dump(exclude_unset=True)
            for name in exported.quantized_base
        ],
        "left_out": exported.left_out,
        "samples": exported.samples,
        "comparison": comparison_rows(job),
        "search": search,
        "alternatives": other_picks(job, exported.packages),
        "again": Again(
            command=command_line(job.given, "runs/again"),
            run=run.path.resolve().name,
            seconds=sum(time.seconds for time in job.schedule.times.values()),
            machine=machine(),
            device=device_name(job.device),
        ),
    }
    data |= trainings(job, exported.packages)
    data["repaired"] = {r.entry.name: repaired_on(job, r.entry.architecture) for r in records}
    checked = with_changes(job, validate_report(data), {r.entry.name: r.lineage.scored_weights for r in records})
    for package in checked.packages:
        write_card(run.packages / package.name, render_card(checked, package.name))
    write_report(checked, run.path)  # last: newer than all that it is made from, it is up to date
    show_report(checked, run.path)
    return checked


def with_changes(job: Job, report: Report, weights: Mapping[str, str | None]) -> Report:
    """The report with how packages differ from the base, and quantized ones from what they were quantized from, over
    the same documents. `weights`: what was scored of each package, by name; what an earlier version scored is left
    without."""
    tasks, scale = job.tasks.tasks, report.scale

    def drawn(fingerprint: str | None) -> Resampled:
        return resampled(tasks, ReportDocuments.read(job, fingerprint)) if fingerprint else {}

    base = drawn(job.untouched_fingerprint)
    known = {name: drawn(fingerprint) for name, fingerprint in weights.items()}

    def change(package: Package, before: Base | Package, ours: Resampled, theirs: Resampled) -> PairedChange | None:
        differences = {}
        for task, interval in score_intervals(tasks, ours, theirs).items():
            now, then = package.tasks[task], before.tasks[task]
            if interval is not None:
                sign = 1 if now.higher_is_better else -1
                value = sign * (now.value - then.value)
                differences[task] = Difference(value=value, low=interval[0], high=interval[1])
        if not differences:
            return None
        quality = None
        if not scale.by_text and set(scale.counted) <= set(ours) & set(theirs):
            interval = paired_interval([scale.resampled(ours)], [scale.resampled(theirs)])
            if interval is not None:
                quality = Difference(value=package.quality - before.quality, low=interval[0], high=interval[1])
        return PairedChange(tasks=differences, quality=quality)

    packages = []
    for package in report.packages:
        ours, plain = known[package.name], report.unquantized(package)
        changes = {
            "change": change(package, report.base, ours, base),
            "change_by_quantization": plain and change(package, plain, ours, known[plain.name]),
        }
        packages.append(package.model_copy(update=changes))
    return report.model_copy(update={"packages": packages})


def is_packaged(job: Job, pick: Mapping[str, Any]) -> bool:
    """Whether the package of a pick's name holds its network; said where it was picked anew since."""
    held = read_record(job.run.packages / pick["name"]).entry.architecture
    if held == Architecture.from_dict(pick["architecture"]).without_bits() and has_its_bits(job, pick):
        return True
    say(f"note: {pick['name']} was picked anew and not packaged since: compressor export {shell_word(job.run.path)}")
    return False


def has_its_bits(job: Job, pick: Mapping[str, Any]) -> bool:
    """Whether the package in the bits that were picked with the size or searched, where any were, is there and holds
    these."""
    architecture = Architecture.from_dict(pick["architecture"])
    scheme = "mixed" if architecture.has_bits else (pick.get("bits") or {}).get("scheme")
    if scheme is None:
        return True
    package = job.run.packages / f"{pick['name']}-{scheme}"
    if not package.is_dir():
        return False
    report = read_record(package).entry.quantization_report
    return not architecture.has_bits or (report is not None and report.bits == architecture)


def other_picks(job: Job, packages: list[str]) -> list[Alternative]:
    """What other preferences would have picked in the place of what was packaged."""
    run = job.run
    if not run.picks.is_file():
        return []
    picks, place = read_json(run.picks), shell_word(run.path)
    with reading(f"{run.picks}: not what this version writes; run compressor pick"):
        return [
            Alternative(
                name=pick["name"],
                prefer=other["prefer"],
                key=other["key"],
                params=int(other["parameters"]),
                quality=other["quality"],
                held_out_loss=other["held_out_loss"],
                speedup=other["speedup"],
                command=f"compressor pick {place} --prefer {other['prefer']}, then compressor export {place}",
            )
            for pick in picks
            if pick["name"] in packages and pick["weights"] == run.supernet_weights and is_packaged(job, pick)
            for other in pick.get("others", [])
            if other["key"] != pick["key"]  # a finalist may have taken the pick's place
        ]


def trainings(job: Job, packages: Sequence[str]) -> dict[str, Any]:
    """What the report says of the fine-tuning and of the healing of each package, as far as there was any."""
    run, said = job.run, dict[str, Any]()
    made = run.manifest(run.supernet) or {}
    finetune = made.get("finetune", {})
    if finetune.get("tokens"):
        said["finetune"] = training(finetune) | {key: finetune[key] for key in ("sampler", "loss", "data")}
        if "bands" in made:
            bands = said["finetune"]["bands"] = [training(band) for band in made["bands"]]
            for name in ("tokens", "seconds", "measuring"):  # of all; the curve is that of the largest sizes
                said["finetune"][name] += sum(band[name] for band in bands)
    if job.recipe.healing.tokens:  # what an earlier export healed may still lie there
        healed = [name for name in packages if (run.subnets / name / HEALING).is_file()]
        said["healing"] = {name: training(read_json(run.subnets / name / HEALING)) for name in healed}
    if said:
        said["hub_dataset"] = finetune.get("hub_dataset")
    return said


def training(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What the report says of a training."""
    history = History.read(recorded)
    return {name: value for name, value in vars(history).items() if name != "passes"} | {"outcome": history.outcome}


def points(job: Job, front: FrontRecord) -> list[Point]:
    """Every measured sub-network as the report shows it."""
    keys = {fidelity: score_keys(job, fidelity) for fidelity in fidelities(job)}
    on_front = set(front["front"])
    names = job.recipe.searching.objectives
    further = [name for name in names if name in HELD_OUT or ":" in name or (name == "bytes" and job.space.bits)]
    shown, weights = [], scored_weights(job, front)
    with EvaluationStore(job.run.evaluations) as store:
        for row in front["evaluations"]:
            found = Evaluation.from_dict(row)
            architecture = found.architecture
            values = {name: value for name, value in found.values.items() if isfinite(value)}
            # A task that the recipe names only since the search has no value there.
            tasks = {n: key for n, key in keys["full" if row["full"] else "screening"].items() if n in values}
            scores = known_scores(store, architecture, weights, tasks)
            shown.append(
                Point(
                    key=row["key"],
                    architecture=architecture,
                    params=job.structure.parameters(architecture),
                    quality=values["quality"],
                    decode_tps=values.get("decode_tps"),
                    tasks={
                        # What a screening measured is shown as corrected by what screenings were worth.
                        name: scores[name].model_copy(update={"value": values[name]})
                        for name in job.tasks.tasks
                        if name in scores and name in values
                    },
                    further={name: values[name] for name in further if name in values},
                    generation=row["generation"],
                    on_front=row["key"] in on_front,
                    full=row["full"],
                )
            )
    return shown


def predictor_score(predictors: JudgedPredictor | None) -> PredictorScore | None:
    """How well the predictor in use (or, where all were set aside, the best of them) ranked the newest measurements."""
    if not predictors or not predictors["newest"]:
        return None
    newest = predictors["newest"]
    used = predictors["used"]
    name = used if used in newest else max(newest, key=lambda kind: newest[kind]["kendall"])
    judged = newest[name]
    return PredictorScore(
        name=name,
        kendall=judged["kendall"],
        spearman=judged["spearman"],
        mae=judged["mae"],
        used=used is not None and name not in predictors["set_aside"],
    )


def searched(job: Job, front: FrontRecord) -> Search:
    """The search as the report shows it, from what front.json holds."""
    basis = front["quality"]
    judged = next(objective["name"] for objective in front["objectives"] if objective["kind"] == "measured")
    generations = [
        Generation(
            generation=row["generation"],
            evaluations=row["evaluations"],
            hypervolume=row["hypervolume"],
            predictor=predictor_score((row.get("predictors") or {}).get(judged)),
            seconds_evaluating=row["seconds"]["evaluation"],
            seconds_other=row["seconds"]["overhead"],
        )
        for row in front["generations"]
    ]
    return Search(
        algorithm=front["algorithm"],
        evaluations=len(front["evaluations"]),
        generations=generations,
        points=points(job, front),
        space=Space(
            name=job.space.name, genes=[Gene(name=gene.name, values=list(gene.values)) for gene in job.space.genes]
        ),
        quality=QualityBasis(counted=basis["counted"], left_out=basis["left_out"], remark=basis["remark"]),
        base_decode_tps=front["base_decode_tps"],
        control=control_of(job, front),
        likeness=likeness_of(job, front),
        targets={name: value for name, value in job.recipe.searched_for.model_dump().items() if value},
    )
