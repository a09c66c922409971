"""Tiny tokenizers of every kind that can be cut, trained in a moment on a few words."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from supernet.vocabulary import BYTES

WORDS = re.findall(
    r"\S+",
    "the cat dog sun sees likes a red big old house tree and then running runner walked walking unhappily station "
    "nation international understanding undone café naïve straße 1999 2024 3.14 hello world tokens tokenizer",
)
ODD = ["日本語", "привет", "🙂", "e\u0301", "½", "\t", "  ", "\n\n", "x=y+1;", "ZZQ"]
"""What the training saw nothing of."""
MARKS = ["<unk>", "<s>", "</s>", "<pad>"]


def texts(count: int, seed: int, odd: float = 0.0) -> list[str]:
    """Random sentences, some words of which are odd ones."""
    rng = random.Random(seed)
    return [
        " ".join(rng.choice(ODD if rng.random() < odd else WORDS) for _ in range(rng.randint(1, 9)))
        for _ in range(count)
    ]


def _trained(tokenizer: Tokenizer, trainer: object) -> dict:
    tokenizer.train_from_iterator(texts(400, 0), trainer)
    return json.loads(tokenizer.to_str())


def _with_bytes(described: dict) -> dict:
    """The same with a token for every byte behind the marks, and byte fallback."""
    model = described["model"]
    model["byte_fallback"] = True
    if model["type"] == "Unigram":
        first, rest = model["vocab"][: len(MARKS)], model["vocab"][len(MARKS) :]
        model["vocab"] = [*first, *([byte, 0.0] for byte in BYTES), *rest]
        return described
    names = sorted(model["vocab"], key=model["vocab"].__getitem__)
    names = [*names[: len(MARKS)], *BYTES, *names[len(MARKS) :]]
    model["vocab"] = {name: number for number, name in enumerate(names)}
    return described


def byte_level() -> dict:
    """As GPT-2, Llama 3, Qwen and SmolLM have it, with a mark behind the model's tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained = _trained(
        tokenizer, trainers.BpeTrainer(vocab_size=460, special_tokens=MARKS, initial_alphabet=sorted(alphabet))
    )
    tokenizer = Tokenizer.from_str(json.dumps(trained))
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return json.loads(tokenizer.to_str())


def byte_level_whole_words() -> dict:
    """The same, as in Llama 3: a word that is a token is not merged."""
    described = byte_level()
    described["model"]["ignore_merges"] = True
    return described


def _metaspace(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def byte_fallback() -> dict:
    """As Llama 2 and Gemma have it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trained = _with_bytes(_trained(tokenizer, trainers.BpeTrainer(vocab_size=220, special_tokens=MARKS)))
    for entry in trained["added_tokens"]:
        entry["special"] = True
    tokenizer = Tokenizer.from_str(json.dumps(trained))
    _metaspace(tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return json.loads(tokenizer.to_str())


def characters() -> dict:
    """BPE of characters, without byte fallback: what was never seen is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _trained(tokenizer, trainers.BpeTrainer(vocab_size=200, special_tokens=MARKS))


def unigram() -> dict:
    """As T5's and many of SentencePiece's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _trained(tokenizer, trainers.UnigramTrainer(vocab_size=180, special_tokens=MARKS, unk_token="<unk>"))


def unigram_byte_fallback() -> dict:
    """The same with a token for every byte."""
    tokenizer = Tokenizer.from_str(json.dumps(_with_bytes(unigram())))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    _metaspace(tokenizer)
    return json.loads(tokenizer.to_str())


KINDS: dict[str, Callable[[], dict]] = {
    "byte-level": byte_level,
    "byte-level-whole-words": byte_level_whole_words,
    "byte-fallback": byte_fallback,
    "characters": characters,
    "unigram": unigram,
    "unigram-byte-fallback": unigram_byte_fallback,
}


def fast(described: dict) -> PreTrainedTokenizerFast:
    """transformers' tokenizer of a tokenizer.json."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
