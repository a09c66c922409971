"""What quantization costs and saves: held-out bits per byte, bytes on disk, speed where it is not undone at load.

    python -m benchmarks.quantization [--checkpoint DIR --data FILE.jsonl] [--iterations 200] [--samples 64] [--mixed]

The whole checkpoint (nothing is cut) is packaged, quantized without data, by GPTQ, and with tuned rounding, and
written for llama.cpp and ONNX Runtime. Text that no variant saw is scored by transformers with each one's weights, as
unpacked, and the ONNX graph by its runtime; speed is that of llama.cpp and ONNX Runtime, one thread, batch 1, prompt
128, 128 new tokens. `--mixed` adds a row for every size of a llama.cpp file: the mixed types that fit in its bytes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.common import make_parser, print_header, print_row, timed
from benchmarks.jobs import temporary_job
from compressor.job import Job
from compressor.stages.finetuning import finetune
from compressor.stages.llama_types import bits_that_fit
from compressor.stages.measuring import load_package
from export.layouts import graphs
from export.layouts.gguf import runtime as llama_cpp
from export.layouts.gguf.file import take_stored_weights
from export.layouts.gguf.types import QUANTIZED
from export.layouts.table import GGUF_MIXED, write_layout
from export.package_record import PackageRecord, read_record
from export.quantization.quantize import quantize_packages
from export.quantization.tuning import pack_texts

HELD_OUT = 200
"""Documents at the end of the data that no variant sees."""

Logits = Callable[[Tensor], Tensor]
"""From token ids, [batch, length], to logits, [batch, length, vocabulary]."""


def logits_of(model: PreTrainedModel) -> Logits:
    return lambda ids: model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def bits_per_byte(logits: Logits, length: int, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> float:
    """Of texts, each read for itself in windows of `length` tokens, first tokens left out. Markers are predicted like
    any token and stand for no bytes."""
    nats, shown = 0.0, 0
    for text in texts:
        stream = torch.tensor([tokenizer(text).input_ids])
        for ids in stream.split(length, dim=1):
            if ids.shape[1] > 1:
                predicted, next_ids = logits(ids)[0, :-1].float(), ids[0, 1:]
                nats += torch.nn.functional.cross_entropy(predicted, next_ids, reduction="sum").item()
                shown += len(tokenizer.decode(next_ids.tolist(), skip_special_tokens=True).encode())
    return nats / math.log(2) / shown


def speed_cell(package: PackageRecord) -> str:
    """Prefill and decode tokens a second in the package's runtime; empty where transformers reads it."""
    runtime = {"gguf": llama_cpp, "onnx": graphs}.get(package.entry.layout)
    if runtime is None:
        return ""
    speed = runtime.measure_speed(package, prompt=128, new=128, threads=1)
    return f"{speed.prefill_tps:,.0f} / {speed.decode_tps:,.0f} ({speed.runtime})"


def main() -> None:
    own = {"iterations": (200, "0: nothing is tuned"), "samples": 64, "documents": (HELD_OUT, "that are scored")}
    schemes = ("int8,int8-dynamic,int4", "empty: only what is for other runtimes")
    mixed = (False, "mixed types of llama.cpp's files too")
    arguments = make_parser(__doc__, "checkpoint", "data", **own, schemes=schemes, mixed=mixed).parse_args()
    torch.set_num_threads(1)
    with temporary_job(arguments.checkpoint, arguments.data, documents=3000, finetuning={"tokens": 0}) as job:
        measure(arguments, job)


def measure(arguments: argparse.Namespace, job: Job) -> None:
    """Write every package, and a row of the table for each."""
    lines = Path(job.recipe.data or "").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    folder, architecture, network = job.run.path, job.structure.base, job.load_base(torch.float32)
    length = min(256, network.config.max_position_embeddings)
    held_out = texts[-HELD_OUT:][: arguments.documents]
    score = partial(bits_per_byte, length=length, tokenizer=job.tokenizer, texts=held_out)

    def write(layout: str, name: str, **more: Any) -> Path:
        entry = {"name": name, "architecture": architecture.to_dict()}
        options = {"entry": entry, "tokenizer": job.tokenizer, "dtype": job.checkpoint.config.dtype, **more}
        if layout.startswith("gguf"):
            options["calibration"] = calibration
        write_layout(layout, network, architecture, folder / name, **options)
        return folder / name

    calibration = torch.zeros(0)
    whole = write("uneven", "whole")
    calibration = pack_texts(whole, texts[:-HELD_OUT], 256)[: arguments.samples]
    reference = score(logits_of(network))
    float32 = 4 * sum(parameter.numel() for parameter in network.parameters())
    print(
        f"{Path(arguments.checkpoint).name}, float32 {float32:,} bytes, {len(calibration)} calibration sequences, "
        f"tuned {arguments.iterations} steps a block\n"
    )
    columns = ["bytes", "of float32", "bits per weight", "bits per byte", "change", "prefill / decode tokens/s", "s"]
    print_header("package", *columns)

    def row(name: str, package: Path, seconds: float, logits: Logits) -> None:
        record, bits = read_record(package), score(logits)
        entry, report = record.entry, record.entry.quantization_report
        print_row(
            name,
            f"{entry.bytes:,}",
            f"{entry.bytes / float32:.3f}",
            f"{report.bits_per_weight:.2f}" if report else "",
            f"{bits:.4f}",
            f"{100 * (bits / reference - 1):+.2f} %",
            speed_cell(record),
            f"{seconds:.0f}",
        )

    def loaded(package: Path) -> Logits:
        return logits_of(load_package(package, torch.float32, torch.device("cpu")))

    row("as it is", whole, 0, loaded(whole))
    hows = {"data-free": (None, 0), "GPTQ": (calibration, 0), "tuned": (calibration, arguments.iterations)}
    for how, (seen, iterations) in hows.items():
        for scheme in filter(None, arguments.schemes.split(",") if how != "tuned" or iterations else []):
            packages = {scheme: folder / f"{scheme}-{how}"}
            quantize = partial(quantize_packages, whole, packages, calibration=seen, iterations=iterations)
            _, seconds = timed(quantize)
            row(f"{scheme}, {how}", packages[scheme], seconds, loaded(packages[scheme]))
    sizes = set()
    for layout in ("gguf-f32", "gguf", *(f"gguf-{kind}" for kind in QUANTIZED)):
        package, seconds = timed(partial(write, layout, layout))
        stored = take_stored_weights(copy.deepcopy(network), package)
        row(layout, package, seconds, logits_of(stored))
        if layout.removeprefix("gguf-") in QUANTIZED:
            sizes.add(read_record(package).entry.bytes)
    if arguments.mixed:
        finetune(job)  # no tokens: what bits cost is measured in a super-network
        job.run.search.mkdir()
        for limit in sorted(sizes, reverse=True):
            job.recipe.targets.max_bytes = str(limit)
            name = f"gguf-mixed in {limit:,}"
            bits = bits_that_fit(job, architecture, name)
            package, seconds = timed(partial(write, GGUF_MIXED, name, bits=bits))
            row(name, package, seconds, logits_of(take_stored_weights(copy.deepcopy(network), package)))
    package, seconds = timed(partial(write, "onnx", "onnx"))
    graph = graphs.Graph(read_record(package))
    row("onnx", package, seconds, lambda ids: graph(ids)[0])


if __name__ == "__main__":
    main()
