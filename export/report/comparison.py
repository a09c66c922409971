"""How ours stands beside the alternatives: the rows of a comparison put together by method and size, and shown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

from export.report.plots import Dot, scatter
from export.report.schema import Comparison
from search.scores import Score
from supernet.common.formatting import count, percent

OURS = "ours"

Meaning = Literal["better", "worse", "unclear"]


@dataclass(frozen=True)
class MethodSummary:
    """One method at one size, over its seeds. Qualities are means over seeds; `meaning` is what can be said of ours."""

    method: str
    about: str
    size: str | None
    seeds: int
    params: int
    bytes: int | None
    quality: float
    stderr: float
    """One standard error of the mean: over documents, and over seeds where there are several."""
    before_healing: float | None
    tasks: Mapping[str, Score]
    """Means over seeds, with standard errors like that of the quality; without a task that any seed has no score of."""
    decode_tps: float | None
    base_decode_tps: float | None
    difference: tuple[float, float, float] | None
    """Quality of ours minus this one's, and its central 95 %."""
    meaning: Meaning | None

    @property
    def ours(self) -> bool:
        return self.method == OURS

    @property
    def verdict(self) -> str:
        """What the difference says, in words."""
        return {"better": "ours is better", "worse": "better than ours", "unclear": "no clear difference", None: ""}[
            self.meaning
        ]

    @property
    def difference_text(self) -> str:
        if self.difference is None:
            return ""
        value, low, high = (100 * number for number in self.difference)
        return f"{value:+.1f} ({low:+.1f}, {high:+.1f})".replace("-", "\N{MINUS SIGN}")


def summarize(rows: Sequence[Comparison]) -> list[list[MethodSummary]]:
    """For every size, largest first, all methods by falling quality: what wins stands first, whoever made it.

    A checkpoint from elsewhere stands at the size of ours that is nearest to it.
    """
    groups: dict[tuple[str, str | None], list[Comparison]] = {}
    for row in rows:
        groups.setdefault((row.method, row.size), []).append(row)
    found = [_standing(group) for group in groups.values()]
    sizes = {one.size: one.params for one in found if one.ours}
    if not sizes:
        return []
    tables: dict[str | None, list[MethodSummary]] = {size: [] for size in sorted(sizes, key=lambda s: -sizes[s])}
    for one in found:
        at = one.size if one.size in sizes else min(sizes, key=lambda size: abs(sizes[size] - one.params))
        tables[at].append(one)
    return [sorted(table, key=lambda one: -one.quality) for table in tables.values()]


def _standing(group: Sequence[Comparison]) -> MethodSummary:
    first = min(group, key=lambda row: row.seed or 0)
    quality, stderr = _mean([(row.quality, row.quality_stderr or 0.0) for row in group])
    before = [row.quality_before_healing for row in group if row.quality_before_healing is not None]
    difference = first.ours_minus_this
    shared = [task for task in first.tasks if all(task in row.tasks for row in group)]
    return MethodSummary(
        method=first.method,
        about=first.about,
        size=first.size,
        seeds=len(group),
        params=first.params,
        bytes=first.bytes,
        quality=quality,
        stderr=stderr,
        before_healing=statistics.fmean(before) if before else None,
        tasks={task: _mean_score([row.tasks[task] for row in group]) for task in shared},
        decode_tps=first.speed.decode_tps if first.speed else None,
        base_decode_tps=first.base_speed.decode_tps if first.base_speed else None,
        difference=(difference.value, difference.low, difference.high) if difference else None,
        meaning=difference.meaning if difference else None,
    )


def _mean_score(scores: Sequence[Score]) -> Score:
    """What one task said over seeds. One whose metric has no standard error over documents is left without any."""
    value, stderr = _mean([(score.value, score.stderr or 0.0) for score in scores])
    none = any(score.stderr is None for score in scores)
    return scores[0].model_copy(update={"value": value, "stderr": None if none else stderr})


def _mean(seeds: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean over seeds of (value, standard error over documents), and its standard error over both: all seeds share
    their documents, so the error over these does not shrink."""
    values = [value for value, _ in seeds]
    over_seeds = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), math.hypot(statistics.fmean(error for _, error in seeds), over_seeds)


def summary(table: Sequence[MethodSummary]) -> str:
    """One size's result in a sentence. A method that wins is named as winning."""
    mine = next(one for one in table if one.ours)
    others = [one for one in table if not one.ours]
    if not others:
        return f"At {mine.size} nothing was compared with ours yet."
    ahead = [one for one in others if one.quality > mine.quality]
    clear = [one.method for one in ahead if one.meaning == "worse"]
    beaten = sum(one.meaning == "better" for one in others)
    quality = f"quality {percent(mine.quality)} at {count(mine.params)} parameters"
    if clear:
        start = f"At {mine.size} {' and '.join(clear)} beat ours ({quality}) beyond what the documents' choice explains"
    elif ahead:
        names = ", ".join(one.method for one in ahead)
        start = f"At {mine.size} ours ({quality}) is not told apart from the best ({names})"
    else:
        start = f"At {mine.size} ours is best ({quality})"
    return f"{start}; it is better than {beaten} of {len(others)} others."


def terminal_table(tables: Sequence[Sequence[MethodSummary]]) -> Table:
    """All sizes in one table, best first in each; it fits 80 columns. A star: more than the choice of documents."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), collapse_padding=True)
    table.add_column("method", no_wrap=True)
    headings = (
        "params",
        "before\nhealing",
        "quality %\n± 1 s.e.",
        "ours less this,\npoints (95 %)",
        "decode\n/ base",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for number, standing in enumerate(tables):
        if number:
            table.add_section()
        for one in standing:
            faster = one.decode_tps / one.base_decode_tps if one.decode_tps and one.base_decode_tps else None
            clear, lost = one.meaning in ("better", "worse"), one.meaning == "worse"
            table.add_row(
                Text(one.method, style="bold" if one.ours else ""),
                count(one.params),
                "" if one.before_healing is None else percent(one.before_healing),
                f"{100 * one.quality:.1f} ± {100 * one.stderr:.1f}",
                Text(f"{one.difference_text} *" if clear else one.difference_text, style="yellow" if lost else ""),
                "" if faster is None else f"{faster:.2f}",
            )
    return table


def plots(tables: Sequence[Sequence[MethodSummary]], base_params: int) -> dict[str, Markup]:
    """Quality against size and against measured speed, the base at (1, 1); bars are one standard error."""
    everyone = [one for table in tables for one in table]
    if not everyone:
        return {}
    leaders = {(table[0].method, table[0].size) for table in tables}

    def dot(one: MethodSummary, x: float) -> Dot:
        named = one.ours or (one.method, one.size) in leaders
        title = f"{one.method}: quality {percent(one.quality)} ± {100 * one.stderr:.1f}, {count(one.params)} parameters"
        return Dot(x, one.quality, title, "chosen" if one.ours else "front", one.method if named else "", one.stderr)

    base = Dot(1.0, 1.0, f"base: {count(base_params)} parameters", "base", "base")
    found = {
        "compared_size": scatter(
            [base, *(dot(one, one.params / base_params) for one in everyone)],
            "parameters, share of the base's",
            "quality on the report split",
            less_is_better=True,
            x_is_share=True,
        )
    }
    timed = [(one, one.decode_tps / one.base_decode_tps) for one in everyone if one.decode_tps and one.base_decode_tps]
    if timed:
        found["compared_speed"] = scatter(
            [base, *(dot(one, faster) for one, faster in timed)],
            "decode speed, multiple of the base's",
            "quality on the report split",
            less_is_better=False,
        )
    return found
