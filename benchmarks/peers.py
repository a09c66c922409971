"""Two other tools do the same cut as ours, on the same checkpoint, in a separate virtual environment.

    python -m benchmarks.peers [--checkpoint DIR] [--data FILE] [--python PYTHON_OF_THE_PEERS]

mergekit's passthrough merge keeps the layers that our ShortGPT baseline keeps: the logits must be equal. optipfair
narrows the FFN by its L2 and MAW criteria; ours at random, by magnitude, Wanda and Taylor, at the same width: held-out
loss of each. Without `--python`, both are installed from the package index into a temporary environment.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.common import make_parser, print_header, print_row, run_process
from benchmarks.jobs import temporary_job
from compressor.job import Job
from evals.baselines import PruningContext, baselines, ordered_cut, with_ffn, without
from supernet.importance import IMPORTANCES
from supernet.slicing import extract
from supernet.training.data import pack
from supernet.training.losses import held_out_loss

PEERS = ("mergekit==0.1.5", "optipfair==0.4.2")

PRUNE_WITH_OPTIPFAIR = """
import sys
from optipfair import prune_model
from transformers import AutoModelForCausalLM

model, output, method = sys.argv[1:]
loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
prune_model(loaded, "MLP_GLU", method, pruning_percentage=30, show_progress=False).save_pretrained(output)
"""
"""Runs in the peers' environment, which has none of our packages."""


def environment(folder: Path) -> Path:
    """The Python of a new environment that has the peers."""
    run_process(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    run_process(python, "-m", "pip", "install", "--quiet", "torch==2.13.0", *PEERS)
    return python


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def main() -> None:
    python = (Path, "of an environment that has the peers")
    arguments = make_parser(__doc__, "checkpoint", "data", python=python).parse_args()
    with temporary_job(arguments.checkpoint, arguments.data, documents=2000) as job:
        compare(job, arguments.python or environment(job.run.path / "peers"))


def compare(job: Job, python: Path) -> None:
    folder, structure, full, model = job.run.path, job.structure, job.structure.base, job.load_base(torch.float32)
    training, held_out = pack(job.recipe.data or "", job.tokenizer, 128, 60_000).split(0.15)
    calibration, probe = training[:64].ids.split(8), held_out[:8].ids

    # 1. One layer less: mergekit's network and ours.
    target = structure.parameters(full) - structure.parameters(full) // len(full.layers)
    context = PruningContext(model, structure, tuple(calibration), target)
    _, shortgpt = baselines()["shortgpt"].cut(context)
    kept = list(shortgpt.kept)
    ours = extract(model, structure, without(full, set(range(len(full.layers))) - set(kept)))
    recipe = {
        "slices": [{"sources": [{"model": job.recipe.model, "layer_range": [i, i + 1]}]} for i in kept],
        "merge_method": "passthrough",
        "dtype": "float32",
    }
    (folder / "merge.yaml").write_text(yaml.safe_dump(recipe))
    run_process(python.parent / "mergekit-yaml", folder / "merge.yaml", folder / "merged")
    with torch.no_grad():
        difference = (load(folder / "merged")(probe).logits - ours(probe).logits).abs().max().item()
    print(f"mergekit passthrough, layers {kept} kept as ShortGPT ranks them: largest logit difference {difference:g}\n")

    # 2. A narrower FFN: optipfair's criteria and ours.
    def loss(network: nn.Module) -> float:
        return held_out_loss(network, held_out, 8, torch.device("cpu"))

    rows, width = [("base", "", loss(model))], 0
    for method in ("L2", "MAW"):
        run_process(python, "-c", PRUNE_WITH_OPTIPFAIR, job.recipe.model, folder / method, method)
        pruned = load(folder / method)
        width = pruned.config.intermediate_size
        rows.append(("optipfair", method, loss(pruned)))
    for criterion in ("random", "magnitude", "wanda", "taylor"):
        scores = IMPORTANCES[criterion](context.supernet(), calibration)
        network, _ = ordered_cut(context, scores, with_ffn(full, width))
        rows.append(("ours", criterion, loss(network)))
    widths = f"FFN {width} of {full.layers[0].intermediate_size}"
    print_header("tool", "criterion", f"held-out loss, nats, {widths}", right_from=2)
    for tool, criterion, value in rows:
        print_row(tool, criterion, f"{value:.4f}")


if __name__ == "__main__":
    main()
