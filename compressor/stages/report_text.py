"""The user's text that packages are measured on, in tokens of the run and of the untouched base, and what they write
behind some openings of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice, pairwise
from typing import Any

import torch

from compressor.inputs import training_blocks, training_rows
from compressor.job import Job
from supernet.tokens import GREEDY
from supernet.training.data import HELD_OUT_BLOCKS, IGNORED, Blocks


def unread_text(job: Job) -> Blocks:
    """Some of the user's text that neither fine-tuning nor healing reads: what the longer of the two holds out."""
    tokens = max(job.recipe.finetuning.tokens or 0, job.recipe.healing.tokens or 0)
    _, held_out = training_blocks(job, tokens).split()
    return held_out.part(0, HELD_OUT_BLOCKS)


def split_again(job: Job, text: Blocks) -> Blocks:
    """Blocks of the same text in the untouched base's tokens, each padded with tokens that are not learnt from.

    What is learnt from and what is not are split apart, as far as they follow one another in a document.
    """
    blocks: list[list[tuple[list[int], bool, bool]]] = []  # ids, whether learnt from, whether a document begins
    for ids, labels, positions in text.table:
        begins = positions == 0
        learnt = (labels != IGNORED) | (begins & (labels.roll(-1) != IGNORED))  # a document's first token never is
        cuts = [0, *((learnt[1:] != learnt[:-1]) | begins[1:]).nonzero().flatten().add(1).tolist(), len(ids)]
        blocks.append([])
        for start, stop in pairwise(cuts):
            passage = job.tokenizer.decode(ids[start:stop])
            again = job.untouched_tokenizer(passage, add_special_tokens=False, verbose=False).input_ids
            blocks[-1].append((again, bool(learnt[start]), bool(begins[start])))
    length = max(sum(len(ids) for ids, _, _ in block) for block in blocks)
    table = torch.zeros(len(blocks), 3, length, dtype=torch.int32)
    table[:, 1] = IGNORED
    for row, block in zip(table, blocks, strict=True):
        at = position = 0
        for ids, learnt, begins in block:
            position = 0 if begins else position
            part = row[:, at : at + len(ids)]
            part[0] = torch.tensor(ids, dtype=torch.int32)
            part[2] = torch.arange(position, position + len(ids))
            if learnt:
                part[1] = part[0]
            if position == 0:
                part[1, :1] = IGNORED
            at, position = at + len(ids), position + len(ids)
    return Blocks(table, text.fingerprint, text.documents)


def learnt_tokens(text: Blocks) -> int:
    """Tokens that a held-out loss is the mean over."""
    return int(text[:].learnt.sum())


def openings(job: Job) -> dict[str, torch.Tensor]:
    """The openings of a few documents of the user's data, and their token ids [1, length]."""
    # Of conversations that the base wrote, the template's words are still in the text.
    texts = [row.text for row in islice(training_rows(job), 400) if row.ids is None or not row.chat]
    prompts = {}
    for text in [text for text in texts if len(text) > 20][-3:]:
        ids = job.tokenizer(text, return_tensors="pt", truncation=True, max_length=256).input_ids
        ids = ids[:, : min(24, 1 + ids.shape[1] // 2)]
        prompts[job.tokenizer.decode(ids[0], skip_special_tokens=True)] = ids.to(job.device)
    return prompts


def continuations(
    tokenizer: Any,
    prompts: Mapping[str, torch.Tensor],
    network: Callable[[], Any],
    kept: Mapping[str, str],
    new: int = 48,
) -> dict[str, str]:
    """Greedy continuations of every prompt's token ids [1, length]; those in `kept` are known already."""
    texts = {}
    for prompt, ids in prompts.items():
        if prompt in kept:
            texts[prompt] = kept[prompt]
            continue
        with torch.no_grad():
            writer = network()
            context = getattr(writer.config, "max_position_embeddings", None) or 10**9
            out = writer.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max(1, min(new, context - ids.shape[1])),
                **GREEDY,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            )
        texts[prompt] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return texts
