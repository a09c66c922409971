"""What healing leaves of the losses that a search sees: the ground on which `--prefer speed` calls networks near.

    python -m benchmarks.healing_leaves [--checkpoint DIR --data FILE.jsonl --include-path DIR --tasks A,B]
        [--size 0.67] [--train-tokens 34000] [--heal-tokens 60000]

One search; of the networks that its scores do not tell apart, the two of the lowest held-out loss in every twentieth of
decode speed are healed alike. Excess: held-out loss above the whole super-network's before healing, above the base's
after it, each as a multiple of that of the lowest loss. Losses in nats per token.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import make_parser, print_header, print_row
from benchmarks.front import settings_of
from compressor import demo, pipeline
from compressor.inputs import training_blocks
from compressor.job import Job
from compressor.recipe import Recipe
from compressor.sizing import sizes_asked_for
from compressor.stages.choosing import decode_speeds
from compressor.stages.front import read_front
from compressor.stages.picking import measured
from compressor.stages.repairing import pick_variants
from compressor.stages.subnet_scores import held_out_losses
from search.pareto import Target, contenders
from supernet.architecture import Architecture
from supernet.slicing import extract
from supernet.training.data import HELD_OUT_BLOCKS
from supernet.training.losses import held_out_loss
from supernet.training.supernet_training import heal

BAND = 0.05
"""Decode speeds over the base's that are taken together."""
UP_TO = 0.5
"""Share of excess over the lowest up to which the end looks."""
NATS = 1.0
"""The same in nats per token."""
EACH = 2
"""Networks of a band that are healed."""


def main() -> None:
    parser = make_parser(
        __doc__,
        "checkpoint",
        "data",
        "include_path",
        tasks=(",".join(demo.TASK_NAMES), "lm-eval tasks, comma-separated"),
        size=("0.67", "the most parameters, as in --max-params"),
        seed=0,
        train_tokens=(34_000, "of the fine-tuning"),
        heal_tokens=(60_000, "of healing"),
        evaluations=(60, "of the search"),
        limit=(60, "documents per task in the search"),
        batch=(4, "sequences in a step"),
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        settings = settings_of(arguments, arguments.size, Path(name), arguments.seed)
        job = pipeline.start(Recipe.model_validate(settings), Path(name) / "run")
        pipeline.finetune(job)
        pipeline.search(job)
        show(job)


def show(job: Job) -> None:
    """Heal some of what scores do not tell apart; a row for each, the lowest loss first."""
    # 1. Who is healed.
    equals = [e.architecture for e in contenders(measured(job), Target(max_params=sizes_asked_for(job)[0]))]
    evaluations = {e.architecture: e for e in measured(job)}
    timed = decode_speeds(job, [evaluations[a] for a in equals])
    base_tps = read_front(job.run.front)["base_decode_tps"]
    speeds = {a: (tps or 0.0) / base_tps for a, tps in zip(equals, timed, strict=True)}
    whole, *losses = held_out_losses(job, [job.structure.base, *equals], HELD_OUT_BLOCKS)
    of = dict(sorted(zip(equals, losses, strict=True), key=lambda pair: pair[1]))
    chosen: list[Architecture] = []
    for architecture in of:
        band = [one for one in chosen if speeds[one] // BAND == speeds[architecture] // BAND]
        if len(band) < EACH:
            chosen.append(architecture)
    # 2. Heal each alike.
    _, held_out = training_blocks(job, job.recipe.healing.tokens or 0).split()
    base = held_out_loss(job.load_base(), held_out.part(0, HELD_OUT_BLOCKS), 1, job.device)
    print_header("parameters", "decode, base 1", "loss", "healed", "excess", "healed excess", right_from=0)
    rows = []
    for architecture in chosen:
        healed = healed_loss(job, architecture)
        rows.append((of[architecture] - whole, healed - base))
        excess, after = (value / first for value, first in zip(rows[-1], rows[0], strict=True))
        share = job.structure.parameters(architecture) / job.untouched_parameters
        cells = [f"{share:.3f}", f"{speeds[architecture]:.2f}", f"{of[architecture]:.4f}", f"{healed:.4f}"]
        print_row(*cells, f"{excess:.2f}", f"{after:.2f}")
    # 3. What is left of differences, in proportion and in nats.
    ratios, nats = (kept - kept[0] for kept in (np.array(rows) / np.array(rows[0]), np.array(rows)))
    print(
        f"\nof 10 % more excess healing leaves, in percent: {left(ratios, UP_TO, 10, 'with up to half as much again')}"
    )
    print(f"of each nat more healing leaves: {left(nats, NATS, 1, 'with up to a nat more')}")


def left(more: NDArray[np.float64], up_to: float, times: float, which: str) -> str:
    """The slope of what is more after the healing over what was before it [n, 2], times a number, through the networks
    of `up_to` more at most; and how many they are."""
    before, after = more[(more[:, 0] > 0) & (more[:, 0] <= up_to)].T
    if not len(before):
        return f"nothing known (no network {which})"
    return f"{times * float((before * after).sum() / (before**2).sum()):.2g} ({len(before)} networks {which})"


def healed_loss(job: Job, architecture: Architecture) -> float:
    """Held-out loss of a sub-network after the healing of the recipe, nats per token."""
    network: Any = extract(job.load_supernet().model, job.structure, architecture, pick_variants(job, architecture))
    blocks = training_blocks(job, job.recipe.healing.tokens or 0)
    job.threads(scoring=False)
    settings = job.train_settings(job.recipe.healing, blocks.length, job.recipe.seed + 1)
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "training.safetensors"
        history = heal(network, job.load_base(), blocks, settings, state=state, accelerator=job.accelerator)
    assert history.best is not None
    return history.best["loss"]


if __name__ == "__main__":
    main()
