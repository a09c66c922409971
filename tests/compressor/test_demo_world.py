"""The bundled demo: its text and tasks are apart, its tasks load anywhere, its checkpoint is what we promise."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from compressor.demo import MODEL, TASK_NAMES, TASKS, training_text
from compressor.demo.world import documents, task_documents

CHANCE = {"world_grammar": 0.5, "world_facts": 0.25, "world_context": 0.25, "world_sums": 0.25}


def committed(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_training_text_is_deterministic_and_seeded(tmp_path: Path) -> None:
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    training_text(first, 50, seed=1)
    training_text(again, 50, seed=1)
    training_text(other, 50, seed=2)
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    rows = [json.loads(line) for line in first.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 50
    assert all(set(row) == {"text"} and row["text"] for row in rows)


def test_every_kind_of_document_occurs() -> None:
    text = " ".join(islice(documents(0), 200))
    for part in (" belongs to ", " = ", "self.", "The favourite "):
        assert part in text


@pytest.mark.parametrize("name", TASK_NAMES)
def test_committed_questions_are_the_generated_ones(name: str) -> None:
    assert committed(name) == task_documents(name)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_questions_are_unique_and_balanced(name: str) -> None:
    questions = committed(name)
    assert len(questions) >= 400
    assert len({question["prompt"] for question in questions}) == len(questions)
    for question in questions:
        assert len(set(question["choices"])) == len(question["choices"]) == round(1 / CHANCE[name])
    for position in range(round(1 / CHANCE[name])):
        share = sum(question["gold"] == position for question in questions) / len(questions)
        assert abs(share - CHANCE[name]) < 0.01


@pytest.mark.parametrize("name", TASK_NAMES)
def test_no_answer_is_right_wherever_it_is_offered(name: str) -> None:
    """Knowing only which words are right often must not be worth more than 15 points."""
    questions = committed(name)
    right = Counter(question["choices"][question["gold"]] for question in questions)
    hits = sum(
        max(question["choices"], key=lambda choice: right[choice]) == question["choices"][question["gold"]]
        for question in questions
    )
    lone = sum(right[question["choices"][question["gold"]]] == 1 for question in questions)
    assert (hits - lone) / len(questions) < CHANCE[name] + 0.15


@pytest.fixture(scope="module")
def text() -> str:
    """Many documents, of two seeds."""
    return "\n".join(text for seed in (0, 7) for text in islice(documents(seed), 40_000))


@pytest.mark.parametrize("name", TASK_NAMES)
def test_no_question_is_answered_in_the_training_text(name: str, text: str) -> None:
    for question in committed(name):
        answered = f"{question['prompt']} {question['choices'][question['gold']]}"
        assert answered + "." not in text
        assert answered + " " not in text


def test_checkpoint_is_of_the_promised_shape() -> None:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(MODEL)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.num_hidden_layers >= 8
    widths = {
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    }
    assert all(width % 64 == 0 for width in widths)
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 6_000_000

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert len(tokenizer) == config.vocab_size
    text = "Mara has the red ball. 12 + 7 = 19."
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_base_scores_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All questions, in lm-eval's own way, from a folder that has nothing to do with the task files."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = HFLM(pretrained=str(MODEL), dtype="float32", device="cpu", batch_size=32)
        assert sum(parameter.numel() for parameter in model.model.parameters()) >= 1_000_000
        found = simple_evaluate(
            model,
            tasks=TASK_NAMES,
            task_manager=TaskManager(include_path=str(TASKS)),
            bootstrap_iters=0,
            log_samples=False,
        )
    finally:
        torch.set_num_threads(threads)
    assert found is not None
    scores = {name: found["results"][name]["acc,none"] for name in TASK_NAMES}
    assert all(scores[name] >= CHANCE[name] + 0.20 for name in TASK_NAMES), scores
    assert sum(0.90 <= score <= 0.99 for score in scores.values()) >= 3, scores
