"""The onnx and openvino layouts: one graph of the network, traced and converted by transformers' exporters.

The graph takes token ids, mask and positions, and the keys and values of every layer with attention; it returns logits
and the longer keys and values. Batch, length and cached length are free, so one graph reads a prompt (nothing cached)
and continues it. Weights are the base's values in float32. `transformers.exporters.ExportedModel` runs both layouts;
so does the runtime itself, by the names of its inputs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from evals.speed.measured import Speed
from export.layouts.installed import EXTRAS, check_installed
from export.package import check_destination, package_draft, write_tokenizer
from export.package_record import PackageRecord, read_record
from export.probe import (
    compare_greedy,
    compare_padded,
    default_ids,
    greedy,
    largest,
    logits_of,
    make_probe,
    next_log_probabilities,
    shorter_rows,
    stored_network,
    tokenizer_fault,
)
from supernet.architecture import Architecture
from supernet.common.errors import NotHeldError, VerificationError
from supernet.common.processes import available_cores, last_line
from supernet.common.versions import versions
from supernet.families import head_dim
from supernet.trust import load_tokenizer
from supernet.uneven import UNEVEN_PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GraphLayout = Literal["onnx", "openvino"]
FAMILIES = (
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "starcoder2",
)
"""Families whose graphs compute what transformers does: `tests/export/layouts/test_graphs.py` runs each in one of the
two runtimes, and in both where COMPRESSOR_ALL_GRAPHS is set."""

REFUSED = {"qwen3_5_text": "the graph's cache holds keys and values, not the state of its linear attention"}
"""Why not, by family."""

TOLERANCE = 1e-4
"""Largest |Δ logit| as a share of the largest |logit|: the runtimes order and fuse sums in their own way."""


def write(
    layout: GraphLayout,
    model: PreTrainedModel,
    architecture: Architecture,
    destination: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | Path,
    entry: Mapping[str, object],
    dtype: torch.dtype,
    lineage: Mapping[str, object] | None = None,
    probe_ids: Tensor | None = None,
    card: str | None = None,
) -> PackageRecord:
    """Write a standalone model as a graph for ONNX Runtime or OpenVINO, with compression.json beside it; returns the
    package's record.

    `dtype` is the base's: weights are rounded to it first, so that the graph holds what the other packages hold.

    Raises `NotHeldError` for a network that the exporter does not support.
    """
    config = model.config
    check_family(layout, config.model_type.removeprefix(UNEVEN_PREFIX))
    params = sum(parameter.numel() for parameter in model.parameters())
    needed = 4 * params + 2**26
    check_destination(destination, needed)
    network = stored_network(model, dtype).to("cpu", torch.float32).eval()
    ids = probe_ids if probe_ids is not None else default_ids(config)
    cached = [heads for i in architecture.kept if (heads := architecture.layers[i].num_key_value_heads)]
    with package_draft(destination, needed, entry=entry, lineage=lineage, card=card) as draft:
        exported = _exported(layout, network, cached)
        exported.config = None  # it would make the folder look like one that transformers' own classes load
        exported.save_pretrained(draft.folder)
        tokenizer = write_tokenizer(tokenizer, draft.folder)
        draft.probe = make_probe(logits_of(network, ids), ids, tokenizer, greedy=greedy(network, ids))
        draft.lineage[layout] = versions(EXTRAS[layout])
        draft.entry |= {
            "layout": layout,
            "cache": {"key_value_heads": cached, "head_dim": head_dim(config)},
            "quantization": None,
            "params": params,
        }
    return read_record(destination)


def check_family(layout: str, model_type: str) -> None:
    """Raises `NotHeldError` for a family that the layout does not hold."""
    if model_type not in FAMILIES:
        why = REFUSED.get(model_type, f"it is known to work for {', '.join(FAMILIES)}")
        raise NotHeldError(f"--format {layout} does not hold {model_type} networks: {why}")


def _exported(layout: GraphLayout, network: PreTrainedModel, cached: list[int]) -> Any:
    """The network traced and converted, as transformers' exporter returns it.

    Raises `NotHeldError` with the exporter's message where it does not support the network.
    """
    # An optional dependency: transformers has these from 5.23 on.
    from transformers.exporters import OnnxConfig, OnnxExporter, OpenVINOConfig, OpenVINOExporter

    # 1. A sample whose sizes no other dimension has, and none of 0 or 1: the trace takes equal ones for the same size.
    taken = {size for parameter in network.parameters() for size in parameter.shape}
    taken |= {*cached, head_dim(network.config)}
    batch, past, new = next((n, n + 2, n + 5) for n in count(2) if not taken & {n, n + 2, n + 5, 2 * n + 7})
    sample = {
        "input_ids": torch.randint(network.config.vocab_size, (batch, new)),
        "attention_mask": torch.ones(batch, past + new, dtype=torch.long),
        "position_ids": torch.arange(past, past + new).expand(batch, new).contiguous(),
        "past_key_values": cache(cached, head_dim(network.config), batch, past),
    }
    # 2. Trace and convert, without what the exporter prints.
    printed = StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            if layout == "onnx":
                return OnnxExporter().export(network, sample, OnnxConfig(dynamic=True))
            return OpenVINOExporter().export(network, sample, OpenVINOConfig(dynamic=True, stateful=False))
    except Exception as error:  # a tracer or a converter may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        kind = network.config.model_type
        raise NotHeldError(f"transformers' {layout} exporter does not support this {kind} network: {reason}") from error


def cache(key_value_heads: list[int], width: int, batch: int, length: int = 0) -> DynamicCache:
    """A key-value cache of `length` tokens of zeros: a layer for each of `key_value_heads`, heads `width` wide."""
    zeros = DynamicCache()
    for layer, heads in enumerate(key_value_heads):
        zeros.update(torch.zeros(batch, heads, length, width), torch.zeros(batch, heads, length, width), layer)
    return zeros


class Graph:
    """A package's graph in its runtime, on the CPU; `threads` are ONNX Runtime's."""

    def __init__(self, package: PackageRecord, threads: int = 1) -> None:
        from transformers.exporters import ExportedModel  # an optional dependency: transformers has it from 5.23 on

        # By default OpenVINO computes in bfloat16 where the processor can. It gets no number of threads: OpenVINO
        # 2026.4 ends the process where it may use only one.
        options: dict[str, Any] = {"config": {"EXECUTION_MODE_HINT": "ACCURACY"}}
        if package.entry.layout == "onnx":
            import onnxruntime  # an optional dependency

            session = onnxruntime.SessionOptions()
            session.intra_op_num_threads = threads
            options = {"session_options": session}
        self._model = ExportedModel.from_pretrained(package.folder, device="cpu", local_files_only=True, **options)
        assert package.entry.cache is not None
        self._cache = package.entry.cache

    def __call__(
        self, ids: Tensor, mask: Tensor | None = None, past: DynamicCache | None = None
    ) -> tuple[Tensor, DynamicCache]:
        """Logits [batch, length, vocabulary] of ids [batch, length] behind what `past` holds, and the longer cache."""
        cached = past.get_seq_length() if past is not None else 0
        if mask is None:
            mask = torch.ones(len(ids), cached + ids.shape[1], dtype=torch.long)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :].contiguous()
        if past is None:
            past = cache(self._cache.key_value_heads, self._cache.head_dim, len(ids))
        out = self._model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past)
        return out.logits, out.past_key_values


def measure_speed(
    package: PackageRecord, *, prompt: int, new: int, threads: int, vocabulary: int = 200, repeats: int = 5
) -> Speed:
    """Speed of a package's graph at batch 1, of `vocabulary` tokens: medians over `repeats` runs.

    OpenVINO chooses its number of threads itself.
    """
    layout = package.entry.layout
    graph = Graph(package, threads)
    if layout == "openvino":
        threads = available_cores()
    runs = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        logits, past = graph(torch.arange(prompt)[None] % min(200, vocabulary))
        first = time.perf_counter()
        for _ in range(new - 1):
            logits, past = graph(logits[:, -1:].argmax(-1), past=past)
        runs.append((first - began, (time.perf_counter() - first) / (new - 1)))
    return Speed(
        runtime=EXTRAS[layout][-1],
        device="cpu",
        threads=threads,
        dtype="float32",
        batch=1,
        prompt=prompt,
        new=new,
        prefill_tps=prompt / statistics.median(first for first, _ in runs[1:]),
        decode_tps=1 / statistics.median(each for _, each in runs[1:]),
    )


def check_graph(package: PackageRecord) -> dict[str, object]:
    """What was proved of the graph in its runtime: logits, a padded batch and cached generation as in transformers.

    Raises `VerificationError` that says what differs, and `RequestError` where the runtime is not installed.
    """
    folder, layout, probe = package.folder, package.entry.layout, package.probe
    check_installed(layout)
    # 1. Run the graph: the probe's sequences, a left-padded batch of them, and a greedy continuation.
    assert probe.greedy is not None
    ids = torch.tensor(probe.ids)
    padded, mask, kept = shorter_rows(ids)
    step, past, continuation = torch.tensor([probe.greedy.prompt]), None, []
    try:
        graph = Graph(package)
        logits, _ = graph(ids)
        batch, _ = graph(padded, mask)
        for _ in probe.greedy.ids:
            next_logits, past = graph(step, past=past)
            step = next_logits[:, -1:].argmax(-1)
            continuation.append(int(step))
    except Exception as error:
        raise VerificationError(f"{folder}: {layout} does not run it: {last_line(str(error))}") from error
    # 2. Log-probabilities. A logit's tolerance moves one by at most twice as much.
    allowed = 2 * TOLERANCE * probe.max_abs_logit
    expected = torch.tensor(probe.next_logprob, dtype=torch.float64)
    message = f"{folder}: log-probabilities differ by up to {{largest}}, allowed are {{allowed}}"
    difference = largest(next_log_probabilities(logits, ids) - expected, allowed, message)
    # 3. Padding, generation and the tokenizer.
    compare_padded(folder, batch, logits, kept, TOLERANCE * probe.max_abs_logit)
    compare_greedy(f"{folder}: {layout}", continuation, probe.greedy, allowed)
    fault = tokenizer_fault(load_tokenizer(folder), probe)
    if fault is not None:
        raise VerificationError(f"{folder}: {fault}")
    runtime = EXTRAS[layout][-1]
    return {
        "layout": layout,
        "quantization": None,
        "compared_with": "log-probabilities of the network in transformers",
        "max_abs_logprob_difference": difference,
        "tolerance": allowed,
        "padding_equal": True,
        "cached_generation_equal": True,
        "tokenizer_equal": True,
        "runtime": f"{runtime} ({versions((runtime,))[runtime]})",
        "device": "cpu",
        "dtype": "float32",
    }
