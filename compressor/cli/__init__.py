"""The command line: one file here for each command, which owns its options and what it prints.

Options that set a key of the recipe stand in `options`, once. Every failure is one line. Exit status: 0 done; 2 the
request is wrong; 1 a fault of ours; 130 interrupted, also by SIGTERM. Progress and messages go to stderr, so that
`--json` has stdout to itself. Nothing here imports torch before a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import Abort, Exit, TyperException

from compressor import __version__
from compressor.cli.chat import chat
from compressor.cli.compare import compare
from compressor.cli.compress import compress
from compressor.cli.demo import demo
from compressor.cli.evaluate import evaluate
from compressor.cli.export import export
from compressor.cli.finetune import finetune
from compressor.cli.front import front
from compressor.cli.inspect import inspect
from compressor.cli.list import list_names
from compressor.cli.pick import pick
from compressor.cli.push import push
from compressor.cli.recipe import recipe
from compressor.cli.report import report
from compressor.cli.search import search
from compressor.cli.slice import slice
from compressor.cli.speed_table import speed_table
from compressor.cli.status import status
from compressor.cli.verify import verify
from compressor.quiet import quiet_libraries
from supernet.common.errors import RequestError, VerificationError, first_line, out_of_space
from supernet.common.metrics import send_to
from supernet.common.progress import console, keep_lines, log_line

INTERRUPTED = 130
OF_THE_MACHINE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR)
"""Errors of the system that say what is in the way, by its name."""

COMMANDS = (
    demo,
    inspect,
    compress,
    finetune,
    search,
    front,
    pick,
    export,
    compare,
    report,
    status,
    recipe,
    chat,
    evaluate,
    verify,
    push,
    slice,
    list_names,
    speed_table,
)

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Turn a pre-trained checkpoint into smaller, quantized, proven ones.",
)
for command in COMMANDS:
    app.command("list" if command is list_names else None)(command)


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="print the version", is_eager=True)] = False,
) -> None:
    if version:  # `run` makes sure that there is a command otherwise
        print(f"nas-compressor {__version__}")
        raise Exit(0)


def main() -> None:
    """The entry point of the command `compressor`."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))


def _terminate(*_: object) -> None:
    """What a batch system or `docker stop` sends is an interruption like Ctrl-C: what is being done is cleaned up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: a second one must not stop the cleaning up
    raise KeyboardInterrupt


@quiet_libraries()
def run(arguments: list[str]) -> int:
    """Run a command and return the exit status; whatever goes wrong is printed as one line."""
    try:
        return _run(arguments)
    finally:  # what is said and measured next is not this command's
        keep_lines()
        send_to()


def _run(arguments: list[str]) -> int:
    try:
        ended = app(arguments or ["--help"], standalone_mode=False)
        if ended != INTERRUPTED:  # what typer makes of Ctrl-C
            return ended if isinstance(ended, int) else 0
    except RequestError as error:
        return _fail(2, str(error))
    except VerificationError as error:
        return _fail(1, str(error))
    except TyperException as error:
        return _fail(2, error.format_message())
    except Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, Abort):
        pass
    except Exception as error:
        return _explain(error)
    return _fail(INTERRUPTED, "interrupted; what was done is kept: run the same command again to resume")


def _explain(error: Exception) -> int:
    """Conditions of the machine are the user's to mend (2); anything else is ours (1)."""
    if isinstance(error, BrokenPipeError):  # as in `compressor report RUN --json | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
        return 0
    if out_of_space(error):
        place = getattr(error, "filename", None) or "while writing"
        return _fail(2, f"no disk space left ({place}); free some and run again to resume")
    if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        place = error.filename2 or error.filename
        return _fail(2, f"{f'{place}: ' if place else ''}{(error.strerror or 'not allowed').lower()}")
    return _fail(1, f"a fault of ours: {type(error).__name__}: {first_line(error)} ({_keep_traceback()})")


def _keep_traceback() -> str:
    """Where the traceback of the exception at hand is, in a sentence. Never raises: the user needs the first cause."""
    for folder in (Path(), Path(tempfile.gettempdir())):
        log = folder / "compressor-error.log"
        with contextlib.suppress(OSError):
            log.write_text(traceback.format_exc(), encoding="utf-8", errors="backslashreplace")
            return f"the traceback is in {log}"
    return "its traceback could not be written anywhere"


def _fail(status: int, line: str) -> int:
    printable = " ".join(line.split()).encode("utf-8", "backslashreplace").decode()
    with contextlib.suppress(OSError):  # nobody reads any more: the status still says it
        console.print(f"error: {printable}", markup=False, soft_wrap=True, style="red")
        log_line(f"error: {printable}")
    return status
