"""Which of the measured sub-networks a target and a preference ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from compressor.job import Job
from compressor.sizing import largest_in_training
from compressor.stages.subnet_scores import FINALISTS, FIRST_BLOCKS, HeldOutLosses
from evals.speed.table import SpeedTable
from search.objectives import Evaluation
from search.pareto import Target, contenders, knee, meeting
from search.preference import HEALED_TOKENS, Preference, faster, preferred, shortlist
from search.scores import Score
from supernet.common.errors import RequestError, did_you_mean
from supernet.common.progress import say
from supernet.training.data import HELD_OUT_BLOCKS


@dataclass(frozen=True)
class Choice:
    """A measured sub-network with its held-out loss, in nats per token, and its decode speed by the layers' timings, in
    tokens per second; None where they were not looked at."""

    evaluation: Evaluation
    loss: Score | None
    decode_tps: float | None

    @property
    def key(self) -> str:
        return self.evaluation.architecture.key


@dataclass(frozen=True)
class Choices:
    """What each preference takes, and the nearest of what they were taken from, by increasing loss."""

    by_preference: dict[Preference, Choice]
    nearest: list[Choice]
    faster: list[Choice] = field(default_factory=list)
    """Where finalists are healed and speed is preferred: what is faster than the pick and may come near by healing."""


def choose(job: Job, evaluations: list[Evaluation], target: Target) -> Evaluation:
    """The measured architecture for a target, by the recipe's preference. Raises ValueError where nothing meets it."""
    return choices(job, evaluations, target).by_preference[job.recipe.prefer].evaluation


def choices(job: Job, evaluations: list[Evaluation], target: Target) -> Choices:
    """The measured architectures for a target, by every preference.

    Where tasks do not tell the best apart, held-out loss does: a mean over every token of some blocks, whose order
    healing keeps almost whole (docs/results.md, "is what is searched what ships?"), where a task's accuracy rests on
    few documents. Which of those near the lowest loss is taken, the preference says (`search.preference`). Where there
    are more than `FINALISTS`, all are measured on `FIRST_BLOCKS` blocks, and on all blocks the best and the fastest.

    For a largest drop of quality, `quality` is the one of fewest parameters, `speed` the fastest of those within it.
    Raises ValueError where nothing meets the target.
    """
    if target.max_drop is not None:
        return within_drop(job, meeting(evaluations, target))
    # 1. What the tasks do not tell from the best.
    equals = contenders(evaluations, target)
    speeds = decode_speeds(job, equals)
    if len(equals) == 1:
        only = Choice(equals[0], None, speeds[0])
        return Choices({"quality": only, "speed": only, "balanced": only}, [only])
    if 2 * len(equals) > len(evaluations):
        say(
            f"warning: the tasks do not tell {len(equals)} of the {len(evaluations)} measured sub-networks apart; more "
            "documents (--limit) would. Held-out loss decides"
        )
    # 2. Of many, the best and the fastest by their losses on a few blocks.
    measurer, numbers, base = HeldOutLosses(job), list(range(len(equals))), largest_in_training(job)
    timed = [speed or 0.0 for speed in speeds]
    healed = (job.recipe.healing.tokens or 0) >= HEALED_TOKENS
    losses_of_all: list[Score] | None = None
    if len(equals) > FINALISTS:
        whole, *losses_of_all = measurer.of([base, *(e.architecture for e in equals)], FIRST_BLOCKS)
        numbers = shortlist(*loss_columns(losses_of_all), timed, whole.value, FINALISTS, healed)
    # 3. What each preference takes of these, by their losses on all blocks.
    whole, *losses = measurer.of([base, *(equals[i].architecture for i in numbers)], HELD_OUT_BLOCKS)
    taken = preferred(*loss_columns(losses), [timed[i] for i in numbers], whole.value, healed)
    listed = [Choice(equals[i], loss, speeds[i]) for i, loss in zip(numbers, losses, strict=True)]
    nearest = sorted(listed, key=lambda choice: choice.loss.value if choice.loss else 0.0)
    # 4. What is faster than the pick, by the losses of all on as many blocks.
    others = 0 if job.recipe.prefer == "quality" or not job.recipe.healing.tokens else job.recipe.healing.finalists - 1
    beyond = []
    if others:
        known = losses if losses_of_all is None else losses_of_all
        pick = numbers[taken[job.recipe.prefer]]
        beyond = [Choice(equals[i], known[i], speeds[i]) for i in faster(loss_columns(known)[0], timed, pick, others)]
    return Choices({name: listed[i] for name, i in taken.items()}, nearest, beyond)


def within_drop(job: Job, found: list[Evaluation]) -> Choices:
    """By every preference, of what is within a largest drop of quality, the fewest parameters first."""
    speeds = decode_speeds(job, found)
    listed = [Choice(e, None, speed) for e, speed in zip(found, speeds, strict=True)]
    fastest = max(range(len(found)), key=lambda i: speeds[i] or 0.0)
    values = np.array([[e.values["parameters"], -(s or 0.0)] for e, s in zip(found, speeds, strict=True)])
    return Choices({"quality": listed[0], "speed": listed[fastest], "balanced": listed[knee(values)]}, listed[:1])


def by_key(evaluations: Sequence[Evaluation], key: str) -> Evaluation:
    """The measured sub-network of this key, or of the one key that begins so. Raises `RequestError` where there is
    none, or more than one."""
    known = {e.architecture.key: e for e in evaluations if e.full}
    found = [name for name in known if name.startswith(key.lower())]
    if len(found) == 1:
        return known[found[0]]
    if found:
        raise RequestError(f"--key {key}: {len(found)} keys begin so ({', '.join(sorted(found)[:3])}); give more of it")
    raise RequestError(
        f"--key {key}: no measured sub-network has this key{did_you_mean(key, known)}; compressor front RUN lists them"
    )


def decode_speeds(job: Job, evaluations: Sequence[Evaluation]) -> list[float | None]:
    """Decode speeds by the layers' timings, in tokens per second: as the search computed them, or from speed.json; None
    where layers were never timed."""
    table: SpeedTable | None = None
    speeds = []
    for evaluation in evaluations:
        speed = evaluation.values.get("decode_tps")
        if speed is None and job.run.speed_table.is_file():
            table = table or SpeedTable.load(job.run.speed_table)
            speed = table.predict(evaluation.architecture)["decode_tps"]
        speeds.append(speed)
    return speeds


def loss_columns(scores: Sequence[Score]) -> tuple[list[float], list[float]]:
    """Values and standard errors of losses."""
    return [score.value for score in scores], [score.stderr or 0.0 for score in scores]
