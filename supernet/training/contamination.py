"""Contamination of the training text by report documents: runs of 13 words that both have, as in GPT-3's paper.

A report document is contaminated where 13 words in a row of it (all words of a shorter one, but at least 8) occur in
the training text, without regard to case and punctuation (Brown et al., arXiv 2005.14165, appendix C). As there, a run
that occurs in more than ten training documents is a common phrase and does not count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

RUN, LEAST, PHRASE = 13, 8, 10
"""Words of a run, words of the shortest document that is looked for, and training documents that may share a run."""


class Contamination:
    """Finds report documents in training text, which is shown to it document by document.

    `report_documents` are pairs of a name and texts. Memory grows with them and not with the training text.
    """

    def __init__(self, report_documents: Iterable[tuple[str, Iterable[str]]]) -> None:
        self._owners: dict[tuple[str, ...], set[str]] = {}
        self.documents = 0
        for name, texts in report_documents:
            self.documents += 1
            for text in texts:
                words = words_of(text)
                if len(words) >= LEAST:
                    for run in runs(words, min(RUN, len(words))):
                        self._owners.setdefault(run, set()).add(name)
        self._lengths = sorted({len(run) for run in self._owners})
        self._seen: Counter[tuple[str, ...]] = Counter()

    def show(self, text: str) -> None:
        """Look for every run of the report in one training document."""
        words = words_of(text)
        self._seen.update({run for length in self._lengths for run in runs(words, length) if run in self._owners})

    @property
    def contaminated(self) -> set[str]:
        """Names of the report documents that share a run with the training text."""
        return {name for run, count in self._seen.items() if count <= PHRASE for name in self._owners[run]}


class Repeats:
    """Counts how much of a text is documents that it holds already. Remembers a number for each of them."""

    def __init__(self) -> None:
        self._known: set[int] = set()
        self._all = self._repeated = 0

    def show(self, text: str) -> None:
        """Look at one document."""
        self._all += len(text)
        if (key := hash(text)) in self._known:
            self._repeated += len(text)
        self._known.add(key)

    @property
    def share(self) -> float:
        """The share of characters that repeat an earlier document."""
        return self._repeated / max(1, self._all)


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def runs(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    """Every `length` words in a row."""
    return zip(*(words[start:] for start in range(length)), strict=False)
