"""A large network ordered, activated, sliced and quantized: seconds and peak memory, beside copying its files.

    python -m benchmarks.large [--size small|1b|7b] [--folder DIR]

A Llama-shaped checkpoint of random bfloat16 weights is written to `--folder` (13.5 GB at 7b; the disk needs three times
that; all is deleted again) and copied. Its units are ordered by magnitude, in memory, and written shard by shard; the
ordered network is loaded and sub-networks of it are activated; about two thirds of its parameters are sliced out of its
files, which are never loaded. The checkpoint is sliced to all of its parameters too, and that is rounded to INT4
without data. Every step runs in a process of its own, from files that are not in the page cache where the system lets
us say so, and ends with everything on the disk (fsync). Its peak memory is read from /proc (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.memory import resident
from compressor import demo
from export.package import write_config, write_package
from export.quantization.quantize import quantize_package
from export.shards import WeightWriter, weight_bytes
from supernet.activation import SuperNetwork
from supernet.architecture import REMOVED, Architecture, LayerSizes
from supernet.common.formatting import size
from supernet.families import describe
from supernet.importance import magnitude
from supernet.ordering import apply_ordering, order_by
from supernet.slicing import build_standalone
from supernet.streaming import StreamedNetwork

SHAPES = {
    "small": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 8},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 16},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def make(folder: Path, size: str) -> None:
    """The checkpoint: random weights, written shard by shard."""
    config = LlamaConfig(vocab_size=32000, **SHAPES[size], dtype=torch.bfloat16)
    model = build_standalone(config)
    folder.mkdir()
    write_config(model, folder, torch.bfloat16)
    # One draw, shifted from tensor to tensor: to draw seven billion numbers takes minutes.
    pool = torch.empty(2**28).normal_(0, 0.02, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with WeightWriter(folder) as weights:
        for number, (name, parameter) in enumerate(model.named_parameters()):
            value = pool[997 * number :][: parameter.numel()].view(parameter.shape)
            weights.add(name, value.clone() if parameter.dim() == 2 else value + 1)
    del pool
    for file in demo.MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True).eval()


def order(base: Path, ordered: Path) -> None:
    """The same network with its units by importance: the one criterion that needs no passes through the network."""
    model = load(base)
    supernet = SuperNetwork(model)
    permutations = order_by(magnitude(supernet, ()))
    del permutations[None, "hidden"]  # as in a run whose sub-networks are all as wide as the base
    apply_ordering(supernet, permutations)
    ordered.mkdir()
    write_config(model, ordered, torch.bfloat16)
    with WeightWriter(ordered) as weights:
        for name, parameter in model.named_parameters():
            weights.add(name, parameter)


def activate(ordered: Path) -> float:
    """Median milliseconds of switching from one sub-network to another; one token passes through each."""
    supernet = SuperNetwork(load(ordered))
    times = []
    with torch.no_grad():
        for number in range(40):
            began = time.perf_counter()
            supernet.activate(uneven(supernet.base, number % 3))
            times.append(1000 * (time.perf_counter() - began))
            if number < 3:
                supernet.model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    return median(times)


def uneven(base: Architecture, first: int = 0) -> Architecture:
    """About two thirds of the parameters: widths and heads that alternate, from `first` on, one layer in eight gone."""
    layers = []
    for index, full in enumerate(base.layers):
        half = LayerSizes(full.num_attention_heads // 2, full.num_key_value_heads // 2, full.intermediate_size // 2)
        wide = LayerSizes(full.num_attention_heads, full.num_key_value_heads, full.intermediate_size * 3 // 4)
        layers.append(REMOVED if index % 8 == 6 else (full, half, wide)[(index + first) % 3])
    return Architecture(base.hidden_size, tuple(layers))


def step(what: str, folder: Path) -> None:
    """One step, in this process. Prints its seconds and peak memory as JSON. The name of a size makes the base."""
    torch.set_num_threads(1)
    base = folder / "base"
    if what in SHAPES:
        make(base, what)
        return
    config = LlamaConfig.from_pretrained(base)
    structure = describe(config)
    began = time.monotonic()
    switch = None
    if what == "copy":
        shutil.copytree(base, folder / "copy")
    elif what == "order":
        order(base, folder / "order")
    elif what == "activate":
        switch = activate(folder / "order")
    elif what == "int4":
        quantize_package(folder / "whole", folder / "int4", "int4", calibration=None, iterations=0)
    else:
        architecture = uneven(structure.base) if what == "two-thirds" else structure.base
        write_package(
            StreamedNetwork(folder / "order" if what == "two-thirds" else base, config, structure, architecture),
            folder / what,
            tokenizer=base,
            entry={"name": what, "architecture": architecture.to_dict()},
            dtype=torch.bfloat16,
        )
    os.sync()
    seconds = time.monotonic() - began
    written = weight_bytes(folder / what)
    print(json.dumps({"seconds": seconds, "peak": resident("VmHWM"), "bytes": written, "switch": switch}))


def run_step(what: str, folder: Path) -> str:
    """Run a step in a process of its own, so that its peak memory is its own. Returns what it printed."""
    command = [sys.executable, "-m", "benchmarks.large", "--step", what, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def forget_cached_files() -> None:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        print("(the page cache could not be emptied: reading is faster than from a disk)", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="small")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step(arguments.step, arguments.folder)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="large-") as name:
        folder = Path(name)
        run_step(arguments.size, folder)
        copied = 0.0
        print(f"{size(weight_bytes(folder / 'base'))} of bfloat16 weights\n")
        print("| step | written | seconds | against copying | peak memory |\n|---|---|---|---|---|")
        for what in ("copy", "order", "activate", "two-thirds", "whole", "int4"):
            forget_cached_files()
            done = json.loads(run_step(what, folder))
            copied = copied or done["seconds"]
            written = "" if done["switch"] else size(done["bytes"])
            name = f"{what}: {done['switch']:.2f} ms a switch" if done["switch"] else what
            cells = [name, written, f"{done['seconds']:.1f}", f"{done['seconds'] / copied:.2f}"]
            print("| " + " | ".join([*cells, size(done["peak"])]) + " |", flush=True)
            if what == "copy":
                shutil.rmtree(folder / "copy")
            elif what == "two-thirds":
                shutil.rmtree(folder / "order")
                shutil.rmtree(folder / "two-thirds")


if __name__ == "__main__":
    main()
