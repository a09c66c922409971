"""llama.cpp as a runtime: a gguf file loaded by a wheel, timed, and compared with what transformers says."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from evals.speed.measured import Speed
from export.layouts.gguf.file import weight_file
from export.layouts.gguf.server import LlamaCpp
from export.layouts.gguf.types import TYPES, bound_of_bits
from export.layouts.installed import check_installed
from export.package_record import PackageRecord, Probe
from export.probe import compare_greedy
from supernet.common.errors import VerificationError
from supernet.common.files import read_json, write_json
from supernet.common.processes import fresh_environment, last_line
from supernet.common.versions import versions

# Largest |Δ log-probability| (nats) against transformers, for each nat of the largest |logit|: llama.cpp rounds
# activations to the type of the weights that they meet, and reads GELU from a table of half-precision values (so the
# record of a float32 file may say that it is as exact as a half-precision one). A network that amplifies rounding may
# differ by what the probe found rounding to cost. Quantized ones have a largest mean, which is their type's.
TOLERANCE = {"f32": 2e-5, "f16": 2e-3, "bf16": 8e-3}
CHECKED_POSITIONS = 8


def measure_speed(
    package: PackageRecord, *, prompt: int, new: int, threads: int, vocabulary: int = 200, repeats: int = 5
) -> Speed:
    """Speed of a gguf package of `vocabulary` tokens in llama.cpp at batch 1: medians over `repeats` runs.

    `prompt` and `new` are cut to what the file's context holds, which may be shorter than the base's (a window of its
    attention, say); the result says what was timed.

    In a process of its own: where torch has computed on several threads, llama.cpp on several is ten times
    slower, as threads of two OpenMP libraries wait for each other's processors (docs/results.md).
    """
    file, gguf_type = weight_file(package.folder)
    ids = [1 + i % min(200, vocabulary - 1) for i in range(prompt)]
    with tempfile.TemporaryDirectory(prefix="compressor-timing-") as folder:
        scratch = Path(folder)
        job = {"file": str(file.resolve()), "ids": ids, "new": new, "threads": threads, "repeats": repeats}
        write_json(scratch / "job.json", job)
        done = subprocess.run(
            [sys.executable, "-m", "export.layouts.gguf.speed_child", str(scratch / "job.json")],
            env=fresh_environment(scratch, file.stat().st_size),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{file}: timing it in llama.cpp failed: {last_line(done.stderr)}")
        timed = read_json(scratch / "timed.json")
    runs, prompt, new = timed["runs"], timed["prompt"], timed["new"]
    return Speed(
        runtime="llama.cpp",
        device="cpu",
        threads=threads,
        dtype=gguf_type,
        batch=1,
        prompt=prompt,
        new=new,
        prefill_tps=prompt / statistics.median(first for first, _ in runs),
        decode_tps=1 / statistics.median(each for _, each in runs),
    )


def check_gguf(package: PackageRecord) -> dict[str, object]:
    """What was proved of the file in llama.cpp: tokens, log-probabilities and greedy text as in transformers.

    Raises `VerificationError` that says what differs, and `RequestError` where llama.cpp is not installed.
    """
    check_installed("gguf")
    (file, gguf_type), probe = weight_file(package.folder), package.probe
    # 1. Load.
    assert probe.greedy is not None
    longest = max(map(len, probe.ids)) + len(probe.greedy.ids) + 8
    try:
        runtime = LlamaCpp(file, max(64, longest))
    except Exception as error:
        raise VerificationError(f"{file}: llama.cpp does not load it: {error}") from error
    # 2. Tokens.
    for text, ids in probe.tokenization:
        tokens = runtime.tokenize(text)
        if tokens != ids:
            raise VerificationError(f"{file}: llama.cpp tokenizes {text!r} as {tokens}, transformers as {ids}")
    result: dict[str, object] = {
        "layout": "gguf",
        "quantization": package.entry.quantization,
        "tokenizer_equal": len(probe.tokenization),
        **({"tokenized": "composed text (NFC), as llama.cpp composes none"} if probe.composed else {}),
        "compared_with": "transformers' log-probabilities",
    }
    # 3. Log-probabilities: of a quantized file in the mean, of others everywhere, and then greedy text too.
    differences = _differences(runtime, probe)
    mean, largest = sum(differences) / len(differences), max(differences)
    report = package.entry.quantization_report
    if report is not None:
        bound = TYPES[gguf_type].bound or 0.0 if report.bits is None else bound_of_bits(report.bits)
        if not mean <= bound:
            raise VerificationError(f"{file}: log-probabilities are off by {mean:.4f} on average, allowed are {bound}")
        result |= {"mean_abs_logprob_difference": mean, "bound": bound}
    else:
        allowed = max(TOLERANCE[probe.exact_to or gguf_type] * max(1.0, probe.max_abs_logit), probe.rounding)
        if not largest <= allowed:
            by = f"by up to {largest:.3g}, allowed are {allowed:.3g}"
            raise VerificationError(f"{file}: log-probabilities differ {by}")
        continuation = runtime.greedy(probe.greedy.prompt, len(probe.greedy.ids))
        agreeing = compare_greedy(f"{file}: llama.cpp", continuation, probe.greedy, 2 * allowed)
        result |= {"max_abs_logprob_difference": largest, "tolerance": allowed, "greedy_equal": agreeing}
    return result | {"runtime": f"llama.cpp ({versions(('xllamacpp',))['xllamacpp']})", "device": "cpu"}


def _differences(runtime: LlamaCpp, probe: Probe) -> list[float]:
    """|Δ log-probability| of the probe's top tokens at some positions of every sequence."""
    differences = []
    step = max(1, len(probe.ids[0]) // CHECKED_POSITIONS)
    for row, ids in enumerate(probe.ids):
        for position in range(step - 1, len(ids), step):
            computed = runtime.log_probabilities(ids[: position + 1], 100)
            expected = zip(probe.top_ids[row][position], probe.top_logprob[row][position], strict=True)
            for token, value in expected:
                # A token that llama.cpp ranks below a hundred others is off by at least this much.
                differences.append(abs(computed.get(token, min(computed.values())) - value))
    return differences
