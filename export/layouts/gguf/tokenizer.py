"""A tokenizer as llama.cpp stores it.

llama.cpp knows pre-tokenizers by name only, not by their rules: a tokenizer whose kind has no name there is refused.
Whether both agree is checked by `export.layouts.gguf.runtime.check_gguf`, which asks llama.cpp itself.

llama.cpp does not compose characters (NFC), which the tokenizers of Qwen and GPT-NeoX do first: they agree on text that
is composed already, as nearly all text is, and are compared on such text. Nor does it leave out the space before a text
that begins with one, as transformers' tokenizer of Llama does: they are compared on text that does not.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from supernet.common.errors import RequestError

if TYPE_CHECKING:
    from gguf import GGUFWriter, TokenType
    from transformers import PreTrainedTokenizerBase

Described = Mapping[str, Any]
"""tokenizer.json, or a part of it."""

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_UNDERLINE_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_UNDERLINE_FIRST = {"type": "Prepend", "prepend": "▁"}
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN3_5_SPLIT = _QWEN2_SPLIT.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
)


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Add the tokenizer to the header; `vocabulary` is the number of rows that the embedding has."""
    kind, pre, described = check_tokenizer(tokenizer)
    tokens, types = _tokens_and_types(described, kind, tokenizer.unk_token_id, vocabulary)
    # 1. Tokens and merges: these as they are, or as the scores that lead to them.
    merges = described["model"]["merges"]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if kind == "llama":
        # SentencePiece merges the pair with the highest score first: that of the earliest merge.
        ranks = {"".join(pair): -float(rank) for rank, pair in reversed(list(enumerate(pairs)))}
        writer.add_token_scores([ranks.get(token, 0.0) for token in tokens])
        writer.add_add_space_prefix(_UNDERLINE_FIRST in _normalizers(described) or _adds_space(described))
    else:
        writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_token_types(types)
    # 2. Special tokens, and which of them are added to a text.
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None and number < vocabulary:
            add(number)
    plain, full = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    writer.add_add_bos_token(full[:1] == [tokenizer.bos_token_id] != plain[:1])
    writer.add_add_eos_token(len(full) > len(plain) and full[-1] == tokenizer.eos_token_id != plain[-1])
    # 3. The chat template, or several with names: one for chats, others for tools and so on.
    if template := tokenizer.chat_template:
        named = isinstance(template, dict)
        writer.add_chat_template(
            [{"name": name, "template": text} for name, text in template.items()] if named else template
        )


def _tokens_and_types(
    described: Described, kind: str, unknown: int | None, vocabulary: int
) -> tuple[list[str], list[TokenType]]:
    """The token of each of `vocabulary` rows of the embedding, and its type; rows without a token get a name."""
    from gguf import TokenType  # an optional dependency

    tokens = [f"[unused {i}]" for i in range(vocabulary)]
    types = [TokenType.UNUSED] * vocabulary
    for token, number in described["model"]["vocab"].items():
        if number < vocabulary:
            tokens[number], types[number] = token, TokenType.NORMAL
            if kind == "llama" and len(token) == 6 and token.startswith("<0x"):
                types[number] = TokenType.BYTE
    for added in described["added_tokens"]:
        number, own = added["id"], not added["special"]
        if number < vocabulary:  # what has no row, no text may hold
            # llama.cpp prints these as they are, and replaces underlines of others only.
            tokens[number] = added["content"].replace("▁", " ") if own and kind == "llama" else added["content"]
            types[number] = TokenType.USER_DEFINED if own else TokenType.CONTROL
    if kind == "llama" and unknown is not None and unknown < vocabulary:
        types[unknown] = TokenType.UNKNOWN
    return tokens, types


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, Described]:
    """llama.cpp's names for a tokenizer and its pre-tokenizer, and its tokenizer.json.

    Raises `RequestError` for a tokenizer that llama.cpp does not know.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise RequestError("the gguf layout needs a tokenizer.json; this tokenizer has none")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    kind, pre = tokenizer_kind(described)
    if kind == "gpt2" and not described["model"]["merges"]:
        raise RequestError("llama.cpp loads no BPE tokenizer without merges")
    return kind, pre, described


def tokenizer_kind(described: Described) -> tuple[str, str]:
    """llama.cpp's names for a tokenizer, given its tokenizer.json, and its pre-tokenizer.

    Raises `RequestError` that says which part llama.cpp has no name for.
    """
    model, pre = described["model"], described.get("pre_tokenizer")
    if model["type"] != "BPE":
        raise RequestError(f"llama.cpp knows no tokenizer of type {model['type']} for these networks (gguf needs BPE)")
    steps = _normalizers(described)
    kinds = [step["type"] for step in steps]
    rules = [_rule(step) for step in (pre or {}).get("pretokenizers", [pre] if pre else [])]
    if model.get("byte_fallback"):
        underlined = steps in ([_UNDERLINE_FIRST, _UNDERLINE_SPACES], [_UNDERLINE_SPACES])
        if underlined and rules in ([], [" "]):  # Gemma's splits at spaces, of which none are left
            return "llama", "default"
        if not steps and _is_whole(pre):  # as transformers builds Llama's
            return "llama", "default"
        raise RequestError(
            f"llama.cpp knows no byte-fallback tokenizer with the normalizer {kinds} and the pre-tokenizer "
            f"{pre and pre['type']}"
        )
    whole_words = bool(model.get("ignore_merges"))
    names = {
        ("bytes+words",): "gpt-2",
        ("digits", "bytes+words"): "smollm",
        (_LLAMA3_SPLIT, "bytes"): "llama-bpe" if whole_words else "dbrx",
        (_QWEN2_SPLIT, "bytes"): "qwen2",
        (_QWEN3_5_SPLIT, "bytes"): "qwen35",
    }
    name = names.get(tuple(rules))
    if name is None or kinds not in ([], ["NFC"]):
        described_rules = f"{', '.join(rules) or 'none'}; normalizer {', '.join(kinds)}"
        raise RequestError(f"llama.cpp has no name for the pre-tokenizer ({described_rules})")
    if whole_words and name != "llama-bpe":
        raise RequestError(f"llama.cpp's pre-tokenizer {name} knows no tokenizer with ignore_merges")
    return "gpt2", name


def strips_behind(described: Described) -> bool:
    """Whether spaces and line ends behind a special token belong to it, in a vocabulary that llama.cpp takes for
    Phi-3's: it looks for these tokens."""
    known = {*described["model"]["vocab"], *(added["content"] for added in described["added_tokens"])}
    strips = any(added["special"] and added["rstrip"] for added in described["added_tokens"])
    return strips and {"<unk>", "<s>", "</s>", "<|endoftext|>"} <= known


def _is_whole(pre: Described | None) -> bool:
    """Whether text is only underlined, and not split."""
    return pre is not None and (pre["type"], pre.get("replacement"), pre.get("split")) == ("Metaspace", "▁", False)


def _adds_space(described: Described) -> bool:
    """Whether a space comes before a text that begins with none."""
    pre = described.get("pre_tokenizer")
    return pre is not None and _is_whole(pre) and pre["prepend_scheme"] != "never"


def _normalizers(described: Described) -> list[Described]:
    """The steps that text goes through before it is split."""
    first = described.get("normalizer")
    return first.get("normalizers", [first]) if first else []


def _rule(step: Described) -> str:
    """One step of a pre-tokenizer, reduced to what distinguishes it from others."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "bytes+words" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and not step.get("invert"):
        if step.get("behavior") == "Isolated":
            return str(step["pattern"].get("Regex"))
        if step.get("behavior") == "MergedWithPrevious":
            return str(step["pattern"].get("String"))
    return kind


def composes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer composes characters (NFC) before it splits text."""
    steps = _normalizers(json.loads(tokenizer.backend_tokenizer.to_str()))
    return any(step["type"] == "NFC" for step in steps)


def tokenization(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[tuple[str, list[int]]]:
    """Texts and their token ids. Texts are composed first where the tokenizer composes them itself, and begin without a
    space where it adds one to such texts alone."""
    if composes(tokenizer):
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    if _adds_space(json.loads(tokenizer.backend_tokenizer.to_str())):
        texts = [stripped for text in texts if (stripped := text.lstrip(" "))]
    return [(text, tokenizer(text, verbose=False).input_ids) for text in texts]


def sample_texts() -> list[str]:
    """Texts on which tokenizers differ: words, digits, contractions, accents, other scripts, code, and spaces between,
    before and behind them. Seeded."""
    rng = random.Random(0)
    words = ["the", "quick", "brown", "Fox", "jumped", "over", "LAZY", "dogs", "didn't", "we've", "I'll", "Anna's"]
    words += ["o'clock", "'re", "naïve", "café", "Straße", "日本語", "привет", "שלום", "🙂", "e\u0301", "½"]
    words += ["7", "42", "1234567", "3.14", "10%", "x=y+1;", "def f(a):", "http://a.b/c?d=e", "...", "—", "(a)", "#!"]
    spaces = [" ", " ", " ", " ", "  ", "   ", "\n", "\n\n", "\t", ", ", ". "]
    texts = []
    for _ in range(200):
        pieces = [rng.choice(words) + rng.choice(spaces) for _ in range(rng.randint(1, 12))]
        text = "".join(pieces)
        texts.append(text.strip() if rng.random() < 0.6 else rng.choice(["", " ", "  ", "\n"]) + text)
    return texts
