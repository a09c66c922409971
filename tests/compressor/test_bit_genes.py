"""Bits as genes: what is scored is what is packaged, and what bits cannot go together with is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compressor.cli import run
from compressor.job import Job
from compressor.run import Run
from compressor.sizing import bits_storage
from compressor.stages.repairing import search_variants
from export.package_record import read_record
from export.probe import logits_of
from export.shards import weight_bytes
from supernet.architecture import Architecture
from supernet.loading import load_causal_lm
from tests.support import tiny

SPACE = {"ffn.*": [0, 32, 64], "kv.*": [1, 2], "attention_bits.*": [2, 4, 8, 16], "ffn_bits.*": [3, 8, 16]}


def test_the_whole_job(tmp_path: Path) -> None:
    """The package holds what was scored: the same logits, and the bytes that were counted, but for the header."""
    recipe = tiny.job_recipe(tmp_path) | {
        "finetuning": {"tokens": 0, "sequence_length": 32},
        "searching": {"evaluations": 12, "population": 6, "limit": 8, "objectives": ["held_out_loss", "bytes"]},
        "repair": {"enabled": False},
        "healing": {"tokens": 0},
        "space": SPACE | {"embedding_bits": [4, 8, 16]},
        "targets": {"max_bytes": "45kB"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    output = tmp_path / "run"
    assert run(["compress", "--recipe", str(tmp_path / "recipe.yaml"), "--output", str(output)]) == 0
    (pick,) = json.loads((output / "search" / "picks.json").read_text())
    architecture = Architecture.from_dict(pick["architecture"])
    assert architecture.has_bits and (output / "search" / "bits.json").is_file()
    record = read_record(output / "packages" / "best-mixed")
    assert record.entry.quantization == "mixed" and weight_bytes(output / "packages" / "best-mixed") < 60_000
    gone = "\N{EN DASH}"
    layers = [
        f"{i}: {(s.attention_bits or 16) if s.num_key_value_heads else gone} and "
        f"{(s.ffn_bits or 16) if s.intermediate_size else gone}; "
        for i, s in enumerate(architecture.layers)
    ]
    assert "".join(layers) in (output / "packages" / "best-mixed" / "README.md").read_text()
    # What was scored: the super-network with the bits on.
    job = Job(Run(output), Run(output).recipe())
    supernet = job.load_supernet()
    supernet.use(search_variants(job, supernet))
    ids = torch.tensor(record.probe.ids)
    supernet.activate(architecture)
    scored = logits_of(supernet.model, ids)
    package, _ = load_causal_lm(output / "packages" / "best-mixed", torch.float32, True)
    shipped = logits_of(package, ids)
    # Which is picked depends on the processor. What has no bits is scored as it is, and shipped in bfloat16.
    kept = [(s.attention_bits, s.num_key_value_heads) for s in architecture.layers]
    kept += [(s.ffn_bits, s.intermediate_size) for s in architecture.layers] + [(architecture.embedding_bits, 1)]
    all_rounded = all(bits for bits, units in kept if units)
    supernet.activate(architecture.without_bits())
    unrounded, largest = (logits_of(supernet.model, ids) - shipped).abs().max(), scored.abs().max()
    assert unrounded > 1e-3 * largest
    assert (scored - shipped).abs().max() <= (1e-4 * largest if all_rounded else unrounded / 4)
    assert pick["values"]["bytes"] == job.structure.bytes(architecture, bits_storage(job)) <= 45_000


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "where bits are searched, bytes must be among them"),
        (["--set", "searching.objectives=quality,bytes", "--format", "elastic"], "--format elastic: not together with"),
        (["--set", "searching.objectives=quality,bytes", "--format", "padded"], "--format padded: not together with"),
        (["--set", "searching.objectives=quality,bytes", "--bits", "joint"], "quantizing.bits: joint: not together"),
        (["--set", "searching.objectives=quality,bytes", "--set", "healing.finalists=2"], "healing.finalists: not"),
    ],
)
def test_what_bits_do_not_go_together_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    model, data = tiny.checkpoint(tmp_path / "m"), tiny.data(tmp_path / "d.jsonl")
    tasks = ["--tasks", "tiny_choice", "--include-path", str(tiny.task(tmp_path / "tasks", documents=40))]
    asked = ["compress", str(model), "--data", str(data), *tasks, "--space", "simq", "--output", str(tmp_path / "run")]
    assert run([*asked, "--repair", "off", "--max-bytes", "60kB", *more]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
