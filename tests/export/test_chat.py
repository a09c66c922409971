"""Talking to packages: the same words in transformers and in llama.cpp, and what a line at a time is answered with."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from compressor.cli import run
from compressor.rates import decoding_rate
from compressor.stages.report_text import continuations
from evals.scoring.encoding import Encoder
from evals.scoring.generation import Generation, Generator
from export.chat import open_speaker
from export.verify import check
from supernet.common.errors import RequestError
from tests.support import tiny
from tests.support.export_networks import EVEN, TEXTS, UNEVEN, cut, tiny_llama, tiny_tokenizer, write_tiny


def test_transformers_and_llama_cpp_say_the_same(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    network = cut(tiny_llama(), EVEN)
    plain = write_tiny(tmp_path / "plain", EVEN, network, layout="uneven")
    file = write_tiny(tmp_path / "file", EVEN, network, layout="gguf", gguf_type="f32", texts=TEXTS)
    folders = [plain.folder, file.folder]
    here, there = (open_speaker(str(folder), "cpu") for folder in folders)
    for text in ("Anna gave", "The cat sat on"):
        assert here.render and here.answer(text, 6) == there.answer(text, 6)
    assert [turn["role"] for turn in there.history] == ["user", "assistant"] * 2


def test_a_text_is_continued_where_there_is_no_template(tmp_path: Path) -> None:
    speaker = open_speaker(str(tiny.checkpoint(tmp_path / "model")), "cpu")
    assert speaker.render is None
    ids = tiny.byte_tokenizer()("the cat").input_ids
    with torch.no_grad():
        expected = tiny.llama().generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, pad_token_id=258)
    assert speaker.answer("the cat", 5) == tiny.byte_tokenizer().decode(
        expected[0, len(ids) :], skip_special_tokens=True
    )
    assert speaker.history == []


def test_what_a_checkpoint_wants_generated_otherwise_is_not_asked_for(tmp_path: Path) -> None:
    """Proofs, chats, samples and rates are of one greedy continuation, as token ids."""
    network = cut(tiny_llama(), EVEN)
    plain = write_tiny(tmp_path / "plain", EVEN, network)
    expected = open_speaker(str(plain.folder), "cpu").answer("Anna gave", 6)
    network.generation_config.update(
        return_dict_in_generate=True, output_scores=True, num_beams=3, num_return_sequences=2
    )
    package = write_tiny(tmp_path / "package", EVEN, network)
    assert check(package.folder)["cached_equals_uncached"]
    assert open_speaker(str(package.folder), "cpu").answer("Anna gave", 6) == expected
    assert decoding_rate(network, 16) > 0
    generator = Generator(network, Encoder(tiny_tokenizer(), network.config))
    settings = Generation(until=[], new=4, arguments={"num_return_sequences": 1})  # in beams, as lm-eval's HFLM does
    assert [len(written) for written in generator.continuations([(5, 6, 7)], settings)] == [4]
    sample = continuations(tiny_tokenizer(), {"Anna": torch.tensor([[5, 6, 7]])}, lambda: network, {}, new=4)
    assert sample.keys() == {"Anna"}


def test_the_oldest_turns_are_forgotten_where_the_context_is_full(tmp_path: Path) -> None:
    package = write_tiny(tmp_path / "package", UNEVEN, cut(tiny_llama(), UNEVEN), layout="uneven")
    speaker = open_speaker(str(package.folder), "cpu")
    while speaker.history[:1] in ([], [{"role": "user", "content": "first"}]):
        speaker.answer("first" if not speaker.history else "and then", 8)
        assert len(speaker.history) < 100
    assert speaker.history[0]["role"] == "user"
    with pytest.raises(RequestError, match="do not fit"):
        speaker.answer("the cat " * 64, 8)


def test_lines_of_stdin_are_answered_beside_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, other = (str(tiny.checkpoint(tmp_path / name, seed)) for name, seed in (("base", 0), ("other", 1)))
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n\nthe dog\n"))
    assert run(["chat", other, "--beside", base, "--max-tokens", "4", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.partition(": ")[0] for line in lines if line.startswith(("other: ", "base: "))]
    assert names == ["other", "base"] * 2 and lines[0].startswith("other: the cat")
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat " * 500 + "\nthe cat\n"))
    assert run(["chat", base, "--max-tokens", "4"]) == 0  # a line that is too long ends nothing
    shown = capsys.readouterr()
    assert "do not fit into its context" in shown.err and len(shown.out.splitlines()) == 1
    with io.TextIOWrapper(io.BytesIO(b"the \xff cat\nthe dog\n"), encoding="utf-8", errors="surrogateescape") as bytes_:
        monkeypatch.setattr("sys.stdin", bytes_)
        assert run(["chat", base, "--max-tokens", "4"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert run(["chat", str(tmp_path / "nowhere")]) == 2
    assert run(["chat", str(tmp_path)]) == 2
    assert run(["chat", base, "--max-tokens", "0"]) == 2
    assert "--max-tokens" in capsys.readouterr().err
