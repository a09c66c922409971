"""What does a step of the elastic fine-tuning cost, beside steps of its members cut out? Time and memory, paired.

    python -m benchmarks.finetune_cost [--checkpoint DIR --data FILE] [--repeats 10]

A sandwich of the largest, the uniform cut to 0.67 and the smallest. Forward and backward passes only, as the optimizer
steps once for all of them; repeats are interleaved, medians of CPU time are compared. A plain step learns from the data
alone; a taught one from the recipe's loss, each member with a pass of its own teacher, as when it is healed: a sandwich
that the base teaches has one such pass for all. Memory is the peak of what torch allocates beyond weights and
gradients. Without a checkpoint: the bundled one on generated text.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from compressor import demo
from compressor.inputs import training_blocks
from compressor.job import Job
from compressor.recipe import Finetuning, Recipe
from compressor.run import Run
from compressor.sizing import uniform_near
from supernet.slicing import extract
from supernet.training.adapters import ElasticLora
from supernet.training.data import Batch
from supernet.training.losses import Loss
from supernet.training.traces import HiddenStates, trace

PLAIN, TAUGHT = Loss({"ce": 1.0}), Loss(Finetuning().losses)


def peak_bytes(work: Callable[[], None]) -> int:
    """The most that torch has allocated on the CPU during `work`, beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    at = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        at += event.nbytes()
        peak = max(peak, at)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=str(demo.MODEL))
    parser.add_argument("--data", help="training text; default: generated")
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    if arguments.data is None:
        arguments.data = str(folder / "text.jsonl")
        demo.training_text(Path(arguments.data), n_documents=1000, seed=1)
    job = Job(Run(folder), Recipe(model=arguments.checkpoint, data=arguments.data, device="cpu"))
    job.threads(scoring=False)
    batch: Batch = training_blocks(job, 1)[:4]
    supernet, base = job.supernet_of(job.load_base(torch.float32)), job.load_base(torch.float32)
    full = job.structure.parameters(job.structure.base)
    members = [job.structure.base, uniform_near(job, 0.67 * full), uniform_near(job, 0.5 * full)]
    networks = [extract(supernet.model, job.structure, member) for member in members]

    adapters = ElasticLora(supernet, rank=Finetuning().lora_rank, seed=0)

    def base_teaches() -> HiddenStates:
        with torch.no_grad():
            return trace(base, batch)

    def sandwich_alone() -> None:
        """Members in turn, each learning from the data alone, as in a plain step."""
        for member in members:
            supernet.activate(member)
            PLAIN(trace(supernet.model, batch), None).backward()

    def sandwich(teacher: HiddenStates | None) -> None:
        """Members in turn, each taught by the largest where nobody else teaches."""
        for member in members:
            supernet.activate(member)
            student = trace(supernet.model, batch)
            loss = TAUGHT(student, teacher)
            teacher = teacher or student.detached()
            del student
            loss.backward()

    def of_adapters() -> None:
        with adapters:
            with torch.no_grad(), adapters.frozen() as network:
                teacher = trace(network.model, batch)
            sandwich(teacher)

    alone: dict[str, Callable[[Any], None]] = {
        "plain": lambda network: PLAIN(trace(network, batch), None).backward(),
        "taught": lambda network: TAUGHT(trace(network, batch), base_teaches()).backward(),
    }
    works: dict[str, Callable[[], None]] = {
        f"{how} {share}": partial(step, network)
        for how, step in alone.items()
        for share, network in zip(("1", "0.67", "0.5"), networks, strict=True)
    }
    works |= {
        "sandwich, not taught": sandwich_alone,
        "sandwich, taught in place": lambda: sandwich(None),
        "sandwich, taught by the base": lambda: sandwich(base_teaches()),
        "sandwich of adapters, taught by the base": of_adapters,
    }
    for work in works.values():  # gradients exist from here on
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(arguments.repeats):
        for name, work in works.items():
            began = time.process_time()
            work()
            seconds[name].append(time.process_time() - began)
    peaks = {name: peak_bytes(work) for name, work in works.items()}
    sums = {how: sum(median(seconds[name]) for name in works if name.startswith(how)) for how in alone}
    largest = max(peak for name, peak in peaks.items() if name.startswith("plain"))
    print(f"{len(batch)} blocks of {batch.ids.shape[1]} tokens, {torch.get_num_threads()} thread(s)\n")
    header = [
        "",
        "CPU milliseconds",
        "/ sum of the plain",
        "/ sum of the taught",
        "peak MiB",
        "beyond the largest plain",
    ]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for name in works:
        at = median(seconds[name])
        cells = [f"{1e3 * at:.0f}", *(f"{at / sums[how]:.2f}" for how in alone), f"{peaks[name] / 2**20:.1f}"]
        print("| " + " | ".join([name, *cells, f"{(peaks[name] - largest) / 2**20:+.1f}"]) + " |")


if __name__ == "__main__":
    main()
