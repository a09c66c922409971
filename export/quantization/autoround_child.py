"""The child process in which AutoRound tunes the rounding of weights.

    python -m export.quantization.autoround_child JOB.json

JOB.json names the package, the calibration tokens and what each scheme asks for; the results lie beside it.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.quantization.round_to_nearest import CHANNEL_GROUP, CHANNEL_INT8, configuration, packed
from export.quantization.schemes import SCHEMES
from export.shards import WeightWriter, weight_files
from supernet.common.files import read_json, write_json
from supernet.trust import check_code

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 8
"""Sequences that AutoRound computes at a time."""


def run(job_path: Path) -> None:
    """Carry out a job file: one folder of weights for each scheme, and `done` at the end."""
    import torch
    from safetensors.torch import load_file

    job = read_json(job_path)
    scratch = job_path.parent
    ids = load_file(scratch / "calibration.safetensors")["ids"]
    for plan in job["schemes"]:
        print(f"\n== {plan['scheme']}", flush=True)
        torch.manual_seed(job["seed"])
        _quantize(Path(job["source"]), scratch / plan["scheme"], plan, job, ids)
    (scratch / "done").touch()


def _quantize(source: Path, target: Path, plan: dict[str, Any], job: dict[str, Any], ids: Tensor) -> None:
    """Leave model*.safetensors and quantization_config.json of one scheme in `target`."""
    import torch

    from supernet.loading import load_causal_lm  # imports torch

    dtype = torch.float32 if job["device"] == "cpu" else torch.bfloat16
    model, _ = load_causal_lm(source, dtype, check_code(source))
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    head = set(linear) - set(job["linear"])
    own_form = SCHEMES[plan["scheme"]].auto_round
    target.mkdir()
    if set(plan["left_out"]) | head == set(linear):
        raw, found = source, configuration({"group_0": CHANNEL_GROUP}, ignored=sorted(head))
    else:
        raw = _autoround(model, plan, job, ids, target / "raw")
        found = read_json(raw / "config.json")["quantization_config"]
        expected = set(plan["left_out"]) if own_form else head | set(plan["left_out"])
        ignored = set(found.get("extra_config", ()) if own_form else found["ignore"])
        if ignored != expected:
            unexpected = ", ".join(sorted(ignored ^ expected))
            raise RuntimeError(f"AutoRound left out other layers than expected: {unexpected}")
        if not own_form:
            found = _configuration(found, linear, plan["left_out"])
    write_json(target / "quantization_config.json", found)
    with WeightWriter(target) as weights:
        for name, tensor in _stored(raw):
            module, _, part = name.rpartition(".")
            if own_form and module in job["linear"] and module not in plan["left_out"]:
                weights.add(name, tensor)
            elif module in plan["left_out"] and part == "weight" and not own_form:
                for suffix, value in packed(tensor, 8, -1).items():
                    weights.add(f"{module}.{suffix}", value)
            else:
                weights.add(name, tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor)


def _autoround(model: Any, plan: dict[str, Any], job: dict[str, Any], ids: Tensor, output: Path) -> Path:
    """Run neural-compressor's AutoRound; returns the folder that it wrote."""
    from neural_compressor.torch.quantization import AutoRoundConfig, convert, prepare

    from supernet.trust import load_tokenizer

    scheme = SCHEMES[plan["scheme"]]
    options: dict[str, Any] = {} if scheme.dynamic else {"group_size": plan["group_size"]}
    config = AutoRoundConfig(
        tokenizer=load_tokenizer(Path(job["source"])),
        scheme=scheme.preset,
        iters=job["iterations"],
        batch_size=min(BATCH, len(ids)),
        dataset=list(ids.split(BATCH)),
        nsamples=len(ids),
        seqlen=ids.shape[1],
        seed=job["seed"],
        # Rounding is tuned against the scales as they are stored.
        scale_dtype="fp16" if scheme.auto_round else "bf16",
        amp=job["device"] != "cpu",
        device_map=job["device"],
        export_format="auto_round" if scheme.auto_round else "llm_compressor",
        output_dir=str(output),
        reloading=False,
        **options,
    )
    prepared = prepare(model, config)
    # auto-round collects garbage several times for each block; over all modules loaded so far that is most of the time
    # that a small network takes. Frozen, they are left alone.
    gc.freeze()
    convert(prepared)
    gc.unfreeze()
    written = [path.parent for path in output.rglob("config.json")]
    if len(written) != 1:
        raise RuntimeError(f"AutoRound wrote {len(written)} models where one was expected")
    return written[0]


def _stored(folder: Path) -> Any:
    from safetensors import safe_open

    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tensors.get_tensor(name)


def _configuration(found: dict[str, Any], linear: list[str], left_out: list[str]) -> dict[str, Any]:
    """AutoRound's configuration, with the layers that it left out put under per-channel INT8."""
    if not left_out:
        return found
    (main,) = found["config_groups"].values()
    names = [name for name in linear if name not in found["ignore"]]
    groups = {"group_0": main}
    if main["weights"]["num_bits"] != 8:
        groups = {
            "group_0": {**main, "targets": names},
            "group_1": {**main, "targets": left_out, "weights": CHANNEL_INT8},
        }
    return {**found, "config_groups": groups, "ignore": [n for n in found["ignore"] if n not in left_out]}


if __name__ == "__main__":
    run(Path(sys.argv[1]))
