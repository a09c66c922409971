"""Slicing and quantizing a network that is never built: seconds and peak memory, beside copying its files.

    python -m benchmarks.large [--size small|1b|7b] [--folder DIR]

A Llama-shaped checkpoint of random bfloat16 weights is written to `--folder` (13.5 GB at 7b; the disk needs three times
that; all is deleted again), copied, sliced to about two thirds of its parameters, sliced to all of them, and the full
copy is rounded to INT4 without data. Every step runs in a process of its own, from files that are not in the page cache
where the system lets us say so, and ends with everything on the disk (fsync).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

from compressor import demo
from compressor.architecture import Architecture, LayerSizes
from compressor.elastic.slicing import build_standalone
from compressor.elastic.streaming import StreamedNetwork
from compressor.families import describe
from export.package import WeightWriter, human_bytes, weight_bytes, write_config, write_package
from export.quantize import quantize_package

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


def uneven(base: Architecture) -> Architecture:
    """About two thirds of the parameters: widths and heads that alternate, one layer in eight gone."""
    layers = []
    for index, full in enumerate(base.layers):
        half = LayerSizes(full.num_attention_heads // 2, full.num_key_value_heads // 2, full.intermediate_size // 2)
        wide = LayerSizes(full.num_attention_heads, full.num_key_value_heads, full.intermediate_size * 3 // 4)
        gone = LayerSizes(0, 0, 0)
        layers.append(gone if index % 8 == 6 else (full, half, wide)[index % 3])
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
    if what == "copy":
        shutil.copytree(base, folder / "copy")
    elif what == "int4":
        quantize_package(folder / "whole", folder / "int4", "int4", calibration=None, iterations=0)
    else:
        architecture = uneven(structure.base) if what == "two-thirds" else structure.base
        write_package(
            StreamedNetwork(base, config, structure, architecture),
            folder / what,
            tokenizer=base,
            entry={"name": what, "architecture": architecture.to_dict()},
            dtype=torch.bfloat16,
        )
    os.sync()
    seconds = time.monotonic() - began
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "peak": peak, "bytes": weight_bytes(folder / what)}))


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
        print(f"{human_bytes(weight_bytes(folder / 'base'))} of bfloat16 weights\n")
        print("| step | written | seconds | against copying | peak memory |\n|---|---|---|---|---|")
        for what in ("copy", "whole", "two-thirds", "int4"):
            forget_cached_files()
            done = json.loads(run_step(what, folder))
            copied = copied or done["seconds"]
            cells = [what, human_bytes(done["bytes"]), f"{done['seconds']:.1f}", f"{done['seconds'] / copied:.2f}"]
            print("| " + " | ".join([*cells, human_bytes(done["peak"])]) + " |", flush=True)
            if what in ("copy", "two-thirds"):
                shutil.rmtree(folder / what)


if __name__ == "__main__":
    main()
