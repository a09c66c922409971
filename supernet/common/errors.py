"""The one exception that the command line turns into a single line: a request that cannot be met as it stands."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RequestError(Exception):
    """The user's request is wrong (exit status 2). The message says what, where, and how to mend it, in one line."""


class VerificationError(Exception):
    """A package does not do what it claims (a fault of ours, or of whoever edited it). One line says what differs."""


def did_you_mean(word: str, known: Iterable[str], count: int = 3) -> str:
    """A hint for a mistyped name: `; did you mean A, B?`, or an empty string where nothing is near."""
    close = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def unknown(key: str, name: str, known: Iterable[str], also: str = "") -> RequestError:
    """The error for a name that no table knows: with the nearest names, or else all of them and what `also` says."""
    names = list(known)
    hint = did_you_mean(name, names) or f"; known are {', '.join(names)}{also}"
    return RequestError(f"{key}: '{name}' is unknown{hint}")
