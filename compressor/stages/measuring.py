"""Score base and packages on the report split, time them side by side, and let them speak."""

from __future__ import annotations

import copy
from contextlib import redirect_stderr
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compressor.architecture import Architecture
from compressor.finetune.sources import plain_text, read_rows
from compressor.job import Job
from compressor.progress import bar, say
from compressor.run import write_json
from compressor.stages.finetuning import weights_fingerprint
from compressor.stages.subnets import relative_quality, stored_scores

if TYPE_CHECKING:
    from search.store import EvaluationStore


def measure_packages(job: Job, base: Any, names: list[str]) -> None:
    """Score base and packages on the report split, time them side by side, and record it in each package.

    Scores are rows of evaluations.db like any other, so nothing is scored twice. What transformers does not load is
    timed in its own runtime. A gguf file is scored with the weights that it holds, and a graph scores what the package
    scores that it is a copy of: that both compute the same in their runtimes is for the proof to say.
    """
    from evals.speed import compare_speed
    from export.card import read_base_card
    from export.package import read_record, update_record
    from search.store import EvaluationStore

    run = job.run
    job.threads(scoring=True)
    records = {name: read_record(run.packages / name) for name in names}
    loadable = [name for name in names if records[name]["entry"]["layout"] in ("uneven", "uniform", "padded")]
    models = {"base": base} | {
        name: load_package(run.packages / name, job.compute_dtype, job.device) for name in loadable
    }
    run.search.mkdir(exist_ok=True)
    with EvaluationStore(run.evaluations) as store, bar("scoring the packages", 1 + len(names)) as progress:
        scores = {"base": report_scores(job, store, base, job.structure.base, job.base_fingerprint)}
        progress.advance(note="base")
        for name, record in records.items():
            layout, origin = record["entry"]["layout"], record["lineage"].get("copy_of", name)
            if layout in ("onnx", "openvino"):
                scores[name] = scores[origin]
            else:
                folder, model = run.packages / name, models.get(name, models[origin])
                architecture = Architecture.from_dict(record["entry"]["architecture"])
                if layout == "gguf":
                    model = gguf_network(model, folder)
                scores[name] = report_scores(job, store, model, architecture, weights_fingerprint(folder))
            progress.advance(note=name)
    say("timing base and packages side by side")
    job.threads(scoring=True)
    speeds = {name: speed.to_dict() for name, speed in compare_speed(models).items()}
    for name in set(names) - set(loadable):
        speeds[name] = speed_in_its_runtime(run.packages / name, records[name], speeds["base"])
    base_values = {task: score["value"] for task, score in scores["base"].items()}
    for name in names:
        values = {task: score["value"] for task, score in scores[name].items()}
        measured = {
            "tasks": scores[name],
            "quality": relative_quality(job, values, base_values),
            "speed": speeds[name],
        }
        documents = {task: job.tasks.fingerprint(task, "report") for task in scores[name]}
        update_record(run.packages / name, entry=measured, lineage={"task_documents": documents})
    write_json(
        run.packages / "base.json",
        {
            "base": {
                "name": Path(job.recipe.model).name,
                "path": job.recipe.model,
                "params": job.structure.parameters(job.structure.base),
                "bytes": job.checkpoint.weight_bytes,
                "dtype": str(job.stored_dtype).removeprefix("torch."),
                "architecture": job.structure.base.to_dict(),
                "card": read_base_card(job.checkpoint.path).model_dump(),
                "hub_id": None if Path(job.recipe.model).expanduser().is_dir() else job.recipe.model,
                "tasks": scores["base"],
                "speed": speeds["base"],
            },
            "packages": names,
            "samples": samples(job, {"base": base} | {n: m for n, m in models.items() if n != "base"}),
        },
    )


def load_package(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A package as users load it, through transformers. Its code file runs only if it is what this version writes."""
    from evals.loading import load_network
    from evals.trust import check_code

    # compressed-tensors draws bars of its own, in loading and when the first pass unpacks the weights.
    with redirect_stderr(StringIO()), torch.no_grad():
        model, _ = load_network(folder, dtype, check_code(folder))
        model = model.to(device).eval()
        model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=device))
    return model


def gguf_network(model: Any, package: Path) -> Any:
    """A copy of the network in `model` that has the weights which a gguf package's file holds."""
    from export.gguf_layout import take_stored_weights

    return take_stored_weights(copy.deepcopy(model), package)


def speed_in_its_runtime(package: Path, record: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Speed of a package that transformers does not load, at the work and on the threads that the base was timed at."""
    from export import gguf_layout, graphs

    work = {"prompt": like["prompt"], "new": like["new"], "threads": like["threads"] or 1}
    if record["entry"]["layout"] == "gguf":
        return gguf_layout.measure_speed(package, **work)
    return graphs.measure_speed(package, record, **work)


def report_scores(
    job: Job, store: EvaluationStore, model: Any, architecture: Architecture, weights: str
) -> dict[str, dict[str, Any]]:
    """Every task's score on the report split, in the report's form."""
    rows = stored_scores(job, store, architecture, weights, "report", lambda: job.scorer(model).score("report"))
    return {name: score_in_report(job, name, row.score, row.stderr, row.n) for name, row in rows.items()}


def score_in_report(job: Job, name: str, value: float, stderr: float | None, n: int) -> dict[str, Any]:
    """A task's score on the report split, as `report.json` holds it."""
    task = job.tasks.tasks[name]
    return {
        "metric": task.metric,
        "value": value,
        "stderr": stderr,
        "n": n,
        "split": "report",
        "higher_is_better": task.higher_is_better,
        "chance": job.tasks.chance(name, "report"),
    }


def samples(job: Job, models: dict[str, Any], count: int = 3, new: int = 48) -> list[dict[str, Any]]:
    """Greedy continuations of the openings of a few documents of the user's data, base beside packages."""
    assert job.recipe.data is not None
    texts = [plain_text(row) for row in islice(read_rows(job.recipe.data), 400)]
    found = []
    for text in [text for text in texts if len(text) > 20][-count:]:
        ids = job.tokenizer(text, return_tensors="pt", truncation=True, max_length=256).input_ids
        ids = ids[:, : min(24, 1 + ids.shape[1] // 2)].to(job.device)
        continuations = {}
        for name, model in models.items():
            with torch.no_grad():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new,
                    do_sample=False,
                    pad_token_id=job.tokenizer.pad_token_id or job.tokenizer.eos_token_id or 0,
                )
            continuations[name] = job.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        found.append({"prompt": job.tokenizer.decode(ids[0], skip_special_tokens=True), "continuations": continuations})
    return found
