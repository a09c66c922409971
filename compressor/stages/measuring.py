"""Score base and packages on the report split, time them side by side, and let them speak."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import replace
from functools import cache, partial
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compressor.architecture import Architecture
from compressor.finetune.data import HELD_OUT_BLOCKS, Blocks
from compressor.finetune.losses import held_out_loss
from compressor.finetune.sources import plain_text, read_rows
from compressor.job import Job
from compressor.progress import say
from compressor.run import read_json, write_json
from compressor.stages.finetuning import training_blocks, weights_fingerprint
from compressor.stages.subnets import relative_quality, stored_scores

if TYPE_CHECKING:
    from search.store import EvaluationStore


LOADABLE = ("uneven", "uniform", "padded")
"""Layouts that transformers loads."""


def measure_packages(job: Job, names: list[str]) -> None:
    """Score base and packages on the report split, time them side by side, and record it in each package.

    One package at a time is in memory, beside the base. Scores are rows of evaluations.db like any other, so nothing is
    scored twice, and what was timed beside this base under the same conditions is not timed again. What transformers
    does not load is timed in its own runtime. A gguf file is scored with the weights that it holds, and a graph scores
    what the package scores that it is a copy of: that both compute the same in their runtimes is for the proof to say.
    """
    from evals.speed import Speed, speed_beside
    from export.card import read_base_card
    from export.package import read_record, update_record
    from search.store import EvaluationStore

    run, base = job.run, cache(job.load_base)
    job.threads(scoring=True)
    unread = unread_text(job)
    conditions = {
        "text": unread.fingerprint,
        "base": job.base_fingerprint,
        "device": torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else job.device.type,
        "dtype": str(job.compute_dtype),
        "threads": torch.get_num_threads() if job.device.type == "cpu" else None,
    }
    file = run.packages / "base.json"
    before = read_json(file) if file.is_file() else {}
    if before.get("conditions") != conditions:
        before = {}
    base_speed: dict[str, Any] | None = before["base"]["speed"] if before else None
    losses = {"base": before["base"].get("held_out_loss") if before else None}
    said: dict[str, dict[str, str]] = {row["prompt"]: row["continuations"] for row in before.get("samples", [])}
    prompts = openings(job)
    texts = {"base": continuations(job, prompts, base, {p: kept["base"] for p, kept in said.items()})}
    run.search.mkdir(exist_ok=True)
    with EvaluationStore(run.evaluations) as store:
        scores = {"base": report_scores(job, store, base, job.structure.base, job.base_fingerprint)}
        if losses["base"] is None:
            losses["base"] = held_out_loss(base(), unread, 1, job.device)
        base_values = {task: score["value"] for task, score in scores["base"].items()}
        for number, name in enumerate(names, start=1):
            say(f"measuring {name} ({number} of {len(names)})")
            package = run.packages / name
            record = read_record(package)
            layout, architecture = record["entry"]["layout"], Architecture.from_dict(record["entry"]["architecture"])
            model = cache(partial(scored_network, job, package, record))  # loaded when, and if, it is needed
            if layout in ("onnx", "openvino"):
                scores[name] = scores[record["lineage"]["copy_of"]]
            else:
                scores[name] = report_scores(job, store, model, architecture, weights_fingerprint(package))
            speed = record["entry"].get("speed")
            timed = speed is not None and base_speed is not None and record["lineage"].get("base_speed") == base_speed
            if not timed:
                job.threads(scoring=True)
                if layout in LOADABLE:
                    known = None if base_speed is None else Speed(**base_speed)
                    found, beside = speed_beside(model(), base(), known)
                    speed, base_speed = found.to_dict(), beside.to_dict()
                else:
                    assert base_speed is not None  # a package of a pick's own layout comes first
                    speed = speed_in_its_runtime(package, record, base_speed)
            losses[name] = record["entry"].get("held_out_loss") if timed else None
            if losses[name] is None:
                graph = layout in ("onnx", "openvino")
                losses[name] = (
                    losses[record["lineage"]["copy_of"]] if graph else held_out_loss(model(), unread, 1, job.device)
                )
            if layout in LOADABLE:
                kept = {prompt: row[name] for prompt, row in said.items() if timed and name in row}
                texts[name] = continuations(job, prompts, model, kept)
            values = {task: score["value"] for task, score in scores[name].items()}
            measured = {
                "tasks": scores[name],
                "quality": relative_quality(job, values, base_values),
                "held_out_loss": losses[name],
                "speed": speed,
            }
            documents = {task: job.tasks.fingerprint(task, "report") for task in scores[name]}
            update_record(package, entry=measured, lineage={"task_documents": documents, "base_speed": base_speed})
    write_json(
        file,
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
                "held_out_loss": losses["base"],
                "speed": base_speed,
            },
            "conditions": conditions,
            "packages": names,
            "samples": [
                {"prompt": prompt, "continuations": {name: found[prompt] for name, found in texts.items()}}
                for prompt in prompts
            ],
        },
    )


def unread_text(job: Job) -> Blocks:
    """Some of the user's text that neither fine-tuning nor healing reads: what the longer of the two holds out."""
    tokens = max(job.recipe.finetuning.tokens or 0, job.recipe.healing.tokens or 0)
    _, held_out = training_blocks(job, tokens).split()
    return replace(held_out, table=held_out.table[:HELD_OUT_BLOCKS])


def scored_network(job: Job, package: Path, record: dict[str, Any]) -> Any:
    """What a package's scores are computed with: the package; for a gguf file, what it is a copy of, with its weights.

    That the file's own runtime computes the same is for the proof to say.
    """
    from export.gguf_layout import take_stored_weights

    if record["entry"]["layout"] != "gguf":
        return load_package(package, job.compute_dtype, job.device)
    original = job.run.packages / record["lineage"]["copy_of"]
    return take_stored_weights(load_package(original, job.compute_dtype, job.device), package)


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


def speed_in_its_runtime(package: Path, record: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Speed of a package that transformers does not load, at the work and on the threads that the base was timed at."""
    from export import gguf_layout, graphs

    work = {"prompt": like["prompt"], "new": like["new"], "threads": like["threads"] or 1}
    if record["entry"]["layout"] == "gguf":
        return gguf_layout.measure_speed(package, **work)
    return graphs.measure_speed(package, record, **work)


def report_scores(
    job: Job, store: EvaluationStore, model: Callable[[], Any], architecture: Architecture, weights: str
) -> dict[str, dict[str, Any]]:
    """Every task's score on the report split, in the report's form. `model` is loaded where a score is missing."""
    rows = stored_scores(job, store, architecture, weights, "report", lambda: job.scorer(model()).score("report"))
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


def openings(job: Job, count: int = 3) -> dict[str, torch.Tensor]:
    """The openings of a few documents of the user's data, and their token ids [1, length]."""
    assert job.recipe.data is not None
    texts = [plain_text(row) for row in islice(read_rows(job.recipe.data), 400)]
    found = {}
    for text in [text for text in texts if len(text) > 20][-count:]:
        ids = job.tokenizer(text, return_tensors="pt", truncation=True, max_length=256).input_ids
        ids = ids[:, : min(24, 1 + ids.shape[1] // 2)]
        found[job.tokenizer.decode(ids[0], skip_special_tokens=True)] = ids.to(job.device)
    return found


def continuations(
    job: Job, prompts: Mapping[str, torch.Tensor], network: Callable[[], Any], kept: Mapping[str, str], new: int = 48
) -> dict[str, str]:
    """What a network greedily makes of every prompt's token ids [1, length]; those in `kept` are known already."""
    found = {}
    for prompt, ids in prompts.items():
        if prompt in kept:
            found[prompt] = kept[prompt]
            continue
        with torch.no_grad():
            out = network().generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=job.tokenizer.pad_token_id or job.tokenizer.eos_token_id or 0,
            )
        found[prompt] = job.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return found
