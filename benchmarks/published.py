"""LLaMA-NAS and InstaTune as published, and this tool's own way: whole jobs at equal tokens, evaluations and size.

    python -m benchmarks.published FOLDER [--checkpoint DIR --data FILE --include-path DIR --tasks A,B]
        [--size 0.67] [--tokens 400000] [--evaluations 100] [--ways llama-nas,instatune,ours] [--rounding-steps 0]

The first two are the recipes of these names, with the tokens, evaluations and documents that are said here, and batches
and learning rates that suit them. Ours searches the base as it is, repaired, and heals the pick on all tokens. A run
each in FOLDER, so that a second call goes on; scores are on the report split.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import make_parser, print_header, print_row
from compressor.interface import Result, compress

CLAIMS: Mapping[str, str] = {
    "llama-nas": "LLaMA2-7B: up to 1.5x smaller and 1.3x faster, a negligible drop for certain tasks",
    "instatune": "BERT on SST-2: 53.6 % fewer multiply-accumulates, 0.7 % less of the score",
    "ours": "",
}
"""What the papers say of themselves (arXiv 2405.18377 and 2308.15609), by recipe."""
BATCH: Mapping[str, Any] = {"finetuning.batch_size": 4, "finetuning.gradient_accumulation": 1}
LENGTH: Mapping[str, Any] = {"finetuning.sequence_length": 256, "finetuning.learning_rate": None}
"""Of small networks and texts; the rate follows from the width."""


def settings_of(way: str, tokens: int, evaluations: int, limit: int) -> dict[str, Any]:
    """The recipe's keys that are said here, for a recipe of a paper or for ours."""
    keys = {**BATCH, **LENGTH, "searching.evaluations": evaluations, "searching.limit": limit}
    keys |= {"searching.population": max(10, evaluations // 5), "quantizing.schemes": ["int8"]}
    if way == "ours":
        return keys | {"finetuning.tokens": 0, "healing.tokens": tokens, "repair.enabled": True}
    return keys | {"finetuning.tokens": tokens}


def row_of(result: Result) -> list[str]:
    """Cells: how much smaller and faster the pick is; its quality and its INT8 package's, each with the central 95 % of
    what it lost; held-out losses of base and pick in nats per token; the INT8 package's megabytes."""
    report = result.report
    base = report["base"]
    by_name = {row["name"]: row for row in report["packages"]}
    best, int8 = by_name["best"], by_name["best-int8"]
    speed = best["speed"]["decode_tps"] / base["speed"]["decode_tps"]
    cells = [f"{base['params'] / best['params']:.2f}x", f"{speed:.2f}x"]
    for package in (best, int8):
        change = package["change"]["quality"]
        cells.append(f"{package['quality']:.3f} ({change['low']:+.3f} to {change['high']:+.3f})")
    return [*cells, f"{base['held_out_loss']:.3f} → {best['held_out_loss']:.3f}", f"{int8['bytes'] / 1e6:.2f}"]


def main() -> None:
    parser = make_parser(
        __doc__,
        "checkpoint",
        "data",
        "include_path",
        tasks=("world_grammar,world_facts", "comma-separated"),
        size=("0.67", "as in --max-params"),
        tokens=(400_000, "of training in all"),
        evaluations=(100, "of the search"),
        limit=(100, "documents of each task in the search"),
        ways=(",".join(CLAIMS), "comma-separated"),
        rounding_steps=(-1, "of the base in int4, which no row is of; negative: as the recipes say"),
    )
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    rows: dict[str, list[str]] = {}
    rounding = {} if arguments.rounding_steps < 0 else {"quantizing.iterations": arguments.rounding_steps}
    for way in arguments.ways.split(","):
        result = compress(
            arguments.checkpoint,
            arguments.folder / way,
            recipe=None if way == "ours" else way,
            data=arguments.data,
            include_path=arguments.include_path,
            tasks=arguments.tasks,
            max_params=arguments.size,
            settings=settings_of(way, arguments.tokens, arguments.evaluations, arguments.limit) | rounding,
        )
        rows[way] = row_of(result)
    print_header(
        "way",
        "smaller",
        "faster",
        "quality (its change)",
        "in INT8",
        "held-out loss",
        "INT8, MB",
        "the paper's own claim",
    )
    for way, cells in rows.items():
        print_row(way, *cells, CLAIMS[way])


if __name__ == "__main__":
    main()
