"""A large network ordered, activated, sliced and quantized: seconds and peak memory, beside copying its files.

    python -m benchmarks.large [--size small|1b|7b] [--folder DIR]

A Llama-shaped checkpoint of random bfloat16 weights is written to `--folder` (13.5 GB at 7b; the disk needs three times
that; all is deleted again) and copied. Its units are ordered by magnitude, in memory, and written shard by shard; the
ordered network is loaded and sub-networks of it are activated; about two thirds of its parameters are sliced out of its
files, which are never loaded. The checkpoint is sliced to all of its parameters too, and that is rounded to INT4
without data. Every step runs in a separate process, with the page cache emptied first where the system allows it, and
ends with everything on the disk. Peak memory is that of the process (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.common import make_parser, print_header, print_row, resident, run_process
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


def make(base: Path, shape: str) -> None:
    """Write the checkpoint: random weights, shard by shard."""
    model = build_standalone(LlamaConfig(vocab_size=32000, **SHAPES[shape], dtype=torch.bfloat16))
    base.mkdir()
    write_config(model, base, torch.bfloat16)
    # One draw, shifted from tensor to tensor: to draw seven billion numbers takes minutes.
    pool = torch.empty(2**28).normal_(0, 0.02, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with WeightWriter(base) as weights:
        for number, (name, parameter) in enumerate(model.named_parameters()):
            value = pool[997 * number :][: parameter.numel()].view(parameter.shape)
            weights.add(name, value.clone() if parameter.dim() == 2 else value + 1)
    for file in demo.MODEL.glob("tokenizer*"):
        shutil.copy(file, base)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True).eval()


def order(base: Path, ordered: Path) -> None:
    """Write the same network with its units by importance: the one criterion that needs no passes through it."""
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


@torch.no_grad()
def activate(ordered: Path) -> float:
    """Median milliseconds of switching from one sub-network to another; one token passes through each."""
    supernet = SuperNetwork(load(ordered))
    seconds = []
    for number in range(40):
        began = time.perf_counter()
        supernet.activate(uneven(supernet.base, number % 3))
        seconds.append(time.perf_counter() - began)
        if number < 3:
            supernet.model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    return 1000 * median(seconds)


def uneven(base: Architecture, first: int = 0) -> Architecture:
    """About two thirds of the parameters: widths and heads that alternate, from `first` on, one layer in eight gone."""
    layers = []
    for index, full in enumerate(base.layers):
        half = LayerSizes(full.num_attention_heads // 2, full.num_key_value_heads // 2, full.intermediate_size // 2)
        wide = LayerSizes(full.num_attention_heads, full.num_key_value_heads, full.intermediate_size * 3 // 4)
        layers.append(REMOVED if index % 8 == 6 else (full, half, wide)[(index + first) % 3])
    return Architecture(base.hidden_size, tuple(layers))


def run_step(step: str, folder: Path) -> None:
    """One step, in this process. Prints its seconds and peak memory as JSON. The name of a shape makes the base."""
    torch.set_num_threads(1)
    base = folder / "base"
    if step in SHAPES:
        make(base, step)
        return
    config = LlamaConfig.from_pretrained(base)
    structure = describe(config)
    began = time.monotonic()
    switch = None
    if step == "copy":
        shutil.copytree(base, folder / "copy")
    elif step == "order":
        order(base, folder / "order")
    elif step == "activate":
        switch = activate(folder / "order")
    elif step == "int4":
        quantize_package(folder / "whole", folder / "int4", "int4", calibration=None, iterations=0)
    else:
        cut = step == "two-thirds"
        architecture = uneven(structure.base) if cut else structure.base
        network = StreamedNetwork(folder / "order" if cut else base, config, structure, architecture)
        entry = {"name": step, "architecture": architecture.to_dict()}
        write_package(network, folder / step, tokenizer=base, entry=entry, dtype=torch.bfloat16)
    os.sync()
    facts = {"seconds": time.monotonic() - began, "bytes": weight_bytes(folder / step), "switch": switch}
    print(json.dumps(facts | {"peak": resident("VmHWM")}))


def empty_page_cache() -> None:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        print("(the page cache could not be emptied: reading is faster than from a disk)", file=sys.stderr)


def main() -> None:
    parser = make_parser(__doc__, folder=Path(tempfile.gettempdir()), step=(str, argparse.SUPPRESS))
    parser.add_argument("--size", choices=SHAPES, default="small")
    arguments = parser.parse_args()
    if arguments.step:
        run_step(arguments.step, arguments.folder)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="large-") as name:
        folder = Path(name)
        run_alone = partial(run_process, sys.executable, "-m", "benchmarks.large", "--folder", folder, "--step")
        run_alone(arguments.size)
        print(f"{size(weight_bytes(folder / 'base'))} of bfloat16 weights\n")
        print_header("step", "written", "seconds", "against copying", "peak memory")
        copying = 0.0
        for step in ("copy", "order", "activate", "two-thirds", "whole", "int4"):
            empty_page_cache()
            facts = json.loads(run_alone(step))
            seconds, switch = facts["seconds"], facts["switch"]
            copying = copying or seconds
            name, written = (f"{step}: {switch:.2f} ms a switch", "") if switch else (step, size(facts["bytes"]))
            print_row(name, written, f"{seconds:.1f}", f"{seconds / copying:.2f}", size(facts["peak"]))
            for done in {"copy": ["copy"], "two-thirds": ["order", "two-thirds"]}.get(step, []):
                shutil.rmtree(folder / done)


if __name__ == "__main__":
    main()
