"""What a report may hold, from the least to everything, and the card that is rendered from it."""

from __future__ import annotations

import copy
import re
from typing import Any

from huggingface_hub import ModelCard

from export.report.card import render_card
from export.report.schema import validate_report
from supernet.architecture import Architecture, LayerSizes

BASE = Architecture(64, (LayerSizes(4, 2, 256),) * 4)
CUT = Architecture(64, (LayerSizes(4, 2, 256), LayerSizes(2, 1, 128), LayerSizes(0, 0, 0), LayerSizes(0, 0, 192)))
THIN = Architecture(64, (LayerSizes(4, 2, 64),) * 4)
HOSTILE = """</script><img src=x onerror="alert('1')">&amp;\n---\n`|*"""


def score(value: float, stderr: float | None, chance: float | None = 0.5, **more: Any) -> dict[str, Any]:
    return {
        "metric": "acc",
        "value": value,
        "stderr": stderr,
        "n": 400,
        "split": "report",
        "higher_is_better": True,
        "chance": chance,
    } | more


def speed(decode: float, runtime: str = "transformers") -> dict[str, Any]:
    return {
        "runtime": runtime,
        "device": "cpu",
        "threads": 1,
        "dtype": "float32",
        "batch": 1,
        "prompt": 128,
        "new": 128,
        "prefill_tps": 10 * decode,
        "decode_tps": decode,
    }


def minimal_report() -> dict[str, Any]:
    """Only what every run has: a training-free run without speed, search or quantization."""
    return {
        "schema": 2,
        "versions": {"nas-compressor": "0.1.0", "torch": "2.13.0"},
        "recipe": {"seed": 0},
        "base": {
            "name": "tiny",
            "path": "models/tiny",
            "params": 1_000_000,
            "bytes": 4_000_000,
            "dtype": "float32",
            "architecture": BASE.to_dict(),
            "tasks": {"grammar": score(0.9, 0.01)},
            "quality": 1.0,
        },
        "front": [],
        "packages": [
            {
                "name": "best",
                "path": "packages/best",
                "layout": "uneven",
                "quantization": None,
                "architecture": CUT.to_dict(),
                "params": 670_000,
                "bytes": 2_680_000,
                "quality": 0.8 / 0.9,
                "tasks": {"grammar": score(0.8, 0.01)},
                "verified": {"logits": True},
            }
        ],
        "comparison": [],
    }


def full_report() -> dict[str, Any]:
    """Every optional part present; `coin` is a task at chance."""
    report = copy.deepcopy(minimal_report())
    report["recipe"] = {
        "seed": 0,
        "healing": {"tokens": 1000},
        "fingerprints": {"data": "abc", "model": {"model.safetensors": "def"}},
    }
    base, best = report["base"], report["packages"][0]
    base |= {"speed": speed(100.0), "card": {"license": "mit", "language": ["en"], "datasets": ["org/text"]}}
    base["hub_id"] = "org/tiny"
    best |= {"speed": speed(140.0)}
    best["verified"] = {"logits": True, "max_logit_difference": 1.25e-6, "bound": 1e-5, "generation": {"cached": True}}
    base["tasks"]["coin"] = score(0.51, 0.025)
    best["tasks"]["coin"] = score(0.48, 0.025)
    base["tasks"]["words"] = score(1.5, None, None, metric="bits_per_byte", higher_is_better=False)
    best["tasks"]["words"] = score(1.6, None, None, metric="bits_per_byte", higher_is_better=False)
    for quantization, size in (("int8", 900_000), ("int4", 600_000)):
        report["packages"].append(
            copy.deepcopy(best)
            | {
                "name": f"best-{quantization}",
                "path": f"packages/best-{quantization}",
                "quantization": quantization,
                "bytes": size,
                "speed": speed(139.0, "transformers (decompressed at load)"),
                "quantization_report": {
                    "scheme": quantization,
                    "group_size": -1,
                    "iterations": 0,
                    "bits_per_weight": 8.25,
                    "bits_per_parameter": 9.5,
                    "exceptions": {"model.layers.1.mlp.down_proj": "per-channel INT8 (172 is no multiple of 32)"},
                },
            }
        )
    point = {"key": CUT.key, "architecture": CUT.to_dict(), "params": 670_000, "quality": 0.9, "decode_tps": 140.0}
    point["tasks"] = {"grammar": score(0.81, 0.01, split="search"), "coin": score(0.5, 0.02, split="search")}
    full = {"key": BASE.key, "architecture": BASE.to_dict(), "params": 1_000_000, "quality": 1.0}
    thin = {"key": THIN.key, "architecture": THIN.to_dict(), "quality": 0.7}
    report["front"] = [point, full]
    report["search"] = {
        "algorithm": "linas",
        "evaluations": 2,
        "generations": [
            {
                "generation": generation,
                "evaluations": generation + 1,
                "hypervolume": 0.1 + 0.1 * generation,
                "predictor": {
                    "name": "ridge",
                    "kendall": 0.5,
                    "spearman": 0.6,
                    "mae": 0.01,
                    "used": generation < 2,
                }
                if generation
                else None,
                "seconds_evaluating": 10.0,
                "seconds_other": 0.1,
            }
            for generation in range(3)
        ],
        "points": [
            point | {"generation": 0, "on_front": True},
            full | {"generation": 1, "on_front": True},
            point | thin | {"generation": 2, "on_front": False, "full": False, "further": {"kl_to_base": 0.25}},
        ],
        "space": {"name": "fine", "genes": [{"name": "ffn.0", "values": [64, 128, 192, 256]}]},
        "targets": {"max_params": ["0.67", "50%", "800K"]},
    }
    report["finetune"] = {
        "curve": [
            {"step": step, "tokens": 100 * step, "largest": 3 / step, "middle": 4 / step, "smallest": 5 / step}
            for step in range(1, 5)
        ],
        "tokens": 400,
        "seconds": 12.5,
        "sampler": "sandwich",
        "loss": "distillation",
        "data": "train.jsonl",
        "measuring": 0.5,
        "kept": 4,
        "halved": [2],
        "outcome": "kept is the last state; held-out largest 3.000 → 0.750",
    }
    report["healing"] = {
        "best": {
            "curve": [{"step": step, "tokens": 100 * step, "loss": 2.5 + step} for step in (0, 4)],
            "tokens": 400,
            "seconds": 2.0,
            "kept": 0,
            "outcome": "no state was better than the untrained one, which is kept; held-out loss 2.500 → 2.500",
        }
    }
    report["samples"] = [
        {"prompt": f"Prompt {n}", "continuations": {"base": "one day", "best": "one dog", "best-int4": "one"}}
        for n in range(3)
    ]
    report["comparison"] = [
        {
            "method": method,
            "about": "a paper",
            "size": "0.67",
            "seed": 0,
            "path": f"comparison/{method}-0.67-0",
            "params": 672_000,
            "quality": quality,
            "quality_stderr": 0.01,
            "tasks": {"coin": score(0.5, 0.025)},
            "speed": speed(120.0),
            "base_speed": speed(100.0),
            "ours_minus_this": difference,
        }
        for method, quality, difference in (
            ("ours", 0.85, None),
            ("shortgpt", 0.8, {"value": 0.05, "low": 0.03, "high": 0.07}),
        )
    ]
    return report


def card_of(data: dict[str, Any], name: str = "best", repo_id: str | None = None) -> ModelCard:
    return ModelCard(render_card(validate_report(data), name, repo_id))


def code_block(text: str) -> str:
    found = re.search(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert found
    return found[1]
