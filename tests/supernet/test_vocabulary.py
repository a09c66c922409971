"""Which tokens stay, and tokenizers of every kind cut to them: no text is lost, that of kept tokens split as before."""

from __future__ import annotations

from collections import Counter

import pytest

from supernet.common.errors import RequestError
from supernet.tokenizer_cut import cut_tokenizer, named_ids, new_ids, renumbered
from supernet.tokens import template_texts
from supernet.vocabulary import (
    Tokens,
    by_frequency,
    chosen_size,
    coverage,
    is_size,
    least_covering,
    merged,
    must_stay,
    parse_size,
    processed,
    renumber_processing,
    rounded,
)
from supernet.vocabulary_cut import compare_splits
from tests.support.tiny_tokenizers import KINDS, fast, texts


def counted(tokenizer: object, seed: int, odd: float = 0.0) -> Counter[int]:
    return Counter(number for text in texts(40, seed, odd) for number in tokenizer(text).input_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_any_size_keeps_all_text_and_the_splits_of_kept_tokens(kind: str) -> None:
    described = KINDS[kind]()
    whole, tokens = fast(described), Tokens.read(described)
    needed = must_stay(tokens, described, [5])
    order = by_frequency(tokens, counted(whole, 1), needed)
    assert len(order) == len(set(order)) and set(needed) == set(order[: len(needed)])
    tried = [*texts(60, 2), *texts(60, 3, odd=0.3), "", " ", "<s>", "the<|im_start|>cat </s>"]
    unknown = whole.unk_token_id
    split_as_before = 0
    for size in sorted({len(needed), *range(len(needed), len(order), 17), len(order)}):
        new = new_ids(described, order[:size])
        cut = fast(cut_tokenizer(described, new))
        assert len(cut) == size
        for split in compare_splits(whole, cut, new, tried):
            split_as_before += split.kept
            assert split.cut_ids.count(new[unknown]) == split.ids.count(unknown)
    assert split_as_before > 60


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("byte")])
def test_byte_tokenizers_give_every_text_back(kind: str) -> None:
    described = KINDS[kind]()
    tokens = Tokens.read(described)
    needed = must_stay(tokens, described, [])
    new = new_ids(described, needed)
    cut = fast(cut_tokenizer(described, new))
    for text in texts(60, 4, odd=0.5):
        assert cut.decode(cut(text).input_ids, skip_special_tokens=True) == text


def test_a_cut_that_forgets_parts_is_found_out() -> None:
    """Without the closure, words of kept tokens are split otherwise: what the other tests prove can fail."""
    described = KINDS["byte-level"]()
    whole, tokens = fast(described), Tokens.read(described)
    alone = [number for number in whole("international").input_ids if len(tokens.parts.get(number, ())) > 4]
    assert alone
    new = new_ids(described, [*must_stay(tokens, described, []), *alone])
    cut = fast(cut_tokenizer(described, new))
    assert cut("international").input_ids != [new.get(n) for n in whole("international").input_ids]


def test_merges_are_the_library_s() -> None:
    described = KINDS["byte-level"]()
    whole = fast(described)
    ranks = {tuple(pair): number for number, pair in enumerate(described["model"]["merges"])}
    for word in ("international", "runner", "unhappily", "walkedwalking"):
        left, _ = merged(list(word), ranks)
        assert left == whole.tokenize(word)


def test_counts_move_tokens_forward_and_the_order_of_merges_decides_among_the_uncounted() -> None:
    described = KINDS["byte-level"]()
    tokens = Tokens.read(described)
    needed = must_stay(tokens, described, [])
    plain = by_frequency(tokens, {}, needed)
    last = plain[-1]
    assert [n for n in plain if n not in needed] == sorted(set(plain) - set(needed), key=lambda n: tokens.rank[n])
    order = by_frequency(tokens, {last: 1000}, needed)
    assert order.index(last) < len(needed) + len(tokens.parts[last])
    uncounted = [n for n in order if n not in needed and n not in tokens.parts[last]]
    assert uncounted == [n for n in plain if n in set(uncounted)]


def test_coverage_and_what_covers_enough() -> None:
    counts = {7: 90, 3: 9, 5: 1}
    assert coverage([7, 3, 9, 5], counts) == [0.0, 0.9, 0.99, 0.99, 1.0]
    assert [least_covering([7, 3, 9, 5], counts, enough) for enough in (0.9, 0.95, 0.999)] == [1, 2, 4]


def test_sizes() -> None:
    assert [parse_size(size, 1000) for size in ("0.5", "50%", "24k", "128", "auto")] == [500, 500, 24000, 128, None]
    assert [rounded(65, 1000), rounded(64, 1000), rounded(990, 1000)] == [128, 64, 1000]
    assert is_size("auto") and is_size("0.5") and is_size("24k") and not is_size("notes.txt") and not is_size("a/b")
    with pytest.raises(ValueError, match="no size of a vocabulary"):
        parse_size("half", 1000)
    order = list(range(1000))
    assert chosen_size("0.5", order, 100, 1000, 0) == 512
    assert chosen_size("auto", order, 100, 1000, 700) == 704
    assert chosen_size("auto", order, 100, 1000, 3) == 128
    with pytest.raises(RequestError, match=r"128 must stay.*ask for 128 or more"):
        chosen_size("64", order, 100, 1000, 0)


def test_other_kinds_are_refused_by_name() -> None:
    with pytest.raises(RequestError, match="type WordPiece cannot be cut, only BPE and Unigram"):
        Tokens.read({"model": {"type": "WordPiece", "vocab": {"a": 0}}, "added_tokens": []})
    described = KINDS["characters"]()
    described["model"]["end_of_word_suffix"] = "</w>"
    with pytest.raises(RequestError, match="end_of_word_suffix"):
        Tokens.read(described)


def test_ids_in_configurations() -> None:
    config = {
        "eos_token_id": [2, 9],
        "pad_token_id": -1,
        "bos_token_id": None,
        "suppress_tokens": [4, 400],
        "forced_decoder_ids": [[1, 9]],
        "sequence_bias": [[[4, 2], -3.5]],
        "vocab_size": 10,
        "use_cache": True,
    }
    assert named_ids(config, 100) == [2, 9, 4]
    new = {2: 0, 4: 1, 9: 2}
    assert renumbered(config, lambda number: new.get(number, number if number < 0 else None)) == {
        "eos_token_id": [0, 2],
        "pad_token_id": -1,
        "bos_token_id": None,
        "suppress_tokens": [1],
        "forced_decoder_ids": [[1, 2]],
        "sequence_bias": [[[1, 0], -3.5]],
    }


def test_what_a_chat_template_says_stays() -> None:
    described = KINDS["byte-level"]()
    tokenizer = fast(described)
    tokenizer.chat_template = "{% for m in messages %}{{ 'walked\n' + m['content'] }}house{% endfor %}"
    assert template_texts(tokenizer) == ["walked\n", "content", "house"]
    tokenizer.chat_template = None
    assert template_texts(tokenizer) == []
    tokens = Tokens.read(described)
    named = tokenizer("walked").input_ids
    kept = must_stay(tokens, described, named)
    assert set(named) <= set(kept) and not set(tokenizer("station").input_ids) <= set(kept)
    assert all(set(tokens.parts[number]) <= set(kept) for number in named if number in tokens.parts)


def test_post_processing_and_padding_name_ids_that_stay() -> None:
    described = KINDS["byte-fallback"]()
    described["padding"] = {"strategy": "BatchLongest", "pad_id": 300, "pad_token": "x"}
    described["post_processor"] = {
        "type": "Sequence",
        "processors": [
            described["post_processor"],
            {"type": "RobertaProcessing", "sep": ["</s>", 301], "cls": ["<s>", 302]},
        ],
    }
    assert {1, 300, 301, 302} == processed(described)
    new = {number: number - 1 for number in range(1, 400)}
    renumbered_keys = renumber_processing(described, new.__getitem__)
    assert renumbered_keys["padding"]["pad_id"] == 299
    template, roberta = renumbered_keys["post_processor"]["processors"]
    assert template["special_tokens"]["<s>"]["ids"] == [0]
    assert (roberta["sep"], roberta["cls"]) == (["</s>", 300], ["<s>", 301])
