"""Training text that holds report documents is found; phrases and short texts are not taken for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compressor.cli import run
from supernet.training.contamination import LEAST, PHRASE, RUN, Contamination, Repeats
from tests.support import tiny

WORDS = [f"word{number}" for number in range(40)]


def test_a_run_of_words_is_found_whatever_the_case_and_punctuation() -> None:
    contamination = Contamination([("a", [" ".join(WORDS[:20])]), ("b", [" ".join(WORDS[20:])])])
    contamination.show("Before. " + ", ".join(WORDS[3 : 3 + RUN]).upper() + "! after")
    assert contamination.contaminated == {"a"} and contamination.documents == 2


def test_one_word_fewer_is_not_enough() -> None:
    contamination = Contamination([("a", [" ".join(WORDS[:20])])])
    contamination.show(" ".join([*WORDS[: RUN - 1], "other", *WORDS[RUN:20]]))
    assert contamination.contaminated == set()


def test_a_shorter_document_must_be_there_whole() -> None:
    contamination = Contamination([("whole", [" ".join(WORDS[:LEAST])]), ("short", ["once upon a time"])])
    contamination.show("once upon a time " + " ".join(WORDS[: LEAST - 1]))
    assert contamination.contaminated == set()
    contamination.show(" ".join(WORDS[:LEAST]))
    assert contamination.contaminated == {"whole"}


def test_what_many_documents_say_is_a_phrase() -> None:
    contamination = Contamination([("a", [" ".join(WORDS[:RUN])])])
    for _ in range(PHRASE):
        contamination.show(" ".join(WORDS[:RUN]))
    assert contamination.contaminated == {"a"}
    contamination.show(" ".join(WORDS[:RUN]))
    assert contamination.contaminated == set()


def test_what_repeats_is_counted_by_its_length() -> None:
    repeats = Repeats()
    assert repeats.share == 0
    for text in ("one", "another one", "one", "one"):
        repeats.show(text)
    assert repeats.share == 6 / 20


@pytest.mark.parametrize("times", [1, 2])
def test_documents_that_are_there_twice_are_warned_of(
    times: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is held out of them may be trained on."""
    tiny.checkpoint(tmp_path / "m")
    rows = [json.dumps({"text": f"{number} {' '.join(WORDS)} {number * 7}"}) + "\n" for number in range(60)]
    (tmp_path / "d.jsonl").write_text("".join(rows * times))
    arguments = ["finetune", str(tmp_path / "m"), "--data", str(tmp_path / "d.jsonl"), "--train-tokens", "0"]
    arguments += ["--set", "finetuning.sequence_length=32", "--output", str(tmp_path / "run"), "--device", "cpu"]
    assert run(arguments) == 0
    warned = "50% of what is read of" in " ".join(capsys.readouterr().err.split())
    assert warned == (times == 2)


def test_the_user_is_warned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.checkpoint(tmp_path / "m")
    tiny.data(tmp_path / "d.jsonl")
    folder = tiny.task(tmp_path / "tasks")
    documents = folder / "tiny_choice.jsonl"
    rows = [json.loads(line) for line in documents.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["context"] = " ".join(f"{word}{number}" for word in WORDS[:RUN])
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "d.jsonl").open("a") as data:
        data.writelines(json.dumps({"text": row["context"]}) + "\n" for row in rows)
    arguments = ["finetune", str(tmp_path / "m"), "--data", str(tmp_path / "d.jsonl"), "--train-tokens", "0"]
    arguments += ["--tasks", "tiny_choice", "--include-path", str(folder), "--output", str(tmp_path / "run")]
    assert run([*arguments, "--device", "cpu", "--json"]) == 0
    output = capsys.readouterr()
    count = json.loads(output.out)["finetune"]["overlapping_report_documents"]
    assert 0 < count < len(rows)  # the report's share of them
    assert f"warning: {count} of {count} report documents share" in " ".join(output.err.split())
