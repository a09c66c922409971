"""What a search gains by qualities that are capped: no task is worth more than the base's own score.

    python -m benchmarks.led_by [--checkpoint DIR --data FILE.jsonl --include-path DIR --tasks A,B] [--sizes 0.8 0.67]
        [--seeds 3] [--train-tokens 0] [--heal-tokens 60000]

For every size and seed one super-network, searched both ways with as many evaluations; all picks are sliced and
healed alike. Losses are held-out, in nats per token; quality is of the packages on the report documents.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.common import Measurements, make_parser, mean_spread, print_header, print_row
from benchmarks.front import settings_of
from compressor import demo, pipeline
from compressor.recipe import Recipe
from compressor.stages.subnet_scores import held_out_losses
from evals.quality import QualityScale
from supernet.architecture import Architecture
from supernet.training.data import HELD_OUT_BLOCKS

WAYS = {"not capped": False, "capped": True}


def main() -> None:
    parser = make_parser(
        __doc__,
        "checkpoint",
        "data",
        "include_path",
        "output",
        "minutes",
        tasks=(",".join(demo.TASK_NAMES), "lm-eval tasks, comma-separated"),
        sizes=(["0.8", "0.67", "0.5"], "the most parameters, as in --max-params"),
        seeds=(3, "runs, each from another seed"),
        train_tokens=(34_000, "of the fine-tuning"),
        heal_tokens=(0, "of healing"),
        evaluations=(60, "of the search"),
        limit=(60, "documents per task in the search"),
        batch=(4, "sequences in a step"),
    )
    arguments = parser.parse_args()
    measurements = Measurements(arguments.output, arguments.minutes)
    kept = {"output", "minutes", "seeds", "sizes"}
    settings = "; ".join(f"{name} {value}" for name, value in vars(arguments).items() if name not in kept)
    results = measurements.by_settings.setdefault(settings, {})
    with tempfile.TemporaryDirectory() as name:
        for size in arguments.sizes:
            for seed in range(arguments.seeds):
                folder = Path(name) / f"{size}-{seed}"
                measurements.measure(results, f"{size} {seed}", partial(picks, arguments, size, seed, folder))
    columns = ["share", "loss as searched", "loss", "quality"]
    print_header("size", "search", "seeds", *columns, right_from=2)
    for size in arguments.sizes:
        rows = [row for key, row in results.items() if key.split()[0] == size]
        for way in WAYS if rows else ():
            cells = [
                mean_spread([row[way][name] for row in rows], ".4f" if "loss" in name else ".3f") for name in columns
            ]
            print_row(size, way, str(len(rows)), *cells)


def picks(arguments: Any, size: str, seed: int, folder: Path) -> dict[str, dict[str, float | None]]:
    """All picks of one super-network: what each is, and what became of it."""
    folder.mkdir()
    settings = settings_of(arguments, size, folder, seed) | {"quantizing": {"schemes": []}}
    recipe = Recipe.model_validate(settings)
    pipeline.finetune(pipeline.start(recipe, folder / "trained"))
    return {way: one(folder, way, capped) for way, capped in WAYS.items()}


def one(folder: Path, way: str, capped: bool) -> dict[str, float | None]:
    """Search, pick and heal in a copy of the run."""
    run = Path(shutil.copytree(folder / "trained", folder / way.replace(" ", "-")))
    job = pipeline.resume(run, {})
    with led_by(capped):
        pipeline.search(job)
    (row,) = pipeline.pick(job)
    (entry,) = pipeline.export(job)
    architecture = Architecture.from_dict(row["architecture"])
    (before,) = held_out_losses(job, [architecture], HELD_OUT_BLOCKS)
    return {
        "share": job.structure.parameters(architecture) / job.untouched_parameters,
        "loss as searched": before,
        "loss": entry.held_out_loss,
        "quality": entry.quality,
    }


@contextmanager
def led_by(capped: bool) -> Iterator[None]:
    """Within, a search's qualities are capped or not."""
    quality = QualityScale.quality

    def as_reported(self: QualityScale, *arguments: Any, **_: Any) -> float:
        return quality(self, *arguments)

    with patch.object(QualityScale, "quality", quality if capped else as_reported):
        yield


if __name__ == "__main__":
    main()
