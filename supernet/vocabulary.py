"""Which tokens of a vocabulary stay when it is cut: pure functions over tokenizer.json. No torch.

Vocabularies are cut to the tokens of some text ("Load What You Need", Abdaoui et al., arXiv 2010.05609; Ushio et al.,
arXiv 2305.15020). Counts alone deceive, since other text has other rare tokens: the order of a tokenizer's merges (of
its scores, for Unigram) is its own memory of what is frequent, so it is a prior that counts are added to.

A token that stays needs the tokens that it is merged from. An order of tokens in which these come first is closed at
every length: any beginning of it is a vocabulary that splits text of its own tokens as the whole one does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from supernet.common.errors import RequestError
from supernet.common.formatting import parse_parameters

Described = Mapping[str, Any]
"""tokenizer.json."""

KINDS = ("BPE", "Unigram")
"""Types of a tokenizer's model that can be cut."""
MULTIPLE = 64
"""Rows of an embedding that is cut: a multiple of this, which kernels and quantization like."""
PRIOR = 0.2
"""Weight of the prior: counts are of so many tokens more, as a share of those counted, that follow Zipf's law over the
order of the merges. Less forgets other text, more the text that was counted (docs/results.md)."""
ENOUGH, ENOUGH_OF_TASKS = 0.999, 0.98
"""Shares of the tokens that `auto` covers of text that was not counted, and of such documents of tasks. Documents of
other domains have rare words of all kinds: 99.9 % of three tasks' tokens are nearly all of SmolLM2's vocabulary."""
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""Tokens of the bytes of what a tokenizer with byte fallback has no other token for."""
SPACE = "▁"
"""What stands for a space in SentencePiece's tokens. Spelled in bytes, decoders would not make a space of it."""


def ids_of(described: Described) -> dict[str, int]:
    """The id of every token, those of added tokens among them.

    Raises `RequestError` for a tokenizer of a kind that cannot be cut.
    """
    model = described["model"]
    kind = model.get("type")
    if kind not in KINDS:
        raise RequestError(f"--vocabulary: a tokenizer of type {kind} cannot be cut, only {' and '.join(KINDS)}")
    for mark in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(mark):
            raise RequestError(f"--vocabulary: a BPE tokenizer with {mark} ({model[mark]!r}) cannot be cut")
    tokens = model["vocab"] if kind == "BPE" else {token: number for number, (token, _) in enumerate(model["vocab"])}
    return {**tokens, **{added["content"]: added["id"] for added in described["added_tokens"]}}


def pairs_of(described: Described) -> list[tuple[str, str]]:
    """The merges of a BPE tokenizer in their order; none of a Unigram one."""
    merges = described["model"].get("merges", [])
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in merges)
    return [(first, second) for first, second in pairs]


def merged(symbols: Sequence[str], ranks: Mapping[tuple[str, str], int]) -> tuple[list[str], list[str]]:
    """What byte-pair encoding makes of symbols, and every token that it merged on the way, in order: of all pairs the
    one of the lowest rank first, the leftmost of equals."""
    left, products = list(symbols), []
    while len(left) > 1:
        rank, at = min((ranks.get(pair, math.inf), i) for i, pair in enumerate(pairwise(left)))
        if rank == math.inf:
            break
        left[at : at + 2] = [left[at] + left[at + 1]]
        products.append(left[at])
    return left, products


@dataclass(frozen=True)
class Tokens:
    """The tokens of a tokenizer, and how they hang together.

    `rank`: each token's place in the tokenizer's own order of what is frequent, from 0. `parts`: the tokens that text
    passes on its way to a token; each beginning of them is closed. Tokens that no text is split into have no rank.
    """

    ids: Mapping[str, int]
    rank: Mapping[int, int]
    parts: Mapping[int, tuple[int, ...]]
    fallback: frozenset[int]
    """What keeps all text encodable: bytes, or characters where there is no byte fallback."""

    @classmethod
    def read(cls, described: Described) -> Tokens:
        """Raises `RequestError` for a tokenizer of a kind that cannot be cut."""
        ids = ids_of(described)
        if described["model"]["type"] == "Unigram":
            return _unigram(described, ids)
        return _bpe(described, ids)

    def __len__(self) -> int:
        return len(self.ids)


def _bpe(described: Described, ids: Mapping[str, int]) -> Tokens:
    """Of byte-pair encoding: where no text can be merged to a token, it is only found whole (`ignore_merges`)."""
    model = described["model"]
    ranks: dict[tuple[str, str], int] = {}
    products: dict[str, int] = {}
    for number, pair in enumerate(pairs_of(described)):
        ranks.setdefault(pair, number)
        products.setdefault("".join(pair), number)
    to_bytes = bool(model.get("byte_fallback"))
    rank: dict[int, int] = {}
    parts: dict[int, tuple[int, ...]] = {}
    for token, number in model["vocab"].items():
        symbols = [token] if token in BYTES and to_bytes else list(token)
        left, passed = merged(symbols, ranks)
        if left == [token] and all(symbol in ids for symbol in symbols):
            parts[number] = tuple(dict.fromkeys(ids[part] for part in [*symbols, *passed]))
            # Characters are no products; where they have no merge to tell how frequent they are, their id does.
            rank[number] = products.get(token, number)
        elif model.get("ignore_merges"):
            parts[number], rank[number] = (number,), number
    if to_bytes:
        fallback = {ids[token] for token in (*BYTES, SPACE) if token in ids}
    else:
        fallback = {number for token, number in model["vocab"].items() if len(token) == 1}
    return Tokens(ids, rank, parts, frozenset(fallback | _unknown(model.get("unk_token"), ids)))


def _unigram(described: Described, ids: Mapping[str, int]) -> Tokens:
    """Of a unigram language model (Kudo, arXiv 1804.10959): any token stands alone, and its score is its rank."""
    model = described["model"]
    scores = [score for _, score in model["vocab"]]
    by_score = sorted(range(len(scores)), key=lambda number: -scores[number])
    fallback = {number for number, (token, _) in enumerate(model["vocab"]) if len(token) == 1}
    if model.get("byte_fallback"):
        fallback = {ids[token] for token in (*BYTES, SPACE) if token in ids}
    # What is unknown costs the lowest score and a penalty: without that token, splits would weigh otherwise.
    fallback.add(by_score[-1])
    if model.get("unk_id") is not None:
        fallback.add(model["unk_id"])
    rank = {number: place for place, number in enumerate(by_score)}
    return Tokens(ids, rank, {number: (number,) for number in rank}, frozenset(fallback))


def _unknown(token: str | None, ids: Mapping[str, int]) -> set[int]:
    return {ids[token]} if token is not None and token in ids else set()


def must_stay(tokens: Tokens, described: Described, named: Iterable[int]) -> list[int]:
    """Ids that every cut keeps: added tokens, fallbacks, tokens that post-processing puts in, and those `named`, each
    behind what it is merged from. A named id that no token has is left to the caller."""
    added = [entry["id"] for entry in described["added_tokens"]]
    present = set(tokens.ids.values())
    wanted = [*added, *sorted(tokens.fallback), *sorted(processed(described)), *(n for n in named if n in present)]
    return _closed(tokens, wanted)


def processed(described: Described) -> set[int]:
    """Ids that the post-processor and the padding of a tokenizer.json name."""
    ids: list[int] = []

    def note(number: int) -> int:
        ids.append(number)
        return number

    renumber_processing(described, note)
    return set(ids)


def renumber_processing(described: Described, new: Callable[[int], int]) -> dict[str, Any]:
    """The keys of tokenizer.json that hold ids beside its model and its added tokens, with `new` ids."""

    def processor(step: Any) -> Any:
        if not isinstance(step, dict):
            return step
        step = dict(step)
        if "processors" in step:
            step["processors"] = [processor(one) for one in step["processors"]]
        if isinstance(step.get("special_tokens"), dict):  # TemplateProcessing
            step["special_tokens"] = {
                name: {**entry, "ids": [new(number) for number in entry["ids"]]}
                for name, entry in step["special_tokens"].items()
            }
        for mark in ("sep", "cls"):  # BertProcessing and RobertaProcessing
            if isinstance(step.get(mark), list):
                token, number = step[mark]
                step[mark] = [token, new(number)]
        return step

    padding = described.get("padding")
    if padding:
        padding = {**padding, "pad_id": new(padding["pad_id"])}
    return {"post_processor": processor(described.get("post_processor")), "padding": padding}


def _closed(tokens: Tokens, wanted: Iterable[int]) -> list[int]:
    """Ids in this order, each behind what it is merged from, none twice."""
    return list(dict.fromkeys(part for number in wanted for part in tokens.parts.get(number, (number,))))


def by_frequency(tokens: Tokens, counts: Mapping[int, float], needed: Sequence[int], prior: float = PRIOR) -> list[int]:
    """All ids that text is split into: those `needed` first, then from the most to the least frequent, each behind what
    it is merged from. Any beginning that holds the needed ones is a vocabulary.

    `counts`: how often each id came up. A token's frequency is its count, and `prior` times all counts, shared out by
    Zipf's law over the tokenizer's own order.
    """
    mass = prior * max(1.0, sum(counts.values())) / math.log(len(tokens) + 1)

    def frequency(number: int) -> float:
        return counts.get(number, 0) + mass / (tokens.rank[number] + 1)

    ranked = sorted(tokens.rank, key=lambda number: (-frequency(number), number))
    return _closed(tokens, [*needed, *ranked])


def coverage(order: Sequence[int], counts: Mapping[int, int]) -> list[float]:
    """The share of counted tokens that the first 0, 1, 2, … of `order` cover."""
    total, covered = max(1, sum(counts.values())), 0
    shares = [0.0]
    for number in order:
        covered += counts.get(number, 0)
        shares.append(covered / total)
    return shares


def rounded(size: int, most: int) -> int:
    """A number of tokens, up to the next multiple of `MULTIPLE`; at most all there are."""
    return min(most, math.ceil(size / MULTIPLE) * MULTIPLE)


def least_covering(order: Sequence[int], counts: Mapping[int, int], enough: float) -> int:
    """The smallest number of tokens from the start of `order` that covers `enough` of the counted tokens."""
    shares = coverage(order, counts)
    return next((number for number, share in enumerate(shares) if share >= enough), len(order))


AUTO = "auto"


def parse_size(size: str, tokens: int) -> int | None:
    """The number of tokens that `0.5`, `50%`, `24k` or `24576` mean of so many; None for `auto`. Raises ValueError."""
    if size == AUTO:
        return None
    try:
        count = parse_parameters(size, tokens)
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"'{size}' is no size of a vocabulary; write a share (0.5), a number of tokens (24k) or auto")
    return count


def is_size(text: str) -> bool:
    """Whether a text is meant as a size of a vocabulary and not as the name of a text."""
    return text == AUTO or re.fullmatch(r"\d*\.?\d+\s*(%|[kmb])?", text.strip().lower()) is not None


def chosen_size(asked: str, order: Sequence[int], needed: int, tokens: int, covering: int) -> int:
    """The number of tokens to keep of `order`, whose first `needed` must stay, of a tokenizer with so many `tokens`.

    `covering` is what `auto` means. Raises `RequestError` for a size below what must stay.
    """
    wanted = parse_size(asked, tokens)
    least = rounded(needed, len(order))
    if wanted is None:
        return max(least, rounded(covering, len(order)))
    size = rounded(wanted, len(order))
    if size < least:
        raise RequestError(
            f"--vocabulary: {asked} is {wanted:,} tokens, and {least:,} must stay (special and added tokens, what the "
            f"chat template and the configuration name, and single bytes or characters); ask for {least} or more"
        )
    return size
