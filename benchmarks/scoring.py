"""Seconds to score one candidate: lm-eval's HFLM on sliced networks and over the super-network, and ours.

    python -m benchmarks.scoring [--checkpoint DIR --include-path DIR --tasks A,B] [--output FILE --minutes 5]
        [--ablation]

Candidates are the second generation of the default search without proposals (the children of a first generation that
was measured on the first task) at a target of 0.67 of the parameters, in the order in which a search scores them. Of
`--candidates`, `--baseline` evenly spaced ones are scored the other ways too:

- (a) each is sliced out and given to `simple_evaluate` in a separate `HFLM`;
- (b) each is switched on in the super-network, and one `HFLM` around that is given to `simple_evaluate`;
- (b, requests) `HFLM.loglikelihood` over the super-network answers the very requests of (c), one candidate in two;
- (c) ours, on all candidates; tasks are built once for all of them, timed apart.

`simple_evaluate` builds its tasks at every call, as always; importing lm-eval and indexing task files is not counted,
and per-document logs are off. HFLM reads batches of 16. All use `--threads` threads: HFLM in every operation, ours in
as many passes side by side; with one, processor time is measured, which other work on the machine leaves alone. The
largest difference is between answers of (b, requests) and (c); memory is the growth of the process's resident memory
at its peak. `--output` has what was measured, by settings; after `--minutes` no further task is begun.

`--ablation` scores a few neighbouring candidates with one of our optimizations switched off at a time.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import resource
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Literal, TypedDict, TypeVar
from unittest import mock

import lm_eval
import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import nn

from benchmarks.common import Measurements, make_parser, print_header, print_row, resident, timed
from benchmarks.jobs import ordered_supernet, temporary_job
from compressor import demo
from compressor.inputs import training_blocks
from compressor.job import Job
from compressor.sizing import parameter_limits, smallest_in_training
from evals.scoring import tree_attention
from evals.scoring.encoding import Encoder, Span
from evals.scoring.lm import NetworkLM
from evals.scoring.scorer import Answers, Scorer
from evals.scoring.tasks import TaskSet
from search.algorithms import algorithm
from search.objectives import Constraint, choose, computed
from search.run import first_generation
from search.sampling import uniform_members
from supernet.architecture import Architecture
from supernet.slicing import extract

SPLIT: Literal["all"] = "all"
BATCH = 16
NEIGHBOURS = 4
"""Candidates of an ablation, in the order of the search."""
WAYS = ("a", "b", "requests", "c")

Result = TypeVar("Result")


class TaskTimes(TypedDict):
    """What was measured on one task: seconds of each candidate and bytes of memory by way, seconds to build it."""

    shots: int
    documents: int
    build: float
    seconds: dict[str, list[float]]
    difference: float
    memory: dict[str, int]


def main() -> None:
    own = {"tasks": ",".join(demo.TASK_NAMES), "documents": 100, "shots": 5, "candidates": 32, "baseline": 4}
    own |= {"threads": torch.get_num_threads(), "ablation": False}
    arguments = make_parser(__doc__, "checkpoint", "include_path", "output", "minutes", **own).parse_args()
    logging.disable(logging.WARNING)
    torch.set_grad_enabled(False)
    torch.set_num_threads(arguments.threads)
    tasks = arguments.tasks.split(",")
    settings = (
        f"{Path(arguments.checkpoint).resolve().name}, {arguments.threads} threads, float32, {arguments.candidates} "
        f"candidates of a search on {tasks[0]}, at most {arguments.documents} documents and {arguments.shots} shots"
    )
    measurements = Measurements(arguments.output, arguments.minutes)
    results = measurements.by_settings.setdefault(settings, {"tasks": {}, "ablation": {}})
    with temporary_job(arguments.checkpoint, documents=400, targets={"max_params": ["0.67"]}) as job:
        timer = ScoringTimer(job, arguments)
        part, measure = ("ablation", timer.ablation) if arguments.ablation else ("tasks", timer.compare)
        for task in tasks:
            measurements.measure(results[part], task, partial(measure, task))
    for heading, measured in measurements.by_settings.items():
        print(f"\n{heading}\n")
        if measured["tasks"]:
            print_comparison(measured["tasks"])
        if measured["ablation"]:
            print_ablation(measured["ablation"])


class ScoringTimer:
    """Times the ways to score the candidates of one real generation of a search in an ordered super-network."""

    def __init__(self, job: Job, arguments: argparse.Namespace) -> None:
        self.job, self.arguments, self.limit = job, arguments, arguments.documents
        self.clock = processor_time if arguments.threads == 1 else time.perf_counter
        self.supernet = ordered_supernet(job, training_blocks(job, 1)[:32].ids.split(8))
        self.encoder = Encoder(job.tokenizer, job.checkpoint.config)
        self.manager = TaskManager(include_path=arguments.include_path, include_defaults=False)
        self.candidates = sorted(self.children(), key=lambda a: (a.hidden_size, a.layers))

    def children(self) -> list[Architecture]:
        """What the default search, without proposals, asks for after a first generation measured on a few documents."""
        count, space, exact = self.arguments.candidates, self.job.space, computed(self.job.structure)
        _, low = smallest_in_training(self.job)
        ((_, high),) = parameter_limits(self.job)
        limits = [Constraint(exact["parameters"], maximum=high, minimum=low)]
        tasks, _ = self.load(self.arguments.tasks.split(",")[0])
        scorer = Scorer(tasks, NetworkLM(self.supernet.model, self.encoder))
        first = first_generation(space, count, np.random.default_rng(0), uniform_members(space, 6, high), limits)
        objectives = choose(["quality", "parameters"], exact, {"quality": "max"})
        searcher = algorithm("linas")(space, objectives, population=count, constraints=limits, initial=first)
        results = []
        for architecture in searcher.ask(len(first)):
            self.supernet.activate(architecture)
            (score,) = scorer.score(SPLIT, min(40, self.limit), architecture=architecture).values()
            results.append((architecture, {"quality": score.value}))
        searcher.tell(results)
        return searcher.ask(count)

    def cut_out(self, architecture: Architecture) -> nn.Module:
        self.supernet.activate(self.job.structure.base)
        return extract(self.supernet.model, self.job.structure, architecture)

    @contextmanager
    def one_thread(self) -> Iterator[None]:
        """Of torch: passes run side by side instead."""
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(self.arguments.threads)

    def seconds(self, work: Callable[[Architecture], object], candidates: Sequence[Architecture]) -> list[float]:
        return [timed(partial(work, candidate), self.clock)[1] for candidate in candidates]

    def load(self, task: str) -> tuple[TaskSet, int]:
        """The task with as many examples as were asked for, where all prompts fit the context, else one; and how
        many these are."""
        include = [self.arguments.include_path]
        for shots in (self.arguments.shots, 1):
            tasks = TaskSet.load([task], encoder=self.encoder, include_path=include, num_fewshot=shots)
            requests = tasks.requests(SPLIT, self.limit).loglikelihood
            prompts = self.encoder.encode(request.args[0] + request.args[1] for request in requests)
            if max(map(len, prompts)) <= self.encoder.max_length:
                break
        self.encoder.forget()
        return tasks, shots

    def our_lm(self, model: nn.Module, **settings: int) -> NetworkLM:
        ours = {"workers": self.arguments.threads, "max_tokens": self.job.recipe.batch_tokens}
        return NetworkLM(model, self.encoder, **ours | settings)

    def evaluate(self, tasks: TaskSet, shots: int, lm: LM, architecture: Architecture) -> None:
        """`simple_evaluate` on the documents that ours scores, with the architecture switched on."""
        self.supernet.activate(architecture)
        ((task, subtasks),) = tasks.documents(SPLIT, self.limit).items()
        samples = {subtask.name: [document.index for document in documents] for subtask, documents in subtasks}
        lm_eval.simple_evaluate(
            lm, tasks=[task], task_manager=self.manager, num_fewshot=shots, samples=samples, log_samples=False
        )

    def compare(self, task: str) -> TaskTimes:
        """All ways on one task."""
        (tasks, shots), build = timed(partial(self.load, task), self.clock)
        requests = tasks.requests(SPLIT, self.limit).loglikelihood
        some = self.candidates[:: -(-len(self.candidates) // self.arguments.baseline)]
        hflm = partial(HFLM, tokenizer=self.job.tokenizer, batch_size=BATCH)
        lm = hflm(pretrained=self.supernet.model)
        scorer = Scorer(tasks, self.our_lm(self.supernet.model))
        expected: dict[Architecture, list[tuple[float, bool]]] = {}
        compared: dict[Architecture, Answers] = {}
        memory, seconds = {}, {way: list[float]() for way in WAYS}

        def sliced(architecture: Architecture) -> None:
            self.evaluate(tasks, shots, hflm(pretrained=self.cut_out(architecture)), self.job.structure.base)

        def ours(architecture: Architecture) -> None:
            self.supernet.activate(architecture)
            answers = scorer.ask(SPLIT, self.limit, architecture)
            scorer.scores(SPLIT, self.limit, answers)
            if architecture in expected:
                compared[architecture] = answers

        seconds["a"], memory["a"] = peak_growth(lambda: self.seconds(sliced, some))
        switched = partial(self.evaluate, tasks, shots, lm)
        seconds["b"], memory["b"] = peak_growth(lambda: self.seconds(switched, some))
        ask = partial(lm.loglikelihood, requests, disable_tqdm=True)
        for architecture in some[::2]:
            self.supernet.activate(architecture)
            expected[architecture], spent = timed(ask, self.clock)
            seconds["requests"].append(spent)
        with self.one_thread():
            seconds["c"], memory["c"] = peak_growth(lambda: self.seconds(ours, self.candidates))
        memory["cache"] = sum(output.nbytes for outputs in scorer.lm._layers._outputs for output in outputs)
        differences = [
            abs(compared[architecture][id(request)][0][0] - score)
            for architecture, scores in expected.items()
            for request, (score, _) in zip(requests, scores, strict=True)
        ]
        return {
            "shots": shots,
            "documents": sum(len(documents) for _, documents in tasks.documents(SPLIT, self.limit)[task]),
            "build": build,
            "seconds": seconds,
            "difference": max(differences, default=0.0),
            "memory": memory,
        }

    def ablation(self, task: str) -> dict[str, float]:
        """Mean seconds of neighbouring candidates: as it is, and with one optimization switched off at a time."""
        tasks, shots = self.load(task)
        requests = tasks.requests(SPLIT, self.limit)
        documents = [document for _, group in tasks.documents(SPLIT, self.limit)[task] for document in group]
        hashes = {id(instance): document.hash for document in documents for instance in document.instances}
        candidates = self.candidates[:NEIGHBOURS]

        def run(
            spans: Sequence[Span] = requests.spans,
            change: Callable[[tree_attention.Plan], None] = lambda plan: None,
            as_tree: bool = True,
            cut_out: bool = False,
            **settings: int,
        ) -> float:
            lm = self.our_lm(self.supernet.model, **settings)
            plan = lm.plan(spans)
            change(plan)
            seconds = []
            for architecture in candidates:
                if cut_out:
                    lm = self.our_lm(self.cut_out(architecture))
                lm._as_tree = as_tree
                began = self.clock()
                if not cut_out:
                    self.supernet.activate(architecture)
                lm.answer(plan, None if cut_out else architecture)
                seconds.append(self.clock() - began)
            return mean(seconds)

        def all_logits(plan: tree_attention.Plan) -> None:
            for source in plan.packs:
                source.at, source.rows = source.rows[source.at], torch.arange(source.tokens.shape[1])
                source.last = source.blocks

        with self.one_thread():
            run()  # warm
            result = {"as it is": run()}
            result["leading layers not shared"] = run(cache_bytes=0)
            result["and contiguous copies instead of views"] = run(cut_out=True)
            with mock.patch.object(tree_attention, "LastLayer", WholeLastLayer):
                result["last layer computed for all tokens"] = run()
                result["and all logits"] = run(change=all_logits)
            of_documents = [hashes[id(instance)] for instance in requests.loglikelihood]
            result["examples read for every document"] = run(set_apart(requests.spans, of_documents))
            result["nothing read in common"] = run(set_apart(requests.spans, range(len(requests.spans))))
            result["padded batches instead of trees"] = run(as_tree=False)
        if self.arguments.threads > 1:
            result["one pass at a time, all threads in it"] = run(workers=1)
        with self.one_thread():
            evaluate = partial(self.evaluate, tasks, shots, self.our_lm(self.supernet.model))
            result["our LM in simple_evaluate"] = mean(self.seconds(evaluate, candidates))
        return result


class WholeLastLayer(tree_attention.LastLayer):
    """The last layer without its short cut."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._layer(*args, **kwargs)[:, tree_attention.reading.pack.rows]


def set_apart(spans: Sequence[Span], groups: Iterable[Hashable]) -> list[Span]:
    """The same spans, but the first token differs from group to group, so that groups have nothing in common."""
    numbers: dict[Hashable, int] = {}
    return [
        Span((numbers.setdefault(group, len(numbers)), *span.tokens[1:]), span.scored)
        for span, group in zip(spans, groups, strict=True)
    ]


def processor_time() -> float:
    """Seconds of this process and of the finished ones that it started: lm-eval asks others about the machine."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def peak_growth(work: Callable[[], Result]) -> tuple[Result, int]:
    """What `work` returns, and the bytes by which the process's resident memory grew at its peak (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again, and not count
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    return work(), resident("VmHWM") - before


def print_comparison(tasks: Mapping[str, TaskTimes]) -> None:
    ways = ["(a) sliced", "(b) switched", "(b) requests", "(c) ours", "(a)/(c)", "(b)/(c)", "requests/(c)"]
    rest = ["building, once", "largest difference", "memory a, b, c (cache), MiB"]
    print_header("task", "documents, shots", "candidates of a, c", *ways, *rest)
    means = {task: {way: mean(times["seconds"][way]) for way in WAYS} for task, times in tasks.items()}

    def ratios(by_way: Mapping[str, float]) -> list[float]:
        return [by_way[way] / by_way["c"] for way in WAYS[:-1]]

    def cells(by_way: Mapping[str, float]) -> list[str]:
        return [*(f"{by_way[way]:.2f}" for way in WAYS), *(f"{ratio:.1f}" for ratio in ratios(by_way))]

    for task, times in tasks.items():
        sliced, switched, ours, cache = (f"{times['memory'][key] / 2**20:.0f}" for key in ("a", "b", "c", "cache"))
        print_row(
            task,
            f"{times['documents']}, {times['shots']}",
            f"{len(times['seconds']['a'])}, {len(times['seconds']['c'])}",
            *cells(means[task]),
            f"{times['build']:.2f}",
            f"{times['difference']:.0e}",
            f"{sliced}, {switched}, {ours} ({cache})",
        )
    overall = {way: mean(by_way[way] for by_way in means.values()) for way in WAYS}
    print_row("mean seconds, and their ratios", "", "", *cells(overall), "", "", "")
    of_tasks = [f"{mean(column):.1f}" for column in zip(*map(ratios, means.values()), strict=True)]
    print_row("mean of the tasks' ratios", *[""] * 6, *of_tasks, "", "", "")


def print_ablation(tasks: Mapping[str, Mapping[str, float]]) -> None:
    print()
    print_header("", *tasks)
    for name in next(iter(tasks.values())):
        print_row(name, *(f"{task[name]:.2f} ({task[name] / task['as it is']:.2f})" for task in tasks.values()))


if __name__ == "__main__":
    main()
