"""The child process in which AutoRound tunes the rounding of weights.

    python -m export.quantization.autoround_child JOB.json

JOB.json is an `AutoRoundJob`; the results lie beside it: a folder for each scheme, and `done` at the end.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from export.models import Model
from export.quantization.round_to_nearest import (
    CHANNEL_GROUP,
    CHANNEL_INT8,
    QuantizationConfig,
    configuration,
    outer_modules,
    packed,
    packed_table,
    plan_configuration,
    with_outer,
)
from export.quantization.schemes import LinearLayers, SchemePlan, form_of
from export.shards import WeightWriter, weight_files
from supernet.common.files import read_json, write_json
from supernet.loading import check_fit, load_causal_lm
from supernet.trust import check_code, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 8
"""Sequences that AutoRound computes at a time."""


class AutoRoundJob(Model):
    """What the child is to do. `calibration.safetensors` beside it holds token ids [sequences, length]."""

    source: str
    """The unquantized package."""
    iterations: int
    """AutoRound's steps for each block."""
    seed: int
    device: str
    linear: LinearLayers
    schemes: list[SchemePlan]


def run(job_file: Path) -> None:
    """Carry out a job file: one folder of weights for each scheme, and `done` at the end."""
    job = AutoRoundJob.model_validate(read_json(job_file))
    scratch = job_file.parent
    ids = load_file(scratch / "calibration.safetensors")["ids"]
    for plan in job.schemes:
        print(f"\n== {plan.scheme}", flush=True)
        steps = register_optimizer_step_post_hook(_StepCounter())
        torch.manual_seed(job.seed)
        _quantize(job, plan, ids, scratch / plan.scheme)
        steps.remove()
    (scratch / "done").touch()


class _StepCounter:
    """Prints, at most once a second, how many steps all blocks of a scheme have taken: auto-round's own bar moves block
    by block, which may take minutes."""

    def __init__(self) -> None:
        self._steps, self._printed = 0, 0.0

    def __call__(self, *_: object) -> None:
        self._steps += 1
        if time.monotonic() - self._printed >= 1:
            print(f"\n-- step {self._steps}", flush=True)
            self._printed = time.monotonic()


def _quantize(job: AutoRoundJob, plan: SchemePlan, ids: Tensor, target: Path) -> None:
    """Leave model*.safetensors and quantization_config.json of one scheme in `target`."""
    source = Path(job.source)
    dtype = torch.float32 if job.device == "cpu" else torch.bfloat16
    model, info = load_causal_lm(source, dtype, check_code(source))
    check_fit(str(source), info)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    outside = set(linear) - set(job.linear.widths)
    auto_round_form = form_of(plan.scheme).auto_round
    formats = {name: plan.format_of(name, shape) for name, shape in job.linear.widths.items()}
    as_stored = {name for name, (bits, _) in formats.items() if bits == 16}
    target.mkdir()
    # 1. Weights and configuration: AutoRound's, or the source's where no layer is under the scheme.
    if set(plan.left_out) | as_stored | outside == set(linear):
        raw, config = source, configuration({"group_0": CHANNEL_GROUP}, ignored=sorted(outside | as_stored))
    else:
        raw = _autoround(model, job, plan, ids, target / "raw")
        config = read_json(raw / "config.json")["quantization_config"]
        expected = set(plan.left_out) if auto_round_form else outside | as_stored | set(plan.left_out)
        if not auto_round_form:
            config["ignore"] = [job.linear.module_of(name) for name in config["ignore"]]
        ignored = set(config.get("extra_config", ()) if auto_round_form else config["ignore"])
        if ignored != expected:
            unexpected = ", ".join(sorted(ignored ^ expected))
            raise RuntimeError(f"AutoRound left out other layers than expected: {unexpected}")
        if plan.bits is not None:
            config = plan_configuration(plan, job.linear)
        elif not auto_round_form:
            config = _with_left_out(config, linear, plan.left_out)
    # 2. Write them: layers that were left out become INT8 in compressed-tensors, embedding and head what the plan says,
    #    rounded to nearest, and all the rest is bfloat16.
    outer, tables = outer_modules(plan, job.linear), dict[str, tuple[int, int]]()
    with WeightWriter(target) as weights:
        for stored_name, tensor in _stored(raw):
            name = job.linear.name_of(stored_name)
            module, _, part = name.rpartition(".")
            if module in outer:
                tables[module] = outer[module], tensor.shape[1]
                for suffix, value in packed_table(tensor, outer[module]).items():
                    weights.add(f"{module}.{suffix}", value)
            elif auto_round_form and module in job.linear.widths and module not in plan.left_out:
                weights.add(name, tensor)
            elif module in plan.left_out and part == "weight" and not auto_round_form:
                for suffix, value in packed(tensor, 8, -1).items():
                    weights.add(f"{module}.{suffix}", value)
            else:
                weights.add(name, tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor)
    write_json(target / "quantization_config.json", with_outer(config, job.linear, tables))


def _autoround(model: PreTrainedModel, job: AutoRoundJob, plan: SchemePlan, ids: Tensor, output: Path) -> Path:
    """Run neural-compressor's AutoRound; returns the folder that it wrote."""
    # neural-compressor takes seconds to import, and the parent process needs only this module's models.
    from neural_compressor.torch.quantization import AutoRoundConfig, convert, prepare

    scheme = form_of(plan.scheme)
    options: dict[str, object] = {} if scheme.dynamic else {"group_size": plan.group_size}
    if plan.bits is not None:
        formats = {name: plan.format_of(name, shape) for name, shape in job.linear.widths.items()}
        options["layer_config"] = {
            name: {"bits": bits, "group_size": group}
            for name, (bits, group) in formats.items()
            if name not in plan.left_out
        }
    config = AutoRoundConfig(
        tokenizer=load_tokenizer(Path(job.source)),
        scheme=scheme.preset,
        iters=job.iterations,
        batch_size=min(BATCH, len(ids)),
        # Without a mask, since there is no padding. auto-round would make one and give every layer the first one's,
        # which layers of another kind cannot take; and it would take a text's own end-of-text tokens for padding.
        dataset=[{"input_ids": part, "attention_mask": None} for part in ids.split(BATCH)],
        nsamples=len(ids),
        seqlen=ids.shape[1],
        seed=job.seed,
        # Rounding is tuned against the scales as they are stored.
        scale_dtype="fp16" if scheme.auto_round else "bf16",
        amp=job.device != "cpu",
        device_map=job.device,
        export_format="auto_round" if scheme.auto_round else "llm_compressor",
        output_dir=str(output),
        reloading=False,
        **options,
    )
    prepared = prepare(model, config)
    # auto-round 0.16 collects garbage several times for each block; over all modules loaded so far that is most of the
    # time that a small network takes. Frozen, they are left alone.
    gc.freeze()
    convert(prepared)
    gc.unfreeze()
    folders = [path.parent for path in output.rglob("config.json")]
    if len(folders) != 1:
        raise RuntimeError(f"AutoRound wrote {len(folders)} models where one was expected")
    return folders[0]


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's weight files, by its name."""
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tensors.get_tensor(name)


def _with_left_out(config: QuantizationConfig, linear: list[str], left_out: list[str]) -> QuantizationConfig:
    """AutoRound's configuration, with the layers that it left out put under per-channel INT8."""
    if not left_out:
        return config
    (main,) = config["config_groups"].values()
    names = [name for name in linear if name not in config["ignore"]]
    groups = {"group_0": main}
    if main["weights"]["num_bits"] != 8:
        groups = {
            "group_0": {**main, "targets": names},
            "group_1": {**main, "targets": left_out, "weights": CHANNEL_INT8},
        }
    return {**config, "config_groups": groups, "ignore": [n for n in config["ignore"] if n not in left_out]}


if __name__ == "__main__":
    run(Path(sys.argv[1]))
