"""`search/front.json`: read and checked in one place, for the stages behind the search and for warm starts elsewhere.

Only what is read of it is checked; what `search.run` and `compressor.stages.searching` write has more.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict, cast

from pydantic import BaseModel

from compressor.stages.repairing import RoundingRecord, searched_weights
from export.models import JSONArchitecture
from search.run import SearchRecord
from supernet.common.errors import reading
from supernet.common.files import read_json

if TYPE_CHECKING:
    from compressor.job import Job


class SearchPart(TypedDict):
    """One of a run's searches."""

    inputs: str
    """Fingerprint of all that it and those before it depend on."""
    targets: NotRequired[dict[str, object]]
    """An older file of one search does not say them, nor its budget."""
    evaluations: NotRequired[int]
    """Its budget."""
    measured: int
    """Architectures that were measured when it ended, by those before it too."""
    generations: int


class QualityRecord(TypedDict):
    """The scale of a search's qualities."""

    definition: int
    """`evals.quality.DEFINITION` of then."""
    counted: list[str]
    left_out: list[str]
    remark: str


class BesideChance(TypedDict):
    """How a search compares with a random one, and whether it could learn anything: `search.control_records` as JSON.
    None where that cannot be said, or the qualities were defined otherwise."""

    control: NotRequired[dict[str, object] | None]
    likeness: NotRequired[dict[str, object] | None]


class FrontRecord(SearchRecord, RoundingRecord, BesideChance):
    """All of front.json. What may be missing is missing in files of earlier versions."""

    inputs: str
    weights: str
    """Fingerprint of the super-network."""
    scored_weights: NotRequired[str]
    base: dict[str, float]
    """Scores of the base by task."""
    quality: NotRequired[QualityRecord]
    base_decode_tps: float
    parts: NotRequired[list[SearchPart]]


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
    targets: dict[str, object]
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


def read_front(file: Path) -> FrontRecord:
    """The content of a front.json. Raises `RequestError` for one that this version does not write."""
    with reading(f"{file}: not what this version writes"):
        content = read_json(file)
        checked = _Front.model_validate(content)
        if unmeasured := set(checked.front) - {row.key for row in checked.evaluations}:
            raise ValueError(f"{min(unmeasured)} is on the front and was not measured")
        return cast("FrontRecord", content)


def scored_weights(job: Job, front: FrontRecord) -> str:
    """What the store keeps a search's scores under; a repair may have been switched since. An older file does not
    say it."""
    return front.get("scored_weights") or searched_weights(job)
