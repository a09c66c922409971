"""What the models of our JSON files share: `compression.json` of a package, and `report.json`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, ValidationError

from supernet.architecture import Architecture
from supernet.common.errors import did_you_mean


class Model(BaseModel):
    """Frozen. Refuses keys that it does not know, and numbers that JSON cannot hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def _architecture(value: Any) -> Architecture:
    if isinstance(value, Architecture):
        return value
    try:
        return Architecture.from_dict(value)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not an architecture ({error})") from error


JSONArchitecture = Annotated[
    Architecture, PlainValidator(_architecture), PlainSerializer(Architecture.to_dict, return_type=dict)
]
"""An architecture; JSON holds its `to_dict()`."""


def first_error(error: ValidationError, known: Iterable[str] = ()) -> str:
    """The first wrong key and what is wrong with it, as in `entry.layout is missing`; `known` are all valid keys."""
    first, *others = error.errors(include_url=False)
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "missing":
        problem = "is missing"
    elif first["type"] == "extra_forbidden":
        problem = f"is an unknown key{did_you_mean(str(first['loc'][-1]), known)}"
    else:
        problem = f"is wrong: {first['msg'].removeprefix('Value error, ')}"
    return f"{key} {problem}{f' (and {len(others)} more)' if others else ''}"
