"""`search/front.json`: read and checked in one place, for the stages behind the search and for warm starts elsewhere.

Only what is read of it is checked; what `search.run` and `compressor.stages.searching` write has more.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from compressor.stages.repairing import searched_weights
from export.models import JSONArchitecture
from supernet.common.errors import reading
from supernet.common.files import read_json

if TYPE_CHECKING:
    from compressor.job import Job


class _Evaluation(BaseModel):
    key: str
    architecture: JSONArchitecture
    values: dict[str, float | None]
    generation: int
    index: int
    full: bool


class _Seconds(BaseModel):
    evaluation: float
    overhead: float


class _Generation(BaseModel):
    generation: int
    evaluations: int
    hypervolume: float | None
    seconds: _Seconds


class _Objective(BaseModel):
    name: str
    kind: str


class _Part(BaseModel):
    inputs: str
    targets: dict[str, Any]
    evaluations: int
    measured: int
    generations: int


class _Front(BaseModel):
    inputs: str
    parts: list[_Part] = []
    weights: str
    scored_weights: str = ""
    base_decode_tps: float
    algorithm: str
    objectives: list[_Objective]
    evaluations: list[_Evaluation]
    front: list[str]
    generations: list[_Generation]


def read_front(file: Path) -> dict[str, Any]:
    """The content of a front.json. Raises `RequestError` for one that this version does not write."""
    with reading(f"{file}: not what this version writes"):
        content = read_json(file)
        checked = _Front.model_validate(content)
        if unmeasured := set(checked.front) - {row.key for row in checked.evaluations}:
            raise ValueError(f"{min(unmeasured)} is on the front and was not measured")
        return dict(content)


def scored_weights(job: Job, front: dict[str, Any]) -> str:
    """What the store keeps a search's scores under; a repair may have been switched since. An older file does not
    say it."""
    return front.get("scored_weights") or searched_weights(job)
