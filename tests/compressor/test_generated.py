"""Text that the base writes, in a run: written once, gone on with, appended to, and read by every stage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor import generated, pipeline
from compressor.cli import run
from compressor.early_checks import check_places
from compressor.inputs import text_fingerprint, training_blocks
from compressor.inspection import inspect_job
from compressor.job import Job
from compressor.local_paths import localized, remembered
from compressor.recipe import Recipe
from compressor.recipe_file import read_recipe
from compressor.run import Run
from supernet.common.errors import RequestError
from supernet.training import generated as writing
from supernet.training.data import IGNORED, Blocks
from supernet.training.sources import hub_dataset
from tests.support import ROOT, tiny

RECIPE = """
finetuning: {tokens: 1600, batch_size: 4, sequence_length: 32}
searching: {evaluations: 6, population: 4, limit: 8, objectives: [quality, parameters, held_out_loss]}
repair: {enabled: true, tokens: 512}
healing: {tokens: 640}
targets: {max_params: [0.8]}
"""
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


class Made:
    """A finished run on text that its base wrote, and how it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tiny.checkpoint(folder / "model")
        tokenizer = tiny.byte_tokenizer()
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder / "model")
        tiny.task(folder / "tasks")
        (folder / "recipe.yaml").write_text(RECIPE)
        self.run = folder / "run"

    def call(self, command: str, *more: str, data: str = "generated") -> int:
        """A command that makes or continues the run: its exit status."""
        options = ["--tasks", "tiny_choice", "--include-path", str(self.folder / "tasks"), "--data", data]
        recipe = [str(self.folder / "model"), "--recipe", str(self.folder / "recipe.yaml")]
        return run([command, *recipe, *options, "--output", str(self.run), *more])

    def texts(self) -> dict[str, bytes]:
        """What was written, by file."""
        return {file.name: file.read_bytes() for file in sorted(self.run.glob("data/*/*.jsonl"))}

    def manifest(self, *, stage: str = "supernet") -> dict[str, Any]:
        return json.loads((self.run / stage / "manifest.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    bench = Made(tmp_path_factory.mktemp("generated"))
    assert bench.call("compress") == 0
    return bench


def copied(made: Made, folder: Path) -> Made:
    shutil.copytree(made.folder, folder, dirs_exist_ok=True)
    task = folder / "tasks" / "tiny_choice.yaml"  # it names its documents by an absolute path
    task.write_text(task.read_text().replace(str(made.folder), str(folder)))
    copy = Made.__new__(Made)
    copy.folder, copy.run = folder, folder / "run"
    return copy


def job_of(folder: Path, data: str = "generated", **recipe: Any) -> Job:
    """A job on the tiny checkpoint, made where there is none yet."""
    if not (folder / "model").is_dir():
        tiny.checkpoint(folder / "model")
    (folder / "run").mkdir(exist_ok=True)
    keys = {"finetuning": {"sequence_length": 16, "tokens": 800}, "healing": {"tokens": 0}} | recipe
    return Job(Run(folder / "run"), Recipe(model=str(folder / "model"), data=data, device="cpu", **keys).resolved())


def test_every_stage_reads_one_text(made: Made) -> None:
    assert list(made.texts()) == [f"{row:08d}-{row + 32:08d}.jsonl" for row in range(0, 256, 32)]
    lines = [json.loads(line) for text in made.texts().values() for line in text.decode().split("\n") if line]
    assert {line["row"]: line["chat"] for line in lines} == {row: bool(row % 2) for row in range(256)}
    report = json.loads((made.run / "report.json").read_text())
    assert report["finetune"]["data"] == "text that the base wrote" and report["recipe"]["data"] == "generated"
    assert report["base"]["held_out_loss"] > 0 and len(report["samples"]) == 3 and report.get("hub_dataset") is None
    assert (made.run / "moments" / "manifest.json").is_file() and list((made.run / "repair").iterdir())
    assert "text that the base wrote" in (made.run / "packages" / "best" / "README.md").read_text()


def test_all_is_there_for_later_commands_wherever_the_run_is(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = copied(made, tmp_path / "moved")
    assert moved.call("compress") == 0
    for command in (["pick", "--max-params", "0.9"], ["export"], ["report"]):
        assert run([command[0], str(moved.run), *command[1:]]) == 0
    assert moved.texts() == made.texts()
    assert "writing training text" not in capsys.readouterr().err


def test_more_tokens_extend_the_text_and_cost_no_second_fine_tuning(made: Made, tmp_path: Path) -> None:
    copy = copied(made, tmp_path)
    before, supernet = copy.texts(), copy.manifest()
    assert copy.call("compress", "--heal-tokens", "9000") == 0
    after = copy.texts()
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 2
    assert copy.manifest() == supernet
    assert run(["compare", str(copy.run), "--baselines", "random"]) == 0
    assert len(copy.texts()) > len(after)  # methods are compared on what both budgets ask for together
    report = json.loads((copy.run / "report.json").read_text())
    assert {row["method"] for row in report["comparison"]} == {"ours", "random"}


def test_what_only_healing_reads_is_written_after_the_pick(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It too is compared with the report's documents, and is a stage of its own."""
    bench = Made(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("healing: {tokens: 640}", "healing: {tokens: 9000}"))
    assert bench.call("finetune") == 0
    assert len(bench.texts()) == 8  # 256 rows of 32 tokens
    assert run(["search", str(bench.run)]) == 0 and run(["pick", str(bench.run)]) == 0
    assert len(bench.texts()) == 8
    before = bench.texts()
    assert run(["export", str(bench.run)]) == 0
    after = bench.texts()
    assert len(after) > 8 and {name: after[name] for name in before} == before
    assert json.loads((bench.run / "times.json").read_text())["writing more text"]["ended"]
    last = max((bench.run / "data").glob("*/*.jsonl"))
    lines = [json.loads(line)["text"] for line in last.read_text().splitlines()]
    last.unlink()
    monkeypatch.setattr("compressor.stages.reading.report_texts", lambda job: [("task 7", lines)])
    capsys.readouterr()
    assert run(["export", str(bench.run)]) == 0
    assert bench.texts() == after
    assert "1 of 1 report documents share 13 words" in capsys.readouterr().err.replace("\n", " ")


def test_text_that_is_lost_is_written_again(made: Made, tmp_path: Path) -> None:
    copy = copied(made, tmp_path)
    before = copy.texts()
    first, second, *_ = (copy.run / "data").glob("*/*.jsonl")
    first.unlink()
    second.unlink()
    assert run(["export", str(copy.run)]) == 0
    assert copy.texts() == before


def test_damaged_text_is_named(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = copied(made, tmp_path)
    file = next((copy.run / "data").glob("*/00000000-*.jsonl"))
    file.write_text(file.read_text()[:-9])
    assert run(["export", str(copy.run)]) == 2
    assert f"{file.name}: damaged; remove it" in capsys.readouterr().err.replace("\n", "")


def test_fine_tuning_again_keeps_the_text_and_another_seed_writes_another(made: Made, tmp_path: Path) -> None:
    copy = copied(made, tmp_path)
    before = copy.texts()
    assert copy.call("finetune", "--redo", "finetune") == 0
    assert copy.texts() == before
    assert copy.call("finetune", "--seed", "1") == 2
    assert copy.call("finetune", "--seed", "1", "--redo", "finetune") == 0
    assert len(list((copy.run / "data").iterdir())) == 2


def test_a_stopped_writing_goes_on_with_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kill between two files would leave it."""
    whole = job_of(tmp_path / "whole")
    expected = training_blocks(whole, 800)
    job = job_of(tmp_path / "stopped")
    keep, kept = writing.keep_rows, []

    def stops(folder: Path, rows: range, *rest: Any) -> None:
        if len(kept) == 3:
            raise KeyboardInterrupt
        kept.append(rows)
        keep(folder, rows, *rest)

    monkeypatch.setattr(writing, "keep_rows", stops)
    with pytest.raises(KeyboardInterrupt):
        training_blocks(job, 800)
    monkeypatch.undo()
    again = training_blocks(job, 800)
    assert torch.equal(again.table, expected.table) and again.fingerprint == expected.fingerprint
    files = sorted((tmp_path / "stopped" / "run" / "data").glob("*/*"))
    assert [file.name for file in files] == [f"{row:08d}-{row + 32:08d}.jsonl" for row in range(0, 256, 32)]


def test_two_processes_share_the_writing(tmp_path: Path) -> None:
    alone = job_of(tmp_path)
    expected = training_blocks(alone, 800)
    text = "\n".join(
        [
            "from pathlib import Path",
            "from tests.compressor.test_generated import job_of",
            "from compressor.inputs import training_blocks",
            f"job = job_of(Path({str(tmp_path / 'two')!r}))",
            "line = f'{training_blocks(job, 800).fingerprint} {job.accelerator.process_index}\\n'",
            "print(line, end='', flush=True)",  # in one piece: two processes print
        ]
    )
    (tmp_path / "write.py").write_text(text)
    tiny.checkpoint(tmp_path / "two" / "model")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "write.py")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *launcher], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")[:2]) == [f"{expected.fingerprint} {rank}" for rank in (0, 1)]


# -- How much -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 3_900, 5_000, 100_000, 1_000_000])
def test_a_training_reads_nothing_twice(tmp_path: Path, tokens: int) -> None:
    job = job_of(tmp_path)
    rows = generated.rows_to_read(job, tokens)
    blocks = Blocks(torch.zeros(rows, 3, 16, dtype=torch.int32), "", 0)
    trained = 16 * len(blocks.split()[0])
    assert rows >= 256 and trained >= tokens
    assert rows == 256 or trained < tokens + 3 * 16


def test_a_number_allows_no_more(tmp_path: Path) -> None:
    job = job_of(tmp_path, "generated:1k")
    blocks = training_blocks(job, 100_000)
    assert len(blocks) == 1000 // 16
    unlimited = training_blocks(job_of(tmp_path), 0)
    assert torch.equal(blocks.table, unlimited.table[: len(blocks)])  # the beginning of the same text
    with pytest.raises(RequestError, match=r"generated:20: less than two blocks of 16 tokens; say generated:32"):
        training_blocks(job_of(tmp_path, "generated:20"), 0)
    assert len(training_blocks(job_of(tmp_path, "generated:32"), 0)) == 2


def test_a_number_counts_in_fingerprints_only_where_it_binds(tmp_path: Path) -> None:
    free, wide, tight = (job_of(tmp_path, data) for data in ("generated", "generated:1M", "generated:5k"))
    assert text_fingerprint(free, 0) == text_fingerprint(free, 10**6) == text_fingerprint(wide, 100_000)
    assert text_fingerprint(tight, 0) == text_fingerprint(free, 0)
    assert text_fingerprint(tight, 100_000) != text_fingerprint(free, 100_000)
    other = job_of(tmp_path, seed=1)
    longer = job_of(tmp_path, finetuning={"sequence_length": 32})
    assert len({text_fingerprint(job, 0) for job in (free, other, longer)}) == 3


def test_how_often_text_is_read_over_is_said(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"finetuning": {"sequence_length": 16, "tokens": 9_920}, "healing": {"tokens": 0}}
    assert generated.repeated(job_of(tmp_path, "generated:5k", **keys)) == (
        "fine-tuning reads its 4,736 tokens 2.1 times"
    )
    keys["healing"] = {"tokens": 47_360}
    assert str(generated.repeated(job_of(tmp_path, "generated:5k", **keys))).endswith(
        "2.1 times and healing reads its 4,736 tokens 10.0 times"
    )
    assert generated.repeated(job_of(tmp_path, "generated:5M", **keys)) is None
    assert generated.repeated(job_of(tmp_path, "generated", **keys)) is None


def test_fewer_rows_at_once_where_vocabulary_and_cache_are_large(tmp_path: Path) -> None:
    assert generated.rows_at_once(job_of(tmp_path)) == 32
    tiny.checkpoint(tmp_path / "wide" / "model", vocab_size=4_000_000, hidden_size=8, head_dim=2)
    assert generated.rows_at_once(job_of(tmp_path / "wide")) == 8


def test_tiny_contexts_and_blocks_without_marks(tmp_path: Path) -> None:
    """A context shorter than the blocks that are asked for, and a tokenizer without marks."""
    tiny.checkpoint(tmp_path / "model", max_position_embeddings=9, bos_token_id=None, eos_token_id=None)
    tokenizer = tiny.byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    blocks = training_blocks(job_of(tmp_path), 0)
    assert blocks.length == 9 and len(blocks) == 256
    assert (blocks[:].labels != IGNORED).any(dim=1).all()


def test_a_conversation_that_does_not_fit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.checkpoint(tmp_path / "model")
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = "You are told " + TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    training_blocks(job_of(tmp_path), 0)
    assert "no conversations are written" in capsys.readouterr().err


# -- What else the word may mean ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("generated:", ["'data'", "not a number of tokens", "generated:2M"]),
        ("generated:0", ["'0' is not a number of tokens"]),
        ("generated:abc", ["'abc' is not a number of tokens"]),
        ("generated:-5", ["'-5' is not a number of tokens"]),
        ("generated:0.4", ["'0.4' is not a number of tokens"]),
        ("generated:40", ["less than two blocks of 32 tokens", "generated:64"]),
        ("Generated", ["did you mean generated?"]),
        ("generatd", ["did you mean generated?"]),
    ],
)
def test_near_misses_are_one_line(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: str, words: list[str]
) -> None:
    command = ["compress", str(made.folder / "model"), "--recipe", str(made.folder / "recipe.yaml"), "--data", data]
    tasks = ["--tasks", "tiny_choice", "--include-path", str(made.folder / "tasks")]
    assert run([*command, *tasks, "--output", str(tmp_path / "run")]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in last for word in words), last


def test_columns_of_generated_text_are_refused(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compress", str(made.folder / "model"), "--data", "generated", "--text-key", "body"]
    tasks = ["--tasks", "tiny_choice", "--include-path", str(made.folder / "tasks")]
    assert run([*command, *tasks, "--output", str(tmp_path / "run")]) == 2
    assert "--text-key" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_file_of_the_name_is_said_to_be_left_alone(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "generated").mkdir()
    tiny.data(tmp_path / "generated" / "d.jsonl", 400)
    recipe = read_recipe(None, {"model": "m", "data": "generated"})
    assert remembered(recipe, tmp_path / "run") == {}
    assert localized(recipe, tmp_path / "run", {}).data == "generated"
    pipeline.start(
        read_recipe(made.folder / "recipe.yaml", {"model": str(made.folder / "model"), "data": "generated"}),
        tmp_path / "a",
        tasks_needed=False,
    )
    assert "is read as ./generated" in capsys.readouterr().err
    job = pipeline.start(
        read_recipe(made.folder / "recipe.yaml", {"model": str(made.folder / "model"), "data": "./generated"}),
        tmp_path / "b",
        tasks_needed=False,
    )
    assert "warning" not in capsys.readouterr().err
    assert training_blocks(job, 0).documents > 256 and not (tmp_path / "b" / "data").exists()


def test_it_is_no_dataset() -> None:
    assert hub_dataset("generated") is None and hub_dataset("generated:2M") is None
    assert hub_dataset("generated/text") == "generated/text" and hub_dataset("generator") == "generator"
    for name in ("generated/text", "generator", "genetics"):
        check_places(Recipe(model="owner/model", data=name))
    with pytest.raises(RequestError, match=r"'Generated:2M' is unknown; did you mean generated:2M\?"):
        check_places(Recipe(model="owner/model", data="Generated:2M"))


def test_inspect_expects_the_writing(tmp_path: Path) -> None:
    with_it, without = (inspect_job(job_of(tmp_path, data)) for data in ("generated", "x.jsonl"))
    stages, before = ({row["name"]: row for row in facts["stages"]} for facts in (with_it, without))
    assert stages["writing text"]["budget"] == f"{256 * 16:,} tokens" and stages["writing text"]["seconds"] > 0
    assert "writing text" not in before
