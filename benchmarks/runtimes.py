"""Which quantized weights are fast on a CPU? Speeds in transformers, torchao, OpenVINO and llama.cpp, of one network.

    pip install nncf                       # which quantizes OpenVINO's graphs
    python -m benchmarks.runtimes [--checkpoint DIR] [--new 24] [--turns 3]

The whole checkpoint is written in every form, and every form is timed in turn: reading 128 tokens, and writing behind
them; float32 where nothing is quantized, batch 1, two threads. `KL` is of the next token's distribution from the
base's, on made-up ids; of llama.cpp's types it stands in docs/results.md. OpenVINO's weights are rounded to nearest: 8
bits for each output channel, 4 bits in groups of 32 but for the head, which has 8.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import make_parser, print_header, print_row
from benchmarks.jobs import temporary_job, write_llama_cpp
from evals.speed.measured import Speed
from export.layouts.gguf import runtime as llama_cpp
from export.layouts.graphs import Graph, measure_speed
from export.layouts.table import write_layout
from export.package_record import PackageRecord, read_record

PROMPT, THREADS = 128, 2
TYPES = ("bf16", "q8_0", "q4_k", "q4_0")
"""Of llama.cpp's files."""

Speeds = tuple[float, float]
"""Tokens a second that are read, and that are written."""


def compressed(graph: Path, mode: str, **options: Any) -> Path:
    """A copy of an OpenVINO package whose graph has weights in fewer bits."""
    import nncf  # in no requirements: nothing else needs it
    import openvino

    folder = graph.with_name(f"{graph.name}-{mode}")
    shutil.copytree(graph, folder)
    (file,) = folder.glob("*.xml")
    model = openvino.Core().read_model(graph / file.name)
    with redirect_stdout(StringIO()):  # tables of its own
        model = nncf.compress_weights(model, mode=getattr(nncf.CompressWeightsMode, mode), **options)
    for stale in folder.glob(f"{file.stem}.*"):
        stale.unlink()
    openvino.save_model(model, file, compress_to_fp16=False)
    return folder


def by_torchao(network: Any, config: str) -> Any:
    """A copy of a network, quantized by torchao."""
    from torchao import quantization

    own = copy.deepcopy(network)
    quantization.quantize_(own, getattr(quantization, config)())
    return own


@torch.no_grad()
def in_torch(network: Any, new: int) -> Speeds:
    """The second of two runs."""
    for _ in range(2):
        began = time.perf_counter()
        out = network(input_ids=torch.arange(PROMPT)[None] % 90, use_cache=True)
        first = time.perf_counter()
        for _ in range(new - 1):
            out = network(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
        ended = time.perf_counter()
    return PROMPT / (first - began), (new - 1) / (ended - first)


def timed_as(measure: Callable[..., Speed], package: PackageRecord, **work: int) -> Speeds:
    """As its layout's own measuring has it."""
    speed = measure(package, **work)
    return speed.prefill_tps, speed.decode_tps


@torch.no_grad()
def divergence(base: Any, logits: Tensor, ids: Tensor) -> float:
    """KL of the next token's distribution from the base's, nats."""
    expected, got = base(input_ids=ids).logits.log_softmax(-1), logits.log_softmax(-1)
    return float((expected.exp() * (expected - got)).sum(-1).mean())


def main() -> None:
    arguments = make_parser(__doc__, "checkpoint", new=24, turns=3).parse_args()
    torch.set_num_threads(THREADS)
    work = {"prompt": PROMPT, "new": arguments.new, "threads": THREADS, "repeats": 3}
    ids = torch.arange(64)[None] % 90 + 5
    with temporary_job(arguments.checkpoint, documents=50) as job:
        base, architecture, folder = job.load_base(torch.float32).eval(), job.structure.base, job.run.path
        runs: dict[str, Callable[[], Speeds]] = {"transformers, float32": partial(in_torch, base, arguments.new)}
        apart: dict[str, float] = {}
        # 1. Every form.
        for name, config in (("weights", "Int8WeightOnlyConfig"), ("dynamic", "Int8DynamicActivationInt8WeightConfig")):
            network = by_torchao(base, config)
            apart[f"torchao, int8 {name}"] = divergence(base, network(input_ids=ids).logits, ids)
            runs[f"torchao, int8 {name}"] = partial(in_torch, network, arguments.new)
        entry, whole = {"name": "openvino", "architecture": architecture.to_dict()}, folder / "openvino"
        options: dict[str, Any] = {"tokenizer": job.tokenizer, "dtype": job.stored_dtype}
        write_layout("openvino", base, architecture, whole, entry=entry, **options)
        graphs = {
            "float32": whole,
            "int8": compressed(whole, "INT8_ASYM"),
            "int4": compressed(whole, "INT4_SYM", group_size=32, ratio=1.0),
        }
        for name, graph in graphs.items():
            package = read_record(graph)
            apart[f"OpenVINO, {name}"] = divergence(base, torch.as_tensor(Graph(package)(ids)[0]), ids)
            runs[f"OpenVINO, {name}"] = partial(timed_as, measure_speed, package, **work)
        for name in TYPES:
            write_llama_cpp(job, base, architecture, folder / name, f"gguf-{name}")
            record = read_record(folder / name)
            runs[f"llama.cpp, {name}"] = partial(timed_as, llama_cpp.measure_speed, record, **work)
        # 2. All of them in turn.
        speeds: dict[str, list[Speeds]] = {name: [] for name in runs}
        for _ in range(arguments.turns):
            for name, run in runs.items():
                speeds[name].append(run())
    # 3. The table.
    print(f"{Path(arguments.checkpoint).name}\n")
    print_header("form", "read, tokens/s", "written, tokens/s", "of transformers', read", "written", "KL", right_from=1)
    first = speeds["transformers, float32"]
    for name, own in speeds.items():
        shares = [median(mine[n] / its[n] for mine, its in zip(own, first, strict=True)) for n in range(2)]
        cells = [f"{median(one[n] for one in own):.0f}" for n in range(2)] + [f"{share:.2f}" for share in shares]
        print_row(name, *cells, f"{apart[name]:.4f}" if name in apart else "")


if __name__ == "__main__":
    main()
