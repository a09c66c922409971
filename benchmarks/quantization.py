"""What quantization costs and saves: held-out bits per byte, bytes on disk, speed where it is not undone at load.

    python -m benchmarks.quantization [--checkpoint DIR --data FILE.jsonl] [--iterations 200] [--samples 64]
        [--schemes int8,int8-dynamic,int4]

The whole checkpoint (nothing is cut) is packaged, quantized without data, with data, and with tuned rounding, and
written for llama.cpp and ONNX Runtime. Text that no variant saw is scored by transformers with each one's weights, as
unpacked, and the ONNX graph by its runtime; speed is llama.cpp's and ONNX Runtime's own, one thread, batch 1, prompt
128, 128 new tokens. Without arguments: the bundled checkpoint on generated text.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor import demo
from compressor.stages.measuring import load_package
from export.layouts import graphs
from export.layouts.gguf import runtime as llama_cpp
from export.layouts.gguf.layout import take_stored_weights
from export.layouts.table import write_layout
from export.package_record import read_record
from export.quantization.quantize import pack_texts, quantize_packages
from supernet.checkpoint import open_checkpoint

HELD_OUT = 200
"""Documents at the end of the data that no variant sees."""


def logits_of(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def bits_per_byte(logits: Callable[[Tensor], Tensor], length: int, tokenizer: Any, texts: list[str]) -> float:
    """Of texts joined end to end and read in windows of `length` tokens, first tokens left out. Markers between texts
    are predicted like any token and stand for no bytes. `logits` takes ids, [batch, length], and gives a distribution
    over the vocabulary for each."""
    stream = [token for text in texts for token in tokenizer(text).input_ids]
    rows = torch.tensor(stream[: len(stream) // length * length]).view(-1, length)
    nats, shown = 0.0, 0
    for ids in rows.split(16):
        guessed, next_ids = logits(ids)[:, :-1].float(), ids[:, 1:]
        nats += torch.nn.functional.cross_entropy(guessed.flatten(0, 1), next_ids.flatten(), reduction="sum").item()
        shown += sum(len(tokenizer.decode(row, skip_special_tokens=True).encode()) for row in next_ids.tolist())
    return nats / math.log(2) / shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=str(demo.MODEL))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--iterations", type=int, default=200, help="0: nothing is tuned")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--schemes", default="int8,int8-dynamic,int4", help="empty: only what is for other runtimes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.data is None:
            arguments.data = folder / "text.jsonl"
            demo.training_text(arguments.data, n_documents=3000, seed=1)
        texts = [json.loads(line)["text"] for line in arguments.data.read_text(encoding="utf-8").splitlines()]
        run(arguments, folder, texts[:-HELD_OUT], texts[-HELD_OUT:])


def run(arguments: argparse.Namespace, folder: Path, seen: list[str], held_out: list[str]) -> None:
    checkpoint = open_checkpoint(arguments.checkpoint)
    tokenizer = checkpoint.load_tokenizer()
    architecture = checkpoint.structure.base
    network = checkpoint.load_model(torch.float32, torch.device("cpu"))
    options: dict[str, Any] = {"tokenizer": tokenizer, "dtype": checkpoint.config.dtype}
    whole = folder / "whole"

    def write(layout: str, destination: Path) -> Path:
        entry = {"name": destination.name, "architecture": architecture.to_dict()}
        write_layout(layout, network, architecture, destination, entry=entry, **options)
        return destination

    write("uneven", whole)
    calibration = pack_texts(whole, seen, 256)[: arguments.samples]
    length = min(256, network.config.max_position_embeddings)
    reference = bits_per_byte(logits_of(network), length, tokenizer, held_out)
    float32 = 4 * sum(parameter.numel() for parameter in network.parameters())
    print(
        f"{Path(arguments.checkpoint).name}, float32 {float32:,} bytes, {len(calibration)} calibration sequences, "
        f"tuned {arguments.iterations} steps a block\n"
    )
    print("| package | bytes | of float32 | bits per weight | bits per byte | change | prefill / decode tokens/s | s |")
    print("|---|---|---|---|---|---|---|---|")

    def row(what: str, package: Path, seconds: float, logits: Callable[[Tensor], Tensor]) -> None:
        record = read_record(package)
        found = bits_per_byte(logits, length, tokenizer, held_out)
        entry, report, speed = record.entry, record.entry.quantization_report, ""
        work = {"prompt": 128, "new": 128, "threads": 1}
        if entry.layout in ("gguf", "onnx"):
            runtime = llama_cpp if entry.layout == "gguf" else graphs
            timed = runtime.measure_speed(record, **work)
            speed = f"{timed.prefill_tps:,.0f} / {timed.decode_tps:,.0f} ({timed.runtime})"
        cells = [
            what,
            f"{entry.bytes:,}",
            f"{entry.bytes / float32:.3f}",
            f"{report.bits_per_weight:.2f}" if report else "",
            f"{found:.4f}",
            f"{100 * (found / reference - 1):+.2f} %",
            speed,
            f"{seconds:.0f}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)

    def load(package: Path) -> Any:
        return load_package(package, torch.float32, torch.device("cpu"))

    row("as it is", whole, 0, logits_of(load(whole)))
    for how, data, iterations in (
        ("data-free", None, 0),
        ("untuned", calibration, 0),
        ("tuned", calibration, arguments.iterations),
    ):
        if how == "tuned" and not iterations:
            continue
        for scheme in filter(None, arguments.schemes.split(",")):
            began = time.monotonic()
            made = quantize_packages(
                whole, {scheme: folder / f"{scheme}-{how}"}, calibration=data, iterations=iterations
            )
            seconds = time.monotonic() - began
            row(f"{scheme}, {how}", made[0].folder, seconds, logits_of(load(made[0].folder)))
    for layout in ("gguf-f32", "gguf", "gguf-q8_0", "gguf-q4_0"):
        began = time.monotonic()
        package = write(layout, folder / layout)
        seconds = time.monotonic() - began
        stored = take_stored_weights(copy.deepcopy(network), package)
        row(layout, package, seconds, logits_of(stored))
    began = time.monotonic()
    package = write("onnx", folder / "onnx")
    seconds = time.monotonic() - began
    graph = graphs.Graph(read_record(package))
    row("onnx", package, seconds, lambda ids: graph(ids)[0])


if __name__ == "__main__":
    main()
