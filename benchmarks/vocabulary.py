"""What does a smaller vocabulary save, and what does it cost? Nothing is trained.

    python -m benchmarks.vocabulary [--checkpoint DIR --data FILE --tasks A B] [--sizes 1 0.75 0.5 0.25 auto]
        [--limit N] [--speed] [--output FILE]
    python -m benchmarks.vocabulary --priors 0 0.2 1 [--checkpoint DIR --data FILE --tasks A B]

Each size is a base as `compress --vocabulary` makes it: tokens are chosen by the data and the tasks' search documents.
Bits per byte are of the same held-out texts at every size, their first bytes; `--limit` scores so many report
documents of each task, `--speed` times decoding beside the untouched network. With `--priors`, only how much of
held-out text each weight of the prior covers, and no network is read. One thread for speed and scores.
"""

from __future__ import annotations

import math
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Measurements, make_parser, print_header, print_row
from benchmarks.jobs import temporary_job
from compressor.job import Job
from compressor.stages.trimming import Choice, bytes_per_token, cut_record, order_tokens, write_cut_base
from evals.scoring.encoding import Encoder
from evals.speed.measured import speed_beside
from export.quantization.schemes import SCHEMES
from supernet.checkpoint import Checkpoint
from supernet.vocabulary import by_frequency, coverage

TEXT_BYTES = 600
"""Of each held-out document."""


@torch.no_grad()
def bits_per_byte(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Of texts that a network reads one by one, each behind an end mark; every token of them is predicted."""
    nats, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        logits = model(input_ids=torch.tensor([[first, *ids]]), use_cache=False).logits[0, :-1].float()
        nats -= float(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum())
        count += len(text.encode())
    return nats / count / math.log(2)


@contextmanager
def base_of_size(job: Job, choice: Choice, size: int) -> Iterator[tuple[Checkpoint, dict[str, Any]]]:
    """The base with so many tokens, and what its record says; the untouched one where all stay."""
    if size == len(choice.tokens):
        record = cut_record(choice, size, job.untouched, job.untouched).model_dump()
        yield job.untouched, record | {"logit_difference": 0.0}
        return
    with tempfile.TemporaryDirectory() as folder:
        _, difference = write_cut_base(job, choice.cut(size), Path(folder), choice.texts())
        made = job.cut_checkpoint(Path(folder))
        yield made, cut_record(choice, size, job.untouched, made).model_dump() | {"logit_difference": difference}


def measure(job: Job, choice: Choice, size: str, texts: Sequence[str], arguments: Namespace) -> dict[str, Any]:
    """Everything that is known of one size."""
    with base_of_size(job, choice, choice.size(size)) as (checkpoint, record):
        structure, tokenizer = checkpoint.structure, checkpoint.load_tokenizer()
        model = checkpoint.load_model(torch.float32, "cpu")
        int4 = SCHEMES["int4"].storage_format(None)
        row = record | {
            "parameters": structure.parameters(structure.base),
            "int4_bytes": structure.bytes(structure.base, int4),
            "bits_per_byte": bits_per_byte(model, tokenizer, texts),
        }
        if arguments.limit:
            tasks = job.untouched_tasks.encoded_by(Encoder(tokenizer, checkpoint.config))
            scores = job.scorer(model, tasks).score("report", arguments.limit)
            row["tasks"] = {name: score.text for name, score in scores.items()}
        if arguments.speed:
            base = job.load_untouched()
            speed, base_speed = speed_beside(model, base, prompt=64, new=48, repeats=5)
            row["text_speed"] = speed.decode_tps * record["bytes_per_token"]
            row["base_text_speed"] = base_speed.decode_tps * record["base_bytes_per_token"]
    return row


def print_sizes(rows: dict[str, dict[str, Any]]) -> None:
    tasks = list(next(iter(rows.values())).get("tasks", {}))
    names = ["size", "tokens", "parameters", "INT4, MB", "of the text", "of the tasks", "bits per byte"]
    print_header(*names, "tokens per byte", "logits moved", *tasks, "text, bytes/s", right_from=1)
    for size, row in rows.items():
        of_tasks = row["tasks_coverage"]
        speed = (
            f"{row['text_speed']:.0f} ({row['text_speed'] / row['base_text_speed']:.2f})" if "text_speed" in row else ""
        )
        print_row(
            size,
            f"{row['rows']:,}",
            f"{row['parameters']:,}",
            f"{row['int4_bytes'] / 1e6:.1f}",
            f"{row['coverage']:.2%}",
            "" if of_tasks is None else f"{of_tasks:.2%}",
            f"{row['bits_per_byte']:.4f}",
            f"{1 / row['bytes_per_token']:.4f}",
            f"{row['logit_difference']:.1g}",
            *(row.get("tasks", {}).get(name, "") for name in tasks),
            speed,
        )


def print_priors(job: Job, priors: Sequence[float], sizes: Sequence[str]) -> None:
    """What the first tokens cover of held-out text and of the tasks' held-out documents, by the prior's weight."""
    choice = order_tokens(job)
    print_header("prior", *(f"{what} at {size}" for size in sizes for what in ("text", "tasks")), right_from=1)
    for prior in priors:
        order = by_frequency(choice.tokens, choice.counts.counted, choice.order[: choice.needed], prior)
        cells = []
        for size in map(choice.size, sizes):
            for held in (choice.counts.held, choice.counts.tasks_held):
                cells.append(f"{coverage(order, held)[size]:.2%}" if held else "")
        print_row(f"{prior:g}", *cells)


def main() -> None:
    own = {
        "tasks": ([""], "lm-eval tasks, whose search documents are counted too"),
        "sizes": (["1", "0.75", "0.5", "0.25", "auto"], "sizes as of --vocabulary"),
        "priors": ([-1.0], "weights of the prior to compare"),
        "documents": (24, "held-out documents for bits per byte"),
        "limit": (0, "report documents of each task to score"),
        "speed": False,
    }
    parser = make_parser(__doc__, "checkpoint", "data", "include_path", "output", "minutes", **own)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keys = {"tasks": [name for name in arguments.tasks if name], "include_path": arguments.include_path}
    with temporary_job(arguments.checkpoint, arguments.data, vocabulary={"size": "auto"}, **keys) as job:
        if arguments.priors != [-1.0]:
            print_priors(job, arguments.priors, [size for size in arguments.sizes if size not in ("1", "auto")])
            return
        choice = order_tokens(job)
        rows = choice.counts.rows
        texts = [row.text.encode()[:TEXT_BYTES].decode(errors="ignore") for row in rows[: arguments.documents]]
        measurements = Measurements(arguments.output, arguments.minutes)
        key = f"{arguments.checkpoint} {arguments.data} {keys['tasks']} {arguments.limit} {arguments.speed}"
        results = measurements.by_settings.setdefault(key, {})
        for size in arguments.sizes:
            measurements.measure(results, size, lambda size=size: measure(job, choice, size, texts, arguments))  # type: ignore[misc]
        if not results:
            raise SystemExit("the minutes were over before anything was measured")
        print(f"{bytes_per_token(rows, job.untouched.load_tokenizer()):.3f} bytes per token of the untouched base\n")
        print_sizes(results)


if __name__ == "__main__":
    main()
