"""Numbers as people read and write them: counts, bytes, shares, rates and times."""

from __future__ import annotations

import re
import shlex
from decimal import Decimal

_NUMBER = r"\d+(?:\.\d+)?(?:e\+?\d{1,2})?"
_PARAMETERS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "min": 60, "s": 1}
_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def count(number: float) -> str:
    """A count in at most four digits: `973`, `260 k`, `1.24 B`."""
    for scale, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= 0.9995 * scale:
            return f"{_three_digits(number / scale)}{unit}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes in decimal units, as file managers and the hub count: `812 B`, `1.06 MB`."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(number) >= 0.9995 * scale:
            return f"{_three_digits(number / scale)} {unit}"
    return f"{number:.0f} B"


def shell_word(path: object) -> str:
    """A path as one word of a shell's line."""
    return shlex.quote(str(path))


def percent(share: float) -> str:
    """A share as a percentage in about three digits: `66.7 %`, `8.33 %`, `100 %`."""
    return f"{_three_digits(100 * share)} %"


def rate(tokens_per_second: float) -> str:
    """Tokens per second in about three digits, whole from 100 on."""
    return _three_digits(tokens_per_second) if tokens_per_second < 100 else f"{tokens_per_second:,.0f}"


def duration(seconds: float) -> str:
    """Seconds in the two largest units: `8 s`, `3 min 20 s`, `2 h 5 min`, `3 days 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400:,} days {whole % 86400 // 3600} h"


def _three_digits(number: float) -> str:
    magnitude = abs(number)
    return f"{number:.2f}" if magnitude < 9.995 else f"{number:.1f}" if magnitude < 99.95 else f"{number:.0f}"


def parse_parameters(size: str, base: int) -> int:
    """The number of parameters in `0.67`, `67%` (shares of `base`), `450M`, `4.5e8` or `450000`. Raises ValueError for
    anything else."""
    text = size.strip().lower()
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
        share = float(match[1]) / 100
    elif re.fullmatch(r"\d*\.\d+|1", text):
        share = float(text)
    elif match := re.fullmatch(rf"({_NUMBER})([kmb]?)", text):
        return int(float(match[1]) * _PARAMETERS[match[2]])
    else:
        raise ValueError(f"'{size}' is not a size; write a share (0.67 or 67%) or a number of parameters (450M)")
    if not 0 < share <= 1:
        raise ValueError(f"'{size}' is not a share between 0 and 1; write for example 0.67, 67% or 450M")
    return int(share * base)


def parse_tokens(size: str) -> int:
    """The number of tokens in `2M`, `500k` or a plain number, at least 1. Raises ValueError otherwise."""
    match = re.fullmatch(rf"({_NUMBER})([kmb]?)", size.strip().lower())
    if not match or (tokens := int(float(match[1]) * _PARAMETERS[match[2]])) < 1:
        raise ValueError(f"'{size}' is not a number of tokens")
    return tokens


def parse_count(text: str) -> int:
    """The whole number in `1e6`, `0.5M`, `500k`, `10_000` or `10,000`. Raises ValueError for anything else."""
    plain = re.sub(r"(?<=\d)[_,](?=\d)", "", text.strip().lower())
    match = re.fullmatch(r"([+-]?\d+(?:\.\d*)?(?:e\+?\d{1,2})?)\s*([kmb]?)", plain)
    number = Decimal(match[1]) * _PARAMETERS[match[2]] if match else Decimal("0.5")
    if number != int(number):
        raise ValueError(f"'{text}' is no whole number; write for example 1000, 1e6 or 0.5M")
    return int(number)


def parse_bytes(size: str) -> int:
    """The number of bytes in `2GiB`, `1500 MB` or a plain number. Raises ValueError otherwise."""
    match = re.fullmatch(rf"({_NUMBER})\s*([kmg]?i?b?)", size.strip().lower())
    if not match or match[2] not in _BYTES:
        raise ValueError(f"'{size}' is not a size in bytes; write for example 2GiB or 500MB")
    return int(float(match[1]) * _BYTES[match[2]])


def parse_duration(text: str) -> float:
    """The seconds in `3h`, `90m`, `1h30m`, `45 min` or `20s`. Raises ValueError otherwise."""
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(min|[dhms])\s*", text.strip().lower())
    if not parts or "".join(f"{number}{unit}" for number, unit in parts) != re.sub(r"\s", "", text.lower()):
        raise ValueError(f"'{text}' is not a time; write for example 3h, 90m or 1h30m")
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if seconds <= 0:
        raise ValueError(f"'{text}' is no time at all; write for example 3h, 90m or 1h30m")
    return seconds
