"""llama.cpp as a runtime: a gguf file loaded by a wheel, timed, and compared with what transformers says."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.speed.measured import Speed
from export.layouts.gguf.layout import QUANTIZED
from export.layouts.installed import check_installed
from supernet.common.errors import VerificationError
from supernet.common.versions import versions

# Largest |Δ log-probability| (nats) against transformers, for each nat of the largest |logit|: llama.cpp rounds
# activations to the type of the weights that they meet, and reads GELU from a table of half-precision values (so the
# record of a float32 file may say that it is as exact as a half-precision one). Quantized: largest mean, as for other
# packages.
TOLERANCE = {"f32": 2e-5, "f16": 2e-3, "bf16": 8e-3}
BOUNDS = {"q8_0": 0.1, "q4_0": 1.0}
CHECKED_POSITIONS = 8


class LlamaCpp:
    """llama.cpp with one model, in this process: a wheel's server, asked over the loopback interface."""

    def __init__(self, file: Path, context: int, threads: int = 1) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx = context
        settings.n_parallel = 1
        settings.warmup = False
        settings.fit_params = False
        settings.verbosity = 0
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = xllamacpp.Server(settings)
        self.address = self._server.listening_address
        self._harmless = self.tokenize("a")[-1]

    def ask(self, path: str, **values: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.address}{path}", json.dumps(values).encode(), {"Content-Type": "application/json"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=600) as reply:
            return json.load(reply)

    def tokenize(self, text: str) -> list[int]:
        return self.ask("/tokenize", content=text, add_special=True)["tokens"]

    def log_probabilities(self, ids: Sequence[int], top: int) -> dict[int, float]:
        """Natural log-probabilities of the `top` likeliest next tokens.

        The server reports none where the sampled token ends the text or is a part of a character, so a harmless one is
        forced; the reported probabilities are those before sampling. Prompts are not taken from its cache, which for
        networks with windows may still hold the one before.
        """
        found = self.ask(
            "/completion",
            prompt=list(ids),
            n_predict=1,
            n_probs=top,
            temperature=0.0,
            cache_prompt=False,
            logit_bias=[[self._harmless, 1e6]],
        )
        return {entry["id"]: entry["logprob"] for entry in found["completion_probabilities"][0]["top_logprobs"]}

    def timed(self, ids: Sequence[int], new: int) -> tuple[float, float]:
        """Seconds to read the prompt, and to write each of `new` tokens behind it, by the server's own clock."""
        found = self.ask(
            "/completion", prompt=list(ids), n_predict=new, temperature=0.0, ignore_eos=True, cache_prompt=False
        )["timings"]
        return found["prompt_ms"] / 1e3, found["predicted_per_token_ms"] / 1e3

    def greedy(self, ids: Sequence[int], new: int) -> list[int]:
        found = self.ask(
            "/completion", prompt=list(ids), n_predict=new, temperature=0.0, return_tokens=True, cache_prompt=False
        )
        return found["tokens"]


def measure_speed(package: Path, *, prompt: int, new: int, threads: int, repeats: int = 5) -> Speed:
    """Speed of a gguf package in llama.cpp at batch 1, as report.json holds it: medians over `repeats` runs."""
    import statistics

    (file,) = package.glob("*.gguf")
    runtime = LlamaCpp(file, prompt + new + 8, threads)
    runs = [runtime.timed([1 + i % 200 for i in range(prompt)], new) for _ in range(repeats + 1)][1:]
    return Speed(
        runtime="llama.cpp",
        device="cpu",
        threads=threads,
        dtype=file.stem.rpartition("-")[2],
        batch=1,
        prompt=prompt,
        new=new,
        prefill_tps=prompt / statistics.median(first for first, _ in runs),
        decode_tps=1 / statistics.median(each for _, each in runs),
    )


def check_gguf(package: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Load the file in llama.cpp and compare tokens, log-probabilities and greedy text with what transformers said.

    Raises `VerificationError` that says what differs, and `RequestError` where llama.cpp is not installed.
    """
    check_installed("gguf")
    (file,) = package.glob("*.gguf")
    probe, gguf_type = record["probe"], file.stem.rpartition("-")[2]
    sequences = probe["ids"]
    longest = max(map(len, sequences)) + len(probe["greedy"]["ids"]) + 8
    try:
        runtime = LlamaCpp(file, max(64, longest))
    except Exception as error:
        raise VerificationError(f"{file}: llama.cpp does not load it: {error}") from error
    for text, ids in probe["tokenization"]:
        found = runtime.tokenize(text)
        if found != ids:
            raise VerificationError(f"{file}: llama.cpp tokenizes {text!r} as {found}, transformers as {ids}")
    differences = []
    step = max(1, len(sequences[0]) // CHECKED_POSITIONS)
    for row, ids in enumerate(sequences):
        for position in range(step - 1, len(ids), step):
            found_here = runtime.log_probabilities(ids[: position + 1], 100)
            expected = zip(probe["top_ids"][row][position], probe["top_logprob"][row][position], strict=True)
            for token, value in expected:
                # A token that llama.cpp ranks below a hundred others is off by at least this much.
                differences.append(abs(found_here.get(token, min(found_here.values())) - value))
    result: dict[str, Any] = {
        "layout": "gguf",
        "quantization": record["entry"]["quantization"],
        "tokenizer_equal": len(probe["tokenization"]),
        **({"tokenized": "composed text (NFC), as llama.cpp composes none"} if probe.get("composed") else {}),
        "compared_with": "transformers' log-probabilities",
    }
    mean, largest = sum(differences) / len(differences), max(differences)
    if gguf_type in QUANTIZED:
        if not mean <= BOUNDS[gguf_type]:
            raise VerificationError(f"{file}: log-probabilities are off by {mean:.4f} on average")
        result |= {"mean_abs_logprob_difference": mean, "bound": BOUNDS[gguf_type]}
    else:
        allowed = TOLERANCE[probe.get("exact_to", gguf_type)] * max(1.0, probe["max_abs_logit"])
        if not largest <= allowed:
            by = f"by up to {largest:.3g}, allowed are {allowed:.3g}"
            raise VerificationError(f"{file}: log-probabilities differ {by}")
        result |= {"max_abs_logprob_difference": largest, "tolerance": allowed}
        result["greedy_equal"] = _compare_greedy(file, runtime, probe["greedy"], allowed)
    return result | {"runtime": f"llama.cpp ({versions(('xllamacpp',))['xllamacpp']})", "device": "cpu"}


def _compare_greedy(file: Path, runtime: LlamaCpp, expected: Mapping[str, Any], allowed: float) -> int:
    """Tokens of the greedy continuation that agree; only where two tokens were as good as equal may it part."""
    found = runtime.greedy(expected["prompt"], len(expected["ids"]))
    for position, (mine, theirs) in enumerate(zip(found, expected["ids"], strict=False)):
        if mine != theirs:
            if expected["lead"][position] <= 2 * allowed:
                return position
            theirs = expected["ids"]
            raise VerificationError(f"{file}: llama.cpp continues with {found}, transformers with {theirs}")
    return len(found)
