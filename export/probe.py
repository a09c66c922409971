"""A probe: a few token sequences and what the network says about them, small enough to be part of a package.

Full logits of the same sequences (`save_reference`) are compared once, at export; the compact probe in
compression.json lets `compressor verify` check a package anywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.package_record import Greedy, Probe
from supernet.common.errors import VerificationError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SEQUENCES, LENGTH = 4, 32
TOP = 5
NEW_TOKENS = 12
"""In a greedy continuation."""
TEXT = "The quick brown fox: 3 jumps, 2 dogs.\nOnce upon a time"


def default_ids(config: PreTrainedConfig, seed: int = 0) -> Tensor:
    """Seeded random token ids of shape [SEQUENCES, LENGTH], shorter where the context is."""
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (SEQUENCES, length), generator=generator)


def stored_network(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The network as a package stores it: parameters rounded to `dtype`, computed in float32 on the CPU, as the proof
    computes them.

    Returns `model` itself where that changes nothing. Buffers (rotary frequencies) are never stored, so not rounded.
    """
    if all(
        p.device.type == "cpu" and p.dtype == torch.float32 and torch.equal(p, p.to(dtype).float())
        for p in model.parameters()
    ):
        return model
    rounded = copy.deepcopy(model).to("cpu")
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(dtype).to(torch.float32)
    return rounded


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Float32 logits [sequences, length, vocabulary] on the CPU, computed without a cache."""
    device = next(model.parameters()).device
    return model(input_ids=ids.to(device), use_cache=False).logits.float().cpu()


def next_log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """log p(token t+1 | tokens up to t), shape [sequences, length - 1]."""
    return logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def make_probe(logits: Tensor, ids: Tensor, tokenizer: PreTrainedTokenizerBase, **more: Any) -> Probe:
    """Token ids, next-token log-probabilities, the top tokens of each position, one tokenized text, and `more`."""
    top = logits.double().log_softmax(-1).topk(min(TOP, logits.shape[-1]))
    text_ids = tokenizer(TEXT).input_ids
    return Probe(
        ids=ids.tolist(),
        next_logprob=_rounded(next_log_probabilities(logits, ids)),
        top_ids=top.indices.tolist(),
        top_logprob=_rounded(top.values),
        max_abs_logit=float(logits.abs().max()),
        text=TEXT,
        text_ids=text_ids,
        text_decoded=tokenizer.decode(text_ids),
        **more,
    )


def greedy(model: PreTrainedModel, ids: Tensor, context: int | None = None) -> Greedy:
    """A greedy continuation of the first half of the first of `ids` [sequences, length], within `context` tokens."""
    prompt = ids[:1, : max(1, ids.shape[1] // 2)]
    text, lead = prompt, []
    for _ in range(NEW_TOKENS if context is None else min(NEW_TOKENS, context - prompt.shape[1])):
        best = logits_of(model, text)[0, -1].topk(2)
        lead.append(round(float(best.values[0] - best.values[1]), 6))
        text = torch.cat([text, best.indices[None, :1].to(text)], -1)
    return Greedy(prompt=prompt[0].tolist(), ids=text[0, prompt.shape[1] :].tolist(), lead=lead)


def compare_greedy(runtime: str, ids: Sequence[int], expected: Greedy, tie: float) -> int:
    """How many tokens of a runtime's greedy continuation are the expected ones, up to where two were equally likely.

    Raises `VerificationError` where it parts from the expected one at a token that was ahead by more than `tie` nats.
    """
    for position, (token, expected_token) in enumerate(zip(ids, expected.ids, strict=False)):
        if token != expected_token:
            if expected.lead[position] > tie:
                raise VerificationError(f"{runtime} continues with {ids}, transformers with {expected.ids}")
            return position
    return len(ids)


def largest(difference: Tensor, allowed: float, message: str) -> float:
    """The largest |difference|. Raises `VerificationError` where it is more than `allowed`, or not a number; `message`
    says so with `{largest}` and `{allowed}` for the two."""
    value = difference.abs().max().item()
    if not value <= allowed:
        raise VerificationError(message.replace("{largest}", f"{value:.3g}").replace("{allowed}", f"{allowed:.3g}"))
    return value


def compare_padded(package: Path, batch: Tensor, logits: Tensor, kept: Sequence[int], allowed: float) -> None:
    """Raises `VerificationError` where the logits of a left-padded batch (`shorter_rows`) are not those of `logits`."""
    message = f"{package}: a left-padded batch differs by {{largest}} from single sequences"
    for row, keep in enumerate(kept):
        largest(batch[row, logits.shape[1] - keep :] - logits[row, :keep], allowed, message)


def padding_token(model: PreTrainedModel) -> int:
    """The configuration's padding token; 0 where it names none, or one that the network has no row for, such as -1."""
    config = model.config.get_text_config()
    named: int | None = config.pad_token_id
    return named if named is not None and 0 <= named < config.vocab_size else 0


def shorter_rows(ids: Tensor, pad: int = 0) -> tuple[Tensor, Tensor, list[int]]:
    """The sequences cut to different lengths and padded on the left, their mask, and how much is left of each."""
    count, length = ids.shape
    padded, mask = torch.full_like(ids, pad), torch.zeros_like(ids)
    kept = [max(1, length - 3 * i) for i in range(count)]
    for row, keep in enumerate(kept):
        padded[row, length - keep :] = ids[row, :keep]
        mask[row, length - keep :] = 1
    return padded, mask, kept


def tokenizer_fault(tokenizer: PreTrainedTokenizerBase, probe: Probe) -> str | None:
    """What a tokenizer makes otherwise than the probe says; None where it agrees."""
    ids = tokenizer(probe.text).input_ids
    if ids != probe.text_ids:
        return f"the tokenizer gives {ids} for {probe.text!r}, recorded are {probe.text_ids}"
    if tokenizer.decode(ids) != probe.text_decoded:
        return f"the tokenizer decodes {ids} as {tokenizer.decode(ids)!r}"
    return None


def _rounded(values: Tensor) -> Any:
    return [_rounded(v) for v in values] if values.dim() > 1 else [round(float(v), 7) for v in values]


def save_reference(path: Path, ids: Tensor, logits: Tensor) -> None:
    """Write token ids and the full logits on them, for `load_reference`."""
    save_file({"ids": ids.contiguous(), "logits": logits.contiguous()}, path)


def load_reference(path: Path) -> tuple[Tensor, Tensor]:
    """Ids and full logits that `save_reference` wrote."""
    tensors = load_file(path)
    return tensors["ids"], tensors["logits"]
