"""Packages written by one transformers and verified by another: what `make test-compat` runs.

    python -m tests.compat write DIR     # with the transformers that this project uses
    python -m tests.compat verify DIR    # with the oldest one that the packages claim to load in

One uneven and one uniform package of every family, a padded one where that is possible, and of a Llama those in every
other layout and quantization scheme. What says that it needs a newer transformers must be refused by the older one, in
one line.
"""

from __future__ import annotations

import contextlib
import random
import re
import sys
from pathlib import Path

import torch
import transformers

from export.layouts.table import write_layout
from export.package import write_package
from export.package_record import check_files
from export.quantization.quantize import quantize_packages
from export.quantization.schemes import SCHEMES
from export.verify import check
from supernet.architecture import Architecture, LayerSizes
from supernet.common.errors import RequestError, VerificationError
from supernet.families import describe
from supernet.slicing import extract
from tests.support.export_networks import cut, tiny_llama, tiny_tokenizer
from tests.support.tiny_families import CONFIGS, random_architecture, tiny_network


def write(folder: Path) -> None:
    rng = random.Random(11)
    for name in CONFIGS:
        model = tiny_network(name)
        structure = describe(model.config)
        for kind, architecture in (("uniform", structure.base), ("uneven", random_architecture(structure.base, rng))):
            entry = {"name": name, "architecture": architecture.to_dict()}
            options = {"tokenizer": tiny_tokenizer(), "entry": entry, "dtype": torch.float32}
            network = extract(model, structure, architecture)
            write_package(network, folder / f"{name}-{kind}", **options)
        with contextlib.suppress(RequestError):  # the last one, uneven; some families cannot be padded
            write_layout("padded", network, architecture, folder / f"{name}-padded", **options)
    sizes = (LayerSizes(4, 2, 96), LayerSizes(2, 1, 64), LayerSizes(0, 0, 96), LayerSizes(4, 2, 0))
    architecture = Architecture(64, sizes)
    network = cut(tiny_llama(head_dim=32), architecture)
    options["entry"] = {"name": "best", "architecture": architecture.to_dict()}
    write_package(network, folder / "quantized", **options)
    for layout in ("gguf", "gguf-q8_0", "onnx", "openvino"):
        write_layout(layout, network, architecture, folder / layout, **options)
    quantize_packages(
        folder / "quantized", {s: folder / f"quantized-{s}" for s in SCHEMES}, calibration=None, iterations=0
    )


def check_all(folder: Path) -> int:
    print(f"transformers {transformers.__version__}")
    faults = 0
    for package in sorted(folder.iterdir()):
        try:
            check_files(package)
            found = check(package)  # in this process, which is a fresh one that saw nothing but the folders
            difference = found.get("mean_abs_logprob_difference", found.get("max_abs_logprob_difference"))
            said = f"verified, difference {difference:.2g}"
        except (VerificationError, RequestError) as error:
            refused = bool(re.search(r"needs (the exporters of )?transformers", str(error)))
            faults += not refused
            said = f"{'refused' if refused else 'FAILED'}: {error}"
        print(f"{package.name:>30}  {said}")
    return faults


if __name__ == "__main__":
    command, where = sys.argv[1], Path(sys.argv[2])
    if command == "write":
        write(where)
    else:
        sys.exit(check_all(where))
