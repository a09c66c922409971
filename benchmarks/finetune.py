"""Which sampler, draw and loss fine-tune a super-network best? Held-out loss of four sub-networks, the same tokens.

    python -m benchmarks.finetune [--checkpoint DIR --data FILE] [--tokens 40000] [--results FILE] [--only "A;B"]

One choice is changed at a time, from the default. Beside them stand the base sliced without training, each size sliced
first and then trained alone, and the base trained plainly (next-token cross-entropy). The sizes are uniform cuts, the
same for all; so are twelve random sub-networks, whose mean loss has a column, since what makes uniform cuts better need
not make these better. Of several `--seeds`, mean and standard deviation; each size alone is trained with seed 0 only.
Every trial is a line of the results file as soon as it is done, and is not done again.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TypedDict

import numpy as np
import torch

from benchmarks.common import make_parser, mean_spread, print_header, print_row
from benchmarks.jobs import subnet_loss, temporary_job
from compressor.inputs import data_fingerprint, training_blocks
from compressor.job import Job
from compressor.recipe import Finetuning
from compressor.sizing import band_limits, draw_near, training_range, uniform_near
from compressor.stages.finetuning import order_supernet, train_supernet
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture
from supernet.common.files import fingerprint
from supernet.slicing import extract
from supernet.training.losses import Loss, held_out_loss
from supernet.training.supernet_training import heal

ALONE = {1.0: 0.03, 0.8: 0.1, 0.67: 0.1, 0.5: 0.1}
"""The sizes that are compared, and the learning rate times the width that each is trained with alone: a whole network
bears less than one that was cut."""
BATCH = 4
RANDOM = 12
"""Random sub-networks whose mean loss is measured too."""

Changes = Mapping[str, str | float | dict[str, float]]
"""Changes of `finetuning` in the recipe. `rate` is the learning rate times the width."""

TRIALS: dict[str, Changes] = {
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
    # what moves the weights
    "adamw": {"optimizer": "adamw"},
    "adamw, rate 0.2 / width": {"optimizer": "adamw", "rate": 0.2},
    # adapters only
    "lora": {"parameters": "lora"},
    "lora, rate 0.1 / width": {"parameters": "lora", "rate": 0.1},
    "lora, rate 1 / width": {"parameters": "lora", "rate": 1.0},
    "lora, adamw": {"parameters": "lora", "optimizer": "adamw"},
    "lora, adamw, rate 0.1 / width": {"parameters": "lora", "optimizer": "adamw", "rate": 0.1},
    # weights that depend on the sizes of a layer
    "routed": {"parameters": "routed"},
    # a super-network for each band of sizes, on equal parts of the tokens
    "two bands": {"bands": 2},
    "two bands, with relations": {"bands": 2, "loss": {"ce": 0.3, "kl": 0.7, "relations": 1.0}},
    "three bands": {"bands": 3},
    # published schemes as they stand
    "LLaMA-NAS": {"sampler": "alternate", "draw": "genes", "loss": "ce"},
    "InstaTune, in place": {"sampler": "joint", "draw": "genes", "strong_teacher": 0.0},
    "BigNAS": {"random_members": 2, "draw": "genes", "loss": "kl", "strong_teacher": 0.0, "tail_share": 0.25},
}
"""Changes of the default by the name of a row."""


class Row(TypedDict, total=False):
    """A line of the results file, as far as the table reads it."""

    losses: list[float]  # of all sizes; `loss` where a trial is of one
    loss: float
    random: float
    passes: int
    training: float


class Trials:
    """The trials, each a change of the recipe of `base`; the sub-networks that are compared; the results so far."""

    def __init__(self, base: Job, tokens: int, results: Path) -> None:
        assert base.recipe.data is not None
        self.base, self.tokens, self.results = base, tokens, results
        results.parent.mkdir(parents=True, exist_ok=True)
        lines = results.read_text().splitlines() if results.is_file() else []
        self.done: dict[str, Row] = {row["key"]: row for row in map(json.loads, lines)}
        base.threads(scoring=False)
        self.blocks = training_blocks(base, tokens)
        self.held_out = self.blocks.split()[1]
        self.structure = base.structure
        self.full = self.structure.parameters(self.structure.base)
        self.sizes = {1.0: self.structure.base}
        self.sizes |= {size: uniform_near(base, size * self.full) for size in ALONE if size < 1}
        low, high = training_range(base).sizes
        rng = np.random.default_rng(1)
        self.random = [draw_near(base, rng, size) for size in np.linspace(low, high, RANDOM)]
        self.inputs = {"model": Path(base.recipe.model).name, "base": base.base_fingerprint}
        self.inputs["data"] = data_fingerprint(base.recipe.data)

    def job(self, changes: Changes, seed: int) -> Job:
        """A job whose recipe is the default with these changes."""
        own = {name: value for name, value in changes.items() if name != "rate"}
        if isinstance(rate := changes.get("rate"), float):
            own["learning_rate"] = rate / self.structure.base.hidden_size
        section = Finetuning.model_validate({"tokens": self.tokens, "batch_size": BATCH} | own)
        job = Job(self.base.run, self.base.recipe.model_copy(update={"finetuning": section, "seed": seed}))
        job.fill_in()
        return job

    def supernet(self, job: Job) -> SuperNetwork:
        supernet = job.supernet_of(job.load_base(torch.float32))
        order_supernet(job, supernet, self.blocks)
        return supernet

    def state(self) -> Path:
        """Where a trial keeps what could resume it: always a new place, as trials are done again from their start."""
        return Path(tempfile.mkdtemp(dir=self.base.run.path)) / "state.safetensors"

    def once(self, facts: dict[str, object], trial: Callable[[], Row]) -> Row:
        """The row of a trial, measured unless a row of the same facts is there."""
        facts |= self.inputs | {"tokens": self.tokens, "batch": BATCH}
        key = fingerprint(facts)
        if key not in self.done:
            began = time.monotonic()
            line = json.dumps({"key": key, **facts, **trial(), "seconds": time.monotonic() - began})
            with self.results.open("a") as file:
                file.write(line + "\n")
            self.done[key] = json.loads(line)
        return self.done[key]

    def measured(self, supernet: SuperNetwork) -> dict[Architecture, float]:
        """Held-out loss of each of the sizes and of the random sub-networks."""
        return {a: subnet_loss(supernet, a, self.held_out) for a in (*self.sizes.values(), *self.random)}

    def row(self, losses: Mapping[Architecture, float], passes: int, training: float) -> Row:
        random = mean(losses[drawn] for drawn in self.random)
        return {
            "losses": [losses[a] for a in self.sizes.values()],
            "random": random,
            "passes": passes,
            "training": training,
        }

    def untrained(self) -> Row:
        return self.row(self.measured(self.supernet(self.job({}, 0))), 0, 0.0)

    def elastic(self, changes: Changes, seed: int) -> Row:
        """A super-network fine-tuned with these changes of the default, and the loss of each size cut out of it."""
        job = self.job(changes, seed)

        def trial() -> Row:
            losses: dict[Architecture, float] = {}
            passes, training, limits = 0, 0.0, band_limits(job)
            for band in range(job.recipe.finetuning.bands):
                supernet = self.supernet(job)
                history = train_supernet(job, supernet, self.blocks, self.state(), band)
                passes, training = passes + history.passes, training + history.seconds
                for architecture, loss in self.measured(supernet).items():
                    if band == sum(self.structure.parameters(architecture) < limit for limit in limits):
                        losses[architecture] = loss
            return self.row(losses, passes, training)

        section = job.recipe.finetuning.model_dump()
        return self.once({"what": "elastic", "section": section, "seed": seed}, trial)

    def alone(self, size: float, seed: int) -> Row:
        """One size sliced first, then trained alone with next-token cross-entropy."""
        job = self.job({"rate": ALONE[size]}, seed)

        def trial() -> Row:
            network = extract(self.supernet(job).model, self.structure, self.sizes[size])
            settings = job.train_settings(job.recipe.finetuning, self.blocks.length, seed)
            plain, state = Loss({"ce": 1.0}), self.state()
            history = heal(
                network, network, self.blocks, settings, loss=plain, state=state, accelerator=job.accelerator
            )
            loss = held_out_loss(network.eval(), self.held_out, 8, torch.device("cpu"))
            return {"loss": loss, "passes": history.passes, "training": history.seconds}

        facts = {"what": "alone", "size": size, "rate": ALONE[size], "seed": seed, "optimizer": job.optimizer}
        return self.once(facts, trial)


def print_trial(name: str, rows: Sequence[Row], reference: Sequence[float], tokens: int) -> None:
    """A row of the table: means over seeds, with standard deviations where there are several."""
    by_size = zip(reference, *(row["losses"] for row in rows), strict=True)
    cells = [f"{mean_spread(losses)} ({mean(losses) / best - 1:+.1%})" for best, *losses in by_size]
    excess = [mean(loss / best - 1 for loss, best in zip(row["losses"], reference, strict=True)) for row in rows]
    random = mean_spread([row["random"] for row in rows]) if "random" in rows[0] else ""
    spent = [f"{tokens:,}", f"{mean(row['training'] for row in rows):.0f}", f"{rows[0]['passes']:,}"]
    print_row(name, *cells, mean_spread(excess, "+.1%"), random, *spent)


def main() -> None:
    only = (";".join(TRIALS), "names of rows, separated by semicolons")
    own = {"tokens": 40_000, "results": Path("runs/finetune.jsonl"), "only": only, "seeds": "0"}
    arguments = make_parser(__doc__, "checkpoint", "data", **own).parse_args()
    names = [name for name in arguments.only.split(";") if name]
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    with temporary_job(arguments.checkpoint, arguments.data) as job:
        compare(Trials(job, arguments.tokens, arguments.results), names, seeds)


def compare(trials: Trials, names: Sequence[str], seeds: Sequence[int]) -> None:
    shares = [trials.structure.parameters(size) / trials.full for size in trials.sizes.values()]
    columns = ["", *(f"{share:.3f}" for share in shares), "mean excess", f"{RANDOM} random"]
    print_header(*columns, "tokens", "seconds", "passes")
    alone = [trials.alone(size, seed=0) for size in ALONE]
    reference = [row["loss"] for row in alone]
    untrained = trials.once({"what": "untrained"}, trials.untrained)
    print_trial("base, sliced, not trained", [untrained], reference, 0)
    seconds, passes = sum(row["training"] for row in alone), sum(row["passes"] for row in alone)
    total: Row = {"losses": reference, "training": seconds, "passes": passes}
    name = f"each size alone ({len(ALONE)} runs{', seed 0' if seeds != [0] else ''})"
    print_trial(name, [total], reference, len(ALONE) * trials.tokens)
    for name in names:
        rows = [trials.elastic(TRIALS[name], seed) for seed in seeds]
        print_trial(name, rows, reference, trials.tokens)


if __name__ == "__main__":
    main()
