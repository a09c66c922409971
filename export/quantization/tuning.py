"""Tuned rounding: AutoRound in a child process (`export.quantization.autoround_child`), and its progress.

It has a process of its own because it writes to stdout and stderr, changes global state, and leaves files where it
runs. One child makes all schemes asked for, since starting it takes longer than quantizing a small network.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from export.package_record import PackageRecord
from export.quantization.autoround_child import AutoRoundJob
from export.quantization.round_to_nearest import QuantizationConfig
from export.quantization.schemes import LinearLayers, SchemePlan
from export.shards import weight_bytes, weight_files
from supernet.common.errors import RequestError
from supernet.common.files import read_json, write_json
from supernet.common.processes import fresh_environment, last_line
from supernet.trust import load_tokenizer

STEP = r"^-- step (\d+)$\n?"
"""A line by which the child says how many steps it has taken; it is for the bar alone."""

Progress = Callable[[float, int, str], None]
"""Called with blocks done (of the one at work, the share of its steps), blocks in all, and what is being quantized."""


@contextmanager
def tuned(
    source: PackageRecord,
    linear: LinearLayers,
    plans: Sequence[SchemePlan],
    calibration: Tensor,
    log: Path | None,
    progress: Progress | None,
    **options: Any,
) -> Iterator[Path]:
    """Within, a folder that holds the weights of every plan, by its scheme's name, as the child has tuned them;
    `options` are of an `AutoRoundJob`."""
    job = AutoRoundJob(source=str(source.folder.resolve()), linear=linear, schemes=list(plans), **options)
    blocks = len(source.entry.architecture.kept)
    with tempfile.TemporaryDirectory(prefix="compressor-quantize-") as folder:
        scratch = Path(folder)
        save_file({"ids": calibration.contiguous()}, scratch / "calibration.safetensors")
        write_json(scratch / "job.json", job.model_dump())
        output = _run_child(scratch, job, blocks, progress)
        if log is not None:
            with log.open("a", encoding="utf-8") as stream:
                stream.write(output)
        if not (scratch / "done").exists():
            if "out of memory" in (why := last_line(output)):
                raise RequestError(f"tuning the rounding ran out of memory ({why}); --rounding-steps 0 needs less")
            raise RuntimeError(f"quantization of {job.source} failed: {why}")
        yield scratch


def move_weights(raw: Path, target: Path) -> QuantizationConfig:
    """Move the child's weights to `target`, which may be on another disk. Returns the quantization configuration."""
    for file in [*weight_files(raw), *raw.glob("*.index.json")]:
        shutil.move(file, target / file.name)
    return read_json(raw / "quantization_config.json")


def pack_texts(source: Path, texts: Sequence[str], length: int = 512) -> Tensor:
    """Token ids [sequences, length] of texts joined end to end, where `length` is at most the network's context."""
    tokenizer = load_tokenizer(source)
    context = read_json(source / "config.json").get("max_position_embeddings") or length
    ids = [token for text in texts for token in tokenizer(text, verbose=False).input_ids]
    length = min(length, context, len(ids))
    if length < 2:
        raise RequestError("the calibration data holds no text")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def _run_child(scratch: Path, job: AutoRoundJob, blocks: int, progress: Progress | None) -> str:
    """Run the child, following its log for progress. Returns what it printed."""
    printed = scratch / "output.txt"
    with printed.open("wb") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", "export.quantization.autoround_child", str(scratch / "job.json")],
            env=fresh_environment(scratch, weight_bytes(Path(job.source))),
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            while child.poll() is None:
                time.sleep(0.2)
                if progress is not None:
                    output = printed.read_text(errors="replace")
                    progress(*position(output, blocks, len(job.schemes), job.iterations))
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    return re.sub(STEP, "", printed.read_text(errors="replace"), flags=re.MULTILINE)


def position(output: str, blocks: int, schemes: int, iterations: int) -> tuple[float, int, str]:
    """Blocks done, blocks in all and the scheme at work, read off what the child has printed: the bar of auto-round
    0.16, and the number of steps of `iterations` for each block.

    Another version may word its bar otherwise: then only this display is wrong.
    """
    _, *started = re.split(r"^== (\S+)$", output, flags=re.MULTILINE)
    if not started:
        return 0, blocks * schemes, "starting"
    scheme, printed = started[-2:]
    counts = re.findall(r"Quantizing[^\r\n]*?(\d+)/\d+ \[", printed)
    steps = re.findall(STEP, printed, flags=re.MULTILINE)
    done = float(counts[-1]) if counts else 0.0
    if steps and iterations:
        done = max(done, min(int(steps[-1]) / iterations, blocks))
    return (len(started) // 2 - 1) * blocks + done, blocks * schemes, scheme
