"""Ours compared with other methods: the rows of a comparison summarized by method and size, and shown."""

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

from export.report.plots import Dot, percent_tick, scatter, times_tick
from export.report.schema import Comparison
from search.scores import Score
from supernet.common.formatting import count, percent

OURS = "ours"

Meaning = Literal["better", "worse", "unclear"]


@dataclass(frozen=True)
class MethodSummary:
    """One method at one size, over its seeds. Qualities are means over seeds; `meaning` says whether ours is better."""

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
    """Means over seeds, with standard errors like that of the quality; only tasks that every seed has a score of."""
    decode_tps: float | None
    base_decode_tps: float | None
    text_per_token: float
    difference: tuple[float, float, float] | None
    """Quality of ours minus this one's, and its central 95 %."""
    meaning: Meaning | None

    @property
    def ours(self) -> bool:
        return self.method == OURS

    @property
    def verdict(self) -> str:
        """What the difference means, in words."""
        return {"better": "ours is better", "worse": "better than ours", "unclear": "no clear difference", None: ""}[
            self.meaning
        ]

    @property
    def speedup(self) -> float | None:
        """Decode speed as a multiple of the base's, of text where tokens are not the same; None if it was not
        measured."""
        if not self.decode_tps or not self.base_decode_tps:
            return None
        return self.text_per_token * self.decode_tps / self.base_decode_tps

    @property
    def difference_text(self) -> str:
        """The difference in points with its central 95 %, as in `+5.0 (+3.0, +7.0)`; empty for ours."""
        if self.difference is None:
            return ""
        value, low, high = (100 * number for number in self.difference)
        return f"{value:+.1f} ({low:+.1f}, {high:+.1f})".replace("-", "\N{MINUS SIGN}")


def summarize(rows: Sequence[Comparison]) -> list[list[MethodSummary]]:
    """For every size, largest first, all methods in order of quality, best first.

    An external checkpoint is listed at the size of ours that is nearest to it.
    """
    groups: dict[tuple[str, str | None], list[Comparison]] = {}
    for row in rows:
        groups.setdefault((row.method, row.size), []).append(row)
    methods = [_summarized(group) for group in groups.values()]
    sizes = {method.size: method.params for method in methods if method.ours}
    if not sizes:
        return []
    tables: dict[str | None, list[MethodSummary]] = {size: [] for size in sorted(sizes, key=lambda s: -sizes[s])}
    for method in methods:
        nearest = min(sizes, key=lambda size: abs(sizes[size] - method.params))
        tables[method.size if method.size in sizes else nearest].append(method)
    return [sorted(table, key=lambda method: -method.quality) for table in tables.values()]


def _summarized(group: Sequence[Comparison]) -> MethodSummary:
    """One method at one size, from its row of every seed."""
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
        text_per_token=first.text_per_token,
        difference=(difference.value, difference.low, difference.high) if difference else None,
        meaning=difference.meaning if difference else None,
    )


def _mean_score(scores: Sequence[Score]) -> Score:
    """One task's mean over seeds; without a standard error where the metric has none over documents."""
    value, stderr = _mean([(score.value, score.stderr or 0.0) for score in scores])
    unknown = any(score.stderr is None for score in scores)
    return scores[0].model_copy(update={"value": value, "stderr": None if unknown else stderr})


def _mean(seeds: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean over seeds of (value, standard error over documents), and its standard error over both: all seeds share
    their documents, so the error over these does not shrink."""
    values = [value for value, _ in seeds]
    over_seeds = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), math.hypot(statistics.fmean(error for _, error in seeds), over_seeds)


def summary(table: Sequence[MethodSummary]) -> str:
    """One size's result in a sentence. Methods that are better than ours are named."""
    ours = next(method for method in table if method.ours)
    others = [method for method in table if not method.ours]
    if not others:
        return f"At {ours.size} nothing was compared with ours yet."
    ahead = [method for method in others if method.quality > ours.quality]
    equal = [method.method for method in others if method.quality == ours.quality]
    better = [method.method for method in ahead if method.meaning == "worse"]
    beaten = sum(method.meaning == "better" for method in others)
    quality = f"quality {percent(ours.quality)} at {count(ours.params)} parameters"
    if better:
        names = " and ".join(better)
        start = f"At {ours.size} {names} beat ours ({quality}) by more than the choice of documents explains"
    elif ahead:
        names = ", ".join(method.method for method in ahead)
        start = f"At {ours.size} ours ({quality}) is not clearly different from the best ({names})"
    elif equal:
        start = f"At {ours.size} ours ({quality}) is as good as {' and '.join(equal)}"
    else:
        start = f"At {ours.size} ours is best ({quality})"
    return f"{start}; it is better than {beaten} of {len(others)} others."


def terminal_table(tables: Sequence[Sequence[MethodSummary]]) -> Table:
    """All sizes in one table, best first in each; it fits 80 columns. A star marks what is more than the choice of
    documents explains."""
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
    for number, methods in enumerate(tables):
        if number:
            table.add_section()
        for method in methods:
            clear, lost = method.meaning in ("better", "worse"), method.meaning == "worse"
            difference = f"{method.difference_text} *" if clear else method.difference_text
            table.add_row(
                Text(method.method, style="bold" if method.ours else ""),
                count(method.params),
                "" if method.before_healing is None else percent(method.before_healing),
                f"{100 * method.quality:.1f} ± {100 * method.stderr:.1f}",
                Text(difference, style="yellow" if lost else ""),
                "" if method.speedup is None else f"{method.speedup:.2f}",
            )
    return table


def comparison_plots(tables: Sequence[Sequence[MethodSummary]], base_params: int) -> dict[str, Markup]:
    """Quality against size and against measured speed, the base at (1, 1); bars are one standard error."""
    methods = [method for table in tables for method in table]
    if not methods:
        return {}

    def dot(method: MethodSummary, x: float) -> Dot:
        quality = f"quality {percent(method.quality)} ± {100 * method.stderr:.1f}"
        title = f"{method.method}: {quality}, {count(method.params)} parameters"
        kind: Literal["ours", "other"] = "ours" if method.ours else "other"
        return Dot(x, method.quality, title, kind, method.method, method.stderr)

    base = Dot(1.0, 1.0, f"base: {count(base_params)} parameters", "base", "base")
    plots = {
        "compared_size": scatter(
            [base, *(dot(method, method.params / base_params) for method in methods)],
            "parameters, share of the base's",
            "quality on the report split",
            less_is_better=True,
            x_text=percent_tick,
        )
    }
    timed = [(method, method.speedup) for method in methods if method.speedup is not None]
    if timed:
        plots["compared_speed"] = scatter(
            [base, *(dot(method, speedup) for method, speedup in timed)],
            "decode speed, multiple of the base's",
            "quality on the report split",
            less_is_better=False,
            x_text=times_tick,
        )
    return {name: plot for name, plot in plots.items() if plot}
