"""llama.cpp as a runtime: a gguf file loaded by a wheel, timed, and compared with what transformers says."""

from __future__ import annotations

import json
import statistics
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.speed.measured import Speed
from export.layouts.gguf.layout import weight_file
from export.layouts.gguf.types import TYPES, bound_of_bits
from export.layouts.installed import check_installed
from export.package_record import PackageRecord, Probe
from export.probe import compare_greedy
from supernet.common.errors import VerificationError
from supernet.common.versions import versions

# Largest |Δ log-probability| (nats) against transformers, for each nat of the largest |logit|: llama.cpp rounds
# activations to the type of the weights that they meet, and reads GELU from a table of half-precision values (so the
# record of a float32 file may say that it is as exact as a half-precision one). A network that amplifies rounding may
# differ by what the probe found rounding to cost. Quantized ones have a largest mean, which is their type's.
TOLERANCE = {"f32": 2e-5, "f16": 2e-3, "bf16": 8e-3}
CHECKED_POSITIONS = 8


class LlamaCpp:
    """llama.cpp with one model, in this process: a wheel's server, asked over the loopback interface."""

    def __init__(self, file: Path, context: int, threads: int = 1) -> None:
        import xllamacpp  # an optional dependency

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

    def ask(self, path: str, **values: object) -> dict[str, Any]:
        """The server's reply, as JSON, to a request with these values."""
        request = urllib.request.Request(
            f"{self.address}{path}", json.dumps(values).encode(), {"Content-Type": "application/json"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=600) as reply:
            return json.load(reply)

    def tokenize(self, text: str) -> list[int]:
        """Token ids, with those that stand for the text's beginning."""
        return self.ask("/tokenize", content=text, add_special=True)["tokens"]

    def complete(self, ids: Sequence[int], new: int, **options: object) -> dict[str, Any]:
        """The server's reply to a prompt, with `new` greedy tokens.

        Prompts are not taken from its cache, which for networks with windows may still hold the one before.
        """
        return self.ask("/completion", prompt=list(ids), n_predict=new, temperature=0.0, cache_prompt=False, **options)

    def log_probabilities(self, ids: Sequence[int], top: int) -> dict[int, float]:
        """Natural log-probabilities of the `top` likeliest next tokens.

        The server reports none where the sampled token ends the text or is a part of a character, so a harmless one is
        forced; the reported probabilities are those before sampling.
        """
        reply = self.complete(ids, 1, n_probs=top, logit_bias=[[self._harmless, 1e6]])
        return {token["id"]: token["logprob"] for token in reply["completion_probabilities"][0]["top_logprobs"]}

    def timed(self, ids: Sequence[int], new: int) -> tuple[float, float]:
        """Seconds to read the prompt, and to write each of `new` tokens behind it, by the server's own clock."""
        timings = self.complete(ids, new, ignore_eos=True)["timings"]
        return timings["prompt_ms"] / 1e3, timings["predicted_per_token_ms"] / 1e3

    def greedy(self, ids: Sequence[int], new: int) -> list[int]:
        """The `new` token ids of a greedy continuation; fewer where the text ends."""
        return self.complete(ids, new, return_tokens=True)["tokens"]


def measure_speed(
    package: PackageRecord, *, prompt: int, new: int, threads: int, vocabulary: int = 200, repeats: int = 5
) -> Speed:
    """Speed of a gguf package of `vocabulary` tokens in llama.cpp at batch 1: medians over `repeats` runs."""
    file, gguf_type = weight_file(package.folder)
    runtime = LlamaCpp(file, prompt + new + 8, threads)
    ids = [1 + i % min(200, vocabulary - 1) for i in range(prompt)]
    runs = [runtime.timed(ids, new) for _ in range(repeats + 1)][1:]
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
