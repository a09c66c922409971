"""Tiny networks and a tiny tokenizer for the tests of packages."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from supernet.architecture import Architecture, LayerSizes
from supernet.families import describe
from supernet.slicing import extract

TEXTS = [
    "Anna gave the red ball to Tom, and Tom gave it back.",
    "Once upon a time there was a quick brown fox: it knew 3 jumps and 12 dogs.",
    "The cat sat on the mat. The dog didn't.\n\nNobody knows why; nobody asked.",
]
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def tiny_tokenizer(texts: list[str] = TEXTS * 3) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=64
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_llama(**sizes: object) -> LlamaForCausalLM:
    """Random, but far from uniform: its next-token distributions have an opinion."""
    torch.manual_seed(0)
    values = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(**values | sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.08 * torch.randn_like(parameter))
    return model


FULL = LayerSizes(4, 2, 96)
EVEN = Architecture(64, (LayerSizes(4, 2, 64), LayerSizes(0, 0, 0), LayerSizes(4, 2, 64), LayerSizes(4, 2, 64)))
UNEVEN = Architecture(64, (FULL, LayerSizes(2, 1, 64), LayerSizes(0, 0, 96), LayerSizes(4, 2, 0)))


def cut(model: nn.Module, architecture: Architecture) -> nn.Module:
    return extract(model, describe(model.config), architecture)


def probe_ids(vocabulary: int = 320, length: int = 24) -> Tensor:
    return torch.randint(vocabulary, (3, length), generator=torch.Generator().manual_seed(5))
