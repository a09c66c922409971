"""`compressor push PACKAGE REPO_ID`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.options import Json
from compressor.cli.output import emit
from supernet.common.errors import RequestError, VerificationError


def push(
    package: Annotated[Path, typer.Argument(help="a verified package folder")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the hub")],
    private: Annotated[bool, typer.Option("--private", help="make the repository private")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be uploaded")] = False,
    json: Json = False,
) -> None:
    """Upload a verified package to the hub."""
    from export.push import push as upload  # imports huggingface_hub

    try:
        pushed = upload(package, repo_id, private=private, dry_run=dry_run)
    except VerificationError as error:  # of the package and not of this program
        raise RequestError(f"{error}; export the package again") from error
    emit(pushed, json)
