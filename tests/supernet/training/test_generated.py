"""Text that a network writes: each token is what the network says of its own document, and stays as it was drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from supernet.common.errors import RequestError
from supernet.training.data import IGNORED, encode_row, pack_rows
from supernet.training.generated import (
    CONFIDENT,
    Document,
    Template,
    Vocabulary,
    _choose,
    _Page,
    keep_rows,
    missing_rows,
    read_documents,
    rows_file,
    vocabulary_of,
    write_rows,
)
from tests.support import tiny
from tests.support.tiny_families import CONFIGS, tiny_network

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}{{ eos_token }}"
    "{% else %}A:{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
LENGTH = 24


def marks(count: int, **more: Any) -> Vocabulary:
    """A vocabulary for the tiny networks of all families: the first `count` of 101 tokens are marks, the last is none
    at all."""
    known = torch.ones(101, dtype=torch.bool)
    known[100] = False
    return Vocabulary(
        **({"opening": [], "template": None} | more),
        known=known,
        special=frozenset(range(count)),
        firsts=range(count, 100),
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_every_token_is_what_the_network_says_of_the_document_alone(family: str) -> None:
    """Without a cache, and without what stands before the document in its row. Linear attention does see that."""
    model, vocabulary = tiny_network(family), marks(12)
    rows = write_rows(model, vocabulary, range(6), LENGTH, seed=3)
    assert all(sum(len(document.ids) for document in documents) == LENGTH for documents in rows)
    assert sum(map(len, rows)) > 8  # documents did end
    for number, documents in enumerate(rows):
        position = 0
        for document in documents[:1] if family == "qwen3_5_text" else documents:
            assert_follows(model, vocabulary, document, _Page(number, LENGTH, vocabulary, 3).draws[position:])
            position += len(document.ids)


def assert_follows(model: PreTrainedModel, vocabulary: Vocabulary, document: Document, draws: Any) -> None:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([document.ids])).logits[0].masked_fill(~vocabulary.known, -torch.inf)
    sums = logits.softmax(dim=1).double().cumsum(dim=1)
    words = logits.masked_fill(~vocabulary.words, -torch.inf)
    assert document.ids[0] in vocabulary.firsts
    for place, token in list(enumerate(document.ids))[1:]:
        if place <= CONFIDENT:
            assert words[place - 1, token] > words[place - 1].max() - 1e-4
        else:
            before = sums[place - 1, token - 1] if token else 0
            assert before - 1e-5 < draws[place] < sums[place - 1, token] + 1e-5
    assert document.learnt == ([[1 + CONFIDENT, len(document.ids)]] if len(document.ids) > 1 + CONFIDENT else [])
    assert vocabulary.special.isdisjoint(document.ids[:-1])


def test_tokens_are_drawn_by_their_probability() -> None:
    torch.manual_seed(0)
    logits, draws = torch.randn(1, 50), (torch.arange(10_000) + 0.5).double() / 10_000
    known, words = torch.ones(50, dtype=torch.bool), torch.ones(50, dtype=torch.bool)
    known[7], words[logits.argmax()] = False, False
    likeliest, drawn = _choose(logits.expand(10_000, -1), known, words, draws)
    shares = torch.bincount(drawn, minlength=50) / 10_000
    expected = logits[0].masked_fill(~known, -torch.inf).softmax(dim=0)
    assert shares[7] == 0 and (shares - expected).abs().max() <= 1.01e-4
    assert set(likeliest.tolist()) == {int(logits[0].topk(2).indices[1])}


def test_a_row_follows_from_its_number_and_the_seed() -> None:
    model, vocabulary = tiny_network("llama"), marks(12)
    rows = write_rows(model, vocabulary, range(5), LENGTH, seed=0)
    assert write_rows(model, vocabulary, range(3, 5), LENGTH, seed=0) == rows[3:]
    assert write_rows(model, vocabulary, range(5), LENGTH, seed=1) != rows
    assert len({str(row) for row in rows}) == 5


def test_progress_is_told_in_tokens() -> None:
    told: list[int] = []
    write_rows(tiny_network("llama"), marks(3), range(4), LENGTH, seed=0, advance=told.append)
    assert sum(told) == 4 * LENGTH


def test_a_network_that_would_end_at_once_still_says_something() -> None:
    """Where the likeliest token is always a mark, the likeliest word is taken."""
    model = tiny_network("llama")
    with torch.no_grad():
        model.lm_head.weight[:12] *= 50
    rows = write_rows(model, marks(12), range(4), LENGTH, seed=0)
    for document in (document for row in rows for document in row[:-1]):
        assert len(document.ids) > 1 + CONFIDENT


def test_logits_that_are_no_numbers_are_refused() -> None:
    model = tiny_network("llama")
    with torch.no_grad():
        model.lm_head.weight[50:] = torch.inf
    with pytest.raises(RequestError, match="in float32 the base's logits are no numbers"):
        write_rows(model, marks(3), range(4), LENGTH, seed=0)


def test_what_the_vocabulary_of_a_tokenizer_is() -> None:
    tokenizer = tiny.byte_tokenizer()
    config = tiny.llama().config
    vocabulary = vocabulary_of(tokenizer, config, 300, LENGTH)  # an embedding with more rows than there are tokens
    assert vocabulary.known.nonzero().flatten().tolist() == list(range(259))
    assert vocabulary.special == {256, 257, 258} and list(vocabulary.firsts) == list(range(256))
    assert list(vocabulary.opening) == [] and vocabulary.template is None
    config.eos_token_id = [65, 66]
    assert vocabulary_of(tokenizer, config, 300, LENGTH).special == {65, 66, 256, 257, 258}
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = None
    config.eos_token_id = None
    assert 65 not in vocabulary_of(tokenizer, config, 259, LENGTH).special


def test_a_document_begins_as_the_tokenizer_begins_it() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    model = tiny.llama()
    vocabulary = vocabulary_of(tokenizer, model.config, 259, LENGTH)
    (document, *_), *_ = write_rows(model, vocabulary, range(1), LENGTH, seed=0)
    assert document.ids[0] == 256 and document.ids[1] in vocabulary.firsts
    assert document.learnt[0][0] == 2 + CONFIDENT


def chatting() -> Any:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_every_second_row_is_a_conversation_of_which_answers_are_learnt() -> None:
    tokenizer, model = chatting(), tiny.llama(seed=1)
    with torch.no_grad():  # at every other place the end mark is likely, so that turns end
        model.lm_head.weight[257] *= 10
    vocabulary = vocabulary_of(tokenizer, model.config, 259, 64)
    encoded = [tokenizer(text, add_special_tokens=False).input_ids for text in ("<s>U:", "</s>A:", "</s>U:")]
    assert vocabulary.template == Template(*encoded)
    rows = write_rows(model, vocabulary, range(12), 64, seed=0)
    assert [any(document.chat for document in row) for row in rows] == [False, True] * 6
    answers = turns = 0
    for document in (document for row in rows[1::2] for document in row):
        text = tokenizer.decode(document.ids)
        assert text.startswith("<s>U:"[: len(text)])
        if text.count("</s>A:") > 1:
            turns += 1
        for start, stop in document.learnt:
            answers += 1
            assert tokenizer.decode(document.ids[:start]).endswith("</s>A:")
            assert vocabulary.special.isdisjoint(document.ids[start : stop - 1])
    assert answers > 6 and turns > 0


def test_a_question_without_an_end_is_answered_after_a_quarter_of_a_row() -> None:
    tokenizer, model = chatting(), tiny.llama()
    vocabulary = vocabulary_of(tokenizer, model.config, 259, 64)
    endless = Vocabulary(vocabulary.known, frozenset(), vocabulary.firsts, [], vocabulary.template)
    _, (document,) = write_rows(model, endless, range(2), 64, seed=0)
    opening, answer = len(vocabulary.template.opening), len(vocabulary.template.answer)  # type: ignore[union-attr]
    assert document.learnt == [[opening + 64 // 4 - 1 + answer, 64]]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only systems speak') }}",
        "{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}</s>{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}" + "long " * 5 + "{{ m.content }}</s>{% endfor %}",
    ],
    ids=["refuses", "changes", "repeats", "marks nothing", "too long"],
)
def test_a_template_that_does_not_do_is_left_out(template: str) -> None:
    tokenizer = chatting()
    tokenizer.chat_template = template
    assert vocabulary_of(tokenizer, tiny.llama().config, 259, LENGTH).template is None


# -- Files ----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_is_trained_on(tmp_path: Path) -> None:
    """Token ids that no text would give, text with line ends of all kinds, and only what was drawn is learnt from."""
    tokenizer = tiny.byte_tokenizer()
    line_ends = tokenizer("\u2028\r\n").input_ids
    assert len(line_ends) == 5
    spans = [[2, 4], [6, 7]]
    rows = [[Document([*line_ends, 200, 201], spans, chat=False)], [Document([256, 3, 257, 200] * 2, [], chat=True)]]
    keep_rows(tmp_path, range(2), rows, tokenizer)
    first, second = read_documents(tmp_path, 2)
    assert (first.ids, first.chat, second.ids, second.chat) == (rows[0][0].ids, False, rows[1][0].ids, True)
    ids, labels = encode_row(first, tokenizer)
    assert ids == rows[0][0].ids
    assert [at for at, label in enumerate(labels) if label != IGNORED] == [2, 3, 6]
    assert [row.ids for row in read_documents(tmp_path, 1)] == [rows[0][0].ids]


def test_a_row_is_a_block(tmp_path: Path) -> None:
    tokenizer, model = tiny.byte_tokenizer(), tiny.llama()
    rows = write_rows(model, vocabulary_of(tokenizer, model.config, 259, LENGTH), range(6), LENGTH, seed=0)
    keep_rows(tmp_path, range(6), rows, tokenizer)
    blocks = pack_rows("generated", read_documents(tmp_path, 5), tokenizer, LENGTH)
    assert blocks[:].ids.tolist() == [[index for document in row for index in document.ids] for row in rows[:5]]


def test_missing_rows_are_found_by_their_files_names(tmp_path: Path) -> None:
    assert missing_rows(tmp_path, 5, 4) == [range(4), range(4, 8)]  # the last portion is whole
    for rows in (range(4), range(10, 12)):
        rows_file(tmp_path, rows).write_text("")
    assert missing_rows(tmp_path, 4, 4) == []
    assert missing_rows(tmp_path, 5, 4) == [range(4, 8)]
    assert missing_rows(tmp_path, 12, 4) == [range(4, 8), range(8, 10)]
    assert missing_rows(tmp_path, 13, 4) == [range(4, 8), range(8, 10), range(12, 16)]
    assert missing_rows(tmp_path, 13, 100) == [range(4, 10), range(12, 112)]


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    row = [Document([1, 2, 3], [[1, 3]], chat=False)]
    for rows in (range(2), range(4, 6)):
        keep_rows(tmp_path, rows, [row, row], tiny.byte_tokenizer())
    assert len(list(read_documents(tmp_path, 2))) == 2
    with pytest.raises(RequestError, match="row 2 is missing"):
        list(read_documents(tmp_path, 3))
    file = rows_file(tmp_path, range(2))
    for text in (
        '{"row": 0, "ids": [1',
        '{"row": 0}',
        '{"row": 0, "ids": [-1], "learnt": [], "chat": 0, "text": ""}',
        "[]",
    ):
        file.write_text(text + "\n")
        with pytest.raises(RequestError, match=f"{file.name}: damaged; remove it"):
            list(read_documents(tmp_path, 2))
