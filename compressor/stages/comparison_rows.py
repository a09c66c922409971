"""The rows of a comparison as they lie in `comparison/`, and how sure their differences to ours are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from compressor.job import Job
from evals.comparison import paired_interval, resampled, text_qualities
from evals.quality import QualityScale
from evals.scoring.scorer import DocumentValues
from evals.scoring.tasks import ScoredTask
from export.report.comparison import OURS
from export.report.schema import Comparison, Difference
from search.scores import Score
from supernet.common.files import fingerprint, read_json, write_json


class FinishedRow(BaseModel):
    """What `comparison/NAME.json` holds: a row of the report, and what it depends on."""

    model_config = ConfigDict(extra="forbid")

    inputs: str
    """Fingerprint of all that the row depends on; rows of others are not compared with it."""
    of: dict[str, str] | None = None
    """What the row shares with its run (`origin`); None for a checkpoint from elsewhere."""
    made: str | None = None
    """Fingerprint of the network as cut, with tokens and seed; None for a checkpoint from elsewhere."""
    weights: str | None = None
    """Fingerprint of a checkpoint from elsewhere."""
    row: Comparison
    documents: DocumentValues
    losses: list[float] | None = None
    """On each block of held-out text, nats per token, where no task counts; and that of all of it behind them."""
    before_healing: dict[str, Score] | float | None = None
    """Scores as cut, or where no task counts the held-out loss. None in rows of versions that kept a quality only."""

    @classmethod
    def read(cls, file: Path) -> FinishedRow:
        return cls.model_validate(read_json(file))

    def write(self, file: Path) -> None:
        write_json(file, self.model_dump(mode="json", exclude_unset=True))

    def with_row(self, **values: Any) -> FinishedRow:
        """The same with some values of the row replaced."""
        return self.model_copy(update={"row": self.row.model_copy(update=values)})


class BaseDocuments(BaseModel):
    """What `comparison/base.json` holds: the base's scores and documents, which every quality is measured against."""

    inputs: str
    tasks: dict[str, Score]
    documents: DocumentValues
    losses: list[float] | None = None
    """As in `FinishedRow`."""

    @property
    def scale(self) -> QualityScale:
        return QualityScale(self.tasks, self.losses[-1] if self.losses else None)

    @classmethod
    def read(cls, job: Job) -> BaseDocuments:
        return cls.model_validate(read_json(base_file(job)))

    def write(self, job: Job) -> None:
        write_json(base_file(job), self.model_dump(mode="json"))


def base_file(job: Job) -> Path:
    """Where the base's scores and documents lie."""
    return job.run.comparison / "base.json"


def documents_scored(job: Job) -> dict[str, str]:
    """Fingerprint of every task's documents on the report split."""
    return {task: job.tasks.fingerprint(task, "report") for task in job.tasks.tasks}


def origin(job: Job) -> dict[str, str]:
    """What a row must share with the run as it is now to be shown in its report."""
    return {"supernet": job.run.supernet_weights, "documents": fingerprint(documents_scored(job))}


def comparison_rows(job: Job) -> list[Comparison]:
    """Every finished row, with how sure its difference to ours is; empty where nothing was compared.

    Qualities follow from the scores that the rows hold, so rows of earlier versions are shown by today's definition.
    Rows of another super-network, of another pick than the newest ours, or scored on other documents are left out. Rows
    of one method and size are judged together, over all their seeds. A checkpoint from elsewhere is judged against ours
    of the nearest size.
    """
    files = sorted(job.run.comparison.glob("*-*.json"))
    if not files:
        return []
    base, now = BaseDocuments.read(job), origin(job)
    if base.inputs != now["documents"]:
        return []
    finished = _current([FinishedRow.read(file) for file in files], now)
    if base.scale.by_text:
        finished = [row for row in finished if row.losses and base.losses]
    drawn = [_drawn(row, base, job.tasks.tasks) for row in finished]
    rows = [_shown(row, base.scale, values) for row, values in zip(finished, drawn, strict=True)]
    return _beside_ours(rows, drawn)


def _current(finished: Sequence[FinishedRow], now: Mapping[str, str]) -> list[FinishedRow]:
    """The rows that are of the run as it is `now` (`origin`), each size of its newest comparison only.

    Every comparison makes the first seed of ours anew where anything changed, so what agrees with that row is current.
    """
    of_this_run = [row for row in finished if row.of is None or row.of == now]
    current: dict[str | None, str] = {None: now["documents"]}
    current |= {row.row.size: row.inputs for row in of_this_run if (row.row.method, row.row.seed) == (OURS, 0)}
    return [row for row in of_this_run if row.inputs == current.get(row.row.size)]


def _shown(finished: FinishedRow, scale: QualityScale, drawn: NDArray[np.float64]) -> Comparison:
    """A row with its qualities by today's definition, and the standard error over resamples."""
    before = finished.before_healing
    qualities = {
        "quality": _quality(scale, finished.losses[-1] if finished.losses else finished.row.tasks),
        "quality_stderr": float(np.nanstd(drawn)) if np.isfinite(drawn).any() else None,
        "quality_before_healing": None if before is None else _quality(scale, before),
    }
    return finished.row.model_copy(update=qualities)


def _beside_ours(rows: Sequence[Comparison], drawn: Sequence[NDArray[np.float64]]) -> list[Comparison]:
    """The rows, those of other methods with their difference to ours of the same size, else of the nearest; `drawn` are
    the qualities of each row in all resamples."""
    groups: dict[tuple[str, str | None], list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault((row.method, row.size), []).append(number)
    ours = {size: group for (method, size), group in groups.items() if method == OURS}

    def mean(group: Sequence[int]) -> float:
        return sum(rows[number].quality for number in group) / len(group)

    judged = list(rows)
    for (method, size), group in groups.items():
        params = rows[group[0]].params
        nearest = min(ours.values(), key=lambda own: abs(rows[own[0]].params - params), default=None)
        rival = ours.get(size, nearest)
        if method == OURS or rival is None:
            continue
        interval = paired_interval([drawn[i] for i in rival], [drawn[i] for i in group])
        if interval is not None:
            difference = Difference(value=mean(rival) - mean(group), low=interval[0], high=interval[1])
            for number in group:
                judged[number] = rows[number].model_copy(update={"ours_minus_this": difference})
    return judged


def _quality(scale: QualityScale, kept: Mapping[str, Score] | float) -> float:
    """Quality from what a row keeps: its scores, where one that is missing was not finite, or its held-out loss."""
    if isinstance(kept, float):
        return scale.kept_of_text(kept)
    none = {name: base.model_copy(update={"value": math.nan}).or_worst() for name, base in scale.base.items()}
    return scale.quality(none | dict(kept))


def _drawn(finished: FinishedRow, base: BaseDocuments, tasks: Mapping[str, ScoredTask]) -> NDArray[np.float64]:
    """Quality of a row in each resample."""
    if base.scale.by_text:
        return text_qualities((finished.losses or [])[:-1], (base.losses or [])[:-1])
    return base.scale.resampled(resampled(tasks, finished.documents))
