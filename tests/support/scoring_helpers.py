"""Tiny tasks of every kind, and lm-eval's own answers to compare with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from evals.scoring.encoding import Encoder
from evals.scoring.lm import NetworkLM
from evals.scoring.scorer import Scorer
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


def documents(count: int, seed: int = 2, longest: int | None = None) -> list[Row]:
    """Made-up documents; with `longest`, every third question is repeated up to so many characters."""
    rows = []
    for i, text in enumerate(tiny.sentences(count, seed)):
        question = text if longest is None or i % 3 else (text + " ") * (longest // len(text) + 1)
        choices = [" cat", " house", " a cat and a tree"][: 2 + i % 2]
        row = {"id": i, "question": question.rstrip(), "choices": choices, "gold": i % len(choices), "word": "sun"}
        rows.append(row)
    return rows


def load(model: PreTrainedModel, folder: Path, *names: str, tokenizer: Any = None, **settings: Any) -> TaskSet:
    """Tasks of a folder, encoded for `model`."""
    encoder = Encoder(tokenizer or tiny.byte_tokenizer(), model.config)
    return TaskSet.load(names, encoder=encoder, include_path=[folder], **settings)


def scorer_of(model: PreTrainedModel, folder: Path, *names: str, holdout: bool = True, **settings: Any) -> Scorer:
    """A scorer of `model` on tasks of a folder; `settings` are `NetworkLM`'s."""
    task_set = load(model, folder, *names, holdout=holdout)
    return Scorer(task_set, NetworkLM(model, task_set.encoder, **settings))


def hflm(model: PreTrainedModel, tokenizer: Any = None, batch: int = 4) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tokenizer or tiny.byte_tokenizer(), batch_size=batch)


def requests(task_set: TaskSet) -> list[Instance]:
    """All requests of all documents."""
    return [
        instance
        for task in task_set.tasks.values()
        for _, docs in task.documents("all")
        for document in docs
        for instance in document.instances
    ]


def assert_same_answers(ours: NetworkLM, theirs: HFLM, asked: list[Instance]) -> None:
    """Both answer every request alike, log-likelihoods within the design's tolerance."""
    kinds = {request.request_type for request in asked}
    assert kinds
    for kind in kinds:
        of_kind = [request for request in asked if request.request_type == kind]
        answers, expected = getattr(ours, kind)(of_kind), getattr(theirs, kind)(of_kind)
        for answer, wanted in zip(answers, expected, strict=True):
            assert_same_answer(answer, wanted)


def assert_same_answer(answer: Any, wanted: Any) -> None:
    """A text is equal; a log-likelihood is equal within the tolerance, and whether it is the network's first choice."""
    if isinstance(answer, str):
        assert answer == wanted
    elif isinstance(answer, tuple):
        assert answer[1] == wanted[1]
        assert_same_answer(answer[0], wanted[0])
    else:
        assert answer == pytest.approx(wanted, abs=1e-4 + 1e-6 * abs(wanted))
