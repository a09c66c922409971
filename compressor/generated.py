"""Training text that the base writes itself (`--data generated`): how much of it a run needs, where it lies, and its
writing, which goes on where it was stopped.

It lies in `RUN/data/`, in a folder for what it follows from: base, seed and manner. How much is there is no part of
that: where more is asked for, more is appended, and what was made from the beginning of the text stays valid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from compressor.job import Job
from supernet.common.errors import RequestError
from supernet.common.files import fingerprint
from supernet.common.progress import bar, say
from supernet.device import release_cached_memory
from supernet.training import generated as writing
from supernet.training.data import HELD_OUT_BLOCKS, HELD_OUT_SHARE, held_out_of
from supernet.training.sources import GENERATED, Row, generated_limit

LEAST_ROWS = 256
"""Rows that are written where budgets ask for fewer: for ordering, repair, quantization and what is held out."""
ROWS_AT_ONCE = {"cpu": (32, 2**30), "cuda": (512, 2**33)}
"""By device, most rows written side by side, and most bytes of their cache and logits. Constants: rows side by side
with others may differ in what kernels round, so free memory must not decide."""


def wanted_rows(job: Job, tokens: int) -> int:
    """Rows of text for a training of so many tokens: what it reads once, and what is held out."""
    trained = math.ceil(tokens / job.length)
    return max(LEAST_ROWS, trained + HELD_OUT_BLOCKS, math.ceil(trained / (1 - HELD_OUT_SHARE)) + 1)


def rows_to_read(job: Job, tokens: int) -> int:
    """The same, but no more than the user allows. Raises `RequestError` where that is less than two blocks."""
    source, length = job.recipe.data or "", job.length
    limit = generated_limit(source)
    if limit is None:
        return wanted_rows(job, tokens)
    if limit < 2 * length:
        raise RequestError(
            f"--data {source}: less than two blocks of {length} tokens; say {GENERATED}:{2 * length} or more, or "
            f"{GENERATED}, for as many as the budgets ask for"
        )
    return min(limit // length, wanted_rows(job, tokens))


def generated_fingerprint(job: Job, tokens: int) -> str:
    """Of all that the text of a training of so many tokens follows from. What the user allows is part of it only where
    the training would have more."""
    rows = rows_to_read(job, tokens)
    return origin_fingerprint(job) if rows == wanted_rows(job, tokens) else fingerprint([origin_fingerprint(job), rows])


def origin_fingerprint(job: Job) -> str:
    """Of all that a run's text follows from, however much of it there is."""
    template = getattr(job.tokenizer, "chat_template", None)
    return fingerprint([writing.VERSION, job.base_fingerprint, job.recipe.seed, job.length, template])


def generated_rows(job: Job, tokens: int) -> Iterator[Row]:
    """The documents that a training of so many tokens reads, written first where they are not there yet."""
    rows, folder = rows_to_read(job, tokens), folder_of(job)
    write_missing(job, folder, rows)
    return writing.read_documents(folder, rows)


def folder_of(job: Job) -> Path:
    """Where the text lies that a run's base writes."""
    return job.run.data / f"{GENERATED}-{origin_fingerprint(job)}"


def is_written(job: Job, tokens: int) -> bool:
    """Whether all is there that a training of so many tokens reads."""
    return not writing.missing_rows(folder_of(job), rows_to_read(job, tokens), rows_at_once(job))


def write_missing(job: Job, folder: Path, rows: int) -> None:
    """Let the base write what is missing of the first `rows` rows. Of several processes each writes its share."""
    at_once, length = rows_at_once(job), job.length
    missing = writing.missing_rows(folder, rows, at_once)
    job.accelerator.wait_for_everyone()  # before one of them writes what another has not looked for yet
    if missing:
        share = missing[job.accelerator.process_index :: job.accelerator.num_processes]
        vocabulary = writing.vocabulary_of(job.tokenizer, job.checkpoint.config, job.structure.vocab_size, length)
        if job.tokenizer.chat_template is not None and vocabulary.template is None:
            say(
                f"warning: --data {job.given.data}: no conversations are written: the chat template renders turns in "
                f"another way than they are, or leaves no room in {length} tokens"
            )
        folder.mkdir(parents=True, exist_ok=True)
        job.threads(scoring=False)
        tokens = sum(map(len, share)) * length
        # What only healing reads is written when it is known how much there is time for.
        more = missing[0].start >= rows_to_read(job, job.recipe.finetuning.tokens or 0)
        stage = "writing more text" if more else "writing text"
        with job.schedule.stage(stage), bar("writing training text", tokens) as progress:
            model = job.load_base()
            for numbers in share:
                written = writing.write_rows(model, vocabulary, numbers, length, job.recipe.seed, progress.advance)
                writing.keep_rows(folder, numbers, written, job.tokenizer)
        del model
        release_cached_memory(job.device)
        job.run.log(f"wrote {tokens} tokens of training text")
    job.accelerator.wait_for_everyone()  # until all of it is there


def rows_at_once(job: Job) -> int:
    """Rows that are written side by side on the job's device, a power of two."""
    most, memory = ROWS_AT_ONCE["cpu" if job.device.type == "cpu" else "cuda"]
    structure = job.structure
    cache = structure.kv_cache_bytes(structure.base, job.length) // structure.dtype_bytes
    of_one = cache * job.compute_dtype.itemsize + 24 * structure.vocab_size
    return 2 ** int(math.log2(max(1, min(most, memory // of_one))))


def repeated(job: Job) -> str | None:
    """How often trainings read the same text, in one line; None where none does."""
    often = []
    for stage, tokens in (("fine-tuning", job.recipe.finetuning.tokens), ("healing", job.recipe.healing.tokens)):
        rows = rows_to_read(job, tokens or 0)
        trained = job.length * (rows - held_out_of(rows))
        if (tokens or 0) > trained:
            often.append(f"{stage} reads its {trained:,} tokens {(tokens or 0) / trained:.1f} times")
    return " and ".join(often) or None
