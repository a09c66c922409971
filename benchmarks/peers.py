"""Two other tools do the same cut as ours, on the same checkpoint, in a virtual environment of their own.

    python -m benchmarks.peers [--checkpoint DIR] [--data FILE] [--python PYTHON_OF_THE_PEERS]

mergekit's passthrough merge keeps the layers that our ShortGPT baseline keeps: the logits must be equal. optipfair
narrows the FFN by its L2 and MAW criteria; ours at random, by magnitude, Wanda and Taylor, at the same width: held-out
loss of each. Without `--python` an environment is made in a temporary folder, which installs both from the package
index.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

PEERS = ("mergekit==0.1.5", "optipfair==0.4.2")
PERCENT = 30
"""Neurons removed in the comparison of widths."""


def prune_with_optipfair(model: str, output: str, method: str) -> None:
    """Runs in the peers' environment."""
    from optipfair import prune_model
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    pruned = prune_model(loaded, "MLP_GLU", method, pruning_percentage=PERCENT, show_progress=False)
    pruned.save_pretrained(output)


def environment(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "torch==2.13.0", *PEERS], check=True)
    return python


def call(command: list[str | Path]) -> None:
    """Run a peer; what it says is shown where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]}:\n{done.stdout}{done.stderr}")


def main() -> None:
    import torch
    import yaml
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from compressor import demo
    from evals.baselines import PruningContext, baselines, ordered_cut, with_ffn
    from supernet.families import describe
    from supernet.importance import IMPORTANCES
    from supernet.slicing import extract
    from supernet.training.data import pack
    from supernet.training.losses import held_out_loss

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=str(demo.MODEL))
    parser.add_argument("--data", help="text, jsonl: what criteria are calibrated on; default: generated")
    parser.add_argument("--python", type=Path, help="of an environment that has the peers")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = given.python or environment(folder / "peers")
        data = given.data
        if data is None:
            data = str(folder / "text.jsonl")
            demo.training_text(Path(data), n_documents=2000, seed=1)
        model = AutoModelForCausalLM.from_pretrained(given.checkpoint, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(given.checkpoint)
        blocks = pack(data, tokenizer, 128, 60_000)
        training, held_out = blocks.split(0.15)
        calibration, probe = training[:64].ids.split(8), held_out[:8].ids
        structure = describe(model.config)
        full = structure.base

        target = structure.parameters(full) - structure.parameters(full) // len(full.layers)
        bench = PruningContext(model, structure, tuple(calibration), target)
        _, shortgpt = baselines()["shortgpt"].cut(bench)
        kept = list(shortgpt.kept)
        plain = type(full)(
            full.hidden_size,
            tuple(layer if index in kept else type(layer)(0, 0, 0) for index, layer in enumerate(full.layers)),
        )
        ours = extract(model, structure, plain)
        recipe = {
            "slices": [{"sources": [{"model": given.checkpoint, "layer_range": [i, i + 1]}]} for i in kept],
            "merge_method": "passthrough",
            "dtype": "float32",
        }
        (folder / "merge.yaml").write_text(yaml.safe_dump(recipe))
        call([python.parent / "mergekit-yaml", folder / "merge.yaml", folder / "merged"])
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval()
        with torch.no_grad():
            difference = (merged(probe).logits - ours(probe).logits).abs().max().item()
        print(
            f"mergekit passthrough, layers {kept} kept as ShortGPT ranks them: largest logit difference {difference:g}"
        )

        def loss(network: torch.nn.Module) -> float:
            return held_out_loss(network, held_out, 8, torch.device("cpu"))

        rows = [("base", "", loss(model))]
        width = 0
        for method in ("L2", "MAW"):
            out = folder / method
            call([python, __file__, "--prune", given.checkpoint, out, method])
            pruned = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
            width = pruned.config.intermediate_size
            rows.append(("optipfair", method, loss(pruned)))
        for criterion in ("random", "magnitude", "wanda", "taylor"):
            scores = IMPORTANCES[criterion](bench.supernet(), calibration)
            network, _ = ordered_cut(bench, scores, with_ffn(full, width))
            rows.append(("ours", criterion, loss(network)))
        before = full.layers[0].intermediate_size
        print(f"\n| tool | criterion | held-out loss, nats, FFN {width} of {before} |\n|---|---|--:|")
        for tool, criterion, value in rows:
            print(f"| {tool} | {criterion} | {value:.4f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--prune"]:
        prune_with_optipfair(*sys.argv[2:])
    else:
        main()
