"""Cut checkpoints of every family: the logits of kept tokens are the base's, and every id means what it meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from supernet.checkpoint import open_checkpoint
from supernet.common.errors import RequestError, VerificationError
from supernet.vocabulary import Tokens, by_frequency, must_stay
from supernet.vocabulary_cut import (
    VocabularyCut,
    compare_splits,
    describe_tokenizer,
    ids_in_configurations,
    write_cut,
)
from tests.support.tiny_families import CONFIGS
from tests.support.tiny_tokenizers import KINDS, fast, texts

ROWS_WITHOUT_TOKEN = 5


def saved(folder: Path, network: str, kind: str = "byte-fallback", **settings: object) -> Path:
    """A tiny checkpoint whose embedding has some rows without a token, one of which the configuration names."""
    tokenizer = fast(KINDS[kind]())
    config = CONFIGS[network]()
    config.vocab_size = len(tokenizer) + ROWS_WITHOUT_TOKEN
    config.pad_token_id = len(tokenizer) + 2
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = [2, 3]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def cut_to(source: Path, share: float, folder: Path) -> VocabularyCut:
    checkpoint = open_checkpoint(str(source))
    tokenizer = checkpoint.load_tokenizer()
    described = describe_tokenizer("base", tokenizer)
    tokens, named = Tokens.read(described), ids_in_configurations(checkpoint)
    needed = must_stay(tokens, described, named)
    order = by_frequency(tokens, {}, needed)
    cut = VocabularyCut.of(described, order[: max(len(needed), round(share * len(order)))], named)
    folder.mkdir()
    write_cut(checkpoint, tokenizer, cut, checkpoint.load_model(torch.float32, "cpu"), folder)
    return cut


@pytest.mark.parametrize("network", CONFIGS)
def test_every_family_says_the_same_of_kept_tokens(network: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "base", network)
    cut = cut_to(source, 0.9, tmp_path / "cut")
    base, made = open_checkpoint(str(source)), open_checkpoint(str(tmp_path / "cut"))
    assert made.structure.vocab_size == len(cut.rows) < base.structure.vocab_size
    assert made.structure.tied == base.structure.tied
    whole, small = base.load_tokenizer(), made.load_tokenizer()
    splits = [split for split in compare_splits(whole, small, cut.new, texts(30, 7)) if split.kept]
    assert splits
    networks = [checkpoint.load_model(torch.float32, "cpu") for checkpoint in (base, made)]
    rows = torch.tensor(cut.rows)
    for split in splits[:4]:
        with torch.no_grad():
            expected = networks[0](input_ids=torch.tensor([split.ids])).logits[..., rows]
            logits = networks[1](input_ids=torch.tensor([split.cut_ids])).logits
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_ids_are_renumbered_everywhere(tmp_path: Path) -> None:
    source = saved(tmp_path / "base", "llama", "byte-level")
    config = json.loads((source / "config.json").read_text())
    config |= {"suppress_tokens": [7, 300], "decoder_start_token_id": 410}
    del config["bos_token_id"], config["eos_token_id"]  # defaults name ids too
    (source / "config.json").write_text(json.dumps(config))
    whole = AutoTokenizer.from_pretrained(source)
    cut = cut_to(source, 0.0, tmp_path / "cut")
    small = AutoTokenizer.from_pretrained(tmp_path / "cut")
    written = json.loads((tmp_path / "cut" / "config.json").read_text())
    new = cut.new
    assert written["vocab_size"] == len(cut.rows)
    assert written["suppress_tokens"] == [new[7], new[300]]
    assert written["decoder_start_token_id"] == new[410] != 410
    assert written["pad_token_id"] == new[config["pad_token_id"]] == len(cut.rows) - 1
    assert small.convert_ids_to_tokens(new[410]) == whole.convert_ids_to_tokens(410)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    base = AutoModelForCausalLM.from_pretrained(source)
    for name in ("bos_token_id", "eos_token_id"):
        assert getattr(model.config, name) == new[getattr(base.config, name)]
    assert model.generation_config.eos_token_id == [new[2], new[3]]
    for token in ("<s>", "</s>", "<pad>", "<|im_start|>"):
        assert small.convert_tokens_to_ids(token) == new[whole.convert_tokens_to_ids(token)]
    assert small("the cat").input_ids[0] == small.bos_token_id


def test_a_tied_head_stays_tied_and_one_of_its_own_stays_its_own(tmp_path: Path) -> None:
    for name, tied in (("llama", False), ("llama-rope-biases-tied", True)):
        cut_to(saved(tmp_path / name, name), 0.5, tmp_path / f"{name}-cut")
        assert open_checkpoint(str(tmp_path / f"{name}-cut")).structure.tied is tied


def test_a_cut_is_written_in_the_dtype_it_is_stored_in(tmp_path: Path) -> None:
    source = saved(tmp_path / "base", "llama")
    checkpoint = open_checkpoint(str(source))
    tokenizer = checkpoint.load_tokenizer()
    described = describe_tokenizer("base", tokenizer)
    tokens = Tokens.read(described)
    cut = VocabularyCut.of(described, must_stay(tokens, described, ids_in_configurations(checkpoint)))
    (tmp_path / "cut").mkdir()
    write_cut(checkpoint, tokenizer, cut, checkpoint.load_model(torch.bfloat16, "cpu"), tmp_path / "cut")
    made = open_checkpoint(str(tmp_path / "cut"))
    weight = made.load_model("auto", "cpu").get_input_embeddings().weight
    whole = checkpoint.load_model(torch.float32, "cpu").get_input_embeddings().weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, whole[list(cut.rows)].bfloat16())


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(RequestError, match=r"slow tokenizer, without tokenizer\.json"):
        describe_tokenizer("base", Slow())


def test_a_wrong_cut_is_found_out() -> None:
    described = KINDS["byte-level"]()
    whole, other = fast(described), fast(KINDS["byte-level-whole-words"]())
    new = {number: number + 1 for number in range(len(whole))}
    with pytest.raises(VerificationError, match="in another way"):
        compare_splits(whole, other, new, ["the cat"])
    with pytest.raises(VerificationError, match="the cut tokenizer makes"):
        compare_splits(whole, fast(KINDS["characters"]()), {}, ["the 🙂"])
