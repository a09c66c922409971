"""Tiny tasks of every kind, and lm-eval's own answers to compare with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM
from torch import nn

from evals.scoring.documents import Subtask
from evals.scoring.encoding import Encoder
from evals.scoring.lm import NetworkLM
from evals.scoring.tasks import TaskSet
from tests.support import tiny

Row = dict[str, Any]


def write_task(folder: Path, name: str, rows: list[Row], *, shots: list[Row] | None = None, **settings: Any) -> Path:
    """A task file `name` over `rows` (few-shot examples from `shots`, where given) with settings as in lm-eval."""
    folder.mkdir(exist_ok=True)
    files = {}
    for split, content in (("test", rows), ("dev", shots or [])):
        if content:
            files[split] = str(folder / f"{name}.{split}.jsonl")
            Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in content))
    config: Row = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    if shots:
        config |= {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}}
    # JSON is YAML.
    (folder / f"{name}.yaml").write_text(json.dumps(config | settings))
    return folder


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}
LAST_WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{question}}",
    "doc_to_target": " {{word}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
    ],
}
WRITING = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{word}}",
    "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def questions(count: int, seed: int = 2, longest: int | None = None) -> list[Row]:
    """Made-up documents; with `longest`, some questions are repeated up to so many characters."""
    rows = []
    for i, text in enumerate(tiny.sentences(count, seed)):
        question = text if longest is None or i % 3 else (text + " ") * (longest // len(text) + 1)
        choices = [" cat", " house", " a cat and a tree"][: 2 + i % 2]
        rows.append(
            {"id": i, "question": question.rstrip(), "choices": choices, "gold": i % len(choices), "word": "sun"}
        )
    return rows


def load(model: nn.Module, folder: Path, *names: str, **settings: Any) -> TaskSet:
    config: Any = model.config
    return TaskSet.load(names, encoder=Encoder(tiny.byte_tokenizer(), config), include_path=[folder], **settings)


def hflm(model: Any, tokenizer: Any = None, batch: int = 4) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tokenizer or tiny.byte_tokenizer(), batch_size=batch)


def requests(leaves: list[Subtask], split: Any = "all") -> list[Any]:
    return [instance for leaf in leaves for document in leaf.documents(split) for instance in document.instances]


def assert_same_answers(ours: NetworkLM, theirs: HFLM, asked: list[Any]) -> None:
    """Both answer every request alike, within the design's tolerance."""
    kinds = {request.request_type for request in asked}
    assert kinds
    for kind in kinds:
        some = [request for request in asked if request.request_type == kind]
        mine, expected = getattr(ours, kind)(some), getattr(theirs, kind)(some)
        if kind == "generate_until":
            assert mine == expected
            continue
        if kind == "loglikelihood_rolling":
            mine, expected = [(value, True) for value in mine], [(value, True) for value in expected]
        for (value, first), (wanted, wanted_first) in zip(mine, expected, strict=True):
            assert value == pytest.approx(wanted, abs=1e-4 + 1e-6 * abs(wanted))
            assert first == wanted_first
