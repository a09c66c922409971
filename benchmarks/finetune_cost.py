"""What does a step of the elastic fine-tuning cost, beside steps of its members cut out? Time and memory, paired.

    python -m benchmarks.finetune_cost [--checkpoint DIR --data FILE] [--repeats 10]

A sandwich of the largest, the uniform cut to 0.67 and the smallest. Forward and backward passes only, as the optimizer
steps once for all of them; repeats are interleaved, medians of CPU time are compared. A plain step learns from the data
alone; a taught one from the recipe's loss, each member with a teacher pass, as when it is healed: a sandwich that the
base teaches has one such pass for all. Memory is the peak of what torch allocates beyond weights and gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from statistics import median

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import make_parser, print_header, print_row, timed
from benchmarks.jobs import temporary_job
from compressor.inputs import training_blocks
from compressor.job import Job
from compressor.recipe import Finetuning
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
    sizes = (event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()))
    return max(accumulate(sizes, initial=0))


def steps(job: Job, batch: Batch) -> dict[str, Callable[[], None]]:
    """What is compared, by name: plain and taught steps of each member cut out, then steps of the sandwich."""
    supernet, base = job.supernet_of(job.load_base(torch.float32)), job.load_base(torch.float32)
    full = job.structure.parameters(job.structure.base)
    members = [job.structure.base, uniform_near(job, 0.67 * full), uniform_near(job, 0.5 * full)]
    cuts = [extract(supernet.model, job.structure, member) for member in members]
    adapters = ElasticLora(supernet, rank=Finetuning().lora_rank, seed=0)

    def base_teaches() -> HiddenStates:
        with torch.no_grad():
            return trace(base, batch)

    def plain(network: nn.Module) -> None:
        PLAIN(trace(network, batch), None).backward()

    def taught(network: nn.Module) -> None:
        TAUGHT(trace(network, batch), base_teaches()).backward()

    def plain_sandwich() -> None:
        for member in members:
            supernet.activate(member)
            plain(supernet.model)

    def sandwich(teacher: HiddenStates | None) -> None:
        """Members in turn, each taught by the largest where there is no teacher."""
        for member in members:
            supernet.activate(member)
            student = trace(supernet.model, batch)
            loss = TAUGHT(student, teacher)
            teacher = teacher or student.detached()
            del student
            loss.backward()

    def sandwich_of_adapters() -> None:
        with adapters:
            with torch.no_grad(), adapters.frozen() as network:
                teacher = trace(network.model, batch)
            sandwich(teacher)

    networks = dict(zip(("1", "0.67", "0.5"), cuts, strict=True))
    return {
        **{f"plain {share}": partial(plain, network) for share, network in networks.items()},
        **{f"taught {share}": partial(taught, network) for share, network in networks.items()},
        "sandwich, not taught": plain_sandwich,
        "sandwich, taught in place": lambda: sandwich(None),
        "sandwich, taught by the base": lambda: sandwich(base_teaches()),
        "sandwich of adapters, taught by the base": sandwich_of_adapters,
    }


def main() -> None:
    arguments = make_parser(__doc__, "checkpoint", "data", repeats=10).parse_args()
    with temporary_job(arguments.checkpoint, arguments.data, documents=1000) as job:
        job.threads(scoring=False)
        batch = training_blocks(job, 1)[:4]
        works = steps(job, batch)
        for work in works.values():  # gradients exist from here on
            work()
        rounds = [
            {name: timed(work, time.process_time)[1] for name, work in works.items()} for _ in range(arguments.repeats)
        ]
        peaks = {name: peak_bytes(work) for name, work in works.items()}
    seconds = {name: median(times[name] for times in rounds) for name in works}
    sums = [sum(seconds[name] for name in works if name.startswith(how)) for how in ("plain", "taught")]
    largest = max(peak for name, peak in peaks.items() if name.startswith("plain"))
    print(f"{len(batch)} blocks of {batch.ids.shape[1]} tokens, {torch.get_num_threads()} thread(s)\n")
    columns = ["CPU milliseconds", "/ sum of the plain", "/ sum of the taught", "peak MiB", "beyond the largest plain"]
    print_header("", *columns)
    for name in works:
        shares = [f"{seconds[name] / total:.2f}" for total in sums]
        memory = [f"{peaks[name] / 2**20:.1f}", f"{(peaks[name] - largest) / 2**20:+.1f}"]
        print_row(name, f"{1e3 * seconds[name]:.0f}", *shares, *memory)


if __name__ == "__main__":
    main()
