"""The exceptions that the command line prints as a single line, and hints for mistyped names."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class RequestError(Exception):
    """The user's request cannot be met (exit status 2). One line says what is wrong, and how to correct it."""


class NotHeldError(RequestError):
    """A layout cannot hold a network, which others may."""


class VerificationError(Exception):
    """A package differs from its record, by our mistake or a later edit. One line says what differs."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Within, whatever a library raises becomes a `RequestError`: `what`, then the reason in brackets.

    Only for libraries that read files of the user's: they raise anything, and what they cannot read is the user's to
    mend. What this project raises itself passes through.
    """
    try:
        yield
    except (RequestError, VerificationError, MemoryError):
        raise
    except Exception as error:
        if out_of_space(error) or (isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM)):
            raise  # a fault of the machine: the command line explains it
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RequestError(f"{what} ({reason})") from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def out_of_space(error: BaseException | None) -> bool:
    """Whether a full disk is the cause. Libraries that are not written in Python say so in their text only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "database or disk is full" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def did_you_mean(word: str, known: Iterable[str], count: int = 3) -> str:
    """A hint for a mistyped name, `; did you mean A, B?`, or an empty string where no known name is similar."""
    close = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def unknown(key: str, name: str, known: Iterable[str], also: str = "") -> RequestError:
    """The error for a name that no table knows: with the nearest names, or else all of them and what `also` says."""
    names = list(known)
    hint = did_you_mean(name, names) or f"; known are {', '.join(names)}{also}"
    return RequestError(f"{key}: '{name}' is unknown{hint}")
