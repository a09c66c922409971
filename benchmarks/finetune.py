"""Which sampler, draw and loss fine-tune a super-network best? Held-out loss of four sub-networks, the same tokens.

    python -m benchmarks.finetune [--checkpoint DIR --data FILE] [--tokens 40000] [--results FILE] [--only "A;B"]
        [--seeds 0,1]

One choice is changed at a time, from the default. Beside them stand the base sliced without training, each size sliced
first and then trained alone, and the base trained plainly (next-token cross-entropy). The sizes are uniform cuts, the
same for all; a column holds the mean loss of twelve random sub-networks between the ends, the same for all too, since
what makes the uniform cuts better need not make these better. Of several seeds, mean and standard deviation; what they
are compared with, each size alone, is trained with seed 0 only, so its own spread is in no number. Every trial is a
line of the results file as soon as it is done, and is not done again. Without a checkpoint: the bundled one on
generated text.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from compressor import demo
from compressor.inputs import data_fingerprint, training_blocks
from compressor.job import Job
from compressor.recipe import Finetuning, Recipe
from compressor.run import Run
from compressor.sizing import draw_near, training_range, uniform_near
from compressor.stages.finetuning import order_supernet, train_supernet
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture
from supernet.common.files import fingerprint
from supernet.slicing import extract
from supernet.training.data import Blocks
from supernet.training.losses import Loss, held_out_loss
from supernet.training.supernet_training import heal

ALONE = {1.0: 0.03, 0.8: 0.1, 0.67: 0.1, 0.5: 0.1}
"""The sizes that are compared, and the learning rate times the width that each is trained with alone: a whole network
bears less than one that was cut."""
BATCH = 4
RANDOM = 12
"""Random sub-networks whose mean loss is measured too."""

TRIALS: dict[str, dict[str, Any]] = {
    "default": {},
    # who takes part
    "sampler alternate": {"sampler": "alternate"},
    "sampler joint": {"sampler": "joint"},
    "two random members": {"random_members": 2},
    "three random members": {"random_members": 3},
    # where random members are drawn
    "draw sizes": {"draw": "sizes"},
    "draw genes": {"draw": "genes"},
    "draw shift": {"draw": "shift"},
    # what from
    "taught in place": {"strong_teacher": 0.0},
    "taught by the base for a half": {"strong_teacher": 0.5},
    "loss ce": {"loss": "ce"},
    "loss kl": {"loss": "kl"},
    "loss kl, draw sizes": {"loss": "kl", "draw": "sizes"},
    "alternate, loss kl, draw sizes": {"sampler": "alternate", "loss": "kl", "draw": "sizes"},
    "temperature 2": {"temperature": 2.0},
    "with relations": {"loss": {"ce": 0.3, "kl": 0.7, "relations": 1.0}},
    "with hidden": {"loss": {"ce": 0.3, "kl": 0.7, "hidden": 1.0}},
    # how fast
    "rate 0.03 / width": {"rate": 0.03},
    "rate 0.06 / width": {"rate": 0.06},
    "rate 0.2 / width": {"rate": 0.2},
    "rate 0.2 / width, draw sizes": {"rate": 0.2, "draw": "sizes"},
    "rate 0.3 / width, draw sizes": {"rate": 0.3, "draw": "sizes"},
    "rate 0.2 / width, two random members": {"rate": 0.2, "random_members": 2},
    "taught in place, rate 0.03 / width": {"strong_teacher": 0.0, "rate": 0.03},
    "constant tail": {"tail_share": 0.25},
    # adapters only
    "lora": {"parameters": "lora"},
    "lora, rate 0.1 / width": {"parameters": "lora", "rate": 0.1},
    "lora, rate 1 / width": {"parameters": "lora", "rate": 1.0},
    # published schemes as they stand
    "LLaMA-NAS": {"sampler": "alternate", "draw": "genes", "loss": "ce"},
    "InstaTune, in place": {"sampler": "joint", "draw": "genes", "strong_teacher": 0.0},
    "BigNAS": {"random_members": 2, "draw": "genes", "loss": "kl", "strong_teacher": 0.0, "tail_share": 0.25},
}
"""Changes of `finetuning` in the recipe, by the name of a row. `rate` is the learning rate times the width."""


class Bench:
    """One checkpoint, its data, the sub-networks that are compared, and the results so far."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.folder = folder
        self.checkpoint, self.data, self.tokens = arguments.checkpoint, arguments.data, arguments.tokens
        if self.data is None:
            self.data = str(self.folder / "text.jsonl")
            demo.training_text(Path(self.data), n_documents=6000, seed=1)
        self.file = Path(arguments.results)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, dict[str, Any]] = {}
        if self.file.is_file():
            self.done = {row["key"]: row for row in map(json.loads, self.file.read_text().splitlines())}
        job = self.job({}, 0)
        job.threads(scoring=False)
        self.blocks: Blocks = training_blocks(job, self.tokens)
        self.full = job.structure.parameters(job.structure.base)
        self.sizes: dict[float, Architecture] = {1.0: job.structure.base}
        self.sizes |= {size: uniform_near(job, size * self.full) for size in ALONE if size < 1}
        self.structure = job.structure
        self.inputs = {"base": job.base_fingerprint, "data": data_fingerprint(self.data)}
        low, high = training_range(job).sizes
        rng = np.random.default_rng(1)
        self.random = [draw_near(job, rng, size) for size in np.linspace(low, high, RANDOM)]

    def job(self, changes: dict[str, Any], seed: int) -> Job:
        section = Finetuning(tokens=self.tokens, batch_size=BATCH, **changes)
        recipe = Recipe(model=self.checkpoint, data=self.data, finetuning=section, seed=seed, device="cpu")
        job = Job(Run(self.folder), recipe.resolved())
        job.fill_in()
        return job

    def supernet(self, job: Job) -> SuperNetwork:
        supernet = job.supernet_of(job.load_base(torch.float32))
        order_supernet(job, supernet, self.blocks)
        return supernet

    def held_out(self, network: Any) -> float:
        network.eval()
        return held_out_loss(network, self.blocks.split()[1], 8, torch.device("cpu"))

    def state(self) -> Path:
        """Where a trial would keep what makes it resumable: a new place, as trials are done again from their start."""
        return Path(tempfile.mkdtemp(dir=self.folder)) / "state.safetensors"

    def once(self, facts: dict[str, Any], trial: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of a trial, measured unless a row of the same facts is there."""
        facts |= {"model": Path(self.checkpoint).name, **self.inputs, "tokens": self.tokens, "batch": BATCH}
        key = fingerprint(facts)
        if key not in self.done:
            began = time.monotonic()
            row = {"key": key, **facts, **trial(), "seconds": time.monotonic() - began}
            with self.file.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.done[key] = row
        return self.done[key]

    def elastic(self, changes: dict[str, Any], seed: int) -> dict[str, Any]:
        """A super-network fine-tuned with these changes of the default, and the loss of each size cut out of it."""
        if "rate" in changes:
            own = {name: value for name, value in changes.items() if name != "rate"}
            changes = own | {"learning_rate": changes["rate"] / self.structure.base.hidden_size}
        job = self.job(changes, seed)

        def trial() -> dict[str, Any]:
            supernet = self.supernet(job)
            history = train_supernet(job, supernet, self.blocks, self.state())
            return self.losses(supernet) | {"passes": history.passes, "training": history.seconds}

        section = job.recipe.finetuning.model_dump()
        return self.once({"what": "elastic", "section": section, "seed": seed}, trial)

    def untrained(self) -> dict[str, Any]:
        def trial() -> dict[str, Any]:
            return self.losses(self.supernet(self.job({}, 0))) | {"passes": 0, "training": 0.0}

        return self.once({"what": "untrained"}, trial)

    def losses(self, supernet: SuperNetwork) -> dict[str, Any]:
        """Held-out loss of each size, and the mean of the random sub-networks."""

        def loss(architecture: Architecture) -> float:
            with torch.no_grad(), supernet.activated(architecture) as network:
                return self.held_out(network)

        return {"losses": [loss(size) for size in self.sizes.values()], "random": mean(map(loss, self.random))}

    def alone(self, size: float, seed: int) -> dict[str, Any]:
        """One size sliced first, then trained alone with next-token cross-entropy."""
        rate = ALONE[size]
        job = self.job({"learning_rate": rate / self.structure.base.hidden_size}, seed)

        def trial() -> dict[str, Any]:
            supernet = self.supernet(job)
            network = extract(supernet.model, self.structure, self.sizes[size])
            settings = job.train_settings(job.recipe.finetuning, self.blocks.length, seed)
            options: dict[str, Any] = {"state": self.state(), "accelerator": job.accelerator}
            history = heal(network, network, self.blocks, settings, loss=Loss({"ce": 1.0}), **options)
            return {"loss": self.held_out(network), "passes": history.passes, "training": history.seconds}

        return self.once({"what": "alone", "size": size, "rate": rate, "seed": seed}, trial)


def line(name: str, rows: list[dict[str, Any]], reference: list[float], tokens: int) -> str:
    """A row of the table: means over seeds, with standard deviations where there are several."""

    def cell(values: list[float], best: float | None = None) -> str:
        more = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
        return f"{mean(values):.3f}{more}" + (f" ({mean(values) / best - 1:+.1%})" if best else "")

    by_size = list(zip(*(row["losses"] for row in rows), strict=True))
    cells = [cell(list(losses), best) for losses, best in zip(by_size, reference, strict=True)]
    excess = [mean(loss / best - 1 for loss, best in zip(row["losses"], reference, strict=True)) for row in rows]
    spread = f" ± {stdev(excess):.1%}" if len(rows) > 1 else ""
    cells += [f"{mean(excess):+.1%}{spread}", cell([row["random"] for row in rows]) if "random" in rows[0] else ""]
    spent = [f"{tokens:,}", f"{mean(row['training'] for row in rows):.0f}", f"{rows[0]['passes']:,}"]
    return "| " + " | ".join([name, *cells, *spent]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=str(demo.MODEL))
    parser.add_argument("--data", help="training text; default: generated")
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--results", default="runs/finetune.jsonl")
    parser.add_argument("--only", default=";".join(TRIALS), help="names of rows, separated by semicolons")
    parser.add_argument("--seeds", default="0")
    arguments = parser.parse_args()
    names = [name for name in arguments.only.split(";") if name]
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        compare(Bench(arguments, Path(folder)), names, seeds)


def compare(bench: Bench, names: list[str], seeds: list[int]) -> None:
    shares = [bench.structure.parameters(a) / bench.full for a in bench.sizes.values()]
    header = ["", *(f"{share:.3f}" for share in shares), "mean excess", f"{RANDOM} random"]
    header += ["tokens", "seconds", "passes"]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|", flush=True)
    single = [bench.alone(size, seed=0) for size in ALONE]
    reference = [row["loss"] for row in single]
    print(line("base, sliced, not trained", [bench.untrained()], reference, 0))
    alone = {
        "losses": reference,
        "training": sum(row["training"] for row in single),
        "passes": sum(row["passes"] for row in single),
    }
    name = f"each size alone ({len(ALONE)} runs{', seed 0' if seeds != [0] else ''})"
    print(line(name, [alone], reference, len(ALONE) * bench.tokens), flush=True)
    for name in names:
        rows = [bench.elastic(TRIALS[name], seed) for seed in seeds]
        print(line(name, rows, reference, bench.tokens), flush=True)


if __name__ == "__main__":
    main()
