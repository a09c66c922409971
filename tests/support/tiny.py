"""The tiny Llama, tokenizer, data and task of all tests: made in a moment, random, and complete.

`export_networks` makes both a little larger for tests of packages; `tiny_families` has one network of each family.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "tie_word_embeddings": True,
}
WORDS = ["the", "cat", "dog", "sun", "sees", "likes", "a", "red", "big", "old", "house", "tree", "and", "then"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and three marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    vocab |= {"<s>": 256, "</s>": 257, "<pad>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=64
    )


def llama(seed: int = 0, **sizes: object) -> LlamaForCausalLM:
    """A random Llama, in evaluation mode."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | sizes))).eval()


def checkpoint(folder: Path, seed: int = 0, **sizes: object) -> Path:
    """The random Llama with the byte tokenizer, saved as a Hugging Face checkpoint."""
    llama(seed, **sizes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def sentences(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 7))) + "." for _ in range(count)]


def data(file: Path, documents: int = 200) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(documents, 1)))
    return file


def task(folder: Path, name: str = "tiny_choice", documents: int = 24, solved: bool = False) -> Path:
    """A task file with two choices a document; `folder` is what `--include-path` names.

    The random Llama guesses, unless `solved`: its embeddings are tied, so it expects the last letter once more.
    """
    folder.mkdir(exist_ok=True)
    rows = []
    for index, text in enumerate(sentences(documents, 2)):
        context, choices = text[:12], [" cat", " house"]
        if solved:
            last = context[-1]
            choices = [4 * last, "".join(other for other in "xqzvjk" if other != last)[:4]][:: 1 - 2 * (index % 2)]
        rows.append({"context": context, "choices": choices, "gold": index % 2})
    documents_file = folder / f"{name}.jsonl"
    documents_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {documents_file}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{context}}"\n'
        'doc_to_target: "{{gold}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    return folder


def job_recipe(folder: Path) -> dict[str, Any]:
    """The beginning of a recipe for a whole job: a tiny network, text and task, made in a folder."""
    return {
        "model": str(checkpoint(folder / "m")),
        "data": str(data(folder / "d.jsonl")),
        "tasks": ["tiny_choice"],
        "include_path": str(task(folder / "tasks", documents=40)),
    }
