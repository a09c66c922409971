"""Does text that the base wrote itself heal as well as other text? The same cut, ordered and healed on each.

    python -m benchmarks.generated [--checkpoint DIR --data FILE FILE] [--include-path DIR --tasks A,B]
        [--tokens 100000] [--size 0.67] [--limit 500] [--device cuda --batch 16]
    python -m benchmarks.generated --rows 8 32 64 [--checkpoint DIR] [--length 64]      # only how fast it writes

Units are ordered on the first blocks of each text, a uniform cut is taken, and it is healed by distillation. Every
network is scored on the search documents of the tasks, and its loss is measured on what is held out of each text. Rows
are printed as they are measured.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import make_parser, print_header, print_row, timed
from benchmarks.jobs import ordered_supernet, temporary_job
from compressor import demo
from compressor.inputs import calibration_batches, training_blocks
from compressor.job import Job
from compressor.sizing import uniform_near
from evals.quality import QualityScale
from search.scores import Score
from supernet.device import release_cached_memory
from supernet.slicing import extract
from supernet.training.data import HELD_OUT_BLOCKS, Blocks
from supernet.training.generated import vocabulary_of, write_rows
from supernet.training.losses import held_out_loss
from supernet.training.sources import GENERATED
from supernet.training.supernet_training import heal


def main() -> None:
    arguments = make_parser(
        __doc__,
        "checkpoint",
        "include_path",
        "device",
        data=([""], "further training texts; default: one that is generated for the bundled network"),
        tasks=(",".join(demo.TASK_NAMES), "lm-eval tasks, comma-separated"),
        tokens=(100_000, "tokens to heal with"),
        size=(0.67, "of the cut, as a share of the base's parameters"),
        limit=(500, "documents per task"),
        batch=(4, "sequences in a step"),
        length=(256, "tokens in a sequence"),
        rows=([0], "measure only the speed of writing so many rows side by side"),
    ).parse_args()
    recipe: dict[str, Any] = {
        "tasks": arguments.tasks,
        "include_path": arguments.include_path,
        "device": arguments.device,
        "healing": {"tokens": arguments.tokens},
        "finetuning": {"tokens": 0, "batch_size": arguments.batch, "sequence_length": arguments.length},
        "searching": {"limit": arguments.limit},
    }
    with temporary_job(arguments.checkpoint, arguments.data[0] or None, **recipe) as job:
        job.fill_in()
        if any(arguments.rows):
            print_speed(job, arguments.rows)
            return
        compare(job, [GENERATED, *(name or str(job.recipe.data) for name in arguments.data)], arguments.size)


def print_speed(job: Job, counts: list[int]) -> None:
    """How many tokens the base writes in a second, by the number of rows side by side."""
    job.threads(scoring=False)
    model, length = job.load_base(), job.length
    vocabulary = vocabulary_of(job.tokenizer, job.checkpoint.config, job.structure.vocab_size, length)
    print_header("rows side by side", "tokens/s", "tokens per second of the processor", right_from=0)
    for count in counts:
        began = time.process_time()
        _, seconds = timed(partial(write_rows, model, vocabulary, range(count), length, job.recipe.seed))
        busy = time.process_time() - began
        print_row(str(count), f"{count * length / seconds:,.0f}", f"{count * length / busy:,.0f}")


def compare(job: Job, sources: list[str], size: float) -> None:
    """Print a row for the base, and for each text two: the cut ordered on it, and healed on it."""
    tokens = job.recipe.healing.tokens or 0
    texts: dict[str, Blocks] = {}
    for source in sources:
        job.recipe.data = job.given.data = source
        texts[source], seconds = timed(partial(training_blocks, job, tokens))
        trained = len(texts[source].split()[0]) * texts[source].length
        print(f"{name_of(source)}: {trained:,} tokens to train on, read {tokens / trained:.1f} times; {seconds:.0f} s")
    print()
    print_header("healed on", *(f"loss on {name_of(source)}" for source in sources), *job.tasks.tasks, "quality")
    base = measure(job, job.load_base(), texts, "base")
    for source, blocks in texts.items():
        job.threads(scoring=False)
        supernet = ordered_supernet(job, calibration_batches(job, blocks))
        architecture = uniform_near(job, size * job.structure.parameters(job.structure.base))
        network = extract(supernet.model, job.structure, architecture)
        del supernet
        measure(job, network, texts, f"nothing, ordered on {name_of(source)}", base)
        job.threads(scoring=False)
        state = job.run.path / "healing.safetensors"
        settings = job.train_settings(job.recipe.healing, blocks.length, seed=1, repaired=False)
        heal(network, job.load_base(), blocks, settings, state=state, accelerator=job.accelerator)
        state.unlink(missing_ok=True)
        measure(job, network, texts, f"**{name_of(source)}**", base)
        del network
        release_cached_memory(job.device)


def measure(
    job: Job, network: Any, texts: dict[str, Blocks], name: str, base: dict[str, Score] | None = None
) -> dict[str, Score]:
    """Print a network's row; returns its scores."""
    job.threads(scoring=True)
    network = network.to(job.compute_dtype).eval()
    with torch.no_grad():
        held_out = [blocks.split()[1].part(0, HELD_OUT_BLOCKS) for blocks in texts.values()]
        losses = [held_out_loss(network, blocks, 8, job.device) for blocks in held_out]
        scores = job.scorer(network).score("search", job.recipe.searching.limit)
    scale = QualityScale(base or scores)
    quality = f"{scale.quality(scores):.3f} ± {scale.stderr(scores):.3f}" if base and scale.counted else ""
    print_row(name, *(f"{loss:.3f}" for loss in losses), *(score.text for score in scores.values()), quality)
    return scores


def name_of(source: str) -> str:
    """A text's name in the table."""
    path = Path(source)
    return GENERATED if source == GENERATED else path.parent.name if path.stem == "train" else path.stem


if __name__ == "__main__":
    main()
