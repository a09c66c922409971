"""`compressor slice PACKAGE OUT --max-params 0.5`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.ending import package_line
from compressor.cli.options import Json
from compressor.cli.output import emit
from supernet.common.errors import RequestError
from supernet.common.progress import say


def slice(
    package: Annotated[Path, typer.Argument(help="an elastic package (export --format elastic)")],
    out: Annotated[Path, typer.Argument(help="the folder of the package to write", metavar="OUT")],
    max_params: Annotated[str, typer.Option(help="0.5, 50% or 450M: the largest size of at most so many parameters")],
    json: Json = False,
) -> None:
    """Cut a plain package out of an elastic one, without its run."""
    from export.cutting import cut  # imports torch
    from supernet.common.formatting import parse_parameters, shell_word

    def limit(whole: int) -> int:
        try:
            return parse_parameters(max_params, whole)
        except ValueError as error:
            raise RequestError(f"--max-params: {error}") from error

    entry = cut(package, out, limit).entry
    say(package_line(out, entry))
    say(f"next: compressor evaluate {shell_word(out)} --tasks A,B, or compressor push {shell_word(out)} OWNER/NAME")
    emit(entry, json)
