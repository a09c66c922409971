"""Seconds to score one candidate: lm-eval's HFLM on sliced networks and over the super-network, and ours.

    python -m benchmarks.scoring [--checkpoint DIR --include-path DIR --tasks A,B] [--output FILE --minutes 5] \\
        [--ablation]

Candidates are the second generation of the default search without proposals (the children of a first generation that
was measured on the first task) at a target of 0.67 of the parameters, in the order in which a search scores them. Of
`--candidates`, `--baseline` evenly spaced ones are scored the other ways too:

- (a) each is sliced out and given to `simple_evaluate` in an `HFLM` of its own;
- (b) each is switched on in the super-network, and one `HFLM` around that is given to `simple_evaluate`;
- (b, requests) `HFLM.loglikelihood` over the super-network answers the very requests of (c), one candidate in two;
- (c) ours, on all candidates; tasks are built once for all of them, timed apart.

In (a) and (b), `simple_evaluate` builds its tasks at every call, as it does for anybody; importing lm-eval and indexing
task files is not counted, and per-document logs are off. HFLM reads batches of 16. All use the same number of threads
(`--threads`): HFLM in every operation, ours in as many passes side by side; with one, processor time is measured, which
other work on the machine leaves alone. Answers of (b, requests) and (c) are compared: the largest difference is in the
table. Memory is the growth of the process's resident memory at its peak.
What is measured is added to `--output`, under the settings it was measured with; after `--minutes` no task is begun any
more, and the next run goes on.

`--ablation` scores a few neighbouring candidates with one device of ours switched off at a time.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from benchmarks.memory import resident
from compressor import demo
from compressor.job import Job
from compressor.recipe import Recipe, Targets
from compressor.run import Run
from compressor.sizing import parameter_limits, smallest_in_training
from evals.scoring import tree_attention as trees
from evals.scoring.encoding import Encoder, Span
from evals.scoring.lm import NetworkLM
from evals.scoring.scorer import Scorer
from evals.scoring.tasks import TaskSet
from search.algorithms import algorithm
from search.objectives import Constraint, choose, computed
from search.run import first_generation
from search.sampling import uniform_members
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture
from supernet.importance import wanda
from supernet.ordering import apply_ordering, order_by
from supernet.slicing import extract
from supernet.training.data import pack

SPLIT: Literal["all"] = "all"
BATCH = 16
NEIGHBOURS = 4
"""Candidates of an ablation, in the order of the search."""
WAYS = ("a", "b", "requests", "c")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=str(demo.MODEL))
    parser.add_argument("--include-path", default=str(demo.TASKS))
    parser.add_argument("--tasks", default=",".join(demo.TASK_NAMES))
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--baseline", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--ablation", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    ends = time.monotonic() + 60 * arguments.minutes
    torch.set_num_threads(arguments.threads)
    tasks = arguments.tasks.split(",")
    settings = (
        f"{Path(arguments.checkpoint).resolve().name}, {arguments.threads} threads, float32, {arguments.candidates} "
        f"candidates of a search on {tasks[0]}, at most {arguments.documents} documents and {arguments.shots} shots"
    )
    known: dict[str, Any] = {}
    if arguments.output and arguments.output.is_file():
        known = json.loads(arguments.output.read_text())
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        found = known.setdefault(settings, {"tasks": {}, "ablation": {}})
        measure, into = bench.compare, found["tasks"]
        if arguments.ablation:
            measure, into = bench.ablation, found["ablation"]
        for task in tasks:
            if task in into or time.monotonic() > ends:
                continue
            into[task] = measure(task)
            if arguments.output:
                arguments.output.write_text(json.dumps(known, indent=1) + "\n")
    for heading, measured in known.items():
        print(f"\n{heading}\n")
        if measured["tasks"]:
            print(comparison_table(measured["tasks"]))
        if measured["ablation"]:
            print("\n" + ablation_table(measured["ablation"]))


class Bench:
    """The ordered super-network of a checkpoint, and one real generation of its search."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        self.clock = processor_time if arguments.threads == 1 else time.perf_counter
        targets = Targets(max_params=["0.67"])
        self.job = Job(Run(folder), Recipe(model=arguments.checkpoint, targets=targets, device="cpu"))
        self.supernet = SuperNetwork(self.job.load_base(torch.float32))
        data = folder / "text.jsonl"
        demo.training_text(data, n_documents=400, seed=1)
        calibration = pack(str(data), self.job.tokenizer, 256)[:32].ids.split(8)
        apply_ordering(self.supernet, order_by(wanda(self.supernet, calibration)))
        self.encoder = Encoder(self.job.tokenizer, self.job.checkpoint.config)
        self.manager = TaskManager(include_path=arguments.include_path, include_defaults=False)
        self.candidates = sorted(self.children(), key=lambda a: (a.hidden_size, a.layers))

    def children(self) -> list[Architecture]:
        """What the default search, without proposals, asks for after a first generation measured on a few documents."""
        count, space, structure = self.arguments.candidates, self.job.space, self.job.structure
        exact = computed(structure)
        _, low = smallest_in_training(self.job)
        ((_, high),) = parameter_limits(self.job)
        limits = [Constraint(exact["parameters"], maximum=high, minimum=low)]
        tasks, _ = self.load(self.arguments.tasks.split(",")[0])
        scorer = Scorer(tasks, NetworkLM(self.supernet.model, self.encoder))
        first = first_generation(space, count, np.random.default_rng(0), uniform_members(space, 6, high), limits)
        searcher = algorithm("linas")(
            space,
            choose(["quality", "parameters"], exact, {"quality": "max"}),
            population=count,
            constraints=limits,
            initial=first,
        )
        results = []
        for architecture in searcher.ask(len(first)):
            self.activate(architecture)
            (score,) = scorer.score(SPLIT, min(40, self.arguments.documents), architecture=architecture).values()
            results.append((architecture, {"quality": score.value}))
        searcher.tell(results)
        return searcher.ask(count)

    def activate(self, architecture: Architecture) -> None:
        with torch.no_grad():
            self.supernet.activate(architecture)

    def cut_out(self, architecture: Architecture) -> Any:
        self.activate(self.job.structure.base)
        return extract(self.supernet.model, self.job.structure, architecture)

    @contextmanager
    def one_thread(self) -> Iterator[None]:
        """Of torch: passes run side by side instead."""
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(self.arguments.threads)

    @contextmanager
    def timed(self, into: list[float]) -> Iterator[None]:
        began = self.clock()
        yield
        into.append(self.clock() - began)

    def load(self, task: str) -> tuple[TaskSet, int]:
        """The task with as many examples as fit the context, else one; gives that number too."""
        for shots in (self.arguments.shots, 1):
            tasks = TaskSet.load(
                [task], encoder=self.encoder, include_path=[self.arguments.include_path], num_fewshot=shots
            )
            asked = tasks.requests(SPLIT, self.arguments.documents)
            texts = [instance.args[0] + instance.args[1] for instance in asked.loglikelihood]
            if max(map(len, self.encoder.encode(texts))) <= self.encoder.max_length:
                break
        self.encoder.forget()
        return tasks, shots

    def samples(self, tasks: TaskSet, task: str) -> dict[str, list[int]]:
        """The scored documents as `simple_evaluate` takes them."""
        subtasks = tasks.documents(SPLIT, self.arguments.documents)[task]
        return {subtask.name: [document.index for document in documents] for subtask, documents in subtasks}

    def evaluate(self, lm: Any, task: str, tasks: TaskSet, shots: int) -> None:
        simple_evaluate(
            lm,
            tasks=[task],
            task_manager=self.manager,
            num_fewshot=shots,
            samples=self.samples(tasks, task),
            log_samples=False,
        )

    def compare(self, task: str) -> dict[str, Any]:
        began = self.clock()
        tasks, shots = self.load(task)
        build = self.clock() - began
        asked = tasks.requests(SPLIT, self.arguments.documents)
        chosen = self.candidates[:: -(-len(self.candidates) // self.arguments.baseline)]
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        expected: dict[Architecture, list[tuple[float, bool]]] = {}

        def hflm(model: Any) -> HFLM:
            return HFLM(pretrained=model, tokenizer=self.job.tokenizer, batch_size=BATCH)

        with peak_memory() as sliced:
            for architecture in chosen:
                with self.timed(seconds["a"]):
                    self.evaluate(hflm(self.cut_out(architecture)), task, tasks, shots)
        with peak_memory() as switched:
            lm = hflm(self.supernet.model)
            for architecture in chosen:
                with self.timed(seconds["b"]):
                    self.activate(architecture)
                    self.evaluate(lm, task, tasks, shots)
        for architecture in chosen[::2]:
            self.activate(architecture)
            with self.timed(seconds["requests"]):
                expected[architecture] = lm.loglikelihood(asked.loglikelihood, disable_tqdm=True)
        difference = 0.0
        with peak_memory() as ours, self.one_thread():
            scorer = Scorer(tasks, NetworkLM(self.supernet.model, self.encoder, **self.settings))
            for architecture in self.candidates:
                with self.timed(seconds["c"]):
                    self.activate(architecture)
                    answers = scorer.ask(SPLIT, self.arguments.documents, architecture)
                    scorer.scores(SPLIT, self.arguments.documents, answers)
                for instance, (wanted, _) in zip(asked.loglikelihood, expected.get(architecture, ()), strict=False):
                    difference = max(difference, abs(answers[id(instance)][0][0] - wanted))
            kept = sum(output.nbytes for outputs in scorer.lm._layers._outputs for output in outputs)
        return {
            "shots": shots,
            "documents": sum(map(len, self.samples(tasks, task).values())),
            "build": build,
            "seconds": seconds,
            "difference": difference,
            "memory": {"a": sliced[0], "b": switched[0], "c": ours[0], "cache": kept},
        }

    @property
    def settings(self) -> dict[str, int]:
        return {"workers": self.arguments.threads, "max_tokens": self.job.recipe.batch_tokens}

    def ablation(self, task: str) -> dict[str, float]:
        """Mean seconds of neighbouring candidates: as it is, and with one device switched off at a time."""
        tasks, shots = self.load(task)
        asked = tasks.requests(SPLIT, self.arguments.documents)
        subtasks = tasks.documents(SPLIT, self.arguments.documents)[task]
        document = {id(i): d.hash for _, documents in subtasks for d in documents for i in d.instances}
        documents = [document[id(instance)] for instance in asked.loglikelihood]
        candidates = self.candidates[:NEIGHBOURS]

        def run(
            spans: Sequence[Span] = asked.spans,
            change: Callable[[NetworkLM, trees.Plan], None] = lambda lm, plan: None,
            cut_out: bool = False,
            **settings: int,
        ) -> float:
            lm = NetworkLM(self.supernet.model, self.encoder, **self.settings | settings)
            plan = lm.plan(spans)
            lm._as_tree = True
            change(lm, plan)
            seconds: list[float] = []
            for architecture in candidates:
                if cut_out:
                    lm = NetworkLM(self.cut_out(architecture), self.encoder, **self.settings)
                    lm._as_tree = True
                with self.timed(seconds):
                    if not cut_out:
                        self.activate(architecture)
                    lm.answer(plan, None if cut_out else architecture)
            return statistics.mean(seconds)

        def padded(lm: NetworkLM, plan: trees.Plan) -> None:
            lm._as_tree = False

        def all_logits(lm: NetworkLM, plan: trees.Plan) -> None:
            for source in plan.packs:
                source.at, source.rows = source.rows[source.at], torch.arange(source.tokens.shape[1])
                source.last = source.blocks

        with self.one_thread():
            run()  # warm
            result = {"as it is": run()}
            result["leading layers not shared"] = run(cache_bytes=0)
            result["and contiguous copies instead of views"] = run(cut_out=True)
            with mock.patch.object(trees, "LastLayer", WholeLastLayer):
                result["last layer computed for all tokens"] = run()
                result["and all logits"] = run(change=all_logits)
            result["examples read for every document"] = run(told_apart(asked.spans, documents))
            result["nothing read in common"] = run(told_apart(asked.spans, range(len(asked.spans))))
            result["padded batches instead of trees"] = run(change=padded)
        if self.arguments.threads > 1:
            result["one pass at a time, all threads in it"] = run(workers=1)
        with self.one_thread():
            lm = NetworkLM(self.supernet.model, self.encoder, **self.settings)
            began = self.clock()
            for architecture in candidates:
                self.activate(architecture)
                self.evaluate(lm, task, tasks, shots)
            result["our LM in simple_evaluate"] = (self.clock() - began) / len(candidates)
        return result


class WholeLastLayer(trees.LastLayer):
    """The last layer without its short cut."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._layer(*args, **kwargs)[:, trees.reading.pack.rows]


def told_apart(spans: Sequence[Span], groups: Iterable[Any]) -> list[Span]:
    """The same spans but for the first token, which is each group's own, so that groups have nothing in common."""
    numbers: dict[Any, int] = {}
    return [
        Span((numbers.setdefault(group, len(numbers)), *span.tokens[1:]), span.scored)
        for span, group in zip(spans, groups, strict=True)
    ]


def processor_time() -> float:
    """Seconds of this process and of the finished ones that it started: lm-eval asks others about the machine."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """One number: bytes by which the process's resident memory grew at its peak (Linux)."""

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again, and not count
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    grown: list[int] = []
    yield grown
    grown.append(resident("VmHWM") - before)


def comparison_table(tasks: dict[str, Any]) -> str:
    lines = [
        "| task | documents, shots | candidates of a, c | (a) sliced | (b) switched | (b) requests | (c) ours "
        "| (a)/(c) | (b)/(c) | requests/(c) | building, once | largest difference | memory a, b, c (cache), MiB |",
        "|---" * 13 + "|",
    ]
    means = {task: {way: statistics.mean(found["seconds"][way]) for way in WAYS} for task, found in tasks.items()}
    for task, found in tasks.items():
        mean, memory = means[task], {key: value / 2**20 for key, value in found["memory"].items()}
        lines.append(
            f"| {task} | {found['documents']}, {found['shots']} "
            f"| {len(found['seconds']['a'])}, {len(found['seconds']['c'])} | "
            + " | ".join(f"{mean[way]:.2f}" for way in WAYS)
            + "".join(f" | {mean[way] / mean['c']:.1f}" for way in WAYS[:-1])
            + f" | {found['build']:.2f} | {found['difference']:.0e} "
            + f"| {memory['a']:.0f}, {memory['b']:.0f}, {memory['c']:.0f} ({memory['cache']:.0f}) |"
        )
    total = {way: statistics.mean(mean[way] for mean in means.values()) for way in WAYS}
    lines.append(
        "| mean seconds, and their ratios | | | "
        + " | ".join(f"{total[way]:.2f}" for way in WAYS)
        + "".join(f" | {total[way] / total['c']:.1f}" for way in WAYS[:-1])
        + " | | | |"
    )
    ratios = [statistics.mean(mean[way] / mean["c"] for mean in means.values()) for way in WAYS[:-1]]
    lines.append(
        "| mean of the tasks' ratios | | | | | | | " + " | ".join(f"{ratio:.1f}" for ratio in ratios) + " | | | |"
    )
    return "\n".join(lines)


def ablation_table(tasks: dict[str, dict[str, float]]) -> str:
    lines = ["| | " + " | ".join(tasks) + " |", "|---" * (1 + len(tasks)) + "|"]
    for name in next(iter(tasks.values())):
        cells = [f"{found[name]:.2f} ({found[name] / found['as it is']:.2f})" for found in tasks.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
