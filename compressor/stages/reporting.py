"""Assemble report.json from what the stages left, write report.html and the model cards, print the table."""

from __future__ import annotations

from typing import Any

from compressor.inputs import data_fingerprint
from compressor.job import Job
from compressor.stages.comparing import comparison_rows
from compressor.stages.comparison_methods import documents_scored
from compressor.stages.score_keys import HELD_OUT, first_look_limit, score_keys
from supernet.architecture import Architecture
from supernet.common.errors import RequestError
from supernet.common.files import read_json
from supernet.common.progress import console, say
from supernet.common.versions import versions

Errors = dict[tuple[str, str, bool], float | None]
"""By architecture, name of the score, and whether it is of all documents of the search."""


def report(job: Job) -> dict[str, Any]:
    """Assemble report.json from what the stages left, write report.html and the cards, print the table."""
    from export.package_record import read_record, write_card
    from export.report.card import render_card
    from export.report.page import write_report
    from export.report.schema import validate_report
    from export.report.table import footnotes, terminal_table
    from export.report.verdict import verdict

    run, recipe = job.run, job.recipe
    base_file = run.packages / "base.json"
    if not base_file.is_file():
        raise RequestError(f"{run.path}: nothing was exported yet; run compressor export")
    exported = read_json(base_file)
    packages = [read_record(run.packages / name)["entry"] for name in exported["packages"]]
    found = read_json(run.front) if run.front.is_file() else None
    errors = standard_errors(job, found) if found else {}
    manifest = run.manifest(run.supernet) or {}
    fingerprints = {
        "model": job.base_fingerprint,
        "data": data_fingerprint(recipe.data or ""),
        "tasks": documents_scored(job),
    }
    data: dict[str, Any] = {
        "schema": 1,
        "versions": versions(),
        "recipe": recipe.model_dump(mode="json") | {"fingerprints": fingerprints},
        "base": exported["base"],
        "front": front_rows(job, found, errors) if found else [],
        "packages": packages,
        "samples": exported["samples"],
        "comparison": comparison_rows(job),
    }
    if found:
        data["search"] = search_section(job, found, errors)
    if manifest.get("finetune", {}).get("tokens"):
        facts = manifest["finetune"]
        data["finetune"] = {key: facts[key] for key in ("curve", "tokens", "seconds", "sampler", "loss", "data")}
    if "finetune" in data or recipe.healing.tokens:
        data["hub_dataset"] = manifest.get("finetune", {}).get("hub_dataset")
    checked = validate_report(data)
    page = write_report(checked, run.path)
    for entry in packages:
        write_card(run.packages / entry["name"], render_card(checked, entry["name"]))
    console.print(terminal_table(checked))
    for line in [*footnotes(checked), "", *verdict(checked)]:
        say(line)
    say(f"report: {page}")
    return read_json(run.report)


def front_rows(job: Job, found: dict[str, Any], errors: Errors) -> list[dict[str, Any]]:
    keys = set(found["front"])
    return [candidate_row(job, row, errors) for row in found["evaluations"] if row["key"] in keys]


def standard_errors(job: Job, found: dict[str, Any]) -> Errors:
    """Standard error of every score of the search."""
    from search.store import EvaluationStore

    looks = [False, True] if first_look_limit(job) else [False]
    names = {key: (name, not look) for look in looks for name, key in score_keys(job, look).items()}
    with EvaluationStore(job.run.evaluations) as store:
        rows = [(a.key, (row.task, row.documents), row.stderr) for a, row in store.all(weights=found["weights"])]
    return {(architecture, *names[key]): stderr for architecture, key, stderr in rows if key in names}


def candidate_row(job: Job, row: dict[str, Any], errors: Errors) -> dict[str, Any]:
    values = row["values"]
    limit = job.recipe.searching.limit if row["full"] else first_look_limit(job)
    further = [name for name in job.recipe.searching.objectives if name in HELD_OUT or ":" in name]
    return {
        "key": row["key"],
        "architecture": row["architecture"],
        "params": job.structure.parameters(Architecture.from_dict(row["architecture"])),
        "quality": values["quality"],
        "decode_tps": values.get("decode_tps"),
        "tasks": {
            name: {
                "metric": task.metric,
                "value": values[name],
                "stderr": errors.get((row["key"], name, row["full"])),
                "n": sum(len(docs) for _, docs in task.documents("search", limit)),
                "split": "search",
                "higher_is_better": task.higher_is_better,
                "chance": job.tasks.chance(name, "search", limit),
            }
            for name, task in job.tasks.tasks.items()
            if name in values  # the recipe may name one since that was not searched for
        },
        "further": {name: values[name] for name in further if values.get(name) is not None},
    }


def predictor_row(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """How well the predictor in use (or, where all were set aside, the best of them) ranked the newest measurements."""
    if not found or not found["newest"]:
        return None
    newest = found["newest"]
    name = found["used"] if found["used"] in newest else max(newest, key=lambda kind: newest[kind]["kendall"])
    judged = {key: newest[name][key] for key in ("kendall", "spearman", "mae")}
    return {"name": name, **judged, "used": found["used"] is not None and name not in found["set_aside"]}


def search_section(job: Job, found: dict[str, Any], errors: Errors) -> dict[str, Any]:
    front = set(found["front"])
    judged = next(o["name"] for o in found["objectives"] if o["kind"] == "measured")
    generations = []
    for row in found["generations"]:
        generations.append(
            {
                "generation": row["generation"],
                "evaluations": row["evaluations"],
                "hypervolume": row["hypervolume"],
                "predictor": predictor_row((row.get("predictors") or {}).get(judged)),
                "seconds_evaluating": row["seconds"]["evaluation"],
                "seconds_other": row["seconds"]["overhead"],
            }
        )
    return {
        "algorithm": found["algorithm"],
        "evaluations": len(found["evaluations"]),
        "generations": generations,
        "points": [
            candidate_row(job, row, errors)
            | {"generation": row["generation"], "on_front": row["key"] in front, "full": row["full"]}
            for row in found["evaluations"]
        ],
        "space": {
            "name": job.space.name,
            "genes": [{"name": g.name, "values": list(g.values)} for g in job.space.genes],
        },
        "targets": {k: v for k, v in job.recipe.targets.model_dump().items() if v},
    }
