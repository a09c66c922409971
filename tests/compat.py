"""Packages written by one transformers and verified by another: what `make test-compat` runs.

    python tests/compat.py write DIR     # with the transformers that this project uses
    python tests/compat.py verify DIR    # with the oldest one that the packages claim to load in

One uneven and one uniform package of every family, and quantized ones of a Llama. Packages that say they need a newer
transformers must be refused by the older one, in one line.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
import transformers
from export_networks import cut, tiny_llama, tiny_tokenizer
from tiny_families import CONFIGS, random_architecture, tiny_network

from compressor.architecture import Architecture, LayerSizes
from compressor.elastic.slicing import extract
from compressor.errors import VerificationError
from compressor.families import describe
from export.package import check_files, write_package
from export.quantize import quantize_packages
from export.schemes import SCHEMES
from export.verify import check


def write(folder: Path) -> None:
    rng = random.Random(11)
    for name in CONFIGS:
        model = tiny_network(name)
        structure = describe(model.config)
        for kind, architecture in (("uniform", structure.base), ("uneven", random_architecture(structure.base, rng))):
            write_package(
                extract(model, structure, architecture),
                folder / f"{name}-{kind}",
                tokenizer=tiny_tokenizer(),
                entry={"name": name, "architecture": architecture.to_dict()},
                dtype=torch.float32,
            )
    sizes = (LayerSizes(4, 2, 96), LayerSizes(2, 1, 64), LayerSizes(0, 0, 96), LayerSizes(4, 2, 0))
    architecture = Architecture(64, sizes)
    write_package(
        cut(tiny_llama(head_dim=32), architecture),
        folder / "quantized",
        tokenizer=tiny_tokenizer(),
        entry={"name": "best", "architecture": architecture.to_dict()},
        dtype=torch.float32,
    )
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
            said = f"verified, difference {found['mean_abs_logprob_difference']:.2g}"
        except VerificationError as error:
            refused = "it needs transformers" in str(error)
            faults += not refused
            said = f"{'refused' if refused else 'FAILED'}: {error}"
        print(f"{package.name:>30}  {said}")
    return faults


if __name__ == "__main__":
    command, where = sys.argv[1], Path(sys.argv[2])
    sys.exit(write(where) if command == "write" else check_all(where))
