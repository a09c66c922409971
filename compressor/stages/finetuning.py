"""Order the base by importance and fine-tune it once as a super-network: fills `supernet/`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from compressor.elastic.ordering import activation_importance, apply_ordering, order_by, save_ordering
from compressor.errors import RequestError
from compressor.finetune.data import Blocks, pack
from compressor.finetune.elastic import finetune_supernet
from compressor.finetune.loop import History
from compressor.finetune.losses import LOSSES, NEEDS_BASE
from compressor.finetune.samplers import SAMPLERS, SizedSpace
from compressor.job import Job
from compressor.progress import say

CALIBRATION_BLOCKS = 64


def finetuning_inputs(job: Job) -> dict[str, Any]:
    """All that the stage reads; another value of any of it makes another super-network."""
    recipe = job.recipe
    least, _ = job.smallest_in_training()
    inputs = {
        "model": job.base_fingerprint,
        "data": data_fingerprint(recipe.data or ""),
        "finetuning": recipe.finetuning.model_dump(),
        "space": job.space.to_dict(),
        "smallest": least.to_dict(),
        "seed": recipe.seed,
    }
    if recipe.finetuning.tokens == 0:  # nothing is drawn, so sizes and samplers do not matter
        inputs = {key: inputs[key] for key in ("model", "data", "seed")}
    return inputs


def check_unchanged(job: Job) -> None:
    """Refuse to throw a super-network and its evaluations away unasked. Before the run's recipe is replaced."""
    run = job.run
    made = run.manifest(run.supernet) is not None
    if made and job.redo != "finetune" and not run.whole(run.supernet, finetuning_inputs(job)):
        raise RequestError(
            f"{run.path}: its super-network was fine-tuned from another recipe or data; say --redo finetune to do it "
            "again (its evaluations will not count any more), or name another --output"
        )


def finetune(job: Job) -> dict[str, Any]:
    """Order the base by importance and fine-tune it once as a super-network. Returns the stage's manifest."""
    recipe, run = job.recipe, job.run
    inputs = finetuning_inputs(job)
    if run.whole(run.supernet, inputs):
        return run.manifest(run.supernet) or {}
    check_unchanged(job)
    least, low = job.smallest_in_training()
    with run.stage(run.supernet, inputs) as (folder, facts):
        job.threads(scoring=False)
        blocks = training_blocks(job, recipe.finetuning.tokens or 0)
        settings = job.train_settings(recipe.finetuning, blocks.ids.shape[1], recipe.seed)
        model = job.load_base(torch.float32)
        supernet = job.supernet_of(model)
        say(f"ordering neurons and heads by importance on {CALIBRATION_BLOCKS} blocks of the data")
        calibration = blocks.ids[:CALIBRATION_BLOCKS].to(job.device).split(8)
        order = order_by(activation_importance(supernet, calibration))
        apply_ordering(supernet, order)
        save_ordering(order, folder / "ordering.safetensors")
        history = History()
        if settings.tokens:
            full = job.structure.parameters(job.structure.base)
            space = SizedSpace(job.structure.base, least, low, 0.98 * full, job.draw_near)
            middle = job.uniform_near((low + full) / 2)
            history = finetune_supernet(
                supernet,
                blocks,
                settings,
                SAMPLERS[recipe.finetuning.sampler](space),
                LOSSES[recipe.finetuning.loss],
                state=folder / "training.safetensors",
                accelerator=job.accelerator,
                base=job.load_base() if recipe.finetuning.loss in NEEDS_BASE else None,
                watched={"largest": job.structure.base, "middle": middle, "smallest": least},
            )
        (folder / "training.safetensors").unlink(missing_ok=True)
        # As stored, so that what is searched is what will be shipped, bit for bit.
        model.to(job.stored_dtype).save_pretrained(folder)
        job.tokenizer.save_pretrained(folder)
        facts["weights"] = weights_fingerprint(folder)
        facts["finetune"] = {
            **vars(history),
            "sampler": recipe.finetuning.sampler,
            "loss": recipe.finetuning.loss,
            "data": recipe.data,
            "blocks": len(blocks),
            "data_fingerprint": blocks.fingerprint,
        }
    run.log("fine-tuned")
    return run.manifest(run.supernet) or {}


def data_fingerprint(source: str) -> str:
    """Of a local file or folder: its contents. Of a hub dataset: its name, as its revision is the hub's."""
    path = Path(source).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    digest = hashlib.sha256(source.encode() if not files else b"")
    for file in files:
        with file.open("rb") as data:
            digest.update(hashlib.file_digest(data, "sha256").digest())
    return digest.hexdigest()[:16]


def training_blocks(job: Job, tokens: int) -> Blocks:
    """The packed training data, at most about twice what will be read, so that huge sources are not read whole."""
    assert job.recipe.data is not None
    length = min(
        job.recipe.finetuning.sequence_length,
        getattr(job.checkpoint.config, "max_position_embeddings", 10**9),
    )
    return pack(job.recipe.data, job.tokenizer, length, max(2 * tokens, 4 * CALIBRATION_BLOCKS * length))


def weights_fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        if file.name != "ordering.safetensors":
            digest.update(file.name.encode())
            with file.open("rb") as data:
                digest.update(hashlib.file_digest(data, "sha256").digest())
    return digest.hexdigest()[:16]
