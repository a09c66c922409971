"""Put ours beside the alternatives: same base, text, tokens, tasks, documents, code and size. Fills `comparison/`.

Every method gives an ordinary package `comparison/METHOD-SIZE-SEED/`, healed with as many tokens as ours has read in
fine-tuning and healing together, and proved like any other; methods that cut the very same network share one. The row
beside it, `METHOD-SIZE-SEED.json`, is written last, so its existence means that the method is done; a killed comparison
goes on behind the last row.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compressor.inputs import CALIBRATION_BLOCKS, training_blocks
from compressor.job import Job
from compressor.recipe import absolute_or_share
from compressor.stages.comparison_methods import Method, SizeComparison, documents_scored, methods
from compressor.stages.exporting import round_as_stored
from compressor.stages.measuring import load_package, score_in_report
from compressor.stages.picking import choose, measured, read_picks
from evals.quality import relative_quality
from export.report.comparison import OURS
from supernet.architecture import Architecture
from supernet.common.errors import RequestError, did_you_mean
from supernet.common.files import fingerprint, read_json, write_json
from supernet.common.progress import say
from supernet.training.data import Blocks
from supernet.training.supernet_training import heal

if TYPE_CHECKING:
    from evals.comparison import Documents, Resampled
    from evals.scoring.scorer import TaskScore
    from search.objectives import Evaluation


def compare(
    job: Job,
    *,
    baselines: Sequence[str] = (),
    sizes: Sequence[str] = (),
    seeds: int = 1,
    others: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Make, heal, prove, score and time every method at every size; returns the report's rows.

    `baselines` are names of `methods()`, all where none is given; `sizes` as in `--max-params`, the run's own picks
    where none is given; `others` are checkpoints, by folder or hub name, that were compressed elsewhere.
    """
    known = methods()
    for name in baselines:
        if name not in known:
            raise RequestError(
                f"--baselines: '{name}' is unknown{did_you_mean(name, known)} (known are {', '.join(known)})"
            )
    if seeds < 1:
        raise RequestError(f"--seeds: {seeds} is not a number of seeds; say 1 or more")
    chosen = [known[name] for name in dict.fromkeys([OURS, *(baselines or known)])]
    run, recipe = job.run, job.recipe
    picked = sizes_to_compare(job, sizes)
    supernet, base = job.load_supernet(), job.load_base()
    total = (recipe.finetuning.tokens or 0) + (recipe.healing.tokens or 0)
    short, long = training_blocks(job, recipe.healing.tokens or 0), training_blocks(job, total)
    calibration = tuple(batch.ids for batch in long[:CALIBRATION_BLOCKS].to(job.device).split(8))
    run.comparison.mkdir(exist_ok=True)
    base_documents(job, base)
    rows = [external_checkpoint(job, other) for other in others]  # first, for they may be refused
    comparisons = [SizeComparison(job, size, one, supernet, base, calibration, long) for size, one in picked]
    for comparison in comparisons:
        done = []
        for number, method in enumerate(chosen, start=1):
            say(f"{method.name} at {comparison.size} ({number} of {len(chosen)} methods)")
            tokens, blocks = (recipe.healing.tokens or 0, short) if method.trained else (total, long)
            try:
                done += run_method(comparison, method, seeds, tokens, blocks)
            except RequestError as error:  # it does not reach the size, or does not suit the family
                say(f"{method.name} is left out at {comparison.size}: {error}")
                run.log(f"{method.name} is left out at {comparison.size}: {error}")
        if len(chosen) > 1 and len(done) == seeds:
            raise RequestError(
                f"no method could be compared with ours at {comparison.size}, for the reasons above; compare at "
                "another size (--max-params)"
            )
        prove(job, done)
        time_beside_base(job, base, [row for row in done if row.stem.endswith("-0")])
        rows += done
    run.log(f"compared: {', '.join(row.stem for row in rows)}")
    return comparison_rows(job)


def sizes_to_compare(job: Job, asked: Sequence[str]) -> list[tuple[str, Architecture]]:
    """(label, architecture of ours) of every size: picked anew from what was measured, or the run's own picks."""
    from search.pareto import Target

    full = job.structure.parameters(job.structure.base)
    if not asked:
        picks = read_picks(job)
        own = [row for row in picks if not row["name"].endswith("-uniform")] or picks
        found = [Architecture.from_dict(row["architecture"]) for row in own]
        labels = job.recipe.targets.max_params
        limits = [absolute_or_share(label, full) for label in labels]
        near = [job.structure.parameters(a) >= 0.9 * limit for a, limit in zip(found, limits, strict=False)]
        if len(labels) != len(found) or not all(near):  # a size says what was picked, not only what was asked for
            labels = [f"{job.structure.parameters(a) / full:.2f}" for a in found]
        return [(_plain(label), a) for label, a in zip(labels, found, strict=True)]
    evaluations: list[Evaluation] = measured(job)
    chosen = []
    for size in asked:
        try:
            limit = absolute_or_share(size, full)
            best = choose(job, evaluations, Target(max_params=limit)).architecture
        except ValueError as error:
            raise RequestError(f"--max-params: {error}") from error
        if job.structure.parameters(best) < 0.9 * limit:
            raise RequestError(
                f"--max-params: this run measured nothing close below {limit:,} parameters; search there first "
                f"(compressor search {job.run.path} --max-params {size})"
            )
        chosen.append((_plain(size), best))
    return chosen


def run_method(comparison: SizeComparison, method: Method, seeds: int, tokens: int, blocks: Blocks) -> list[Path]:
    """One method at one size for every seed; returns its rows. What is there already is left as it is, and what another
    method has made of the same cut is taken from there."""
    from export.layouts.table import write_layout

    job = comparison.job
    cut: tuple[Any, Architecture] | None = None
    raw: float | None = None
    rows = []
    for seed in range(seeds):
        name = f"{method.name}-{comparison.size}-{seed}"
        row_file = job.run.comparison / f"{name}.json"
        rows.append(row_file)
        if row_file.is_file() and read_json(row_file)["inputs"] == comparison.inputs:
            continue
        if cut is None or method.drawn:
            job.threads(scoring=True)
            cut, raw = method.make(comparison, seed), None
        made = fingerprint([network_fingerprint(cut[0]), tokens, seed])
        if twin := made_before(comparison, made):
            write_json(row_file, twin | {"row": twin["row"] | {"method": method.name, "about": method.about}})
            continue
        network, architecture = copy.deepcopy(cut[0]), cut[1]
        params = sum(p.numel() for p in network.parameters())
        if raw is None and tokens:
            raw, _, _ = scored(job, network)
        if tokens:
            # Named after all that it is trained from: an interrupted healing of anything else is not gone on with.
            state = job.run.comparison / f".{name}-{fingerprint([comparison.inputs, made])}.training.safetensors"
            heal_as_ours(job, comparison.base, network, tokens, blocks, seed, state)
        quality, tasks, documents = scored(job, network)
        folder = job.run.comparison / name
        lineage = {"inputs": comparison.inputs, "method": method.name, "about": method.about, "tokens": tokens}
        write_layout(
            "uneven",
            network,
            architecture,
            folder,
            entry={"name": name, "architecture": architecture.to_dict(), "quality": quality, "tasks": tasks},
            tokenizer=job.tokenizer,
            dtype=job.stored_dtype,
            lineage=lineage | {"base": {"name": job.recipe.model, "fingerprint": job.base_fingerprint}},
            probe_ids=blocks.split()[1][:4].ids[:, :32],
        )
        row = {
            "method": method.name,
            "about": method.about,
            "size": comparison.size,
            "seed": seed,
            "path": f"comparison/{name}",
            "architecture": architecture.to_dict(),
            "params": params,
            "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            "tokens": tokens,
            "quality": quality,
            "quality_before_healing": raw if tokens else quality,
            "tasks": tasks,
        }
        found = {"made": made, "row": row, "documents": documents}
        write_json(row_file, {"inputs": comparison.inputs, "of": provenance(job)} | found)
        for left in job.run.comparison.glob(f".{name}-*.training.safetensors*"):
            left.unlink()
    return rows


def provenance(job: Job) -> dict[str, str]:
    """What a row must share with the run as it is now to be shown in its report."""
    return {"supernet": job.run.supernet_weights, "documents": fingerprint(documents_scored(job))}


def made_before(comparison: SizeComparison, made: str) -> dict[str, Any] | None:
    """A finished row of this comparison that began with the same network, tokens and seed."""
    for file in sorted(comparison.job.run.comparison.glob(f"*-{comparison.size}-*.json")):
        data: dict[str, Any] = read_json(file)
        if data["inputs"] == comparison.inputs and data["made"] == made:
            return data
    return None


def network_fingerprint(network: Any) -> str:
    """Of a network's configuration and of every weight, bit for bit."""
    digest = hashlib.sha256(repr(network.config).encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def heal_as_ours(job: Job, base: Any, network: Any, tokens: int, blocks: Blocks, seed: int, state: Path) -> None:
    """Heal in place with the recipe's rate; seed 0 draws what the export of this run drew."""
    section = job.recipe.healing.model_copy(update={"tokens": tokens})
    settings = job.train_settings(section, blocks.length, job.recipe.seed + 1 + seed)
    job.threads(scoring=False)
    heal(network, base, blocks, settings, state=state, accelerator=job.accelerator)
    round_as_stored(job, network)


def scored(job: Job, network: Any) -> tuple[float, dict[str, Any], Documents]:
    """Quality, scores as the report holds them, and every document's own, on the report split."""
    job.threads(scoring=True)
    found = job.scorer(network).score("report")
    base = {task: row["value"] for task, row in read_json(job.run.comparison / "base.json")["tasks"].items()}
    quality = relative_quality(job.tasks.tasks, {task: score.value for task, score in found.items()}, base)
    return quality, in_report(job, found), {task: score.items for task, score in found.items()}


def in_report(job: Job, found: Mapping[str, TaskScore]) -> dict[str, Any]:
    return {task: score_in_report(job, task, score.value, score.stderr, score.n) for task, score in found.items()}


def base_documents(job: Job, base: Any) -> None:
    """`comparison/base.json`: the base's scores and documents, against which every quality is."""
    file = job.run.comparison / "base.json"
    inputs = fingerprint(documents_scored(job))
    if file.is_file() and read_json(file)["inputs"] == inputs:
        return
    job.threads(scoring=True)
    found = job.scorer(base).score("report")
    documents = {task: score.items for task, score in found.items()}
    write_json(file, {"inputs": inputs, "tasks": in_report(job, found), "documents": documents})


def prove(job: Job, rows: Sequence[Path]) -> None:
    """Reload in a fresh process every package that was not proved yet."""
    from export.package_record import read_record
    from export.verify import verify_all

    folders = sorted({job.run.path / read_json(row)["row"]["path"] for row in rows})
    unproved = [folder for folder in folders if not read_record(folder)["entry"].get("verified")]
    if unproved:
        verify_all([(folder, None) for folder in unproved], record=True, log=job.run.log_file)


def time_beside_base(job: Job, base: Any, rows: Sequence[Path]) -> None:
    """Decode and prefill speed of every package that was not timed yet, each in turn with the base: only these two are
    in memory together. Rows that share a package share its speed."""
    from evals.speed.measured import speed_beside
    from export.package_record import update_record

    job.threads(scoring=True)
    untimed: dict[str, list[Path]] = {}
    for row in rows:
        data = read_json(row)["row"]
        if "speed" not in data:
            untimed.setdefault(data["path"], []).append(row)
    for path, sharing in untimed.items():
        folder = job.run.path / path
        found, beside = speed_beside(load_package(folder, job.compute_dtype, job.device), base)
        speeds = {"speed": found.to_dict(), "base_speed": beside.to_dict()}
        update_record(folder, entry={"speed": speeds["speed"]})
        for row in sharing:
            whole = read_json(row)
            whole["row"] |= speeds
            write_json(row, whole)


def external_checkpoint(job: Job, given: str) -> Path:
    """Score a checkpoint that was compressed elsewhere, as it came, with its own tokenizer."""
    from evals.scoring.encoding import Encoder
    from evals.scoring.evaluate import load_checkpoint
    from evals.scoring.scorer import NetworkLM, Scorer
    from evals.scoring.tasks import TaskSet

    name = re.sub(r"[^0-9A-Za-z._]+", "-", Path(given).name if Path(given).is_dir() else given)
    file = job.run.comparison / f"with-{name}.json"
    if file.is_file() and read_json(file)["row"]["path"] != given:  # another one whose folder has this name
        name = f"{name}-{fingerprint(given)[:6]}"
        file = job.run.comparison / f"with-{name}.json"
    model, tokenizer = load_checkpoint(given, str(job.device), job.recipe.dtype, None, job.recipe.trust_remote_code)
    weights = network_fingerprint(model)
    documents = read_json(job.run.comparison / "base.json")["inputs"]
    if file.is_file() and (known := read_json(file))["inputs"] == documents and known["weights"] == weights:
        return file
    say(f"scoring {given}")
    include = [job.recipe.include_path] if job.recipe.include_path else []
    encoder = Encoder(tokenizer, model.config)
    tasks = TaskSet.load(job.recipe.tasks, encoder=encoder, include_path=include)
    found = Scorer(tasks, NetworkLM(model.eval(), encoder, max_tokens=job.recipe.batch_tokens)).score("report")
    base = {task: row["value"] for task, row in read_json(job.run.comparison / "base.json")["tasks"].items()}
    parameters = list(model.parameters())
    row = {
        "method": name,
        "about": "compressed elsewhere, as it came",
        "size": None,
        "seed": None,
        "path": given,
        "params": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
        "tokens": None,
        "quality": relative_quality(job.tasks.tasks, {task: score.value for task, score in found.items()}, base),
        "tasks": in_report(job, found),
    }
    items = {task: score.items for task, score in found.items()}
    write_json(file, {"inputs": documents, "weights": weights, "row": row, "documents": items})
    return file


def comparison_rows(job: Job) -> list[dict[str, Any]]:
    """Every finished row, with how sure its difference to ours is; empty where nothing was compared.

    Rows of another super-network, of another pick than the newest ours, or scored on other documents are left out. Rows
    of one method and size are judged together, over all their seeds. A checkpoint from elsewhere is judged against ours
    of the nearest size.
    """
    from evals.comparison import paired_interval, qualities, resampled

    folder = job.run.comparison
    found = [read_json(file) for file in sorted(folder.glob("*-*.json"))]
    if not found:
        return []
    tasks, of_base, now = job.tasks.tasks, read_json(folder / "base.json"), provenance(job)
    if of_base["inputs"] != now["documents"]:
        return []
    found = [data for data in found if data.get("of", now) == now]  # a checkpoint from elsewhere is of no run
    # Every comparison makes the first seed of ours anew where anything changed: what agrees with that row is current.
    first = [data for data in found if (data["row"]["method"], data["row"]["seed"]) == (OURS, 0)]
    valid = {data["row"]["size"]: data["inputs"] for data in first} | {None: now["documents"]}
    found = [data for data in found if data["inputs"] == valid.get(data["row"]["size"])]
    base: Resampled = resampled(tasks, of_base["documents"])
    groups: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for data in found:
        drawn = qualities(tasks, resampled(tasks, data["documents"]), base)
        data["drawn"] = drawn
        data["row"]["quality_stderr"] = float(np.nanstd(drawn)) if np.isfinite(drawn).any() else None
        groups.setdefault((data["row"]["method"], data["row"]["size"]), []).append(data)
    mine = {size: group for (method, size), group in groups.items() if method == OURS}
    for (method, size), group in groups.items():
        rival = mine.get(size) or min(
            mine.values(), key=lambda g: abs(g[0]["row"]["params"] - group[0]["row"]["params"]), default=None
        )
        if method == OURS or rival is None:
            continue
        interval = paired_interval([d["drawn"] for d in rival], [d["drawn"] for d in group])
        if interval is None:
            continue
        low, high = interval
        for data in group:
            data["row"]["ours_minus_this"] = {"value": _mean(rival) - _mean(group), "low": low, "high": high}
    return [data["row"] for data in found]


def _mean(group: Sequence[dict[str, Any]]) -> float:
    return sum(data["row"]["quality"] for data in group) / len(group)


def _plain(size: str) -> str:
    return re.sub(r"[^0-9A-Za-z.]", "", size)
