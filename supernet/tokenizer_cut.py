"""Cutting a tokenizer.json to some of its tokens: ids follow one another anew, all else stays as it is. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from supernet.vocabulary import Described, pairs_of, renumber_processing

NAMES_OF_IDS = ("_token_id", "_token_ids", "_tokens_id")
"""How keys end, in config.json and generation_config.json, whose values are ids of tokens."""
LISTS_OF_IDS = (
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "force_words_ids",
    "forced_decoder_ids",
    "sequence_bias",
)
"""Further keys that hold ids, some in lists of lists."""


def new_ids(described: Described, kept: Sequence[int]) -> dict[int, int]:
    """{old id: new id} of the tokens kept: first those of the model, then added ones beside it, each in their order.

    That is how the library numbers added tokens when it reads the file.
    """
    vocabulary = described["model"]["vocab"]
    own = set(vocabulary.values()) if isinstance(vocabulary, Mapping) else set(range(len(vocabulary)))
    ordered = sorted(set(kept), key=lambda number: (number not in own, number))
    return {old: new for new, old in enumerate(ordered)}


def cut_tokenizer(described: Described, new: Mapping[int, int]) -> dict[str, Any]:
    """tokenizer.json with the tokens of `new` only, under their new ids.

    Merges whose parts or product are gone are gone. Normalizer, pre-tokenizer, decoder and template stay.
    """
    model = dict(described["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {token: new[number] for token, number in model["vocab"].items() if number in new}
        kept = model["vocab"]
        model["merges"] = [
            list(pair) for pair in pairs_of(described) if pair[0] in kept and pair[1] in kept and "".join(pair) in kept
        ]
    added = [{**entry, "id": new[entry["id"]]} for entry in described["added_tokens"]]
    return {**described, "model": model, "added_tokens": added, **renumber_processing(described, new.__getitem__)}


def names_ids(key: str) -> bool:
    """Whether a key of a configuration holds ids of tokens."""
    return key.endswith(NAMES_OF_IDS) or key in LISTS_OF_IDS


def named_ids(config: Mapping[str, Any], rows: int) -> list[int]:
    """All ids of tokens that a configuration names and that have one of so many rows of the embedding."""
    ids: list[int] = []

    def note(number: int) -> int:
        ids.append(number)
        return number

    renumbered(config, note)
    return [number for number in dict.fromkeys(ids) if 0 <= number < rows]


def renumbered(config: Mapping[str, Any], new: Callable[[int], int | None]) -> dict[str, Any]:
    """The keys of a configuration that hold ids of tokens, with what `new` makes of each; lists lose what is None."""

    def value(key: str, held: Any) -> Any:
        if isinstance(held, bool) or held is None:
            return held
        if isinstance(held, int):
            return new(held)
        if isinstance(held, list | tuple):
            if key == "forced_decoder_ids":  # pairs of a position and an id
                return [[position, value("", number)] for position, number in held]
            if key == "sequence_bias":  # pairs of ids and a bias
                return [[value("", ids), bias] for ids, bias in held]
            return [one for one in (value("", entry) for entry in held) if one is not None]
        return held

    return {key: value(key, held) for key, held in config.items() if names_ids(key)}
