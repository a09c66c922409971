"""llama.cpp with one model: a wheel's server, asked over the loopback interface. Imports nothing that is large."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class LlamaCpp:
    """A server in this process, on a file, with a context of so many tokens."""

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
        """The server's reply, as JSON, to a request with these values, or to a question without any. Raises
        RuntimeError with what the server says where it refuses."""
        request = urllib.request.Request(
            f"{self.address}{path}",
            json.dumps(values).encode() if values else None,
            {"Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=600) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:  # which says no more than its number: the reason is in the body
            body = " ".join(error.read().decode(errors="replace").split())
            raise RuntimeError(
                f"llama.cpp's server answers {path} with {error.code}: {body or error.reason}"
            ) from error

    @property
    def context(self) -> int:
        """Tokens that it holds: what it was asked for, or fewer where the file's context is shorter."""
        return int(self.ask("/props")["default_generation_settings"]["n_ctx"])

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
