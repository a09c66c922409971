"""What compressed-tensors' rounding at every call costs on a CPU: decode speed with it, without it, and of the base.

    python -m benchmarks.unpacked [--checkpoint DIR] [--new 64] [--rounds 7]

The whole checkpoint is quantized without data. Each package is loaded twice: as transformers loads it, whose modules
round their unpacked weights again at every call, and with that switched off (`supernet.loading.stop_rounding`). The
networks write in turn, so that other work on the machine slows all of them; medians, one thread, float32, batch 1.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import make_parser, print_header, print_row
from benchmarks.jobs import temporary_job
from export.layouts.table import write_layout
from export.quantization.quantize import quantize_package
from export.quantization.schemes import SchemeName
from supernet.loading import load_network, stop_rounding
from supernet.trust import check_code

SCHEMES: tuple[SchemeName, ...] = ("int8", "int8-dynamic", "int4", "int3")
PROMPT = 32


@torch.no_grad()
def seconds_a_token(network: Any, new: int) -> float:
    """Of decoding behind a prompt, with a cache."""
    ids = torch.ones((1, PROMPT), dtype=torch.long)

    def write(tokens: int) -> float:
        began = time.perf_counter()
        options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        network.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return time.perf_counter() - began

    first = write(1)
    return (write(new) - first) / (new - 1)


def loaded(package: Path, unpacked: bool) -> Any:
    """A package as transformers loads it, after its first pass."""
    network, _ = load_network(package, torch.float32, check_code(package))
    network.eval()
    with torch.no_grad():
        network(input_ids=torch.zeros((1, 2), dtype=torch.long))
    if unpacked:
        stop_rounding(network)
    return network


def main() -> None:
    arguments = make_parser(__doc__, "checkpoint", new=64, rounds=7).parse_args()
    torch.set_num_threads(1)
    with temporary_job(arguments.checkpoint, documents=50) as job:
        architecture, folder = job.structure.base, job.run.path
        entry = {"name": "whole", "architecture": architecture.to_dict()}
        options: dict[str, Any] = {"tokenizer": job.tokenizer, "dtype": job.stored_dtype}
        write_layout("uneven", job.load_base(torch.float32), architecture, folder / "whole", entry=entry, **options)
        networks: dict[str, Any] = {"base": loaded(folder / "whole", False)}
        for scheme in SCHEMES:
            quantize_package(folder / "whole", folder / scheme, scheme, calibration=None, iterations=0)
            for how in ("as loaded", "unpacked once"):
                networks[f"{scheme}, {how}"] = loaded(folder / scheme, how == "unpacked once")
        taken: dict[str, list[float]] = {name: [] for name in networks}
        for _ in range(arguments.rounds):
            for name, network in networks.items():
                taken[name].append(seconds_a_token(network, arguments.new))
    print(f"{Path(arguments.checkpoint).name}\n")
    print_header("network", "decode tokens/s", "of the base's speed", right_from=1)
    for name, seconds in taken.items():
        relative = median(base / own for base, own in zip(taken["base"], seconds, strict=True))
        print_row(name, f"{1 / median(seconds):.0f}", f"{relative:.2f}")


if __name__ == "__main__":
    main()
