"""Tiny packages, and the network and tokenizer that are in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from export.layouts.table import write_layout
from export.package_record import RECORD, PackageRecord
from export.shards import FileRecord
from supernet.architecture import Architecture, LayerSizes
from supernet.families import describe
from supernet.slicing import extract
from tests.support import tiny

TEXTS = [
    "Anna gave the red ball to Tom, and Tom gave it back.",
    "Once upon a time there was a quick brown fox: it knew 3 jumps and 12 dogs.",
    "The cat sat on the mat. The dog didn't.\n\nNobody knows why; nobody asked.",
]
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


# A layer of each kind that an uneven package can have, widths that groups of 32 (INT4) divide, a head of its own.
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}


def tiny_tokenizer(texts: list[str] = TEXTS * 3) -> PreTrainedTokenizerFast:
    """The byte tokenizer with what packages must carry: merges, a marker before every text, and a chat template."""
    tokenizer = tiny.byte_tokenizer().train_new_from_iterator(texts, SIZES["vocab_size"], show_progress=False)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama(**sizes: object) -> LlamaForCausalLM:
    """The tiny Llama in the sizes above, far from uniform: its next-token distributions have an opinion."""
    model = tiny.llama(**(SIZES | sizes))
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


def write_tiny(
    destination: Path,
    architecture: Architecture,
    network: nn.Module | None = None,
    layout: str = "uneven",
    **options: Any,
) -> PackageRecord:
    """A package of `network`, or of a tiny Llama cut to `architecture`; `options` are the layout's."""
    values = {
        "tokenizer": tiny_tokenizer(),
        "entry": {"name": destination.name, "architecture": architecture.to_dict()},
        "dtype": torch.float32,
        "probe_ids": probe_ids(),
    }
    network = network or cut(tiny_llama(), architecture)
    return write_layout(layout, network, architecture, destination, **values | options)


@contextmanager
def edited(file: Path) -> Iterator[Any]:
    """The content of a JSON file, written back as the block leaves it; the package's record knows nothing of it."""
    content = json.loads(file.read_text())
    yield content
    file.write_text(json.dumps(content))


def record_anew(package: Path, name: str) -> None:
    """Bring the recorded hash of a file in line with its content: only the content can give an edit away."""
    with edited(package / RECORD) as record:
        record["files"][name] = FileRecord.of(package / name).model_dump()
