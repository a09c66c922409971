"""A pack is a faithful picture of its spans: each reads its own tokens, at its own positions, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from evals.scoring.encoding import Span
from evals.scoring.prefix_tree import Pack, coarse_sizes, fine_sizes, pack, tokens_read


def seen(packed: Pack, last: bool = False) -> list[set[int]]:
    """The nodes that each node attends to; with `last`, that each row does."""
    sets: list[set[int]] = [set() for _ in range(len(packed.rows) if last else len(packed))]
    for blocks in packed.last if last else packed.blocks:
        for queries, keys, mask, valid in zip(blocks.queries, blocks.keys, blocks.mask, blocks.valid, strict=True):
            for query, row, real in zip(queries, mask, valid, strict=True):
                assert row.any()
                if real:
                    assert not sets[query], "a node is a query once"
                    visible = keys[row].tolist()
                    assert len(set(visible)) == len(visible)
                    sets[query] = set(visible)
    return sets


def random_spans(seed: int, count: int) -> list[Span]:
    rng = np.random.default_rng(seed)
    spans = []
    for _ in range(count):
        if spans and rng.random() < 0.7:
            stem = spans[rng.integers(len(spans))].tokens
            stem = stem[: rng.integers(1, len(stem) + 1)]
        else:
            stem = (0,)
        tokens = (*stem, *(int(t) for t in rng.integers(0, 3, rng.integers(1, 30))))
        spans.append(Span(tokens, int(rng.integers(1, len(tokens)))))
    return spans


@pytest.mark.parametrize("round_up", [fine_sizes, coarse_sizes])
@pytest.mark.parametrize("block", [1, 4, 64])
@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_every_span_is_read_whole_and_alone(
    seed: int, max_tokens: int, block: int, round_up: Callable[[int], int]
) -> None:
    spans = random_spans(seed, 40)
    scored: dict[int, list[int]] = {}
    for packed in pack(spans, max_tokens, block=block, round_up=round_up):
        longest = max(len(spans[i].tokens) for i in packed.owner)
        assert len(packed) <= max(max_tokens, longest)
        visible = seen(packed)
        assert seen(packed, last=True) == [visible[node] for node in packed.rows]
        for node, row in zip(packed.rows[packed.at], range(len(packed.at)), strict=True):
            span = spans[packed.owner[row]]
            chain = sorted(visible[node], key=lambda n: packed.positions[n])
            done = len(scored.setdefault(packed.owner[row], []))
            length = len(span.tokens) - span.scored + done
            assert packed.positions[chain].tolist() == list(range(length))
            assert tuple(packed.tokens[chain]) == span.tokens[:length]
            scored[packed.owner[row]].append(packed.targets[row])
        assert len(set(packed.rows)) == len(packed.rows)
    for i, span in enumerate(spans):
        assert tuple(scored[i]) == span.tokens[-span.scored :]


def test_what_spans_share_is_one_node() -> None:
    preamble = tuple(range(100, 150))
    spans = [Span((*preamble, question, answer), 1) for question in range(3) for answer in range(60, 64)]
    (packed,) = pack(spans, 10_000)
    assert len(packed) == tokens_read(spans) == 50 + 3  # the answers are only scored
    assert len(packed.rows) == 3 and len(packed.at) == 12


def test_rows_of_logits_are_bounded() -> None:
    spans = [Span(tuple(range(10 * i, 10 * i + 10)), 9) for i in range(10)]
    packs = pack(spans, 10_000, max_rows=20)
    assert [len(packed.rows) for packed in packs] == [18] * 5
