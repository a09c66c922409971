"""What can go wrong between text and a network: tokens without a row in the embedding, templates that do not render."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supernet.common.errors import RequestError, reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
}
"""Arguments of `generate` for one greedy continuation as token ids, whatever generation_config.json says."""


def read_tokenizer(folder: Path, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, tried once: some settings that are no good are only met when text is encoded.

    `options` are AutoTokenizer's. Raises `RequestError` that names the folder.
    """
    from transformers import AutoTokenizer

    what = f"{folder}: its tokenizer cannot be used"
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        # What transformers says then names a library that seldom helps.
        what += "; it has no tokenizer.json: save it with one, by save_pretrained where it can be read"
    with reading(what):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
        tokenizer.decode(tokenizer("A text.").input_ids)
        return tokenizer


def tokens_without_row(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[tuple[str, int]]:
    """The tokens, with their ids in order, that the tokenizer has beyond the rows of the embedding."""
    return sorted(((t, i) for t, i in tokenizer.get_vocab().items() if i >= rows), key=lambda token: token[1])


def no_row(token: str, index: int, rows: int) -> str:
    """What is wrong with such a token, and how it is mended."""
    return (
        f"the token {token!r} (id {index}) has no row in the embedding, which has {rows}; resize the embedding in "
        "transformers (resize_token_embeddings), or give the tokenizer that belongs to the model"
    )


def check_rows(what: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, rows: int | None) -> None:
    """Raises `RequestError` where `ids` hold a token that has no row."""
    if rows is not None and ids and (largest := max(ids)) >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise RequestError(f"{what}: {no_row(str(token), largest, rows)}")


def rendering(what: str) -> AbstractContextManager[None]:
    """Within, whatever a chat template raises becomes a `RequestError`: it is a program of the model's author."""
    return reading(f"{what}: the chat template cannot render it")


def template_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """All text that the chat templates of a tokenizer hold: what they print, and strings in their code."""
    import jinja2

    template = tokenizer.chat_template or {}
    texts = []
    for text in [template] if isinstance(template, str) else template.values():
        with rendering("the tokenizer"):
            for _, kind, value in jinja2.Environment().lex(text):
                if kind == "data":
                    texts.append(value)
                elif kind == "string":
                    unquoted = value[1:-1].encode("ascii", "backslashreplace")
                    texts.append(unquoted.decode("unicode-escape"))  # as jinja2 does
    return texts
