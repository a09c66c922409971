"""`compressor verify PACKAGE`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.options import IncludePath, Json
from compressor.cli.output import emit
from compressor.cli.request import announce
from supernet.common.errors import RequestError, VerificationError
from supernet.common.progress import say, working


def verify(
    package: Annotated[Path, typer.Argument(help="a package folder")],
    scores: Annotated[bool, typer.Option("--scores", help="measure the reported task scores again, too")] = False,
    include_path: IncludePath = None,
    json: Json = False,
) -> None:
    """Check again, in a fresh process, what a package claims."""
    if not package.is_dir():
        raise RequestError(f"{package}: no such folder; give the folder of a package")
    announce(str(package), "export.verify")
    from export.network_check import TaskFiles  # imports transformers
    from export.verify import verify as run_verification

    try:
        with working("proving in a fresh process"):
            result = run_verification(package, tasks=TaskFiles(include_path) if scores or include_path else None)
    except VerificationError as error:  # of the package and not of this program
        raise RequestError(f"{error}; fetch or export the package again") from error
    if scores and result["layout"] in ("gguf", "onnx", "openvino"):
        say(f"note: {package}: in this runtime the scores are not measured again")
    if not json:
        say(f"{package}: verified ({', '.join(f'{k} {v}' for k, v in result.items() if not isinstance(v, dict))})")
    emit(result, json)
