"""Many token sequences as one: every distinct prefix once, no padding. No torch.

The sequences of a batch form a tree whose nodes are tokens. A network reads the nodes as one sequence, each at the
position of its depth, and attention lets a node see its ancestors and itself. What sequences share (a few-shot
preamble, a question before its answers, the beginning of a minimal pair) is computed once.

Attention over the whole tree would cost the square of its size, so nodes are cut into *blocks*: runs of consecutive
nodes that have their outside ancestors in common. A block's queries see those ancestors and, under a mask, the block.

After the last attention, only the nodes whose logits are needed matter: `last` are the blocks with those queries.

Two spans `a b c` and `a b d`, where c and d are scored, are the tree a - b with one row of logits, at b, and two
targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evals.scoring.encoding import Span

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of like size, padded with 0.

    `queries` [b, q]: positions among the nodes that are queries. `keys` [b, k]: nodes. `mask` [b, q, k]: true where a
    query sees a key. `valid` [b, q]: false where a query is padding; it sees key 0, so that softmax stays finite.
    """

    queries: Ints
    keys: Ints
    mask: NDArray[np.bool_]
    valid: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Pack:
    """One forward pass over a tree of n nodes, and where the scores of its spans are in its logits.

    `tokens`, `positions` [n]. `rows` [r]: the nodes whose logits are needed. Scored token j is `targets[j]` at logits
    row `at[j]` and belongs to span `owner[j]`, an index into the list of spans that was packed. In `blocks` all nodes
    are queries, in `last` only the rows.
    """

    tokens: Ints
    positions: Ints
    blocks: tuple[Blocks, ...]
    last: tuple[Blocks, ...]
    rows: Ints
    at: Ints
    targets: Ints
    owner: Ints

    def __len__(self) -> int:
        return len(self.tokens)


def pack(
    spans: Sequence[Span],
    max_tokens: int,
    max_rows: int | None = None,
    block: int = 64,
    round_up: Callable[[int], int] | None = None,
) -> list[Pack]:
    """Spans in packs of at most `max_tokens` nodes and `max_rows` rows of logits (a single span may exceed both).

    `block`: nodes that a block may hold before it is cut where the tree branches. `round_up`: sizes of blocks that it
    makes equal are computed together, padded to the largest; by default `fine_sizes`.
    """
    round_up = round_up or fine_sizes
    order = sorted(range(len(spans)), key=lambda i: spans[i].tokens)
    packs: list[Pack] = []
    batch: list[int] = []
    nodes = rows = 0
    previous: tuple[int, ...] = ()
    for i in order:
        tokens = spans[i].tokens[:-1]  # the last token is only scored, never read
        shared = _common_prefix(previous, tokens)
        more, more_rows = len(tokens) - shared, min(spans[i].scored, len(tokens) - shared + 1)
        if batch and (nodes + more > max_tokens or (max_rows is not None and rows + more_rows > max_rows)):
            packs.append(_pack(spans, batch, block, round_up))
            batch, nodes, rows = [], 0, 0
            more, more_rows = len(tokens), spans[i].scored
        batch.append(i)
        nodes, rows, previous = nodes + more, rows + more_rows, tokens
    if batch:
        packs.append(_pack(spans, batch, block, round_up))
    return packs


def tokens_read(spans: Sequence[Span]) -> int:
    """Tokens that a network reads to score all spans: every distinct prefix once, as if all fitted one pass."""
    ordered = sorted({span.tokens[:-1] for span in spans})
    return sum(len(b) - _common_prefix(a, b) for a, b in zip([(), *ordered], ordered, strict=False))


def _pack(spans: Sequence[Span], batch: Sequence[int], block: int, round_up: Callable[[int], int]) -> Pack:
    """A pack of the spans at the indices `batch`, which are in lexicographic order of their tokens: a depth-first walk
    through the tree."""
    # 1. The tree: a node for each token that the span before it does not share; rows and targets of what is scored.
    tokens: list[int] = []
    parents: list[int] = []
    path: list[int] = []  # nodes of the previous sequence, from the root
    previous: tuple[int, ...] = ()
    row_of: dict[int, int] = {}
    at: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for i in batch:
        inputs = spans[i].tokens[:-1]
        del path[_common_prefix(previous, inputs) :]
        for token in inputs[len(path) :]:
            parents.append(path[-1] if path else -1)
            path.append(len(tokens))
            tokens.append(token)
        previous = inputs
        scored = spans[i].scored
        at += [row_of.setdefault(node, len(row_of)) for node in path[len(path) - scored :]]
        targets += spans[i].tokens[-scored:]
        owner += [i] * scored
    # 2. Positions: the depth of each node.
    positions = np.zeros(len(tokens), np.int64)
    for node, parent in enumerate(parents):
        positions[node] = positions[parent] + 1 if parent >= 0 else 0
    # 3. Blocks, with all nodes as queries and with the rows only.
    end = _ends(parents)
    cuts = _cuts(end, block)
    return Pack(
        np.array(tokens, np.int64),
        positions,
        _blocks(cuts, end, {node: node for node in range(len(tokens))}, round_up),
        _blocks(cuts, end, row_of, round_up),
        np.array(list(row_of), np.int64),
        np.array(at, np.int64),
        np.array(targets, np.int64),
        np.array(owner, np.int64),
    )


Cut = tuple[list[int], int, int]
"""A block's outside ancestors, its first node, and one past its last."""


def _ends(parents: Sequence[int]) -> list[int]:
    """One past the last descendant of each node; nodes are in depth-first order."""
    end = list(range(1, len(parents) + 1))
    for node in range(len(parents) - 1, -1, -1):
        if parents[node] >= 0:
            end[parents[node]] = max(end[parents[node]], end[node])
    return end


def _cuts(end: Sequence[int], block: int) -> list[Cut]:
    """The nodes cut into blocks of at most `block` where the tree branches."""
    cuts: list[Cut] = []
    todo: list[Cut] = [([], 0, len(end))]  # runs of sibling subtrees
    while todo:
        ancestors, start, stop = todo.pop()
        while start < stop:
            # 1. As many whole subtrees as fit are one block.
            last = start
            while last < stop and (end[last] - start <= block):
                last = end[last]
            if last > start:
                cuts.append((ancestors, start, last))
                start = last
                continue
            # 2. A subtree that does not fit: its unbranched top is cut evenly, its branches are done later.
            above = ancestors
            chain = start
            while chain < end[start] and end[chain] == end[start]:
                chain += 1
            for first in range(start, chain, block):
                cuts.append((above, first, min(first + block, chain)))
                above = above + list(range(first, min(first + block, chain)))
            if chain < end[start]:
                todo.append((above, chain, end[start]))
            start = end[start]
    return cuts


def _blocks(
    cuts: Sequence[Cut], end: Sequence[int], place: Mapping[int, int], round_up: Callable[[int], int]
) -> tuple[Blocks, ...]:
    """Blocks of like size together. `place`: the nodes that are queries, and their positions among the queries."""
    alike: dict[tuple[int, int], list[tuple[list[int], Cut]]] = {}
    for cut in cuts:
        queries = [node for node in range(cut[1], cut[2]) if node in place]
        if queries:
            size = round_up(len(queries)), round_up(len(cut[0]) + cut[2] - cut[1])
            alike.setdefault(size, []).append((queries, cut))
    ends = np.array(end, np.int64)
    return tuple(_stack(group, ends, place) for _, group in sorted(alike.items(), key=lambda item: item[0]))


def _stack(group: Sequence[tuple[list[int], Cut]], end: Ints, place: Mapping[int, int]) -> Blocks:
    """One `Blocks` of several blocks, each given by the nodes that are its queries and its cut."""
    width = max(len(queries) for queries, _ in group)
    reach = max(len(ancestors) + stop - start for _, (ancestors, start, stop) in group)
    queries = np.zeros((len(group), width), np.int64)
    keys = np.zeros((len(group), reach), np.int64)
    mask = np.zeros((len(group), width, reach), np.bool_)
    valid = np.zeros((len(group), width), np.bool_)
    for b, (query_nodes, (ancestors, start, stop)) in enumerate(group):
        nodes, inside = np.array(query_nodes)[:, None], np.arange(start, stop)
        size, outside, total = len(query_nodes), len(ancestors), len(ancestors) + stop - start
        queries[b, :size] = [place[node] for node in query_nodes]
        valid[b, :size] = True
        keys[b, :outside] = ancestors
        keys[b, outside:total] = inside
        mask[b, :size, :outside] = True
        mask[b, :size, outside:total] = (inside <= nodes) & (nodes < end[inside])  # keys whose subtree holds the query
        mask[b, size:, 0] = True
    return Blocks(queries, keys, mask, valid)


def coarse_sizes(size: int) -> int:
    """Few groups with much padding, for a GPU, where every group costs ten launches: powers of two from 64 on."""
    return max(64, 1 << max(size - 1, 0).bit_length())


def fine_sizes(size: int) -> int:
    """Many groups with little padding, for a CPU: the next power of two below 16, then the next multiple of an eighth
    of one."""
    if size <= 16:
        return 1 << max(size - 1, 0).bit_length() if size else 0
    step = max(8, 1 << (size.bit_length() - 3))
    return -(-size // step) * step


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
