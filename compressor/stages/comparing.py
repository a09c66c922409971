"""Put ours beside the alternatives: same base, text, tokens, tasks, documents, code and size. Fills `comparison/`.

Every method gives an ordinary package `comparison/METHOD-SIZE-SEED/`, healed with as many tokens as ours has read in
fine-tuning and healing together, and proved like any other; methods that cut the very same network share one. The row
beside it, `METHOD-SIZE-SEED.json`, is written last, so its existence means that the method is done; a killed comparison
goes on behind the last row.
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compressor.inputs import calibration_batches, training_blocks
from compressor.job import Job
from compressor.sizing import parameter_limits, size_label
from compressor.stages.choosing import choose
from compressor.stages.comparison_methods import Method, SizeComparison, methods
from compressor.stages.comparison_rows import (
    BaseDocuments,
    FinishedRow,
    base_file,
    comparison_rows,
    documents_scored,
    origin,
)
from compressor.stages.exporting import remember_vocabulary
from compressor.stages.healing import round_as_stored
from compressor.stages.measuring import load_package
from compressor.stages.picking import measured
from compressor.stages.picks import cut_out, is_uniform, read_picks
from compressor.stages.report_text import unread_text
from evals.baselines import Cut
from evals.quality import QualityScale
from evals.scoring.encoding import Encoder
from evals.scoring.evaluate import load_checkpoint
from evals.scoring.lm import NetworkLM
from evals.scoring.scorer import DocumentValues, Scorer
from evals.scoring.tasks import TaskSet
from evals.speed.measured import speed_beside
from export.layouts.table import write_layout
from export.package_record import read_record, update_record
from export.report.comparison import OURS
from export.report.schema import Comparison
from export.verify import verify_all
from search.pareto import Target
from search.scores import Score
from supernet.architecture import Architecture
from supernet.common.errors import RequestError, unknown
from supernet.common.files import fingerprint, read_json
from supernet.common.formatting import parse_parameters, shell_word
from supernet.common.progress import say
from supernet.training.data import Blocks
from supernet.training.losses import held_out_loss
from supernet.training.supernet_training import heal

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Scored:
    """What one network scores on the report split."""

    tasks: dict[str, Score]
    documents: DocumentValues
    losses: list[float] | None
    """As in `FinishedRow`."""

    def quality(self, scale: QualityScale) -> float:
        return scale.quality(self.tasks, self.losses[-1] if self.losses else None)

    @property
    def summary(self) -> dict[str, Score] | float:
        """What its quality rests on, without scores that JSON cannot hold."""
        return self.losses[-1] if self.losses else {n: s for n, s in self.tasks.items() if math.isfinite(s.value)}


def compare(
    job: Job,
    *,
    baselines: Sequence[str] = (),
    sizes: Sequence[str] = (),
    seeds: int = 1,
    others: Sequence[str] = (),
) -> list[Comparison]:
    """Make, heal, prove, score and time every method at every size; returns the report's rows.

    `baselines` are names of `methods()`, all where none is given; `sizes` as in `--max-params`, the run's own picks
    where none is given; `others` are checkpoints, by folder or hub name, that were compressed elsewhere.
    """
    # 1. What is compared, at which sizes.
    known = methods(repair=job.repairs)
    for name in baselines:
        if name not in known:
            raise unknown("--baselines", name, known)
    if seeds < 1:
        raise RequestError(f"--seeds: {seeds} is not a number of seeds; say 1 or more")
    chosen = [known[name] for name in dict.fromkeys([OURS, *(baselines or known)])]
    run, recipe = job.run, job.recipe
    picked = sizes_to_compare(job, sizes)
    # 2. Text, networks, and the base's scores.
    total = (recipe.finetuning.tokens or 0) + (recipe.healing.tokens or 0)
    long = training_blocks(job, total)  # before networks are in memory, since the base may have to write some of it
    short = training_blocks(job, recipe.healing.tokens or 0)
    supernet, base = job.load_supernet(), job.load_base()
    untouched = base if job.vocabulary is None else job.load_untouched()
    calibration = tuple(calibration_batches(job, long))
    run.comparison.mkdir(exist_ok=True)
    remark = score_base(job, untouched).scale.remark
    if remark:
        say(f"warning: {remark}")
    # 3. Checkpoints from elsewhere, first, for they may be refused; then every method at every size.
    rows = [external_checkpoint(job, other) for other in others]
    comparisons = [SizeComparison(job, size, one, supernet, base, calibration, long) for size, one in picked]
    for comparison in comparisons:
        done: list[Path] = []
        compared: list[str] = []
        for number, method in enumerate(chosen, start=1):
            say(f"{method.name} at {comparison.size} ({number} of {len(chosen)} methods)")
            tokens, blocks = (recipe.healing.tokens or 0, short) if method.trained else (total, long)
            if made := run_method(comparison, method, seeds, tokens, blocks):
                done += made
                compared.append(method.name)
        if len(chosen) > 1 and compared == [OURS]:
            raise RequestError(
                f"no method could be compared with ours at {comparison.size}, for the reasons above; compare at "
                "another size (--max-params)"
            )
        prove(job, done)
        time_beside_base(job, untouched, [row for row in done if row.stem.endswith("-0")])
        rows += done
    run.log(f"compared: {', '.join(row.stem for row in rows)}")
    return comparison_rows(job)


def sizes_to_compare(job: Job, asked: Sequence[str]) -> list[tuple[str, Architecture]]:
    """(label, architecture of ours) of every size: picked anew from what was measured, or the run's own picks."""
    full = job.untouched_parameters
    if not asked:
        picks = read_picks(job)
        own = [row for row in picks if not is_uniform(row["name"])] or picks
        picked = [cut_out(row) for row in own]
        labels = job.recipe.targets.max_params
        limits = [parse_parameters(label, full) for label in labels]
        near = [0.9 * limit <= job.structure.parameters(a) <= limit for a, limit in zip(picked, limits, strict=False)]
        if len(labels) != len(picked) or not all(near):  # a size says what was picked, not only what was asked for
            labels = [f"{job.structure.parameters(a) / full:.2f}" for a in picked]
        return [(size_label(label), a) for label, a in zip(labels, picked, strict=True)]
    evaluations, shipped = measured(job), own_picks(job)
    chosen = []
    for size in asked:
        try:
            limit = parse_parameters(size, full)
            best = shipped.get(limit)
            if best is None:
                best = choose(job, evaluations, Target(max_params=limit)).architecture.without_bits()
        except ValueError as error:
            raise RequestError(f"--max-params: {error}") from error
        if job.structure.parameters(best) < 0.9 * limit:
            raise RequestError(
                f"--max-params: this run measured nothing close below {limit:,} parameters; search there first "
                f"(compressor search {shell_word(job.run.path)} --max-params {size})"
            )
        chosen.append((size_label(size), best))
    return chosen


def own_picks(job: Job) -> dict[int, Architecture]:
    """What the run picked for each size that it was asked for, by the most parameters; not by a key. Of several
    finalists that is the one that healed best, which another choice might not find."""
    if not job.run.picks.is_file() or job.recipe.key:
        return {}
    picked = {row["name"]: cut_out(row) for row in read_picks(job)}
    return {limit: picked[name] for name, limit in parameter_limits(job) if limit is not None and name in picked}


def run_method(comparison: SizeComparison, method: Method, seeds: int, tokens: int, blocks: Blocks) -> list[Path]:
    """One method at one size for every seed; returns its rows. What is there already is left as it is, and what another
    method has made of the same cut is taken from there. A method that does not reach the size, or does not suit the
    family, is left out from that seed on, and says so."""
    job = comparison.job
    cut: Cut | None = None
    unhealed: Scored | None = None
    rows = []
    for seed in range(seeds):
        file = job.run.comparison / f"{method.name}-{comparison.size}-{seed}.json"
        if file.is_file() and read_json(file)["inputs"] == comparison.inputs:
            rows.append(file)
            continue
        # 1. Cut, once for all seeds of a method that does not draw.
        if cut is None or method.drawn:
            job.threads(scoring=True)
            try:
                cut, unhealed = method.make(comparison, seed), None
            except RequestError as error:
                if method.name == OURS:
                    raise
                say(f"{method.name} is left out at {comparison.size}: {error}")
                return rows
        rows.append(file)
        made = fingerprint([network_fingerprint(cut[0]), tokens, seed, *healed_otherwise(job, method.repaired)])
        # 2. What is already made of this cut has another name; else heal and package a copy, the cut serves again.
        if twin := made_before(comparison, made):
            twin.with_row(method=method.name, about=method.about).write(file)
            continue
        network: Any = copy.deepcopy(cut[0])
        if unhealed is None and tokens:
            unhealed = scored(job, network)
        finished = healed_row(comparison, method, seed, (network, cut[1]), unhealed, made, tokens, blocks)
        finished.write(file)
        for left in file.parent.glob(f".{file.stem}-*.training.safetensors*"):
            left.unlink()
    return rows


def healed_row(
    comparison: SizeComparison,
    method: Method,
    seed: int,
    cut: Cut,
    unhealed: Scored | None,
    made: str,
    tokens: int,
    blocks: Blocks,
) -> FinishedRow:
    """Heal a cut in place where there are tokens for it, score it and write its package; returns its row.

    `unhealed` are its scores as cut, needed only where it is healed; `made` is as in `FinishedRow`.
    """
    job, (network, architecture) = comparison.job, cut
    name = f"{method.name}-{comparison.size}-{seed}"
    # 1. Heal, and score.
    if tokens:
        # Named after all that it is trained from: an interrupted healing of anything else is not gone on with.
        state = job.run.comparison / f".{name}-{fingerprint([comparison.inputs, made])}.training.safetensors"
        heal_as_ours(job, comparison.base, network, tokens, blocks, seed, state, repaired=method.repaired)
    now = scored(job, network)
    before = unhealed or now
    # 2. Package, and the row.
    scale = BaseDocuments.read(job).scale
    row = Comparison(
        method=method.name,
        about=method.about,
        size=comparison.size,
        seed=seed,
        path=f"comparison/{name}",
        architecture=architecture,
        params=sum(p.numel() for p in network.parameters()),
        bytes=0,
        tokens=tokens,
        quality=now.quality(scale),
        quality_before_healing=before.quality(scale),
        tasks=now.tasks,
    )
    stored = write_method_package(comparison, row, network, architecture, blocks)
    return FinishedRow(
        inputs=comparison.inputs,
        of=origin(job),
        made=made,
        row=row.model_copy(update={"bytes": stored}),
        documents=now.documents,
        losses=now.losses,
        before_healing=before.summary,
    )


def write_method_package(
    comparison: SizeComparison, row: Comparison, network: Any, architecture: Architecture, blocks: Blocks
) -> int:
    """Write the package of a row; returns the bytes of its weights."""
    job = comparison.job
    folder = job.run.path / row.path
    lineage = {"inputs": comparison.inputs, "method": row.method, "about": row.about, "tokens": row.tokens}
    scores = {task: score.model_dump() for task, score in row.tasks.items()}
    write_layout(
        "uneven",
        network,
        architecture,
        folder,
        entry={"name": folder.name, "architecture": architecture.to_dict(), "quality": row.quality, "tasks": scores},
        tokenizer=job.tokenizer,
        dtype=job.stored_dtype,
        lineage=lineage | {"base": {"name": job.given.model, "fingerprint": job.untouched_fingerprint}},
        probe_ids=blocks.split()[1][:4].ids[:, :32],
    )
    remember_vocabulary(job, [folder])
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def made_before(comparison: SizeComparison, made: str) -> FinishedRow | None:
    """A finished row of this comparison that began with the same network, tokens and seed."""
    for file in sorted(comparison.job.run.comparison.glob(f"*-{comparison.size}-*.json")):
        finished = FinishedRow.read(file)
        if finished.inputs == comparison.inputs and finished.made == made:
            return finished
    return None


def healed_otherwise(job: Job, repaired: bool) -> list[str]:
    """Says so of a method that is not healed as ours is, since only one of them is repaired."""
    return [] if repaired or not job.repairs else ["plain"]


def network_fingerprint(network: Any) -> str:
    """16 hexadecimal digits of a network's configuration and of every weight, bit for bit."""
    digest = hashlib.sha256(repr(network.config).encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def heal_as_ours(
    job: Job,
    base: PreTrainedModel,
    network: PreTrainedModel,
    tokens: int,
    blocks: Blocks,
    seed: int,
    state: Path,
    *,
    repaired: bool,
) -> None:
    """Heal in place, as suits one that was `repaired`, where the run does so, or not; seed 0 draws what the export
    of this run drew."""
    section = job.recipe.healing.model_copy(update={"tokens": tokens})
    seed = job.recipe.seed + 1 + seed
    settings = job.train_settings(section, blocks.length, seed, repaired=repaired and job.repairs)
    job.threads(scoring=False)
    heal(network, base, blocks, job.in_parts(settings), state=state, accelerator=job.accelerator)
    round_as_stored(job, network)


def scored(job: Job, network: PreTrainedModel) -> Scored:
    """Scores and every document's own value, on the report split; where no task counts, losses on held-out text."""
    job.threads(scoring=True)
    scores, documents = job.scorer(network).score_with_documents("report")
    return Scored(scores, documents, text_losses(job, network) if BaseDocuments.read(job).scale.by_text else None)


def text_losses(job: Job, network: PreTrainedModel) -> list[float]:
    """Loss on each block of the text that packages are measured on, and on all of it, nats per token."""
    text = unread_text(job)
    blocks = [text.part(number, number + 1) for number in range(len(text))]
    return [held_out_loss(network, part, 1, job.device) for part in [*blocks, text]]


def score_base(job: Job, base: PreTrainedModel) -> BaseDocuments:
    """The base's scores and documents on the report split, scored where that was not done yet."""
    inputs = fingerprint(documents_scored(job))
    if not (base_file(job).is_file() and read_json(base_file(job))["inputs"] == inputs):
        job.threads(scoring=True)
        scores, documents = job.scorer(base, job.untouched_tasks).score_with_documents("report")
        BaseDocuments(inputs=inputs, tasks=scores, documents=documents).write(job)
    known = BaseDocuments.read(job)
    if known.scale.by_text and known.losses is None:
        same_tokens = base if job.vocabulary is None else job.load_base()
        known = known.model_copy(update={"losses": text_losses(job, same_tokens)})
        known.write(job)
    return known


def prove(job: Job, rows: Sequence[Path]) -> None:
    """Reload in a fresh process every package that was not proved yet."""
    folders = sorted({job.run.path / FinishedRow.read(row).row.path for row in rows})
    unproved = [folder for folder in folders if not read_record(folder).entry.verified]
    if unproved:
        verify_all([(folder, None) for folder in unproved], record=True, log=job.run.debug_file)


def time_beside_base(job: Job, base: PreTrainedModel, rows: Sequence[Path]) -> None:
    """Decode and prefill speed of every package that was not timed yet, each in turn with the base: only these two are
    in memory together. Rows that share a package share its speed."""
    job.threads(scoring=True)
    cut = 1.0 if job.vocabulary is None else job.vocabulary.record.text_per_token
    untimed: dict[str, list[Path]] = {}
    for file in rows:
        row = FinishedRow.read(file).row
        if row.speed is None:
            untimed.setdefault(row.path, []).append(file)
    for path, sharing in untimed.items():
        folder = job.run.path / path
        speed, base_speed = speed_beside(load_package(folder, job.compute_dtype, job.device), base)
        update_record(folder, entry={"speed": speed.model_dump()})
        for file in sharing:
            finished = FinishedRow.read(file)
            text = cut if finished.row.size is not None else 1.0  # a checkpoint from elsewhere has tokens of its own
            finished.with_row(speed=speed, base_speed=base_speed, text_per_token=text).write(file)


def external_checkpoint(job: Job, given: str) -> Path:
    """Score a checkpoint that was compressed elsewhere, as it came, with its own tokenizer. Returns its row."""
    name = re.sub(r"[^0-9A-Za-z._]+", "-", Path(given).name if Path(given).is_dir() else given)
    file = job.run.comparison / f"with-{name}.json"
    if file.is_file() and FinishedRow.read(file).row.path != given:  # another one whose folder has this name
        name = f"{name}-{fingerprint(given)[:6]}"
        file = job.run.comparison / f"with-{name}.json"
    model, tokenizer = load_checkpoint(given, str(job.device), job.recipe.dtype, None, job.recipe.trust_remote_code)
    weights, base = network_fingerprint(model), BaseDocuments.read(job)
    if file.is_file():
        before = FinishedRow.read(file)
        if before.inputs == base.inputs and before.weights == weights:
            return file
    say(f"scoring {given}")
    include = [job.recipe.include_path] if job.recipe.include_path else []
    encoder = Encoder(tokenizer, model.config)
    tasks = TaskSet.load(job.recipe.tasks, encoder=encoder, include_path=include)
    scorer = Scorer(tasks, NetworkLM(model.eval(), encoder, max_tokens=job.batch_tokens))
    if base.scale.by_text and tokenizer.get_vocab() != job.tokenizer.get_vocab():
        raise RequestError(
            f"--with {given}: {base.scale.remark} Its tokens are not the base's, so their losses cannot be compared; "
            "choose tasks that the base solves"
        )
    scores, documents = scorer.score_with_documents("report")
    now = Scored(scores, documents, text_losses(job, model) if base.scale.by_text else None)
    parameters = list(model.parameters())
    row = Comparison(
        method=name,
        about="compressed elsewhere, as it came",
        size=None,
        seed=None,
        path=given,
        params=sum(p.numel() for p in parameters),
        bytes=sum(p.numel() * p.element_size() for p in parameters),
        quality=now.quality(base.scale),
        tasks=scores,
    )
    FinishedRow(inputs=base.inputs, weights=weights, row=row, documents=documents, losses=now.losses).write(file)
    return file
