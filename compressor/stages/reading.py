"""The training text as a run reads it for the first time: what was passed over, and what of it the report asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from compressor.inputs import training_blocks
from compressor.job import Job
from supernet.common.progress import say
from supernet.training.contamination import RUN, Contamination, Repeats
from supernet.training.data import Blocks
from supernet.training.sources import Row

REPEATED = 0.05
"""Share of the text that may repeat earlier documents before it is warned of: greetings and headings always do."""


def read_checked(job: Job, tokens: int) -> tuple[Blocks, set[str]]:
    """The text of a training of so many tokens, and names of the report documents that lie in it; warns of these, of
    rows that were passed over, and of documents that are there several times."""
    overlap, repeats, unread = Contamination(report_texts(job)), Repeats(), Counter[str]()

    def seen(row: Row) -> None:
        overlap.show(row.text)
        repeats.show(row.text)
        unread.update(row.unread)

    blocks = training_blocks(job, tokens, seen)
    if blocks.skipped:
        reasons = ", ".join(f"{count} because {reason}" for reason, count in blocks.skipped.items())
        say(f"warning: rows of --data {job.given.data} were passed over: {reasons}")
    if unread:
        columns = ", ".join(f"'{name}' of {count} rows" for name, count in unread.items())
        say(f"warning: --data {job.given.data}: not read: {columns}; what they say belongs in the messages")
    if repeats.share > REPEATED:
        say(
            f"warning: {repeats.share:.0%} of what is read of --data {job.given.data} repeats documents before it; "
            "what is held out of it may be trained on, so that held-out losses are too good: leave them out"
        )
    contaminated = overlap.contaminated
    if contaminated:
        say(
            f"warning: {len(contaminated)} of {overlap.documents} report documents share {RUN} words in a row "
            f"with the training text, for example {min(contaminated)}; their scores may be too good"
        )
    return blocks, contaminated


def report_texts(job: Job) -> Iterator[tuple[str, list[str]]]:
    """Name and texts of every report document; none where there are no tasks yet.

    A document's own columns and not its prompts, which few-shot examples share.
    """
    if not job.recipe.tasks:
        return
    for subtasks in job.tasks.requests("report").documents.values():
        for subtask, documents in subtasks:
            for document in documents:
                columns = [value if isinstance(value, list) else [value] for value in document.doc.values()]
                texts = [text for column in columns for text in column if isinstance(text, str)]
                yield f"{subtask.name} {document.index}", texts
