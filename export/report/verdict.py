"""A report in plain sentences, and whether a difference of scores is more than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from export.report.quantized_base import quantized_base_sentences
from export.report.schema import Base, Difference, Package, Report
from export.report.vocabulary import decode_ratio
from search.scores import Score
from supernet.common.formatting import count, parse_bytes, percent, size

Meaning = Literal["better", "worse", "unclear", "unknown"]

HEAVY = 0.9
"""Quality below which a loss is called heavy; it is said once, of the package in which it happens."""


@dataclass(frozen=True)
class Change:
    """How a score differs from the base's. `delta` is positive if the score is better, also where lower is better."""

    delta: float
    meaning: Meaning
    """`unclear`: the choice of documents explains it; `unknown`: not equal, and no error is known."""

    @property
    def text(self) -> str:
        decimals = 3 if abs(self.delta) < 10 else 2
        return f"{self.delta:+.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def change(base: Score, score: Score, paired: Difference | None = None) -> Change:
    """How `score` differs from the base's. What that means follows from the same documents (`paired`) where that is
    known. Else, in runs of versions that kept no scores by document, both are taken as independent, which hides losses:
    `unclear` within two standard errors."""
    delta = (score.value - base.value) * (1 if score.higher_is_better else -1)
    if paired is not None:
        return Change(delta, paired.meaning)
    if base.stderr is None or score.stderr is None:
        return Change(delta, "unknown" if delta else "unclear")
    if abs(delta) <= 2 * math.hypot(base.stderr, score.stderr):
        return Change(delta, "unclear")
    return Change(delta, "better" if delta > 0 else "worse")


def verdict(report: Report) -> list[str]:
    """The result in a few sentences: how much smaller, how fast, how much quality is lost, and if that may be noise."""
    if not report.packages:
        return [f"No package of {report.base.name} has been written yet."]
    base = report.base
    sentences: list[str] = []
    for package in [*report.packages, *report.quantized_base]:
        if package.refused:
            sentences.append(
                f"{_sentence(package.label)} was refused by its proof and is not to be shipped: {package.refused}."
            )
        elif not package.verified:
            sentences.append(f"{_sentence(package.label)} was not proved yet; compressor export proves it.")
    sentences += [f"{name} was asked for and left out: {reason}." for name, reason in report.left_out.items()]
    shipped = [package for package in report.packages if not package.refused]
    for package in shipped:
        if missing := [task for task in base.tasks if task not in package.tasks]:
            sentences.append(f"{_sentence(package.label)} has no finite score on {_listed(missing)}.")
        plain = report.unquantized(package)
        if plain is None or plain.refused:
            sentences += _size_sentences(report, package, first=package is shipped[0])
            sentences += _losses(report, package, base)
            sentences += _text_loss(package, base)
        else:
            sentences.append(
                f"{_sentence(package.label)} takes {size(package.bytes)} on disk "
                f"({percent(package.bytes / base.bytes)} of the base) and keeps {percent(package.quality)} "
                "of the quality."
            )
            sentences += _losses(report, package, plain)
    asked = (report.recipe.get("targets") or {}).get("max_bytes")
    limit = parse_bytes(asked) if asked else math.inf
    for package in (package for package in shipped if package.layout == "gguf" and package.bytes > limit):
        more = f"more than the {limit:,} that the recipe asks for"
        sentences.append(f"{_sentence(package.label)} takes {package.bytes:,} bytes, {more}.")
    if remark := report.scale.remark:
        sentences.append(remark)
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


def _size_sentences(report: Report, package: Package, first: bool) -> list[str]:
    """Size, quality and speed of an unquantized package against the base's."""
    base = report.base
    if package.sizes:
        least, most = (pick(package.sizes, key=lambda one: one.params) for pick in (min, max))
        return [
            f"{_sentence(package.label)} holds {len(package.sizes)} sizes in one set of weights ({size(package.bytes)} "
            f"on disk), from {percent(least.params / base.params)} to {percent(most.params / base.params)} of the "
            f"parameters of {base.name}; none is healed, and size {package.default_size} keeps "
            f"{percent(package.quality)} of the quality."
        ]
    quality = f"{percent(package.quality)} of its quality"
    if first and (tasks := len(report.scale.counted)):
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


def told_apart(before: float, now: float) -> str:
    """Two numbers in as few digits, three or more, as show that they differ."""
    for digits in range(3, 8):
        if f"{before:.{digits}g}" != f"{now:.{digits}g}":
            break
    return f"{before:.{digits}g} → {now:.{digits}g}"


def _losses(report: Report, package: Package, before: Base | Package) -> list[str]:
    """One verdict on what a package lost against the base, or against the package that it was quantized from.

    A loss is said where it is more than noise: of tasks, or of all together. A fall of the quality below `HEAVY` is
    called heavy where it is, and else put down to too few documents.
    """
    from_base = isinstance(before, Base)
    changes, quality = _changes(report, package, before)
    shown = {task: f"{task} ({told_apart(before.tasks[task].value, package.tasks[task].value)})" for task in changes}
    worse = [task for task, meaning in changes.items() if meaning == "worse"]
    heavy = package.quality < HEAVY <= before.quality
    sentences = []
    # 1. What was lost, or that nothing was.
    if worse:
        opening = "It loses" if from_base else "Quantization loses"
        sentences.append(f"{opening} more than noise explains on {_listed([shown[task] for task in worse])}.")
    elif quality == "worse":
        of = "" if from_base else " of quantization"
        sentences.append(f"No single task tells the loss{of} from noise, all tasks together do.")
    elif heavy:
        sentences.append(
            f"It keeps less than {percent(HEAVY)} of the quality as measured, but these documents are too few to tell "
            "that from noise; tasks with more documents would."
        )
    elif from_base and any(meaning != "unknown" for meaning in changes.values()):
        sentences.append("No loss is larger than the noise of measuring.")
    # 2. Tasks that it no longer solves.
    fallen = [task for task in worse if package.tasks[task].stamp and before.tasks[task].above_chance]
    if fallen:
        solver = "the base" if from_base else "the unquantized network"
        sentences.append(f"It has fallen to chance on {_listed(fallen)}, which {solver} solves.")
    # 3. How bad that is.
    if heavy and (worse or quality == "worse"):
        sentences.append(
            "That is a heavy loss: a larger size, more training, more healing or a search on more documents may keep "
            "more."
        )
    unknown = [shown[task] for task, meaning in changes.items() if meaning == "unknown"]
    if unknown and from_base:
        sentences.append(f"It is not known how much of the loss is noise on {_listed(unknown)}.")
    return sentences


def _changes(report: Report, package: Package, before: Base | Package) -> tuple[dict[str, Meaning], Meaning]:
    """What each task's difference means, and that of the quality."""
    paired = package.change if isinstance(before, Base) else package.change_by_quantization
    meanings: dict[str, Meaning] = {}
    for task, score in before.tasks.items():
        if task in package.tasks:
            apart = change(score, package.tasks[task], paired.tasks.get(task) if paired else None)
            meanings[task] = "unclear" if apart.meaning == "unknown" and apart.delta > 0 else apart.meaning
    if paired is not None and paired.quality is not None:
        return meanings, paired.quality.meaning
    scale, lost = report.scale, package.quality - before.quality
    if scale.by_text:  # a mean over thousands of tokens
        return meanings, "worse" if lost < 0 else "better"
    error = math.hypot(scale.stderr(package.tasks), scale.stderr(before.tasks))
    return meanings, "unclear" if abs(lost) <= 2 * error else "better" if lost > 0 else "worse"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
