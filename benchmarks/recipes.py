"""Memory and time of the recipes that come with the program, as the plan computes them for a current GPU.

    python -m benchmarks.recipes [--write]

Networks are built from their published sizes on the meta device, so nothing is fetched. `--write` puts a line with the
numbers into each recipe, behind its first lines of comments.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig

from benchmarks.common import make_parser, print_header, print_row
from compressor.costs import stage_costs
from compressor.job import Job
from compressor.names import recipes
from compressor.rates import GPU_BANDWIDTH, GPU_RATE, estimate_rates
from compressor.recipe_file import read_recipe
from compressor.run import Run
from supernet.common.files import write_text
from supernet.common.formatting import count, duration, size

Sizes = dict[str, int | bool]

SMOLLM2: Sizes = {
    "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
SIZES: dict[str, Sizes] = {
    "smollm2-135m": SMOLLM2,
    "instatune": SMOLLM2,
    "llama-nas": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "intermediate_size": 11008, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "llama-1b": {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "llama-3b": {
        "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
        "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "llama-8b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""As the models' own config.json say."""
MARK = "# By the plan: "


class OnGpu(Job):
    """A job whose counts are those of a GPU, where there may be none."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")


def planned(name: str, folder: Path) -> tuple[int, str, dict[str, float]]:
    """Parameters, the stage that needs most memory, and {memory and disk in bytes, seconds} of one recipe."""
    LlamaConfig(**SIZES[name], max_position_embeddings=8192, dtype="bfloat16").save_pretrained(folder)
    recipe = read_recipe(recipes()[name], {"model": str(folder), "device": "auto"}).resolved()
    job = OnGpu(Run(folder / "run"), recipe, weights=False)
    costs = stage_costs(job, estimate_rates(job, GPU_RATE, GPU_BANDWIDTH))
    most = max(costs, key=lambda cost: cost.memory)
    total = {"memory": most.memory, "disk": sum(c.disk for c in costs), "seconds": sum(c.seconds for c in costs)}
    return job.structure.parameters(job.structure.base), most.name, total


def write_line(file: Path, line: str) -> None:
    """Put the line behind the recipe's first comments, instead of an earlier one."""
    lines = [row for row in file.read_text(encoding="utf-8").splitlines() if not row.startswith(MARK)]
    end = next(index for index, row in enumerate(lines) if not row.startswith("#"))
    write_text(file, "\n".join([*lines[:end], line, *lines[end:]]) + "\n")


def main() -> None:
    options = make_parser(__doc__ or "", write=False).parse_args()
    print_header("recipe", "parameters", "GPU memory at most", "in", "time", "disk", right_from=1)
    for name, file in recipes().items():
        with tempfile.TemporaryDirectory() as folder:
            parameters, stage, total = planned(name, Path(folder))
        memory, seconds, disk = size(total["memory"]), duration(total["seconds"]), size(total["disk"])
        print_row(f"`{name}`", count(parameters), memory, stage, seconds, disk)
        if options.write:
            rate = f"{GPU_RATE / 1e12:.0f} TFLOP/s"
            write_line(file, f"{MARK}{memory} of GPU memory ({stage}), {seconds} at {rate}, {disk} on disk.")


if __name__ == "__main__":
    main()
