"""Tokenizers in gguf files: those with the rules of each family, trained here, are asked in llama.cpp itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from export.layouts.gguf.runtime import check_gguf
from export.layouts.gguf.tokenizer import sample_texts, tokenizer_kind
from export.package_record import PackageRecord
from supernet.common.errors import RequestError, VerificationError
from tests.support.export_networks import EVEN, cut, probe_ids, tiny_llama, tiny_tokenizer, write_tiny

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WITH_MARKS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def isolated(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS])
RULES: dict[str, tuple[Any, Any, bool]] = {  # pre-tokenizer, normalizer, whole words
    "gpt2": (WORDS, None, False),
    "gpt_neox": (WORDS, normalizers.NFC(), False),
    "starcoder2, granite": (DIGITS, None, False),
    "olmo2": (isolated(SPLIT), None, False),
    "llama 3, smollm3": (isolated(SPLIT), None, True),
    "qwen": (isolated(SPLIT.replace("{1,3}", "")), normalizers.NFC(), False),
    "qwen3.5, composed": (isolated(WITH_MARKS), normalizers.NFC(), False),
    "qwen3.5": (isolated(WITH_MARKS), None, False),
}
UNDERLINE = normalizers.Replace(" ", "▁")
UNDERLINED = normalizers.Sequence([normalizers.Prepend("▁"), UNDERLINE])
TEXTS = [*sample_texts(), "the Brownies and Brownies"]


def write(destination: Path, tokenizer: Any, texts: list[str]) -> PackageRecord:
    model = cut(tiny_llama(vocab_size=max(320, len(tokenizer) + 3)), EVEN)
    options = {"tokenizer": tokenizer, "texts": texts, "probe_ids": probe_ids()[:1]}
    return write_tiny(destination, EVEN, model, layout="gguf-f32", **options)


def tokenizer_of(model: Any, pre: Any, normalizer: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def trained(pre: Any, first: list[str], **options: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of BPE that begins with given tokens, and its merges, learnt from the sample texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    tokenizer.train_from_iterator(
        sample_texts() * 2, trainers.BpeTrainer(vocab_size=640, special_tokens=first, show_progress=False, **options)
    )
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


@pytest.mark.parametrize("name", RULES)
def test_byte_level_tokenizers(name: str, tmp_path: Path) -> None:
    pre, normalizer, whole_words = RULES[name]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary, merges = trained(pre, ["<s>", "</s>"], initial_alphabet=alphabet)
    vocabulary["ĠBrownies"] = len(vocabulary)  # which no merge leads to
    tokenizer = tokenizer_of(models.BPE(vocabulary, merges, ignore_merges=whole_words), pre, normalizer)
    assert (vocabulary["ĠBrownies"] in tokenizer(TEXTS[-1]).input_ids) == whole_words
    result = check_gguf(write(tmp_path / "p", tokenizer, TEXTS))
    assert result["tokenizer_equal"] == 401 and ("tokenized" in result) == (normalizer is not None)


@pytest.mark.parametrize("name", ["llama, phi3, mixtral", "llama as transformers builds it", "gemma"])
def test_byte_fallback_tokenizers(name: str, tmp_path: Path) -> None:
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    spaces = pre_tokenizers.Metaspace(prepend_scheme="never")
    vocabulary, merges = trained(spaces, first, limit_alphabet=60)  # what is left out takes the bytes
    model = models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    if name == "gemma":
        tokenizer = tokenizer_of(model, pre_tokenizers.Split(" ", "merged_with_previous"), UNDERLINE)
        tokenizer.add_tokens(["\n\n", "\t\t", "▁▁"])
    elif "builds" in name:
        tokenizer = tokenizer_of(model, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), None)
    else:
        tokenizer = tokenizer_of(model, None, UNDERLINED)
    tokenizer.unk_token = "<unk>"
    ids = tokenizer(TEXTS[-1]).input_ids
    assert tokenizer.convert_ids_to_tokens(ids[:1])[0].startswith("▁") == (name != "gemma")
    package = write(tmp_path / "p", tokenizer, TEXTS)
    assert check_gguf(package)["tokenizer_equal"] == 401
    if name == "gemma":  # llama.cpp prints added tokens as they are
        tokens, _ = header(package)
        assert "  " in tokens and "▁▁" not in tokens


def header(package: PackageRecord) -> tuple[list[str], str]:
    """The tokens and the name that a file says."""
    reader = gguf.GGUFReader(package.folder / (package.entry.file or ""))
    fields = reader.fields
    return fields["tokenizer.ggml.tokens"].contents(), fields["general.name"].contents()


def test_tokens_without_a_row_are_left_out_and_phi_is_known_by_name(tmp_path: Path) -> None:
    """Gemma 3 has a token more than rows. Special tokens that take the spaces behind them are Phi-3's."""
    first = ["<unk>", "<s>", "</s>", "<|endoftext|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary, merges = trained(pre_tokenizers.Metaspace(prepend_scheme="never"), first, limit_alphabet=60)
    model = models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = tokenizer_of(model, None, UNDERLINED)
    network = cut(tiny_llama(vocab_size=len(tokenizer)), EVEN)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|user|>", rstrip=True)], "pad_token": "<p>"}
    )
    options = {"tokenizer": tokenizer, "texts": TEXTS, "probe_ids": probe_ids()[:1]}
    package = write_tiny(tmp_path / "p", EVEN, network, layout="gguf-f32", **options)
    tokens, name = header(package)
    assert len(tokens) == network.config.vocab_size and "<|user|>" not in tokens and name.endswith("(phi-3)")
    assert check_gguf(package)["tokenizer_equal"] > 200


def test_composed_text_is_compared(tmp_path: Path) -> None:
    """llama.cpp does not compose characters: where the tokenizer does, both agree on text that is composed."""
    tokenizer, text = tiny_tokenizer(), "cafe\u0301"
    probe = write(tmp_path / "raw", tokenizer, [text]).probe
    assert probe.tokenization[-1] == (text, tokenizer(text).input_ids) and not probe.composed
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    probe = write(tmp_path / "composed", tokenizer, [text]).probe
    assert probe.tokenization[-1] == ("caf\u00e9", tokenizer(text).input_ids) and probe.composed


def test_another_tokenization_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.layouts.gguf.tokenizer.tokenizer_kind", lambda described: ("gpt2", "smollm"))
    package = write(tmp_path / "p", tiny_tokenizer(["in 2024 and 1999 "] * 50), ["it was 1999"])
    with pytest.raises(VerificationError, match=r"llama\.cpp tokenizes"):
        check_gguf(package)


def test_kinds_of_tokenizers() -> None:
    def described(pre: Any, normalizer: Any = None, **options: Any) -> dict[str, Any]:
        tokenizer = Tokenizer(models.BPE(**options))
        if pre is not None:
            tokenizer.pre_tokenizer = pre
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        return json.loads(tokenizer.to_str())

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    assert tokenizer_kind(described(byte_level)) == ("gpt2", "gpt-2")
    assert tokenizer_kind(described(pre_tokenizers.Sequence([digits, byte_level]))) == ("gpt2", "smollm")
    assert tokenizer_kind(described(None, UNDERLINED, byte_fallback=True)) == ("llama", "default")
    for pre, normalizer, named in (
        (pre_tokenizers.Whitespace(), None, "Whitespace"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None, "ByteLevel"),
        (byte_level, normalizers.Lowercase(), "Lowercase"),
        (pre_tokenizers.Split(" ", "removed"), None, "Split"),
        (None, None, "none"),
    ):
        with pytest.raises(RequestError, match=named):
            tokenizer_kind(described(pre, normalizer))
    for pre, normalizer in ((pre_tokenizers.Metaspace(), None), (None, normalizers.Replace("a", "b"))):
        with pytest.raises(RequestError, match="knows no byte-fallback tokenizer with the normalizer"):
            tokenizer_kind(described(pre, normalizer, byte_fallback=True))
    with pytest.raises(RequestError, match="gpt-2 knows no tokenizer with ignore_merges"):
        tokenizer_kind(described(byte_level, ignore_merges=True))
    with pytest.raises(RequestError, match="WordLevel"):
        tokenizer_kind(json.loads(Tokenizer(models.WordLevel({"a": 0}, "a")).to_str()))


def test_sample_texts_are_the_same_everywhere() -> None:
    texts = sample_texts()
    assert texts == sample_texts() and len(texts) == 200 and len(set(texts)) > 190


def test_templates_with_names_are_all_kept(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    (file,) = write(tmp_path / "package", tokenizer, []).folder.glob("*.gguf")
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages[0].content }}"
    assert fields["tokenizer.chat_template.tool_use"].contents() == "{{ tools }}"
