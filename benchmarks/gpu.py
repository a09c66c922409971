"""What works on a GPU, how exactly, and how fast: thirteen parts, each a process of its own with a time limit.

    python -m benchmarks.gpu --checkpoint DIR [--include-path DIR --tasks A,B --data FILE] --output DIR
    python -m benchmarks.gpu --tiny --output DIR          # the same on a CPU, with tiny budgets: does it run?
    python -m benchmarks.gpu --checkpoint DIR --job --output DIR      # a compression with the same data, and its report

Every part has a time limit. What it measures is appended to `OUTPUT/gpu.jsonl`, a line for each fact, as it comes; what
it prints, tracebacks among it, is in `OUTPUT/PART.log`. A part that fails or runs out of time costs the others nothing.
The last thing printed is a Markdown table of all facts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import make_parser, print_header, print_row
from compressor import demo

if TYPE_CHECKING:
    import torch

    from compressor.job import Job
    from supernet.architecture import Architecture

COMPRESSOR = [sys.executable, "-c", "from compressor.cli import main; main()"]
"""The command, where it is not installed."""
SEQUENCE = 1024
"""Tokens of a training sequence."""


def main() -> None:
    parser = make_parser(
        __doc__,
        "checkpoint",
        "include_path",
        "data",
        tasks=",".join(demo.TASK_NAMES),
        output=Path,
        parts=(",".join(part for part in PARTS if part != "job"), "which parts, comma-separated"),
        part=(str, argparse.SUPPRESS),
        tiny=(False, "tiny budgets, for a CPU"),
        job=(False, "only a whole compression to 0.67 of the parameters"),
        time=("6m", "the time that the whole compression may take"),
    )
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        for name, value in PARTS[arguments.part][1](arguments):
            with (arguments.output / "gpu.jsonl").open("a") as facts:
                facts.write(json.dumps({"part": arguments.part, "fact": name, "value": value}) + "\n")
        return
    for name in ["job"] if arguments.job else arguments.parts.split(","):
        run_part(name, arguments)
    print_facts(arguments.output / "gpu.jsonl")


def run_part(name: str, arguments: argparse.Namespace) -> None:
    """One part in a process of its own, within its time limit."""
    seconds = PARTS[name][0]
    command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--part", name]
    ended: int | str
    began = time.monotonic()
    with (arguments.output / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            ended = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds} s"
        finally:  # with what it has started, which would keep the card
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    fact = {"part": name, "fact": "exit, seconds", "value": [ended, round(time.monotonic() - began, 1)]}
    with (arguments.output / "gpu.jsonl").open("a") as facts:
        facts.write(json.dumps(fact) + "\n")
    print(f"{name}: {fact['value']}", flush=True)


def print_facts(file: Path) -> None:
    """All facts as a Markdown table."""
    print_header("part", "what", "")
    for row in map(json.loads, file.read_text().splitlines()):
        print_row(row["part"], row["fact"], short(row["value"]))


def short(value: Any) -> str:
    """A value for the table: floats in four digits."""
    if isinstance(value, list):
        return ", ".join(map(short, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


Facts = Iterator[tuple[str, Any]]
"""(what, its value), as it is measured."""


# -- what the parts share --


def place() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], repeats: int = 10, warmup: int = 2) -> float:
    """Median seconds of some work, the device waited for."""
    times = []
    for number in range(warmup + repeats):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        if number >= warmup:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def peak_gib() -> float | None:
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


@contextmanager
def open_job(arguments: argparse.Namespace, **changes: Any) -> Iterator[Job]:
    """A job in a folder that goes away, with recipe keys by dotted name."""
    from compressor.job import Job
    from compressor.recipe_file import read_recipe
    from compressor.run import Run

    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data
        if data is None:
            data = str(Path(folder) / "text.jsonl")
            demo.training_text(Path(data), n_documents=2000, seed=1)
        given = {
            "model": arguments.checkpoint,
            "data": data,
            "tasks": arguments.tasks,
            "include_path": arguments.include_path,
            "finetuning.sequence_length": 64 if arguments.tiny else SEQUENCE,
            "searching.limit": 4 if arguments.tiny else 40,
        }
        recipe = read_recipe(None, given | changes).resolved()
        job = Job(Run(Path(folder) / "run"), recipe)
        job.fill_in()
        yield job


def cuts(job: Job) -> dict[str, Architecture]:
    """Sub-networks of several shapes: all of it, narrow, few heads, few layers."""
    from supernet.architecture import REMOVED, Architecture, LayerSizes

    base = job.structure.base
    full = base.layers[0]
    groups = max(1, full.num_key_value_heads // 2)
    heads = groups * full.num_attention_heads // full.num_key_value_heads
    narrow = LayerSizes(full.num_attention_heads, full.num_key_value_heads, full.intermediate_size // 2)
    few = LayerSizes(heads, groups, full.intermediate_size)
    one = LayerSizes(full.num_attention_heads // full.num_key_value_heads, 1, full.intermediate_size // 4)
    layers = len(base.layers)
    return {
        "full": base,
        "half the FFN": Architecture(base.hidden_size, (narrow,) * layers),
        "half the heads": Architecture(base.hidden_size, (few,) * layers),
        "one group, a quarter of the FFN": Architecture(base.hidden_size, (one,) * layers),
        "two thirds of the layers": Architecture(
            base.hidden_size, tuple(REMOVED if i % 3 == 1 else sizes for i, sizes in enumerate(base.layers))
        ),
    }


# -- the parts --


def environment(arguments: argparse.Namespace) -> Facts:
    """Versions, the card, and its ceilings: matrix products and copies."""
    import torch
    import transformers

    device = place()
    yield "torch, transformers", f"{torch.__version__}, {transformers.__version__}"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        yield "card", torch.cuda.get_device_name()
        yield "free of GiB", [round(free / 2**30, 1), round(total / 2**30, 1)]
        yield "cuDNN", torch.backends.cudnn.version()
    size = 512 if arguments.tiny else 8192
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(size, size, device=device).to(dtype)
        yield f"TFLOP/s of a product of {size}, {dtype}", 2 * size**3 / seconds_of(partial(torch.matmul, a, a)) / 1e12
    a = torch.randn(size * size, device=device)
    yield "GB/s of a copy", 8 * a.numel() / seconds_of(lambda: a.clone()) / 1e9


def attention(arguments: argparse.Namespace) -> Facts:
    """Masked attention as scoring asks for it: many shapes, each the first and the second time, by backend."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    device, generator = place(), torch.Generator().manual_seed(0)
    shapes = [
        tuple(int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((1, 40), (1, 80), (20, 400)))
        for _ in range(4 if arguments.tiny else 30)
    ]
    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        first: list[float] = []
        second: list[float] = []
        for rows, queries, keys in shapes:
            q = torch.randn(rows, 9, queries, 64, device=device, dtype=torch.bfloat16)
            k, v = (torch.randn(rows, 9, keys, 64, device=device, dtype=torch.bfloat16) for _ in range(2))
            mask = torch.zeros(rows, 1, queries, keys, device=device, dtype=torch.bfloat16)
            for times in (first, second):
                synchronize()
                began = time.perf_counter()
                scaled_dot_product_attention(q, k, v, attn_mask=mask)
                synchronize()
                times.append(1e3 * (time.perf_counter() - began))
        name = "with cuDNN" if cudnn else "without cuDNN"
        yield f"ms, first call of a shape, {name}: median, largest", [statistics.median(first), max(first)]
        yield f"ms, second call, {name}: median, largest", [statistics.median(second), max(second)]
        for groups in (1, 2, 4):
            q = torch.randn(2, 8, 96, 64, device=device)
            k, v = (torch.randn(2, groups, 160, 64, device=device) for _ in range(2))
            mask = torch.randn(2, 1, 96, 160, device=device)
            exact = torch.softmax(q @ k.repeat_interleave(8 // groups, 1).mT / 8 + mask, -1)
            exact = exact @ v.repeat_interleave(8 // groups, 1)
            q, k, v, mask = (x.bfloat16() for x in (q, k, v, mask))
            given = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            error = float((given.float() - exact).norm() / exact.norm())
            yield f"relative error, {groups} key-value heads, {name}", error


def whole_demo(arguments: argparse.Namespace) -> Facts:
    """`compressor demo` as a user types it."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        done = subprocess.run([*COMPRESSOR, "demo", "--output", f"{folder}/run"])
        yield "exit status", done.returncode
        yield "seconds", time.monotonic() - began
        report = Path(folder) / "run" / "report.json"
        if report.is_file():
            packages = json.loads(report.read_text())["packages"]
            yield "quality by package", {row["name"]: round(row["quality"], 4) for row in packages}
            yield "decode tokens/s by package", {row["name"]: round(row["speed"]["decode_tps"], 1) for row in packages}


def correctness(arguments: argparse.Namespace) -> Facts:
    """Log-likelihoods on the GPU in bfloat16, read as trees and padded, against float32 on the CPU."""
    import torch

    from evals.scoring.lm import NetworkLM

    with open_job(arguments, **{"searching.limit": 4 if arguments.tiny else 10}) as job:
        spans = job.tasks.requests("search", job.recipe.searching.limit).spans
        spans = spans[: 20 if arguments.tiny else 200]
        exact_net = job.supernet_of(job.checkpoint.load_model(torch.float32, torch.device("cpu")))
        networks = {dtype: job.supernet_of(job.load_base(dtype)) for dtype in (torch.float32, torch.bfloat16)}
        for name, architecture in cuts(job).items():
            exact_net.activate(architecture)
            plain = NetworkLM(exact_net.model, job.tasks.encoder)
            exact = [answer[0] for answer in plain.answer(plain.plan(spans))]
            scale = statistics.fmean(abs(value) for value in exact)
            for dtype, network in networks.items():
                network.activate(architecture)
                lm = NetworkLM(network.model, job.tasks.encoder)
                plan = lm.plan(spans)
                trees = [answer[0] for answer in lm.answer(plan, architecture)]
                read_as_trees = bool(lm._as_tree)
                lm._as_tree = False
                padded = [answer[0] for answer in lm.answer(plan)]
                worst = [max(abs(a - b) for a, b in zip(one, exact, strict=True)) for one in (trees, padded)]
                what = f"{name}, {str(dtype).removeprefix('torch.')}: error of trees, padded; mean size; as trees"
                yield what, [worst[0], worst[1], scale, read_as_trees]


def logits(arguments: argparse.Namespace) -> Facts:
    """Float32 logits on the GPU against the CPU, as a share of the largest."""
    import torch

    with open_job(arguments) as job:
        ids = torch.randint(0, job.structure.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
        cpu = job.checkpoint.load_model(torch.float32, torch.device("cpu"))
        gpu = job.load_base(torch.float32)
        with torch.no_grad():
            for allowed in (False, True):
                torch.backends.cuda.matmul.allow_tf32 = allowed
                one, other = cpu(ids).logits, gpu(ids.to(place())).logits.cpu()
                share = float((one - other).abs().max() / one.abs().max())
                yield f"largest difference / largest logit, TF32 {'on' if allowed else 'off'}", share


def scoring(arguments: argparse.Namespace) -> Facts:
    """Seconds to score a candidate, several ways, and with HFLM."""
    import torch
    from lm_eval.models.huggingface import HFLM

    from evals.scoring.lm import NetworkLM

    with open_job(arguments) as job:
        requests = job.tasks.requests("search", job.recipe.searching.limit)
        network = job.supernet_of(job.load_base(job.compute_dtype))
        architectures = list(cuts(job).values())[1:]
        yield "requests, tokens", [len(requests.loglikelihood), sum(len(span.tokens) for span in requests.spans)]

        def candidates(**options: Any) -> tuple[float, int]:
            lm = NetworkLM(network.model, job.tasks.encoder, **options)
            plan = lm.plan(requests.spans)
            times = []
            for number, architecture in enumerate([*architectures, *architectures]):
                network.activate(architecture)
                synchronize()
                began = time.perf_counter()
                lm.answer(plan, architecture)
                synchronize()
                if number >= len(architectures):
                    times.append(time.perf_counter() - began)
            return statistics.fmean(times), len(plan.packs)

        ways: dict[str, tuple[bool, dict[str, Any]]] = {
            "ours, as set": (False, {}),
            "ours, cuDNN on": (True, {}),
            "ours, 4096 tokens a pass": (False, {"max_tokens": 4096}),
            "ours, 65536 tokens a pass": (False, {"max_tokens": 65536}),
            "ours, no cache of layers": (False, {"cache_bytes": 0}),
        }
        for name, (cudnn, options) in ways.items():
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            yield f"{name}: seconds a candidate, passes", list(candidates(**options))
        torch.backends.cuda.enable_cudnn_sdp(False)
        network.activate(job.structure.base)
        hflm = HFLM(
            pretrained=network.model,
            tokenizer=job.tokenizer,
            backend="causal",
            batch_size=4 if arguments.tiny else "auto",
            max_batch_size=512,
        )
        times = []
        for architecture in architectures[:1] * 2:
            network.activate(architecture)
            began = time.perf_counter()
            hflm.loglikelihood(requests.loglikelihood, disable_tqdm=True)
            synchronize()
            times.append(time.perf_counter() - began)
        yield "HFLM, batch_size=auto: seconds of the first and second candidate", times


def speed(arguments: argparse.Namespace) -> Facts:
    """Decode and prefill, called as usual and as a CUDA graph: does time follow size?"""
    import torch

    from supernet.slicing import extract

    with open_job(arguments) as job:
        base = job.load_base(job.compute_dtype)
        prompt, new = (8, 4) if arguments.tiny else (512, 32)
        parameters = {name: job.structure.parameters(a) for name, a in cuts(job).items()}
        rows: dict[str, list[float]] = {}
        for name, architecture in cuts(job).items():
            network: Any = extract(base, job.structure, architecture)
            rows[name] = list(decode_times(network, prompt, new).values())
            yield f"{name}: ms of prefill, decode, decode as a graph (batch 1)", [1e3 * t for t in rows[name]]
            if not arguments.tiny:
                wide = list(decode_times(network, prompt, new, batch=32).values())
                rows[name] += wide
                yield f"{name}: the same at batch 32", [1e3 * t for t in wide]
            del network
            torch.cuda.empty_cache()
        names = list(rows)
        for position in range(len(rows[names[0]])):
            pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
            agree = [
                math.copysign(1, (parameters[a] - parameters[b]) * (rows[a][position] - rows[b][position]))
                for a, b in pairs
                if not math.isnan(rows[a][position])
            ]
            yield f"tau of column {position} and parameters", statistics.fmean(agree) if agree else None


def decode_times(network: Any, prompt: int, new: int, batch: int = 1) -> dict[str, float]:
    """Seconds to read a prompt, of a decoding step, and of a step replayed as a CUDA graph (not a number on a CPU)."""
    import torch
    from transformers import StaticCache

    device = place()
    ids = torch.randint(0, 100, (batch, prompt), device=device)
    token = ids[:, :1].clone()

    def fresh() -> Any:
        # Every call and every replay moves on by one (transformers 5.23 counts in the cache).
        return StaticCache(config=network.config, max_cache_len=prompt + 4 * new + 32)

    with torch.inference_mode():
        prefill = seconds_of(lambda: network(input_ids=ids, use_cache=False, logits_to_keep=1), repeats=5)
        cache, position = fresh(), torch.tensor([prompt], device=device)
        network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

        def step() -> Any:
            return network(
                input_ids=token,
                past_key_values=cache,
                position_ids=position[None].expand(batch, 1),
                use_cache=True,
                logits_to_keep=1,
            ).logits

        plain = seconds_of(step, repeats=new)
        graphed = math.nan
        if device.type == "cuda":
            try:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(3):
                        step()
                torch.cuda.current_stream().wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step()
                graphed = seconds_of(graph.replay, repeats=new)
            except RuntimeError as error:  # what a graph cannot capture is a fact too
                print(f"no graph: {error}")
    return {"prefill": prefill, "decode": plain, "graph": graphed}


def training(arguments: argparse.Namespace, rows: int = 16, ordering: str | None = None) -> Facts:
    """Sandwich steps: seconds, synchronisations, memory, and the share of the card's rate."""
    import torch

    from compressor.inputs import training_blocks
    from compressor.memory_needs import expected_memory
    from compressor.rates import matrix_rate
    from compressor.stages.finetuning import order_supernet, train_supernet

    steps, rows = (2, 2) if arguments.tiny else (20, rows)
    length = 64 if arguments.tiny else SEQUENCE
    tokens = steps * rows * length
    changes: dict[str, Any] = {"finetuning.tokens": tokens, "finetuning.batch_size": rows}
    changes |= {"finetuning.ordering": ordering, "targets.max_params": "0.67"}
    with open_job(arguments, **changes) as job:
        rate = matrix_rate(place(), torch.bfloat16)
        network = job.supernet_of(job.load_base(torch.float32))
        blocks = training_blocks(job, tokens)
        order_supernet(job, network, blocks)
        with tempfile.TemporaryDirectory() as folder:
            job.recipe.finetuning.tokens = tokens // steps  # the first steps build kernels
            train_supernet(job, network, blocks, Path(folder) / "first")
            job.recipe.finetuning.tokens = tokens
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            began = time.monotonic()
            history = train_supernet(job, network, blocks, Path(folder) / "state")
            synchronize()
        taken, stepping = time.monotonic() - began, history.seconds - history.measuring
        structure = job.structure
        macs = structure.macs(structure.base, length // 2)
        flop = (6 * 3 * 0.8 + 2) * macs * tokens
        yield "optimizer, seconds a step, tokens/s", [job.optimizer, stepping / steps, tokens / stepping]
        yield "seconds with the curve's points", taken
        yield "model FLOP utilisation, the optimizer's products not counted", flop / stepping / rate
        yield "TFLOP/s of a matrix product", rate / 1e12
        yield "peak GiB, and as inspect expects", [peak_gib(), expected_memory(job)["fine-tuning"] / 2**30]
        if torch.cuda.is_available():
            yield "synchronisations in three steps, by place", synchronisations(job, network, blocks)
            yield from profiled(job, network, blocks)


def training_a_billion(arguments: argparse.Namespace) -> Facts:
    """The same with a random network of 1.1 B parameters, by half as many sequences a step; its order is no matter."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    tokenizer, tiny = AutoTokenizer.from_pretrained(arguments.checkpoint), arguments.tiny
    config = LlamaConfig(
        hidden_size=64 if tiny else 2048,
        intermediate_size=128 if tiny else 5632,
        num_hidden_layers=2 if tiny else 22,
        num_attention_heads=4 if tiny else 32,
        num_key_value_heads=2 if tiny else 4,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
    )
    with tempfile.TemporaryDirectory() as folder:
        with place():
            network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del network
        yield from training(argparse.Namespace(**vars(arguments) | {"checkpoint": folder}), 8, "magnitude")


def synchronisations(job: Job, network: Any, blocks: Any) -> dict[str, int]:
    """Where a few more steps wait for the GPU, and how often."""
    import warnings

    import torch

    from compressor.stages.finetuning import train_supernet

    job.recipe.finetuning.tokens = 3 * (job.recipe.finetuning.batch_size or 1) * blocks.length
    with warnings.catch_warnings(record=True) as caught, tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        train_supernet(job, network, blocks, Path(folder) / "state")
        torch.cuda.set_sync_debug_mode("default")
    places: dict[str, int] = {}
    for warning in caught:
        if "synchroniz" in str(warning.message):
            name = f"{Path(warning.filename).name}:{warning.lineno}"
            places[name] = places.get(name, 0) + 1
    return dict(sorted(places.items(), key=lambda pair: -pair[1])[:20])


def profiled(job: Job, network: Any, blocks: Any) -> Facts:
    """What the GPU does in a step, by kernel, and the share of the time that it does anything."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    from compressor.stages.finetuning import train_supernet

    both = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with tempfile.TemporaryDirectory() as folder, profile(activities=both) as trace:
        began = time.perf_counter()
        train_supernet(job, network, blocks, Path(folder) / "state")
        torch.cuda.synchronize()
        taken = time.perf_counter() - began
    events = [event for event in trace.key_averages() if event.device_type == DeviceType.CUDA]
    busy = sum(event.self_device_time_total for event in events) / 1e6
    yield "seconds of three steps and their curve, share of them that the GPU is busy", [taken, busy / taken]
    longest = sorted(events, key=lambda event: -event.self_device_time_total)[:18]
    yield "ms of the GPU by kernel", {e.key[:60]: round(e.self_device_time_total / 1e3, 1) for e in longest}


def optimizers(arguments: argparse.Namespace) -> Facts:
    """A step of each optimizer on the network's own matrices: milliseconds, and the memory that it takes beside
    weights and gradients; and how far Muon's directions in bfloat16 are from those in float32."""
    import torch

    from compressor.rates import estimate_rates
    from supernet.training.loop import parameter_groups
    from supernet.training.muon import orthogonal
    from supernet.training.optimizers import OPTIMIZERS

    for name in ("muon", "adamw"):
        changes = {"finetuning.optimizer": name, "finetuning.tokens": 4096}
        with open_job(arguments, **changes) as job:
            network = job.load_base(torch.float32)
            settings = job.train_settings(job.recipe.finetuning, job.length, 0)
            parameters = dict(network.named_parameters())
            groups = parameter_groups(network, parameters, settings)
            optimizer = OPTIMIZERS[name](groups, settings.learning_rate)
            for parameter in parameters.values():
                parameter.grad = torch.randn_like(parameter)
            before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
            taken = 1000 * seconds_of(optimizer.step, 5)
            held = (torch.cuda.memory_allocated() - before) / 2**30 if torch.cuda.is_available() else None
            yield f"{name}: ms a step, as predicted, GiB", [taken, 1000 * estimate_rates(job).step, held]
    matrix = torch.randn(1536, 576, device=place())
    exact, rounded = orthogonal(matrix.cpu()).flatten(), orthogonal(matrix).cpu().flatten()
    yield "cosine of Muon's directions here and on the CPU", float(torch.cosine_similarity(exact, rounded, 0))


def same_seed(arguments: argparse.Namespace) -> Facts:
    """The same fine-tuning twice: how far the weights are apart."""
    import torch

    from compressor.inputs import training_blocks
    from compressor.stages.finetuning import train_supernet

    rows, length = (2, 64) if arguments.tiny else (8, 256)
    tokens = 4 * rows * length
    changes = {
        "finetuning.tokens": tokens,
        "finetuning.batch_size": rows,
        "finetuning.sequence_length": length,
        "targets.max_params": "0.67",
    }
    ends = []
    with open_job(arguments, **changes) as job:
        blocks = training_blocks(job, tokens)
        for _ in range(2):
            network = job.supernet_of(job.load_base(torch.float32))
            with tempfile.TemporaryDirectory() as folder:
                train_supernet(job, network, blocks, Path(folder) / "state")
            ends.append([p.detach().clone() for p in network.model.parameters()])
    apart = max(float((a - b).abs().max()) for a, b in zip(*ends, strict=True))
    yield "largest difference of a weight after 4 steps", apart


def heal_and_quantize(arguments: argparse.Namespace) -> Facts:
    """A whole compression without fine-tuning: healing, then quantization in a child on the same card."""
    tiny = arguments.tiny
    budgets = (
        f"effort: quick\nfinetuning: {{tokens: 0, batch_size: {2 if tiny else 16}, "
        f"sequence_length: {64 if tiny else 512}}}\nhealing: {{tokens: {2_000 if tiny else 200_000}}}\n"
        f"searching: {{evaluations: {8 if tiny else 72}, population: {4 if tiny else 18}, "
        f"limit: {8 if tiny else 100}, warm_start: [{'' if tiny else 'blockwise'}]}}\n"
        "quantizing: {schemes: [int8, int4], iterations: 0}\n"
    )
    yield from compression(arguments, "job-small", budgets)


def memory(arguments: argparse.Namespace) -> Facts:
    """A random network of 3 B parameters: the peak of a training step beside what `inspect` expects."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=64 if arguments.tiny else 3072,
        intermediate_size=128 if arguments.tiny else 8192,
        num_hidden_layers=2 if arguments.tiny else 26,
        num_attention_heads=4 if arguments.tiny else 24,
        num_key_value_heads=2 if arguments.tiny else 8,
        vocab_size=128 if arguments.tiny else 32000,
    )
    with place():
        network = AutoModelForCausalLM.from_config(config).to(torch.float32)
    count = sum(p.numel() for p in network.parameters())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=place().type == "cuda")
    ids = torch.randint(0, config.vocab_size, (2, 64 if arguments.tiny else 1024), device=place())
    for _ in range(2):
        with torch.autocast(place().type, torch.bfloat16):
            loss = network(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    yield "parameters, peak GiB, 16 bytes a parameter in GiB", [count, peak_gib(), 16 * count / 2**30]


def whole_job(arguments: argparse.Namespace) -> Facts:
    """A compression to 0.67 of the parameters with INT8 and INT4, in the time that is named."""
    length = 64 if arguments.tiny else 512
    yield "time asked for", arguments.time
    budgets = f"time: {arguments.time}\nfinetuning: {{sequence_length: {length}}}\n"
    yield from compression(arguments, "job", budgets + "quantizing: {schemes: [int8, int4]}\n")


def compression(arguments: argparse.Namespace, name: str, budgets: str) -> Iterator[tuple[str, Any]]:
    """Run `compressor compress` to 0.67 with lines of a recipe; its report, plan and times are copied to the output."""
    import shutil

    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data or f"{folder}/text.jsonl"
        if not arguments.data:
            demo.training_text(Path(data), n_documents=2000, seed=1)
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(budgets + "targets: {max_params: [0.67]}\n")
        options = ["--data", data, "--tasks", arguments.tasks, "--include-path", arguments.include_path]
        command = ["compress", arguments.checkpoint, "--recipe", str(recipe), *options, "--output", f"{folder}/run"]
        began = time.monotonic()
        done = subprocess.run([*COMPRESSOR, *command])
        yield "exit status", done.returncode
        yield "seconds", time.monotonic() - began
        for file in ("log.txt", "report.json", "plan.json", "times.json", "speed.json", "compressor-error.log"):
            source = Path(folder) / "run" / file if file != "compressor-error.log" else Path(file)
            if source.is_file():
                shutil.copy(source, arguments.output / f"{name}-{file}")
        report = Path(folder) / "run" / "report.json"
        if report.is_file():
            for row in json.loads(report.read_text())["packages"]:
                scores = {task: round(score["value"], 4) for task, score in row["tasks"].items()}
                yield f"{row['name']}: quality, scores", [round(row["quality"], 4), scores]


PARTS: dict[str, tuple[float, Callable[[argparse.Namespace], Facts]]] = {
    "environment": (30, environment),
    "attention": (40, attention),
    "correctness": (60, correctness),
    "scoring": (75, scoring),
    "training": (90, training),
    "training-1b": (110, training_a_billion),
    "optimizers": (40, optimizers),
    "speed": (60, speed),
    "logits": (30, logits),
    "same-seed": (45, same_seed),
    "memory": (40, memory),
    "demo": (180, whole_demo),
    "heal-and-quantize": (120, heal_and_quantize),
    "job": (400, whole_job),
}
"""Seconds and function of each part, the most important first; `job` runs where it is asked for."""


if __name__ == "__main__":
    main()
