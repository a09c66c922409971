"""What the stages of a run cost on a given model: seconds, processor seconds and peak memory, a row as each ends.

    [taskset -c 0] python -m benchmarks.stage_costs [--checkpoint DIR --data FILE.jsonl] [--stages ordering,proposals]
        [--device cuda]

Each stage does what a run does, on the base where a run has its fine-tuned super-network, which costs the same. Memory
is that of the whole process at its peak during the stage, on a GPU the card's.
"""

from __future__ import annotations

import argparse
import gc
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from benchmarks.common import make_parser, print_header, print_row, resident, timed
from benchmarks.jobs import temporary_job
from compressor import demo
from compressor.inputs import calibration_blocks, few_batches, training_blocks
from compressor.job import Job
from compressor.sizing import uniform_near
from compressor.stages.finetuning import order_supernet
from compressor.stages.score_keys import held_out_keys
from compressor.stages.subnet_scores import HeldOut
from compressor.stages.warm_start import layer_variants, rounds_of
from evals.speed.table import SpeedTable
from evals.warm_starts.blockwise import blockwise, refined
from export.layouts.table import write_layout
from export.quantization.cost import step_seconds
from export.quantization.quantize import quantize_package
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture
from supernet.slicing import extract
from supernet.training.supernet_training import heal

STEPS = 8
"""Steps of healing that are timed."""


def ordering(job: Job, supernet: SuperNetwork, share: float) -> str:
    """Wanda's order of all units, and block influence."""
    order_supernet(job, supernet, training_blocks(job, 0))
    return f"{calibration_blocks(job)} blocks of {job.recipe.finetuning.sequence_length} tokens"


def timing(job: Job, supernet: SuperNetwork, share: float) -> str:
    """speed.json."""
    job.threads(scoring=True)
    table = SpeedTable.measure(lambda a: extract(supernet.model, job.structure, a), job.structure)
    errors = ", ".join(f"{name.split('_')[0]} {100 * error:.1f} %" for name, error in table.check.items())
    return f"{SpeedTable.steps(job.structure, job.device)} networks; median error {errors}"


def proposals(job: Job, supernet: SuperNetwork, share: float) -> str:
    """Block by block, then around what that proposes at one size."""
    variants = layer_variants(job.space)
    batches = few_batches(job)
    began = time.perf_counter()
    found = blockwise(supernet, variants, batches)
    first = time.perf_counter() - began
    refined(
        supernet,
        variants,
        batches,
        found.path,
        [int(share * job.structure.parameters(supernet.base))],
        found.halves,
        rounds_of(job),
    )
    return f"{len(variants)} variants; block by block {first:.0f} s"


def held_out(job: Job, supernet: SuperNetwork, share: float) -> str:
    """Held-out loss of one network, as large as the base."""
    measure = HeldOut(job)
    ((_, score, seconds),) = measure.scores(supernet, held_out_keys(job, ["held_out_loss"]))
    return f"{len(measure.blocks)} blocks; {seconds:.1f} s, {score.value:.3f} ± {score.stderr or 0:.3f} nats"


def rounding(job: Job, supernet: SuperNetwork, share: float) -> str:
    """A step of a block of AutoRound's to int4, as predicted, and as taken: two layers, 4 and 14 steps of each; and a
    block of GPTQ's, which takes none."""
    seconds = step_seconds(supernet.model, job.recipe.finetuning.sequence_length)
    base = supernet.base
    some = Architecture(base.hidden_size, (*base.layers[:2], *base.without_layers().layers[2:]))
    network, folder = extract(supernet.model, job.structure, some), job.run.path / "package"
    entry = {"name": "two", "architecture": some.to_dict()}
    write_layout("uneven", network, some, folder, entry=entry, tokenizer=job.tokenizer, dtype=job.stored_dtype)
    ids = training_blocks(job, 0)[: job.recipe.quantizing.samples].ids
    spent = []
    for steps in (0, 4, 14):
        began = time.perf_counter()
        destination = job.run.path / f"int4-{steps}"
        quantize_package(folder, destination, "int4", calibration=ids, iterations=steps, device=job.device.type)
        spent.append(time.perf_counter() - began)
    step = (spent[2] - spent[1]) / 20
    return f"{seconds:.2f} s a step and block predicted, {step:.2f} s taken; GPTQ {spent[0] / 2:.1f} s a block"


def healing(job: Job, supernet: SuperNetwork, share: float) -> str:
    """A few steps of healing a network of that size, cut uniformly, taught by the base."""
    batch, length = job.recipe.finetuning.batch_size or 4, job.length
    blocks = training_blocks(job, STEPS * batch * length)
    network = extract(
        supernet.model,
        job.structure,
        uniform_near(job, share * job.structure.parameters(supernet.base)),
    )
    section = job.recipe.healing.model_copy(update={"tokens": STEPS * batch * length})
    settings = job.in_parts(job.train_settings(section, length, job.recipe.seed))
    with torch.enable_grad():
        heal(network, supernet.model, blocks, settings, state=job.run.path / "state", accelerator=job.accelerator)
    return f"{STEPS} steps of {batch} x {length} tokens, {job.optimizer}"


def scoring(job: Job, supernet: SuperNetwork, share: float) -> str:
    """A candidate's task scores, and the same requests through HFLM."""
    limit = job.recipe.searching.limit
    requests = job.tasks.requests("search", limit)
    scorer = job.scorer(supernet.model)
    scorer.ask("search", 1)  # whether it reads trees is found out once
    # What others do on the machine does not count where one core is used.
    clock = time.process_time if job.cores == 1 and job.device.type == "cpu" else time.perf_counter
    answers, ours = timed(partial(scorer.ask, "search", limit), clock)
    job.threads(scoring=False)
    lm = HFLM(pretrained=supernet.model, tokenizer=job.tokenizer, batch_size=16)
    expected, others = timed(partial(lm.loglikelihood, requests.loglikelihood, disable_tqdm=True), clock)
    pairs = zip(requests.loglikelihood, expected, strict=True)
    difference = max(abs(answers[id(request)][0][0] - value) for request, (value, _) in pairs)
    return (
        f"{len(requests.loglikelihood)} requests; ours {ours:.1f} s, HFLM {others:.1f} s ({others / ours:.1f} times); "
        f"largest difference {difference:.0e} nats"
    )


STAGES: dict[str, Callable[[Job, SuperNetwork, float], str]] = {
    "ordering": ordering,
    "timing": timing,
    "proposals": proposals,
    "held_out": held_out,
    "healing": healing,
    "rounding": rounding,
    "scoring": scoring,
}


def measure(stage: str, job: Job, supernet: SuperNetwork, arguments: argparse.Namespace) -> None:
    """Print a stage's row."""
    gc.collect()
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux)
    job.threads(scoring=False)
    began, spent = time.perf_counter(), time.process_time()
    what = STAGES[stage](job, supernet, arguments.share)
    seconds, processor = time.perf_counter() - began, time.process_time() - spent
    cuda = job.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(job.device) if cuda else resident("VmHWM")
    print_row(stage.replace("_", " "), what, f"{seconds:.0f}", f"{processor:.0f}", f"{peak / 2**30:.2f}")


def main() -> None:
    own: dict[str, object] = {
        "stages": (",".join(STAGES), "which"),
        "device": "cpu",
        "share": (0.67, "size proposed for"),
        "tasks": ",".join(demo.TASK_NAMES),
        "documents": (40, "of each task"),
    }
    arguments = make_parser(__doc__, "checkpoint", "data", "include_path", **own).parse_args()
    torch.set_grad_enabled(False)
    logging.disable(logging.WARNING)
    scored: dict[str, Any] = {"tasks": arguments.tasks.split(","), "include_path": arguments.include_path}
    scored |= {"searching": {"limit": arguments.documents}}
    with temporary_job(arguments.checkpoint, arguments.data, device=arguments.device, **scored) as job:
        job.threads(scoring=False)
        supernet = job.supernet_of(job.load_base())
        full = job.structure.parameters(job.structure.base)
        print(f"{job.checkpoint.path.name}, {full:,} parameters, {arguments.device}, {job.cores} cores\n")
        print_header("stage", "what", "seconds", "processor seconds", "peak memory, GiB", right_from=2)
        for stage in arguments.stages.split(","):
            measure(stage, job, supernet, arguments)


if __name__ == "__main__":
    main()
