"""Training data: what is read, what is learnt from, and that packed documents do not see one another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from supernet.common.errors import RequestError
from supernet.training.data import IGNORED, Batch, Blocks, encode_row, pack
from supernet.training.sources import hub_dataset, hub_rows, kind_of, plain_text, read_rows
from supernet.training.traces import trace
from tests.support import tiny

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}\n{% else %}A:{{ m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


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


def test_conversations_are_learnt_from_where_the_assistant_speaks() -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "q"), ("assistant", "z")]
    messages = [{"role": role, "content": text} for role, text in turns]
    ids, labels = encode_row({"messages": messages}, tokenizer, "x")
    assert tokenizer.decode(ids) == "U:hi\nA:yo\nU:q\nA:z\n"
    assert learnt(ids, labels) == "yo\nz\n"
    ids, labels = encode_row({"prompt": messages[:3], "completion": messages[3:]}, tokenizer, "x")
    assert tokenizer.decode(ids) == "U:hi\nA:yo\nU:q\nA:z\n"
    assert learnt(ids, labels) == "z\n"


def test_completions_are_learnt_from_and_prompts_are_not() -> None:
    ids, labels = encode_row({"prompt": "2+2=", "completion": "4"}, tiny.byte_tokenizer(), "x")
    assert tiny.byte_tokenizer().decode(ids) == "2+2=4</s>" and learnt(ids, labels) == "4</s>"
    with pytest.raises(RequestError, match="both"):
        encode_row({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, tiny.byte_tokenizer(), "x")


def test_conversations_need_a_chat_template() -> None:
    with pytest.raises(RequestError, match="chat template"):
        encode_row({"messages": [{"role": "assistant", "content": "x"}]}, tiny.byte_tokenizer(), "x")


def test_plain_text_jsonl_and_parquet_are_read_in_order(tmp_path: Path) -> None:
    import pandas

    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    pandas.DataFrame({"text": ["three", "four"]}).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text('{"prompt": "f", "completion": "ive"}\n{"text": "six"}\n')
    rows = list(read_rows(str(tmp_path)))
    assert [row["text"].strip() for row in rows[:4]] == ["one", "two", "three", "four"]
    assert (rows[4]["prompt"], rows[4]["completion"], rows[5]["text"]) == ("f", "ive", "six")


def test_a_hub_dataset_is_read_by_name_configuration_and_split(tmp_path: Path) -> None:
    """The same call on a folder laid out as the hub lays them out."""
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: a.jsonl\n"
        "  - split: validation\n    path: b.jsonl\n- config_name: other\n  data_files: c.jsonl\n---\n"
    )
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")

    def texts(config: str | None, split: str) -> list[str]:
        return [row["text"] for row in hub_rows(str(tmp_path), config, split)]

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
        ("a.jsonl", '{"text": "a"}\n{"words": "b"}\n', "line 2 has neither"),
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


def test_columns_of_other_names_are_refused(tmp_path: Path) -> None:
    import pandas

    pandas.DataFrame({"words": ["a"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(RequestError, match=r"row 1 has neither .* \(it has words\)"):
        list(read_rows(str(tmp_path / "a.parquet")))


def test_every_epoch_visits_every_block_once_in_its_own_order() -> None:
    blocks = Blocks(torch.arange(7, dtype=torch.int32)[:, None, None].expand(7, 3, 1), "", 7)
    seen: Any = torch.cat([blocks.batch(step, 2, seed=1).ids.flatten() for step in range(7)]).tolist()
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7))
    assert seen[:7] != seen[7:]
    assert seen[4:6] == blocks.batch(2, 2, seed=1).ids.flatten().tolist()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a text", "completion": "and what is no answer"}, "a text"),
        ({"prompt": None, "completion": "x", "text": "a text"}, "a text"),
        ({"messages": "no turns", "text": "a text"}, "a text"),
        ({"prompt": "2 + 2 =", "completion": " 4", "text": "a text"}, "2 + 2 = 4"),
        (
            {"messages": [{"role": "assistant", "content": None}, {"role": "tool"}, {"role": "user", "content": "so"}]},
            "so",
        ),
    ],
)
def test_columns_that_make_no_whole_are_passed_over(row: dict[str, Any], said: str) -> None:
    assert kind_of(row) is not None and plain_text(row) == said
    if kind_of(row) == "text":
        assert (
            encode_row(row, tiny.byte_tokenizer(), "d")[0] == encode_row({"text": said}, tiny.byte_tokenizer(), "d")[0]
        )


def test_the_held_out_part_is_not_trained_on() -> None:
    blocks = Blocks(torch.arange(100, dtype=torch.int32)[:, None, None].expand(100, 3, 1), "", 1)
    training, held_out = blocks.split()
    assert (len(training), len(held_out)) == (84, 16)
    assert not set(training[:].ids.flatten().tolist()) & set(held_out[:].ids.flatten().tolist())
    few = Blocks(blocks.table[:5], "", 1).split()
    assert [len(part) for part in few] == [3, 2]
