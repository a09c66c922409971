"""`compressor chat PACKAGE [--beside BASE]`"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated

import typer

from compressor.cli.request import announce
from supernet.common.errors import RequestError
from supernet.common.progress import say, working
from supernet.raw_config import local_folder


def chat(
    package: Annotated[str, typer.Argument(help="a package folder, or any checkpoint")],
    beside: Annotated[
        str | None, typer.Option(help="another that answers too, such as the base: a folder or a hub name")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="tokens of an answer at most")] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Talk to a package, in transformers or llama.cpp.

    It answers where its tokenizer has a chat template, and continues what is typed where it has none. Lines are read
    from stdin until it ends; the answers are the likeliest tokens, so the same line is always answered alike.
    """
    if max_tokens < 1:
        raise RequestError(f"--max-tokens: {max_tokens} is no length of an answer; say 1 or more")
    names = [package, *([beside] if beside else [])]
    for name in names:
        folder = local_folder(name)
        if folder is not None and not any((folder / file).is_file() for file in ("config.json", "compression.json")):
            raise RequestError(f"{name}: neither a checkpoint nor a package (no config.json, no compression.json)")
    announce(" and ".join(names), "export.chat")
    from export.chat import open_speaker  # imports torch

    with working("loading weights"):
        speakers = [open_speaker(name, device) for name in names]
    if any(speaker.render for speaker in speakers):
        say("type a message")
    else:
        say("no chat template: type the beginning of a text, and it is continued")
    with suppress(KeyboardInterrupt):  # ends it as the end of stdin does
        for line in _lines():
            for speaker in speakers:
                try:
                    with working(f"{speaker.name} writes"):
                        answer = speaker.answer(line, max_tokens)
                except RequestError as error:  # this line is too long, another may not be
                    say(str(error))
                    continue
                if speaker.render is None:
                    answer = line + answer
                print(f"{speaker.name}: {answer.strip()}" if len(speakers) > 1 else answer.strip(), flush=True)


def _lines() -> Iterator[str]:
    """What is typed, line by line, with a mark on a terminal; nothing is asked of a pipe. Bytes that are no text are
    replaced by the sign for what cannot be read."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
