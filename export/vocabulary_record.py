"""`vocabulary.json` beside a base whose vocabulary was cut: what was kept, and how texts are split since.

Packages say the same in compression.json, so that `verify` can check it where only the package is.
"""

from __future__ import annotations

from pathlib import Path

from export.models import Model
from supernet.common.errors import reading
from supernet.common.files import read_json

VOCABULARY = "vocabulary.json"


class VocabularyRecord(Model):
    """What a vocabulary was cut to, in numbers. Text that was not counted for the choice is what they are about."""

    rows: int
    """Rows of the embedding."""
    base_rows: int
    """Rows of the untouched base's embedding."""
    coverage: float
    """Share of the untouched base's tokens of the text that were kept."""
    tasks_coverage: float | None = None
    """The same of documents of the tasks' search split; None where there were no tasks."""
    bytes_per_token: float
    """Bytes of the text (UTF-8) that a token stands for."""
    base_bytes_per_token: float
    """The same of the untouched base's tokens."""

    @property
    def text_per_token(self) -> float:
        """Text that a token stands for, as a share of what one of the untouched base's does."""
        return self.bytes_per_token / self.base_bytes_per_token


class SplitText(Model):
    """A text, the ids that it must be split into, and what these must decode to."""

    text: str
    ids: list[int]
    decoded: str
    """What the untouched base's tokenizer makes of its own ids."""
    kept: bool
    """Whether all tokens that the untouched base splits the text into were kept: then `ids` are these, renumbered."""


class CutVocabulary(Model):
    """All that `vocabulary.json` holds."""

    inputs: str
    """Fingerprint of all that the choice follows from."""
    record: VocabularyRecord
    splits: list[SplitText]
    logit_difference: float
    """The largest difference of the kept tokens' logits from the untouched base's, on kept tokens of texts, as a share
    of the largest logit."""

    @classmethod
    def read(cls, file: Path) -> CutVocabulary:
        """Raises `RequestError` for a file that this version does not write."""
        with reading(f"{file}: not what this version writes"):
            return cls.model_validate(read_json(file))
