"""Does training with the default rate ever make a network worse? Held-out losses before and after, at three sizes.

    python -m benchmarks.safe_training [--checkpoints DIR DIR] [--data FILE] [--tokens 20000 100000 500000]
        [--batch 4] [--heal] [--device cuda] [--rate-factor 8]

Every checkpoint is fine-tuned as a super-network by the default recipe, for each number of tokens from its start.
Losses are nats per token on the whole held-out part of the text, of which the training itself measures a part. `--heal`
also heals a uniform cut to 0.67 of the untrained network on the same tokens. `--rate-factor` multiplies the default
rates: what happens to a checkpoint that bears less than was thought? The bundled checkpoint reads generated text. A row
is printed as soon as it is measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common import make_parser, print_header, print_row, timed
from benchmarks.jobs import subnet_loss, temporary_job
from compressor import demo
from compressor.inputs import training_blocks
from compressor.job import Job
from compressor.recipe import Finetuning
from compressor.sizing import training_range, uniform_near
from compressor.stages.finetuning import order_supernet, train_supernet
from supernet.activation import SuperNetwork
from supernet.slicing import extract
from supernet.training.data import Blocks
from supernet.training.history import History
from supernet.training.losses import held_out_loss
from supernet.training.supernet_training import heal

HEALED = 0.67


def main() -> None:
    own = {
        "checkpoints": ([str(demo.MODEL)], "folders of networks"),
        "tokens": [20_000, 100_000, 500_000],
        "batch": (4, "sequences in a step"),
        "heal": (False, "also heal a cut of each"),
        "rate_factor": (1.0, "times the default rate"),
    }
    arguments = make_parser(__doc__, "data", "device", **own).parse_args()
    columns = ["checkpoint", "tokens", "steps", "rate", "largest", "middle", "smallest", "highest of the largest"]
    columns += ["kept after", "halved after", "measuring", "seconds"]
    print_header(*columns, *[f"a cut to {HEALED} healed", "kept after"] * arguments.heal)
    for checkpoint in arguments.checkpoints:
        bundled = Path(checkpoint).resolve() == demo.MODEL.resolve()
        with temporary_job(checkpoint, None if bundled else arguments.data, device=arguments.device) as job:
            for tokens in arguments.tokens:
                factor = arguments.rate_factor
                cells = measure(tuned_job(job, tokens, arguments.batch, factor), arguments.heal, factor)
                print_row(Path(checkpoint).name, f"{tokens:,}", *cells)


def tuned_job(job: Job, tokens: int, batch: int, factor: float) -> Job:
    """The default recipe with so many tokens for fine-tuning and healing, its rate of fine-tuning times a factor."""
    section = Finetuning(tokens=tokens, batch_size=batch)
    healing = job.recipe.healing.model_copy(update={"tokens": tokens, "learning_rate": None})
    tuned = Job(job.run, job.recipe.model_copy(update={"finetuning": section, "healing": healing}))
    tuned.fill_in()
    assert tuned.recipe.finetuning.learning_rate is not None
    tuned.recipe.finetuning.learning_rate *= factor
    tuned.threads(scoring=False)
    return tuned


def measure(job: Job, healing: bool, factor: float) -> list[str]:
    """The cells of a row, from the number of steps on."""
    section = job.recipe.finetuning
    blocks = training_blocks(job, section.tokens or 0)
    supernet = job.supernet_of(job.load_base(torch.float32))
    order_supernet(job, supernet, blocks)
    range_, held_out = training_range(job), blocks.split()[1]
    sizes = [range_.largest, uniform_near(job, sum(range_.sizes) / 2), range_.least]

    def losses() -> list[float]:
        return [subnet_loss(supernet, size, held_out) for size in sizes]

    healed = heal_cut(job, supernet, blocks, factor) if healing else []  # before the super-network is trained
    before = losses()
    history, seconds = timed(lambda: train_supernet(job, supernet, blocks, new_state(job)))
    after = losses()
    steps = int(history.curve[-1]["step"])
    return [
        str(steps),
        f"{section.learning_rate:.2g}",
        *(changed(*pair) for pair in zip(before, after, strict=True)),
        f"{max(point.get('largest', float('inf')) for point in history.curve):.3f}",
        *kept(history),
        f"{history.measuring / seconds:.0%}",
        f"{seconds:.0f}",
        *healed,
    ]


def heal_cut(job: Job, supernet: SuperNetwork, blocks: Blocks, factor: float) -> list[str]:
    """A uniform cut of the super-network, healed as a plain slice is, at its rate times a factor: its losses, and the
    step whose state was kept."""
    architecture = uniform_near(job, HEALED * job.structure.parameters(job.structure.base))
    network = extract(supernet.model, job.structure, architecture).to(job.device)
    settings = job.train_settings(job.recipe.healing, blocks.length, job.recipe.seed + 1, repaired=False)
    settings = replace(settings, learning_rate=factor * settings.learning_rate)
    held_out = blocks.split()[1]
    before = held_out_loss(network.eval(), held_out, 8, job.device)
    history = heal(network, job.load_base(), blocks, settings, state=new_state(job), accelerator=job.accelerator)
    after = held_out_loss(network.eval(), held_out, 8, job.device)
    return [changed(before, after), kept(history)[0]]


def new_state(job: Job) -> Path:
    """Where a training keeps what could resume it: always a new place, as every row begins anew."""
    return Path(tempfile.mkdtemp(dir=job.run.path)) / "state.safetensors"


def changed(before: float, after: float) -> str:
    return f"{before:.3f} → {after:.3f} ({after / before - 1:+.1%})"


def kept(history: History) -> Sequence[str]:
    """The step whose state was kept, and those after which the rate was halved."""
    return str(history.kept), ", ".join(map(str, history.halved)) or "never"


if __name__ == "__main__":
    main()
