"""Training data: what is read, what is learnt from, and that packed documents do not see one another."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow
import pytest
import torch

from supernet.common.errors import RequestError
from supernet.tokens import tokens_without_row
from supernet.training.data import IGNORED, Batch, Blocks, encode_row, pack
from supernet.training.sources import Row, hub_dataset, hub_rows, local_files, other_files, read_rows
from supernet.training.traces import trace
from tests.support import tiny

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}\n{% else %}A:{{ m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


def rows_of(folder: Path, *rows: object, **options: Any) -> list[Row]:
    """What is read of rows that lie in a JSON lines file."""
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_rows(str(folder / "d.jsonl"), **options))


def learnt(ids: list[int], labels: list[int]) -> str:
    return tiny.byte_tokenizer().decode([i for i, label in zip(ids, labels, strict=True) if label != IGNORED])


def test_packing_joins_documents_with_end_marks_and_counts_positions_anew(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "abc"}\n{"text": "de"}\n{"text": "fgh"}\n')
    tokenizer = tiny.byte_tokenizer()
    blocks = pack(str(file), tokenizer, 5)
    a, b, c, d, e, f, g, h = (tokenizer(letter).input_ids[0] for letter in "abcdefgh")
    batch = blocks[:]
    assert batch.ids.tolist() == [[a, b, c, 257, d], [e, 257, f, g, h]]
    assert batch.labels.tolist() == [[IGNORED, b, c, 257, IGNORED], [e, 257, IGNORED, g, h]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0], [0, 1, 0, 1, 2]]
    assert blocks.documents == 3


def test_packed_documents_do_not_see_one_another(tmp_path: Path) -> None:
    """The second document of a block has the hidden states that it has alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.checkpoint(tmp_path / "m"), dtype=torch.float32).eval()
    ids = torch.tensor([[5, 6, 7, 257, 9, 10, 11, 12]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    packed = trace(model, Batch(ids, ids, positions)).hidden
    alone = trace(model, Batch(ids[:, 4:], ids[:, 4:], positions[:, 4:])).hidden
    unpacked = trace(model, Batch(ids, ids, torch.arange(8)[None])).hidden
    assert torch.allclose(packed[4:], alone, atol=1e-6)
    assert not torch.allclose(packed[4:], unpacked[4:], atol=1e-3)


def test_a_block_with_nothing_to_learn_from_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    rows = [{"prompt": "p" * 40, "completion": "yes"}, {"prompt": "q" * 40, "completion": "no way, never"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    blocks = pack(str(file), tiny.byte_tokenizer(), 8)
    batch = blocks[:]
    assert len(blocks) == 3 and (batch.learnt.sum(1) > 0).all()
    assert learnt(batch.ids.flatten().tolist(), batch.labels.flatten().tolist()) == "yes</s>no way, neve"


def test_conversations_are_learnt_from_where_the_assistant_speaks(tmp_path: Path) -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "q"), ("assistant", "z")]
    messages = [{"role": role, "content": text} for role, text in turns]
    completion = {"prompt": messages[:3], "completion": messages[3:]}
    shared = {"conversations": [{"from": r, "value": t} for r, t in zip(["human", "gpt"] * 2, "abcd", strict=True)]}
    alpaca = {"instruction": "add", "input": "1 2", "output": "3"}
    encoded = [
        encode_row(row, tokenizer) for row in rows_of(tmp_path, {"messages": messages}, completion, shared, alpaca)
    ]
    assert [tokenizer.decode(ids) for ids, _ in encoded] == [
        "U:hi\nA:yo\nU:q\nA:z\n", "U:hi\nA:yo\nU:q\nA:z\n", "U:a\nA:b\nU:c\nA:d\n", "U:add\n\n1 2\nA:3\n",
    ]  # fmt: skip
    assert [learnt(*one) for one in encoded] == ["yo\nz\n", "z\n", "b\nd\n", "3\n"]


def test_messages_are_given_to_the_template_as_it_can_take_them(tmp_path: Path) -> None:
    """Content that is null is empty, parts of text are joined, and a key without a value is not defined."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None}
    (row,) = rows_of(tmp_path, {"messages": [parts, call]})
    assert row.content == [{"role": "user", "content": "ab"}, call | {"content": ""}]
    (columns,) = rows_of(tmp_path, {"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}})
    assert columns.content == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system turn') }}", "no system turn"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages[0].missing.key }}", "has no attribute 'missing'"),
    ],
)
def test_a_chat_that_the_template_cannot_render_is_named(tmp_path: Path, template: str, reason: str) -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = template
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = rows_of(tmp_path, {"text": "fine"}, {"messages": turns})
    with pytest.raises(RequestError, match=rf"d\.jsonl: row 2: the chat template cannot render it \(.*{reason}"):
        encode_row(rows[1], tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE.replace("A:{{ m.content }}", "A:{{ m.content if loop.last else '' }}"),
        TEMPLATE.replace("A:{% endif", "B:{% endif"),
    ],
    ids=["earlier answers are left out", "answers begin otherwise than they are asked for"],
)
def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path, template: str) -> None:
    """What is learnt from would not be what the assistant said."""
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = template
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "q"), ("assistant", "z")]
    (row,) = rows_of(tmp_path, {"messages": [{"role": role, "content": text} for role, text in turns]})
    with pytest.raises(RequestError, match="rewrites earlier turns"):
        encode_row(row, tokenizer)


def test_a_token_without_a_row_in_the_embedding_is_named(tmp_path: Path) -> None:
    tokenizer = tiny.byte_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<new>", "<newer>"])
    assert tokens_without_row(tokenizer, rows) == [("<new>", rows), ("<newer>", rows + 1)]
    rows_of(tmp_path, {"text": "plain text that fills two blocks"}, {"text": "a <newer> b"})
    with pytest.raises(
        RequestError, match=rf"row 2: the token '<newer>' \(id {rows + 1}\) has no row in the embedding"
    ):
        pack(str(tmp_path / "d.jsonl"), tokenizer, 8, rows=rows)
    rows_of(tmp_path, {"text": "plain text that fills two blocks"})
    assert len(pack(str(tmp_path / "d.jsonl"), tokenizer, 8, rows=rows)) > 1


def test_completions_are_learnt_from_and_prompts_are_not(tmp_path: Path) -> None:
    alpaca = {"instruction": "add", "input": "", "output": "3"}
    for row, text, part in zip(
        rows_of(tmp_path, {"prompt": "2+2=", "completion": "4"}, alpaca),
        ("2+2=4</s>", "add\n\n3</s>"),
        ("4</s>", "3</s>"),
        strict=True,
    ):
        ids, labels = encode_row(row, tiny.byte_tokenizer())
        assert tiny.byte_tokenizer().decode(ids) == text and learnt(ids, labels) == part


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, {"messages": [{"role": "assistant", "content": "x"}]})
    with pytest.raises(RequestError, match="row 1: a conversation, but the tokenizer has no chat template"):
        encode_row(row, tiny.byte_tokenizer())


def test_all_kinds_of_files_are_read_in_order_and_others_are_named(tmp_path: Path) -> None:
    import pandas

    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    pandas.DataFrame({"text": ["three", "four"]}).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "c.JSONL").write_text('{"prompt": "f", "completion": "ive"}\n\n{"text": "six"}\n')
    (tmp_path / "d.json").write_text('[{"text": "seven"}, {"text": "2020-01-01"}]')
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "f.jsonl.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf{"text": "eight"}\n'))
    with pyarrow.output_stream(str(tmp_path / "e" / "g.txt.zst"), compression="zstd") as stream:
        stream.write("neun: ä".encode())
    datasets.Dataset.from_dict({"text": ["ten"]}).save_to_disk(tmp_path / "h")
    for unread in (".hidden.jsonl", "notes.csv", "e/f.tar.gz"):
        (tmp_path / unread).write_text("x")
    texts = [row.text.strip() for row in read_rows(str(tmp_path))]
    assert texts == ["one", "two", "three", "four", "five", "six", "seven", "2020-01-01", "eight", "neun: ä", "ten"]
    assert [file.name for file in other_files(str(tmp_path))] == ["f.tar.gz", "notes.csv"]


def test_text_is_split_at_empty_lines_wherever_it_is_read_in_pieces(tmp_path: Path) -> None:
    texts = ["a" * (2**20 - 1), "b" * 2**20, "c\nd"]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    assert [row.text for row in read_rows(str(tmp_path / "a.txt"))] == texts


def test_lines_of_spaces_and_several_empty_ones_separate_as_one_does(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\none\n\n\n  two\nlines\n \t\nthree\n\n\n\n")
    assert [row.text for row in read_rows(str(tmp_path / "a.txt"))] == ["one", "  two\nlines", "three"]


def test_of_several_saved_splits_the_training_split_is_read(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("test", "train")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    assert [row.text for row in read_rows(str(tmp_path / "both"))] == ["train"]
    datasets.DatasetDict({"test": splits["test"]}).save_to_disk(tmp_path / "one")
    assert [row.text for row in read_rows(str(tmp_path / "one"))] == ["test"]
    datasets.DatasetDict({"a": splits["test"], "b": splits["train"]}).save_to_disk(tmp_path / "neither")
    with pytest.raises(RequestError, match="holds a, b, and no split 'train'; name the folder of one split"):
        list(read_rows(str(tmp_path / "neither")))


def test_columns_beside_a_conversation_that_are_not_read_are_known(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    rows = [
        {"messages": turns, "tools": [{"name": "f"}]},
        {"messages": turns, "tools": []},
        {"instruction": "do", "output": "done", "system": "be brief"},
        {"text": "plain", "system": "unix"},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [list(row.unread) for row in read_rows(str(file))] == [["tools"], [], ["system"], []]


def test_rows_without_a_text_are_passed_over_and_counted(tmp_path: Path) -> None:
    skipped = Counter[str]()
    rows = [
        {"text": None, "id": 1}, {"text": None}, {"prompt": "a", "completion": None}, {"messages": []},
        {"text": "half \ud800"}, {"text": "whole"},
    ]  # fmt: skip
    assert [row.text for row in rows_of(tmp_path, *rows, skipped=skipped)] == ["whole"]
    assert skipped == {
        "'text' is null": 2, "'completion' is null": 1, "'messages' is empty": 1, "the text is not valid Unicode": 1
    }  # fmt: skip
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = [{"text": None}, {"text": "x" * 99}, {"messages": [{"role": "user", "content": "a"}]}]
    rows_of(tmp_path, *rows)
    assert pack(str(tmp_path / "d.jsonl"), tokenizer, 8).skipped == {
        "'text' is null": 1, "the assistant says nothing": 1
    }  # fmt: skip


def test_another_column_is_read_where_it_is_named(tmp_path: Path) -> None:
    rows = [{"content": "a", "text": "no"}, {"content": None}, {"content": "b"}]
    assert [row.text for row in rows_of(tmp_path, *rows, text_key="content")] == ["a", "b"]
    with pytest.raises(RequestError, match=r"row 2 has no 'content' \(--text-key\); it has text"):
        rows_of(tmp_path, {"content": "a"}, {"text": "b"}, text_key="content")
    with pytest.raises(RequestError, match=r"row 1: 'content' is a number \(5\), not a text"):
        rows_of(tmp_path, {"content": 5}, text_key="content")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": 5}, r"'text' is a number \(5\), not a text"),
        ({"text": True}, r"'text' is a truth value \(True\), not a text"),
        ({"text": ["a"]}, "'text' is a list, not a text"),
        ({"prompt": "a"}, "'prompt' without 'completion'"),
        ({"prompt": "a", "completion": 1}, r"'completion' is a number \(1\), not a text"),
        (
            {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]},
            "'prompt' and 'completion' must both be texts",
        ),
        ({"instruction": "a"}, "'instruction' without 'output'"),
        ({"messages": "a"}, "'messages' is a text, not a list of messages"),
        ({"messages": [{"content": "a"}]}, "'messages' is a list, not a list of messages with 'role'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1: its content is a part of type"),
        ({"messages": [{"role": "user", "content": 3}]}, r"message 1: its content is a number \(3\), not text"),
        ({"words": "b"}, r"has neither 'text'.* \(it has words\); --text-key names another column"),
        ([1], "is a list, not an object"),
        ("a", "is a text, not an object"),
    ],
)
def test_what_a_row_lacks_is_named(tmp_path: Path, row: object, said: str) -> None:
    with pytest.raises(RequestError, match=rf"d\.jsonl: row 2:? {said}") as refused:
        rows_of(tmp_path, {"text": "fine"}, row)
    assert "\n" not in str(refused.value)


def test_a_hub_dataset_is_read_by_name_configuration_and_split(tmp_path: Path) -> None:
    """The same call on a folder laid out as the hub lays them out."""
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: a.jsonl\n"
        "  - split: validation\n    path: b.jsonl\n- config_name: other\n  data_files: c.jsonl\n---\n"
    )
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")

    def texts(config: str | None, split: str) -> list[object]:
        return [row["text"] for row in hub_rows(str(tmp_path), config, split) if isinstance(row, dict)]

    assert texts("small", "validation") == ["b"] and texts("small", "train") == ["a"]
    assert texts("other", "train") == ["c"]
    with pytest.raises(RequestError, match="neither a local file nor a reachable hub dataset"):
        texts("none", "train")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("org/text", "org/text"),
        ("org/text:small:validation", "org/text"),
        ("text.jsonl", None),
        ("./text", None),
        ("~/text", None),
        ("/data/text", None),
        (str(Path(__file__).parent), None),
    ],
)
def test_hub_datasets_are_known_by_name(source: str, name: str | None) -> None:
    assert hub_dataset(source) == name


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "[" * 10**5, "line 1 is not valid JSON"),
        ("a.json", '{\n"data": []\n}', "one object; write its rows as an array"),
        ("a.json", '[{"text": "a"}', "is not valid JSON"),
        ("a.jsonl.gz", "no gzip", "cannot be read"),
        ("a.arrow", "no arrow", "cannot be read"),
        ("a.jsonl", '{"text": "a"\n', "line 1 is not valid JSON"),
        ("a.parquet", "no parquet", "cannot be read"),
        ("a.csv", "text\n", "expected"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RequestError, match=said) as refused:
        list(read_rows(str(tmp_path / name)))
    assert "\n" not in str(refused.value)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.json"):
        (tmp_path / name).write_bytes('{"text": "ä"}'.encode("utf-16"))
        with pytest.raises(RequestError, match="not text in UTF-8"):
            list(read_rows(str(tmp_path / name)))


def test_a_column_of_another_type_is_refused_in_tables_too(tmp_path: Path) -> None:
    import pandas

    pandas.DataFrame({"text": pandas.to_datetime(["2020-01-01"])}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(RequestError, match="row 1: 'text' is a datetime, not a text"):
        list(read_rows(str(tmp_path / "a.parquet")))


def test_a_source_without_anything_to_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing.jsonl"):
        with pytest.raises(RequestError, match=r"expected \.txt|no such file"):
            local_files(str(tmp_path / name))


def test_every_epoch_visits_every_block_once_in_its_own_order() -> None:
    blocks = Blocks(torch.arange(7, dtype=torch.int32)[:, None, None].expand(7, 3, 1), "", 7)
    seen: Any = torch.cat([blocks.batch(step, 2, seed=1).ids.flatten() for step in range(7)]).tolist()
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7))
    assert seen[:7] != seen[7:]
    assert seen[4:6] == blocks.batch(2, 2, seed=1).ids.flatten().tolist()
    assert seen[:7] != blocks.batch(0, 7, seed=2).ids.flatten().tolist()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a text", "completion": "and what is no answer"}, "a text"),
        ({"prompt": None, "completion": "x", "text": "a text"}, "a text"),
        ({"messages": "no turns", "text": "a text"}, "a text"),
        ({"prompt": "2 + 2 =", "completion": " 4", "text": "a text"}, "2 + 2 = 4"),
        ({"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "so"}]}, "so"),
    ],
)
def test_columns_that_make_no_whole_are_passed_over(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    (read,) = rows_of(tmp_path, row)
    assert read.text == said
    if read.prompt is None and isinstance(read.content, str):
        assert encode_row(read, tiny.byte_tokenizer())[0] == [*tiny.byte_tokenizer()(said).input_ids, 257]


def test_the_held_out_part_is_not_trained_on() -> None:
    blocks = Blocks(torch.arange(100, dtype=torch.int32)[:, None, None].expand(100, 3, 1), "", 1)
    training, held_out = blocks.split()
    assert (len(training), len(held_out)) == (84, 16)
    assert not set(training[:].ids.flatten().tolist()) & set(held_out[:].ids.flatten().tolist())
    few = Blocks(blocks.table[:5], "", 1).split()
    assert [len(part) for part in few] == [3, 2]


def test_a_completion_is_taught_to_end_also_behind_a_start_mark(tmp_path: Path) -> None:
    class Marked:
        """Marks starts, as Llama's tokenizer does, and no ends."""

        bos_token_id, eos_token_id = 1, 2

        def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
            ids = [10 + ord(letter) for letter in text]
            return SimpleNamespace(input_ids=[1, *ids] if add_special_tokens else ids)

    ids, learnt = encode_row(Row("row 1", "b", prompt="a"), Marked())  # type: ignore[arg-type]
    assert ids == [1, 107, 108, 2] and learnt[-2:] == [108, 2]
