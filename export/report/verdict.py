"""A report in plain sentences, and whether a difference of scores is more than noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from export.report.quantized_base import quantized_base_sentences
from export.report.schema import Base, Package, Report
from export.report.vocabulary import decode_ratio
from search.scores import Score
from supernet.common.formatting import count, percent, size

HEAVY = 0.9
"""Quality below which a loss is called heavy; it is said once, of the package in which it happens."""


@dataclass(frozen=True)
class Change:
    """How a score differs from the base's. `delta` is positive if the score is better, also where lower is better."""

    delta: float
    stderr: float | None

    @property
    def meaning(self) -> Literal["better", "worse", "unclear", "unknown"]:
        """`unclear` within two standard errors, `unknown` without a standard error (and not equal)."""
        if self.stderr is None:
            return "unknown" if self.delta else "unclear"
        if abs(self.delta) <= 2 * self.stderr:
            return "unclear"
        return "better" if self.delta > 0 else "worse"

    @property
    def text(self) -> str:
        decimals = 3 if abs(self.delta) < 10 else 2
        return f"{self.delta:+.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def change(base: Score, score: Score) -> Change:
    """How `score` differs from the base's, the two taken as independent."""
    delta = (score.value - base.value) * (1 if score.higher_is_better else -1)
    if base.stderr is None or score.stderr is None:
        return Change(delta, None)
    return Change(delta, math.hypot(base.stderr, score.stderr))


def verdict(report: Report) -> list[str]:
    """The result in a few sentences: how much smaller, how fast, how much quality is lost, and if that may be noise."""
    if not report.packages:
        return [f"No package of {report.base.name} has been written yet."]
    base = report.base
    sentences: list[str] = []
    for package in report.packages:
        plain = _unquantized(report, package)
        if plain is None:
            sentences += _size_sentences(package, base, first=not sentences)
            sentences += _losses("It loses", base.tasks, package.tasks, say_none=True)
            sentences += _text_loss(package, base)
        else:
            sentences.append(
                f"{_sentence(package.label)} takes {size(package.bytes)} on disk "
                f"({percent(package.bytes / base.bytes)} of the base) and keeps {percent(package.quality)} "
                "of the quality."
            )
            sentences += _losses("Quantization loses", plain.tasks, package.tasks, say_none=False)
        before, solver = (base, "the base") if plain is None else (plain, "the unquantized network")
        fallen = [t for t, s in package.tasks.items() if s.stamp and t in before.tasks and not before.tasks[t].stamp]
        if fallen:
            sentences.append(f"It has fallen to chance on {_listed(fallen)}, which {solver} solves.")
        if package.quality < HEAVY <= before.quality:
            sentences.append(
                "That is a heavy loss: a larger size, more training, more healing or a search on more documents may "
                "keep more."
            )
    blind = [task for task, score in base.tasks.items() if score.stamp]
    if blind:
        sentences.append(
            f"The base itself only guesses on {_listed(blind)}: there the scores tell nothing about quality."
        )
    return [*sentences, *quantized_base_sentences(report)]


def _text_loss(package: Package, base: Base) -> list[str]:
    """How the loss on text changed, which tasks of few choices may not show."""
    if package.held_out_loss is None or base.held_out_loss is None:
        return []
    sentences = [
        f"On text that was not trained on, its loss is {package.held_out_loss:.3g} nats per token, the base's "
        f"{base.held_out_loss:.3g}."
    ]
    if package.held_out_loss > base.held_out_loss + math.log(2):
        sentences.append(
            "So it gives the next token less than half the probability that the base gives it, "
            "also where tasks show no loss."
        )
    return sentences


def _unquantized(report: Report, package: Package) -> Package | None:
    """The package that `package` was quantized from, if the report has it; None for an unquantized one."""
    if package.quantization is None:
        return None
    same = [p for p in report.packages if p.quantization is None and p.architecture == package.architecture]
    return next((p for p in same if p.layout == package.layout), same[0] if same else None)


def _size_sentences(package: Package, base: Base, first: bool) -> list[str]:
    """Size, quality and speed of an unquantized package against the base's."""
    quality = f"{percent(package.quality)} of its quality"
    if first:
        tasks = len(package.tasks)
        quality += f", measured by {tasks} task{'s' * (tasks != 1)} on documents that the search never saw"
    sentences = [
        f"{_sentence(package.label)} has {percent(package.params / base.params)} of the parameters of {base.name} "
        f"({count(package.params)} of {count(base.params)}), takes {size(package.bytes)} on disk instead of "
        f"{size(base.bytes)}, and keeps {quality}."
    ]
    if package.speed and base.speed and package.speed.comparable(base.speed):
        ratio = decode_ratio(package, base)
        what = "tokens" if package.vocabulary is None else "text"
        sentences.append(
            f"It generates {what} {ratio:.2f} times as fast ({base.speed.where})."
            if ratio >= 1.02
            else f"It is not faster: {ratio:.2f} times the base's {what} per second ({base.speed.where})."
        )
    return sentences


def _losses(opening: str, before: Mapping[str, Score], after: Mapping[str, Score], say_none: bool) -> list[str]:
    """On which tasks a loss is more than noise, and for which that is not known."""
    changes = {task: change(score, after[task]) for task, score in before.items() if task in after}
    shown = {task: f"{task} ({before[task].value:.3g} → {after[task].value:.3g})" for task in changes}
    worse = [shown[task] for task, it in changes.items() if it.meaning == "worse"]
    unknown = [shown[task] for task, it in changes.items() if it.meaning == "unknown" and it.delta < 0]
    sentences = []
    if worse:
        sentences.append(f"{opening} more than noise explains on {_listed(worse)}.")
    elif say_none and any(it.stderr is not None for it in changes.values()):
        sentences.append("No loss is larger than the noise of measuring (two standard errors).")
    if unknown and say_none:
        sentences.append(f"It is not known how much of the loss is noise on {_listed(unknown)}.")
    return sentences


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
