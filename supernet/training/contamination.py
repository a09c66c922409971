"""Does training text hold what the report will ask? Runs of 13 words, as GPT-3's authors looked for them.

A report document overlaps where 13 words in a row of it (all of them, where it is shorter, but 8 at least) occur in
the training text, case and punctuation aside (Brown et al., arXiv 2005.14165, appendix C). What occurs in more than
ten training documents is a phrase and not a leak, as there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

RUN, LEAST, PHRASE = 13, 8, 10


class Contamination:
    """Shown the training text document by document; `found` are the report documents that occur in it.

    `asked` maps a report document's name to its texts. Memory grows with the report documents, not with the data.
    """

    def __init__(self, asked: Iterable[tuple[str, Iterable[str]]]) -> None:
        self._owners: dict[tuple[str, ...], set[str]] = {}
        self.documents = 0
        for name, texts in asked:
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
    def found(self) -> set[str]:
        """Names of the report documents that share a run with the training text."""
        return {name for run, count in self._seen.items() if count <= PHRASE for name in self._owners[run]}


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def runs(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    """Every `length` words in a row."""
    return zip(*(words[start:] for start in range(length)), strict=False)
