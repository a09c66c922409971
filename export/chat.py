"""Talk to a package: it answers where its tokenizer has a chat template, and continues what is typed where it has none.

Packages that transformers loads run there, gguf packages in llama.cpp. Both get the same token ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.scoring.evaluate import load_checkpoint
from export.layouts.gguf.layout import weight_file
from export.layouts.gguf.runtime import LlamaCpp
from export.layouts.installed import check_installed
from export.package_record import RECORD, read_record
from supernet.common.errors import RequestError
from supernet.common.processes import SMALL_BYTES, available_cores
from supernet.trust import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 4096
"""Tokens of a conversation in llama.cpp at most; its cache is made for so many."""


@dataclass
class Speaker:
    """One that answers. `write` makes up to so many token ids behind some."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    write: Callable[[list[int], int], list[int]]
    context: int
    history: list[dict[str, str]] = field(default_factory=list)
    """The turns of the conversation so far; nothing where there is no template."""

    @property
    def converses(self) -> bool:
        """Whether it answers in a conversation, instead of continuing a text."""
        return bool(self.tokenizer.chat_template)

    def answer(self, text: str, new: int) -> str:
        """What it says to `text`, in at most `new` tokens. The oldest turns are forgotten where the context is full.

        Raises `RequestError` where `text` alone does not fit.
        """
        if self.converses:
            self.history.append({"role": "user", "content": text})
        ids = self._ids(text)
        while len(ids) + new > self.context and len(self.history) > 2:
            del self.history[:2]
            ids = self._ids(text)
        if len(ids) + new > self.context:
            raise RequestError(
                f"{self.name}: {len(ids)} tokens and {new} new ones do not fit into its context of {self.context}; say "
                "less, or ask for fewer (--max-tokens)"
            )
        said = str(self.tokenizer.decode(self.write(ids, new), skip_special_tokens=True))
        if self.converses:
            self.history.append({"role": "assistant", "content": said})
        return said

    def _ids(self, text: str) -> list[int]:
        if not self.converses:
            return list(self.tokenizer(text).input_ids)
        rendered: Any = self.tokenizer.apply_chat_template(self.history, add_generation_prompt=True, return_dict=True)
        return list(rendered["input_ids"])


def open_speaker(name: str, device: str = "auto") -> Speaker:
    """The package in a folder, or any checkpoint by folder or hub name. Raises `RequestError` where it cannot talk."""
    folder = Path(name).expanduser()
    layout = read_record(folder).entry.layout if (folder / RECORD).is_file() else ""
    if layout in ("onnx", "openvino"):
        raise RequestError(f"{name}: {layout} packages do not chat here; take the package that it is a copy of")
    return _in_llama_cpp(folder) if layout == "gguf" else _in_transformers(name, device)


def _in_transformers(name: str, device: str) -> Speaker:
    import torch

    model, tokenizer = load_checkpoint(name, device, "auto", None, False)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    torch.set_num_threads(1 if weights < SMALL_BYTES else available_cores())
    network: Any = model.eval()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0

    @torch.no_grad()
    def write(ids: list[int], new: int) -> list[int]:
        prompt = torch.tensor([ids], device=network.device)
        out = network.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, pad_token_id=pad
        )
        return out[0, len(ids) :].tolist()

    context = getattr(network.config, "max_position_embeddings", None) or CONTEXT
    return Speaker(Path(name).name, tokenizer, write, context)


def _in_llama_cpp(folder: Path) -> Speaker:
    check_installed("gguf")
    file, _ = weight_file(folder)
    tokenizer = load_tokenizer(folder)
    context = min(CONTEXT, tokenizer.model_max_length)
    runtime = LlamaCpp(file, context, available_cores())
    return Speaker(folder.name, tokenizer, runtime.greedy, context)
