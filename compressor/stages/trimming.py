"""Cut the vocabulary of the base, before anything else: fills `base/`, an ordinary checkpoint with fewer tokens.

It is the base of the super-network from then on. The untouched checkpoint stays what quality, speed and reports compare
with. Which tokens stay is chosen once: a run keeps its base while model, size and text are the same.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compressor.inputs import data_fingerprint
from compressor.job import Job
from compressor.recipe import Recipe
from export.layouts.gguf.tokenizer import sample_texts
from export.probe import logits_of
from export.vocabulary_record import VOCABULARY, CutVocabulary, SplitText, VocabularyRecord
from supernet.checkpoint import Checkpoint
from supernet.common.errors import RequestError, VerificationError
from supernet.common.files import fingerprint, temporary_name, write_json
from supernet.common.progress import say
from supernet.tokens import no_row, template_texts, tokens_without_row
from supernet.training.data import encode_row
from supernet.training.sources import Row, is_generated, read_rows
from supernet.vocabulary import (
    AUTO,
    ENOUGH,
    ENOUGH_OF_TASKS,
    Tokens,
    by_frequency,
    chosen_size,
    coverage,
    least_covering,
)
from supernet.vocabulary import must_stay as ids_that_stay
from supernet.vocabulary_cut import (
    VocabularyCut,
    compare_splits,
    cut_loaded,
    describe_tokenizer,
    ids_in_configurations,
    write_cut,
)

COUNTED = 2_000_000
"""Tokens of the text that are read at most."""
LEAST = 10_000
"""Tokens that a text must have: fewer say nothing of what is frequent."""
HELD = 10
"""One document of so many is not counted: coverage is stated on those."""
LEAST_COVERED = 0.97
"""Share of the text's tokens that a cut vocabulary covers without a warning."""
TEXTS, TEXT_LENGTH = 1000, 100
"""Pieces of held-out text that both tokenizers split, beside some that are hard to split; and their characters."""
REMEMBERED = 32
"""How many of these a package remembers. They are readable in it, so they are few and short."""
PROOF_TEXTS, PROOF_LENGTH = 8, 64
"""Texts of kept tokens on which logits are compared, and their tokens at most."""
SHARES = ("1", "0.75", "0.5", "0.25")
"""Sizes that `inspect` shows beside those asked for."""
TOLERANCE = 1e-4
"""Largest difference of logits as a share of the largest one: a head with fewer rows is summed in another order."""


@dataclass
class Counts:
    """How often each id came up: in the text and in the tasks' search documents, and in those of both that are held
    out. `rows` are the held-out documents of the text."""

    counted: Counter[int] = field(default_factory=Counter)
    held: Counter[int] = field(default_factory=Counter)
    tasks_held: Counter[int] = field(default_factory=Counter)
    rows: list[Row] = field(default_factory=list)


def text_of(job: Job) -> str:
    """The text that tokens are counted in. Raises `RequestError` where there is none yet."""
    text = job.recipe.vocabulary.text or job.recipe.data
    if text is None:
        raise RequestError("--vocabulary: no text to choose tokens by; name one with --vocabulary-text or --data")
    if is_generated(text):
        raise RequestError(
            "--vocabulary: text that the base is to write cannot choose its tokens; name one with --vocabulary-text"
        )
    return text


def trim_inputs(job: Job) -> dict[str, object]:
    """All that the choice follows from. Tasks that a run is given later change nothing any more."""
    vocabulary = job.given.vocabulary
    inputs = {
        "model": job.untouched_fingerprint,
        "tokenizer": job.untouched_tokenizer.backend_tokenizer.to_str() if job.untouched_tokenizer.is_fast else "",
        "size": vocabulary.size,
        "text": data_fingerprint(text_of(job)),
    }
    return inputs if vocabulary.text is not None else inputs | {"text_key": job.recipe.text_key}


def trim(job: Job, scratch: Path) -> None:
    """Let the job go on with the cut base: the run's own where that was made from the same, or a new one in the folder
    `scratch`, which `keep_base` puts into the run.

    Raises `RequestError` for what cannot be cut, a text that is too short and a size below what must stay.
    """
    if job.recipe.vocabulary.size is None:
        return
    kept = job.run.base / VOCABULARY
    if not kept.is_file():
        job.checkpoint = job.untouched  # until there is one with fewer tokens
    text_of(job)
    describe_tokenizer(job.given.model, job.untouched_tokenizer)  # refused before anything is read
    inputs = fingerprint(trim_inputs(job))
    if kept.is_file() and CutVocabulary.read(kept).inputs == inputs:
        job.use_base(job.run.base)
        return
    choice = order_tokens(job)
    size = choice.size(job.recipe.vocabulary.size)
    cut = choice.cut(size)
    splits, difference = write_cut_base(job, cut, scratch, choice.texts())
    record = cut_record(choice, size, job.untouched, job.cut_checkpoint(scratch))
    say(f"vocabulary: {in_words(record)}")
    if record.coverage < LEAST_COVERED:
        say(
            f"warning: {1 - record.coverage:.1%} of the text's tokens are spelled in smaller ones now, as the network "
            "never read them; a larger --vocabulary (auto covers 99.9 %) loses less before anything is cut"
        )
    made = CutVocabulary(inputs=inputs, record=record, splits=splits, logit_difference=difference)
    write_json(scratch / VOCABULARY, made.model_dump())
    job.use_base(scratch)


def keep_base(job: Job) -> None:
    """Put the cut base into the run, where it is not there yet."""
    if job.vocabulary is None:
        return
    made = job.checkpoint.path
    job.accelerator.wait_for_everyone()  # until no process looks any more whether there is a base
    if job.run.writes and made != job.run.base:
        with job.run.stage(job.run.base, job.vocabulary.inputs) as (folder, _):
            for file in made.iterdir():
                shutil.move(file, folder / file.name)
        job.run.log(f"cut the vocabulary to {job.structure.vocab_size} tokens")
    job.accelerator.wait_for_everyone()  # until it is there
    job.use_base(job.run.base)


@contextmanager
def scratch_folder(recipe: Recipe, output: Path) -> Iterator[Path]:
    """Where a base is made before there is a run to hold it: on the run's disk; what killed processes left there is
    removed. Where none is made, the run's own folder."""
    if recipe.vocabulary.size is None:
        yield output
        return
    parent = next(folder for folder in output.absolute().parents if folder.is_dir())
    folder = temporary_name(parent / output.name, "base")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Choice:
    """A vocabulary in the order in which tokens stay, and how much of it must."""

    described: dict[str, Any]
    tokens: Tokens
    order: list[int]
    needed: int
    named: list[int]
    counts: Counts

    def size(self, asked: str) -> int:
        """The number of tokens that a size means. Raises `RequestError` for one below what must stay."""
        covering = least_covering(self.order, self.counts.held, ENOUGH)
        if self.counts.tasks_held:
            covering = max(covering, least_covering(self.order, self.counts.tasks_held, ENOUGH_OF_TASKS))
        return chosen_size(asked, self.order, self.needed, len(self.tokens), covering)

    def cut(self, size: int) -> VocabularyCut:
        return VocabularyCut.of(self.described, self.order[:size], self.named)

    def coverage(self, size: int) -> tuple[float, float | None]:
        """Shares of the tokens that so many cover of held-out text, and of held-out documents of tasks."""
        held, tasks = self.counts.held, self.counts.tasks_held
        return coverage(self.order, held)[size], coverage(self.order, tasks)[size] if tasks else None

    def texts(self) -> list[str]:
        """Texts to prove a cut on: some of those held out, and some that are hard to split."""
        texts = [piece for row in self.counts.rows for piece in pieces(row.text)]
        return [*texts[:: max(1, len(texts) // TEXTS)][:TEXTS], *sample_texts()]


def order_tokens(job: Job) -> Choice:
    """All tokens of the base in the order in which they stay, by the text and the tasks' search documents."""
    tokenizer = job.untouched.load_tokenizer()
    described = describe_tokenizer(job.given.model, tokenizer)
    tokens, rows = Tokens.read(described), job.untouched.structure.vocab_size
    if beyond := tokens_without_row(tokenizer, rows):
        raise RequestError(f"--vocabulary: {no_row(*beyond[0], rows)}")
    counts = count(job, tokenizer)
    named = ids_in_configurations(job.untouched)
    in_template = (number for text in template_texts(tokenizer) for number in tokenizer(text).input_ids)
    needed = ids_that_stay(tokens, described, [*named, *in_template])
    return Choice(described, tokens, by_frequency(tokens, counts.counted, needed), len(needed), named, counts)


def count(job: Job, tokenizer: Any) -> Counts:
    """How often each token comes up in the text, and in the tasks' search documents where there are tasks."""
    counts, source, total = Counts(), text_of(job), 0
    key = job.recipe.text_key if job.recipe.vocabulary.text is None else None
    for number, row in enumerate(rows_of(source, key, job)):
        ids, _ = encode_row(row, tokenizer)
        total += len(ids)
        if number % HELD == HELD - 1:
            counts.held.update(ids)
            counts.rows.append(row)
        else:
            counts.counted.update(ids)
        if total >= COUNTED:
            break
    if total < LEAST or not counts.rows:
        raise RequestError(
            f"--vocabulary-text {source}: {total:,} tokens in {number + 1 if total else 0} documents are too few to "
            f"choose tokens by; give {LEAST:,} at least, in {HELD} documents or more"
        )
    if job.recipe.tasks:
        for number, texts in enumerate(search_texts(job)):
            ids = [one for text in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids for one in text]
            (counts.tasks_held if number % HELD == HELD - 1 else counts.counted).update(ids)
    return counts


def rows_of(source: str, key: str | None, job: Job) -> Iterator[Row]:
    """The rows of the text, whose errors name the option that it was given by."""
    if job.recipe.vocabulary.text is None:
        yield from read_rows(source, key)
        return
    try:
        yield from read_rows(source, key)
    except RequestError as error:
        raise RequestError(str(error).replace("--data ", "--vocabulary-text ", 1)) from error


def search_texts(job: Job) -> Iterator[list[str]]:
    """Of every search document of the tasks, all that a network reads of it, each text once."""
    for subtasks in job.untouched_tasks.documents("search", job.recipe.searching.limit).values():
        for _, documents in subtasks:
            for document in documents:
                texts = [text for instance in document.instances for text in instance.args if isinstance(text, str)]
                yield list(dict.fromkeys(filter(None, texts))) or [""]


def pieces(text: str) -> list[str]:
    """A text in pieces of at most `TEXT_LENGTH` characters, cut at spaces."""
    made, piece = [], ""
    for word in text.split(" "):
        if piece and len(piece) + len(word) >= TEXT_LENGTH:
            made.append(piece)
            piece = ""
        piece = f"{piece} {word}" if piece else word
    return [part[: 4 * TEXT_LENGTH] for part in [*made, piece] if part]


def write_cut_base(job: Job, cut: VocabularyCut, folder: Path, texts: Sequence[str]) -> tuple[list[SplitText], float]:
    """Write the cut base; returns how it splits some of the texts, and the largest difference of the kept tokens'
    logits, as a share of the largest one.

    Raises `VerificationError` where text of kept tokens is split otherwise than before, or the logits differ.
    """
    untouched, whole, new = job.untouched, job.untouched.load_tokenizer(), cut.new
    # 1. What the untouched network says of texts, those first whose tokens were all kept; others without what is gone.
    encoded = sorted((whole(text, verbose=False).input_ids for text in texts), key=lambda ids: not set(ids) <= set(new))
    kept = [[number for number in ids if number in new][:PROOF_LENGTH] for ids in encoded]
    proof = [torch.tensor([ids]) for ids in kept if ids][:PROOF_TEXTS]
    model = untouched.load_model(torch.float32, "cpu")
    expected = [logits_of(model, ids)[..., list(cut.rows)] for ids in proof]
    # 2. Cut and write it.
    write_cut(untouched, whole, cut, model.to(job.stored_dtype), folder)
    del model
    # 3. What was written splits the same, and says the same.
    made = job.cut_checkpoint(folder)
    splits = compare_splits(whole, made.load_tokenizer(), new, texts)
    model = made.load_model(torch.float32, "cpu")
    difference = 0.0
    for ids, logits in zip(proof, expected, strict=True):
        moved = (logits_of(model, ids.apply_(new.__getitem__)) - logits).abs().max() / logits.abs().max()
        difference = max(difference, moved.item())
    if not difference <= TOLERANCE:
        raise VerificationError(f"the cut base says otherwise of kept tokens, by {difference:.2g} of the largest logit")
    few = splits[:: math.ceil(len(splits) / REMEMBERED)]
    return [SplitText(text=s.text, ids=list(s.cut_ids), decoded=s.decoded, kept=s.kept) for s in few], difference


def cut_record(choice: Choice, size: int, untouched: Checkpoint, made: Checkpoint) -> VocabularyRecord:
    """A cut in numbers, on text that was not counted."""
    share, tasks_share = choice.coverage(size)
    return VocabularyRecord(
        rows=made.structure.vocab_size,
        base_rows=untouched.structure.vocab_size,
        coverage=share,
        tasks_coverage=tasks_share,
        bytes_per_token=bytes_per_token(choice.counts.rows, made.load_tokenizer()),
        base_bytes_per_token=bytes_per_token(choice.counts.rows, untouched.load_tokenizer()),
    )


def sizes(job: Job, asked: str) -> list[dict[str, Any]]:
    """What some sizes of the vocabulary, `auto` and the one `asked` for among them, would keep and save; nothing is
    written. Raises `RequestError` as `trim` does."""
    choice, tokenizer = order_tokens(job), job.untouched.load_tokenizer()
    structure, base = job.untouched.structure, job.untouched.structure.base
    shapes = (structure.shape(tensor, base) for tensor in structure.tensors if tensor.role in ("embedding", "head"))
    for_each_row = sum(shape[1] for shape in shapes if shape)
    choice.size(asked)  # refused before anything is measured
    rows = []
    for name in dict.fromkeys((*SHARES, AUTO, asked)):
        try:
            size = choice.size(name)
        except RequestError:  # less than must stay
            continue
        share, tasks_share = choice.coverage(size)
        cut = choice.cut(size)
        saved = for_each_row * (structure.vocab_size - len(cut.rows))
        rows.append(
            {
                "size": name,
                "tokens": size,
                "coverage": share,
                "tasks_coverage": tasks_share,
                "parameters_saved": saved,
                "share_saved": saved / structure.parameters(base),
                "bytes_saved": saved * structure.dtype_bytes,
                "tokens_per_byte": 1 / bytes_per_token(choice.counts.rows, cut_loaded(tokenizer, cut)),
            }
        )
    return rows


def in_words(record: VocabularyRecord) -> str:
    """A cut in one line."""
    tasks = "" if record.tasks_coverage is None else f" and {record.tasks_coverage:.2%} of that of the tasks"
    return (
        f"{record.rows:,} of {record.base_rows:,} tokens; they are {record.coverage:.2%} of the text that was not "
        f"counted{tasks}, in which a token stands for {record.bytes_per_token:.2f} bytes, before for "
        f"{record.base_bytes_per_token:.2f}"
    )


def bytes_per_token(rows: list[Row], tokenizer: Any) -> float:
    """Bytes of documents (UTF-8, without what a template adds) for each of their tokens."""
    tokens = sum(len(encode_row(row, tokenizer)[0]) for row in rows)
    return sum(len(row.text.encode()) for row in rows) / max(1, tokens)
