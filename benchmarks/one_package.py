"""An elastic package: what loading one of its sizes takes, and whether it is the slice.

    python -m benchmarks.one_package
    python -m benchmarks.one_package --checkpoint path/to/model --shares 1 0.8 0.67 0.5

The checkpoint's own weights, unordered and untrained, written with sizes that are drawn at random near the shares asked
for. Each size is loaded in a process of its own: its seconds, and its peak of memory above that of a process that has
imported torch and transformers, both with a first pass of eight tokens.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import make_parser, print_header, print_row, run_process
from benchmarks.jobs import temporary_job
from compressor.job import Job
from compressor.sizing import draw_near
from export.layouts.elastic import ElasticSource, load_size, size_name, write
from export.package_record import ElasticSize
from export.probe import default_ids, logits_of
from supernet.common.formatting import count, size

LOAD = """
import json, sys, time
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from benchmarks.common import resident
AutoConfig.from_pretrained(sys.argv[1], local_files_only=True, trust_remote_code=True)
import transformers.models.auto.modeling_auto
before, began = resident("VmRSS"), time.perf_counter()
network = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], size=sys.argv[2], dtype="auto", local_files_only=True, trust_remote_code=True
)
seconds = time.perf_counter() - began
with torch.no_grad():
    network(input_ids=torch.ones((1, 8), dtype=torch.long))  # reads what was only mapped
weights = sum(p.numel() * p.element_size() for p in network.parameters())
print(json.dumps([weights, resident("VmHWM") - before, resident("VmRSS") - before, seconds]))
"""


def main() -> None:
    parser = make_parser(__doc__, "checkpoint", shares=[1.0, 0.8, 0.67, 0.5])
    arguments = parser.parse_args()
    with temporary_job(arguments.checkpoint) as job, tempfile.TemporaryDirectory() as scratch:
        source = source_of(job, arguments.shares)
        folder = Path(scratch) / "elastic"
        default = source.sizes[0].architecture
        entry: dict[str, object] = {"name": "elastic", "architecture": default.to_dict()}
        write(source, default, folder, tokenizer=job.tokenizer, entry=entry, dtype=job.stored_dtype)
        print_header(
            "size", "parameters", "bytes of weights", "peak", "held then", "seconds",
            "largest logit difference from the slice", right_from=1,
        )  # fmt: skip
        ids = default_ids(source.config)
        for one in source.sizes:
            printed = run_process(sys.executable, "-c", LOAD, folder, one.name)
            weights, peak, held, seconds = json.loads(printed.splitlines()[-1])
            expected = source.size(one.architecture).logits(ids, job.stored_dtype)
            logits = logits_of(load_size(folder, one.name, torch.float32).eval(), ids)
            apart = float((logits - expected).abs().max() / expected.abs().max())
            numbers = (size(weights), size(peak), size(held), f"{seconds:.1f}", f"{apart:.1e}")
            print_row(one.name, count(one.params), *numbers)


def source_of(job: Job, shares: list[float]) -> ElasticSource:
    """The checkpoint, with a random sub-network near each of the shares."""
    full = job.structure.parameters(job.structure.base)
    rng, sizes = np.random.default_rng(job.recipe.seed), {}
    for share in shares:
        drawn = job.structure.base if share == 1 else draw_near(job, rng, share * full, job.declared_space)
        params = job.structure.parameters(drawn)
        name = size_name(params / full)
        sizes[name] = ElasticSize(name=name, architecture=drawn, params=params)
    return ElasticSource(job.checkpoint.path, job.checkpoint.config, job.structure, list(sizes.values()))


if __name__ == "__main__":
    main()
