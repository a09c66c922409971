"""Which documents are for the search and which for the report, with which prompts, and by which metric."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from evals.scoring.documents import doc_hash
from evals.scoring.encoding import Encoder
from evals.scoring.tasks import TaskSet, spread
from supernet.common.errors import RequestError
from tests.support import ROOT, tiny
from tests.support.scoring_helpers import CHOICE, LAST_WORD, documents, write_task


def load(folder: Path, *names: str, **settings: Any) -> TaskSet:
    encoder = Encoder(tiny.byte_tokenizer(), max_length=64)
    return TaskSet.load(names, encoder=encoder, include_path=[folder], **settings)


def ids(task_set: TaskSet, name: str, split: Any, limit: int | None = None) -> list[int]:
    return [d.doc["id"] for _, docs in task_set.documents(split, limit)[name] for d in docs]


def test_doc_hash_is_lm_evals() -> None:
    doc = {"question": "where är it?", "n": 3}
    expected = hashlib.sha256(json.dumps(doc, indent=2, ensure_ascii=False).encode()).hexdigest()
    assert doc_hash(doc) == expected


def test_splits_are_disjoint_whole_and_decided_by_the_hash(tmp_path: Path) -> None:
    write_task(tmp_path, "choice", documents(60), **CHOICE)
    task_set = load(tmp_path, "choice")
    search, report = ids(task_set, "choice", "search"), ids(task_set, "choice", "report")
    assert not set(search) & set(report) and sorted(search + report) == list(range(60))
    for row in documents(60):
        assert (row["id"] in search) == (int(doc_hash(row)[0], 16) % 2 == 0)
    assert ids(load(tmp_path, "choice"), "choice", "search") == search


def test_a_limit_takes_a_part_of_a_larger_limit(tmp_path: Path) -> None:
    write_task(tmp_path, "choice", documents(60), **CHOICE)
    task_set = load(tmp_path, "choice")
    whole = ids(task_set, "choice", "search")
    previous: set[int] = set()
    for limit in (1, 4, 9, 1000):
        chosen = ids(task_set, "choice", "search", limit)
        assert len(chosen) == min(limit, len(whole)) and chosen == sorted(chosen)
        assert previous <= set(chosen) <= set(whole)
        previous = set(chosen)


def test_a_groups_limit_is_spread_over_its_tasks(tmp_path: Path) -> None:
    for name, count in (("a", 80), ("b", 20)):
        write_task(tmp_path, name, documents(count, seed=count), **CHOICE)
    for name, weighted in (("by_size", "true"), ("alike", "false")):
        (tmp_path / f"{name}.yaml").write_text(
            f"group: {name}\ntask: [a, b]\naggregate_metric_list:\n  - {{metric: acc, weight_by_size: {weighted}}}\n"
        )
    for name, even in (("by_size", False), ("alike", True)):
        task_set = load(tmp_path, name)
        task = task_set.tasks[name]
        sizes = [subtask.size("search") for subtask in task.subtasks]
        shares = task.limits("search", 10)
        assert sum(x or 0 for x in shares) == 10
        assert shares == ([5, 5] if even else [round(10 * sizes[0] / sum(sizes)), round(10 * sizes[1] / sum(sizes))])


@pytest.mark.parametrize(
    ("limit", "sizes", "weights", "expected"),
    [
        (10, [100, 100], [1, 1], [5, 5]),
        (10, [3, 100], [1, 1], [3, 7]),
        (10, [3, 4], [1, 1], [3, 4]),
        (3, [10, 10], [1, 1], [2, 1]),
        (9, [60, 30], [60, 30], [6, 3]),
        (1, [5, 5, 0], [1, 1, 1], [1, 1, 0]),
        (10, [1, 1, 100], [1, 1, 1], [1, 1, 8]),
    ],
)
def test_spread(limit: int, sizes: list[int], weights: list[int], expected: list[int]) -> None:
    assert spread(limit, sizes, weights) == expected


def test_the_metric_that_counts(tmp_path: Path) -> None:
    write_task(tmp_path, "choice", documents(8), **CHOICE)
    write_task(tmp_path, "word", documents(8), **LAST_WORD)
    write_task(tmp_path, "odd", documents(8), **LAST_WORD | {"metric_list": LAST_WORD["metric_list"][:1]})
    task_set = load(tmp_path, "choice", "word", "odd")
    assert [task.metric for task in task_set.tasks.values()] == ["acc_norm", "acc", "perplexity"]
    assert [task.higher_is_better for task in task_set.tasks.values()] == [True, True, False]
    chosen = load(tmp_path, "choice:acc", "word:perplexity,none").tasks
    assert (chosen["choice"].metric, chosen["word"].key) == ("acc", "perplexity,none")
    with pytest.raises(RequestError, match="task choice has no metric 'f1'; it has acc, acc_norm"):
        load(tmp_path, "choice:f1")
    with pytest.raises(RequestError, match="no filter 'strict'; it has none"):
        load(tmp_path, "choice:acc,strict")


def test_the_first_filter_counts_unless_another_is_named(tmp_path: Path) -> None:
    filters = [
        {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
        for name, pattern in (("strict", "#(.)"), ("loose", "(.)"))
    ]
    settings = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{word}}",
        "filter_list": filters,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    write_task(tmp_path, "write", documents(8), **settings)
    assert load(tmp_path, "write").tasks["write"].key == "exact_match,strict"
    assert load(tmp_path, "write:exact_match,loose").tasks["write"].key == "exact_match,loose"


def test_chance_is_what_guessing_gives(tmp_path: Path) -> None:
    write_task(tmp_path, "choice", documents(10), **CHOICE)  # half of them with two choices, half with three
    write_task(tmp_path, "word", documents(10), **LAST_WORD)
    task_set = load(tmp_path, "choice", "word")
    assert task_set.chance("choice", "all") == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert task_set.chance("word", "all") is None


def test_chance_of_a_task_that_scores_by_itself_is_its_own(tmp_path: Path) -> None:
    """As in truthfulqa_mc2: the probability of all true choices."""
    code = (
        "import numpy as np\n\n\n"
        "def mass(doc, results):\n"
        "    shares = np.exp([ll for ll, _ in results])\n"
        "    return {'acc': (shares / shares.sum())[: doc['true']].sum()}\n"
    )
    (tmp_path / "own.py").write_text(code)
    rows = [{"question": "what", "choices": [" a", " b", " c", " d"], "true": 1 + n % 2, "gold": 0} for n in range(8)]
    metric = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    write_task(tmp_path, "mass", rows, **CHOICE | {"metric_list": metric}, process_results="!function own.mass")
    file = tmp_path / "mass.yaml"
    file.write_text(file.read_text().replace('"!function own.mass"', "!function own.mass"))
    assert load(tmp_path, "mass").chance("mass", "all") == pytest.approx((1 / 4 + 2 / 4) / 2)


def shot_texts(task_set: TaskSet, name: str) -> set[str]:
    """The prompts of all documents without the documents' own part."""
    texts = set()
    for split in ("search", "report"):
        for _, docs in task_set.documents(split)[name]:  # type: ignore[arg-type]
            texts |= {d.instances[0].args[0].removesuffix(d.doc["question"]) for d in docs}
    return texts


def test_examples_from_another_split_are_lm_evals_own(tmp_path: Path) -> None:
    """Drawn anew for every document, in lm-eval's order, and not in that in which documents are asked for."""
    shots, rows = documents(30, 8), documents(12)
    write_task(tmp_path, "few", rows, shots=shots, num_fewshot=2, fewshot_config={"sampler": "default"}, **CHOICE)
    task_set = load(tmp_path, "few")
    ours = {d.index: d for split in ("report", "search") for _, docs in task_set.documents(split)["few"] for d in docs}  # type: ignore[arg-type]
    task = TaskManager(include_path=str(tmp_path), include_defaults=False).load(["few"])["tasks"]["few"]
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    expected = {instance.doc_id: instance.args[0] for instance in task.instances}
    assert {index: d.instances[0].args[0] for index, d in ours.items()} == expected
    assert len(shot_texts(task_set, "few")) > 1


@pytest.mark.parametrize("sampler", ["default", "first_n"])
def test_examples_from_the_scored_documents_are_set_aside(tmp_path: Path, sampler: str) -> None:
    rows = documents(40)
    settings = {"num_fewshot": 3, "fewshot_split": "test", "fewshot_config": {"sampler": sampler}}
    write_task(tmp_path, "few", rows, **settings, **CHOICE)
    task_set = load(tmp_path, "few")
    scored = ids(task_set, "few", "search") + ids(task_set, "few", "report")
    assert len(scored) == 37
    (prompt,) = shot_texts(task_set, "few")
    aside = [row for row in rows if row["id"] not in scored]
    assert all(row["question"] in prompt for row in aside)
    if sampler == "first_n":
        assert [row["id"] for row in aside] == [0, 1, 2]
    assert shot_texts(load(tmp_path, "few"), "few") == {prompt}
    assert len(load(tmp_path, "few", holdout=False).documents("all")["few"][0][1]) == 40


def test_scored_documents_that_are_also_examples_are_dropped(tmp_path: Path) -> None:
    rows = documents(20)
    write_task(tmp_path, "few", rows, shots=[rows[3], *documents(5, 9)], num_fewshot=1, **CHOICE)
    task_set = load(tmp_path, "few")
    assert 3 not in ids(task_set, "few", "search") + ids(task_set, "few", "report")
    assert len(ids(task_set, "few", "all")) == 19


def test_number_of_examples_can_be_chosen_except_where_a_task_says_none(tmp_path: Path) -> None:
    for name, own in (("two", 2), ("none", 0)):
        write_task(tmp_path, name, documents(8), shots=documents(5, 9), num_fewshot=own, **CHOICE)
    task_set = load(tmp_path, "two", "none", num_fewshot=1)
    assert [task.subtasks[0].shots for task in task_set.tasks.values()] == [1, 0]


def test_fingerprint_stands_for_documents_and_prompts(tmp_path: Path) -> None:
    write_task(tmp_path / "a", "choice", documents(20), **CHOICE)
    write_task(tmp_path / "b", "choice", documents(20), **CHOICE | {"doc_to_text": "Q: {{question}}"})
    first = load(tmp_path / "a", "choice")
    again, other = load(tmp_path / "a", "choice"), load(tmp_path / "b", "choice")
    assert first.fingerprint("choice", "search") == again.fingerprint("choice", "search")
    different = [(first, "search", None), (first, "report", None), (first, "search", 2), (other, "search", None)]
    assert len({task_set.fingerprint("choice", split, limit) for task_set, split, limit in different}) == 4


def test_bad_requests(tmp_path: Path) -> None:
    write_task(tmp_path, "choice", documents(8), **CHOICE)
    write_task(tmp_path, "lost", documents(8), **CHOICE)
    (tmp_path / "lost.test.jsonl").unlink()
    write_task(tmp_path, "broken", documents(8), **CHOICE | {"output_type": "guessing"})
    (tmp_path / "group.yaml").write_text(
        "group: pair\ntask: [choice]\naggregate_metric_list:\n  - {metric: acc, aggregation: mean}\n"
    )
    for names, message in (
        (["choise"], r"unknown task 'choise'; did you mean .*choice"),
        (["choice", "choice:acc"], "choice is asked for twice"),
        (["choice", "pair"], "choice is asked for twice"),
        (["lost"], r"task lost \(.*lost.yaml\) cannot be built"),
        (["broken"], "task broken .* cannot be built: .*guessing"),
        ([], "no task was given"),
    ):
        with pytest.raises(RequestError, match=message):
            load(tmp_path, *names)
    with pytest.raises(RequestError, match="is not a folder"):
        load(tmp_path / "none", "choice")


def test_lm_evals_own_tasks_are_indexed_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_task(tmp_path, "choice", documents(8), **CHOICE)
    asked: list[bool] = []
    original = TaskManager.__init__

    def spy(self: TaskManager, *args: Any, **kwargs: Any) -> None:
        asked.append(kwargs["include_defaults"])
        original(self, *args, **kwargs)

    monkeypatch.setattr(TaskManager, "__init__", spy)
    load(tmp_path, "choice")
    assert asked == [False]


def test_no_torch_is_imported(tmp_path: Path) -> None:
    """Tasks and a saved speed table serve where no network can run."""
    modules = "evals.scoring.tasks, evals.speed.table, evals.scoring.prefix_tree"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_prompts_are_rendered_once_for_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run reads the same prompts from disk; a changed template, or other documents, are rendered anew."""
    kept = tmp_path / "requests"
    settings: dict[str, Any] = CHOICE | {"num_fewshot": 2}
    write_task(tmp_path, "choice", documents(30), **settings)

    def prompts(folder: Path) -> list[Any]:
        task_set = load(folder, "choice", kept=kept)
        prompts = [i.args for _, docs in task_set.documents("all")["choice"] for d in docs for i in d.instances]
        task_set.keep(kept)
        return prompts

    first = prompts(tmp_path)
    assert len(list(kept.iterdir())) == 1

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("rendered again")

    with monkeypatch.context() as patch:
        patch.setattr(ConfigurableTask, "fewshot_context", refuse)
        assert prompts(tmp_path) == first
        write_task(tmp_path, "choice", documents(30), **settings | {"doc_to_text": "{{question}} so"})
        with pytest.raises(RequestError, match=r"document \d+ \(rendered again\)"):
            prompts(tmp_path)
    assert prompts(tmp_path) != first
