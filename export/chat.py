"""Talk to a package: it answers where its tokenizer has a chat template, and continues what is typed where it has none.

Packages that transformers loads run there, gguf packages in llama.cpp, which renders the template of its own file.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from evals.scoring.evaluate import load_checkpoint
from export.layouts.gguf.file import weight_file
from export.layouts.gguf.server import LlamaCpp
from export.layouts.installed import check_installed
from export.package_record import RECORD, read_record
from supernet.common.errors import RequestError
from supernet.common.processes import SMALL_BYTES, available_cores
from supernet.tokens import GREEDY

CONTEXT = 4096
"""Tokens of a conversation in llama.cpp at most; its cache is made for so many."""


Turns = list[dict[str, str]]
"""A conversation: the role and the content of each turn."""


@dataclass
class Speaker:
    """One that answers. `encode` gives a text's token ids, `write` the text of up to so many tokens behind some."""

    name: str
    context: int
    encode: Callable[[str], list[int]]
    write: Callable[[list[int], int], str]
    render: Callable[[Turns], list[int]] | None
    """The token ids of a conversation; None where there is no chat template, and texts are continued."""
    history: Turns = field(default_factory=list)

    def answer(self, text: str, new: int) -> str:
        """What it says to `text`, in at most `new` tokens. The oldest turns are forgotten where the context is full.

        Raises `RequestError` where `text` alone does not fit.
        """
        turns = [*self.history, {"role": "user", "content": text}]
        ids = self._ids(turns)
        while len(ids) + new > self.context and self.render is not None and len(turns) > 2:
            turns = turns[2:]
            ids = self._ids(turns)
        if len(ids) + new > self.context:
            raise RequestError(
                f"{self.name}: {len(ids)} tokens and {new} new ones do not fit into its context of {self.context}; say "
                "less, or ask for fewer (--max-tokens)"
            )
        said = self.write(ids, new)
        if self.render is not None:
            self.history = [*turns, {"role": "assistant", "content": said}]
        return said

    def _ids(self, turns: Turns) -> list[int]:
        return self.encode(turns[-1]["content"]) if self.render is None else self.render(turns)


def open_speaker(name: str, device: str = "auto") -> Speaker:
    """The package in a folder, or any checkpoint by folder or hub name. Raises `RequestError` where it cannot talk."""
    folder = Path(name).expanduser()
    layout = read_record(folder).entry.layout if (folder / RECORD).is_file() else ""
    if layout in ("onnx", "openvino"):
        raise RequestError(f"{name}: {layout} packages do not chat here; take the package that it is a copy of")
    return _in_llama_cpp(folder) if layout == "gguf" else _in_transformers(name, device)


def _in_transformers(name: str, device: str) -> Speaker:
    """A checkpoint that transformers loads, by folder or hub name."""
    import torch

    with redirect_stderr(StringIO()):  # compressed-tensors draws bars of its own
        model, tokenizer = load_checkpoint(name, device, "auto", None, False)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    torch.set_num_threads(1 if weights < SMALL_BYTES else available_cores())
    network: Any = model
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0

    def render(turns: Turns) -> list[int]:
        rendered: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        return list(rendered["input_ids"])

    @torch.no_grad()
    def write(ids: list[int], new: int) -> str:
        prompt = torch.tensor([ids], device=network.device)
        out = network.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, pad_token_id=pad, **GREEDY
        )
        return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))

    return Speaker(
        Path(name).name,
        getattr(network.config, "max_position_embeddings", None) or CONTEXT,
        lambda text: list(tokenizer(text).input_ids),
        write,
        render if tokenizer.chat_template else None,
    )


def _in_llama_cpp(folder: Path) -> Speaker:
    """A gguf package, in a server of llama.cpp."""
    check_installed("gguf")
    from gguf import GGUFReader  # an optional dependency

    file, _ = weight_file(folder)
    fields = GGUFReader(file).fields
    longest = next((field.contents() for key, field in fields.items() if key.endswith(".context_length")), CONTEXT)
    context = min(CONTEXT, int(longest))
    runtime = LlamaCpp(file, context, available_cores())

    def render(turns: Turns) -> list[int]:
        prompt = runtime.ask("/apply-template", messages=turns)["prompt"]
        return list(runtime.ask("/tokenize", content=prompt, add_special=False, parse_special=True)["tokens"])

    def write(ids: list[int], new: int) -> str:
        return str(runtime.complete(ids, new)["content"])

    template = "tokenizer.chat_template" in fields
    return Speaker(folder.name, context, runtime.tokenize, write, render if template else None)
