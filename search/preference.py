"""Which of several networks to take whose scores do not tell them apart: the best, the fastest of the near ones, or one
between the two.

Scores tell networks apart that lie more than two standard errors from the best (`pareto.contenders`). Of the rest,
held-out loss says which are near the best. It is that before healing, which takes most of it back: of each nat by
which one network loses more than another it left 0.3 on stories260K and 0.2 on prose-7m, whose networks lose twenty
times less than those of stories260K (`docs/results.md`). So nearness is a number of nats where something is healed;
where little or nothing is, a share of what the best loses, and no more than that number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Preference = Literal["quality", "speed", "balanced"]
PREFERENCES: tuple[Preference, ...] = get_args(Preference)

Numbers = Sequence[float] | NDArray[np.float64]


NEAR = 0.5
"""By how much more a near network's loss may lie above the whole network's than the lowest does, as a share of that."""


MOST, LEFT = 0.2, 0.06
"""By how many nats per token a near network may lose more than the lowest, and what healing leaves of that."""
HEALED_TOKENS = 50_000
"""Tokens of healing from which that was measured: with so many, all of `MOST` is allowed whatever the lowest loses."""


STEP = 0.05
"""Share by which one finalist is faster than another, at least."""


def near(losses: Numbers, stderrs: Numbers, whole: float, healed: bool = False, most: float = MOST) -> list[int]:
    """Indices of those near the lowest loss, that one first: within two standard errors of it, or by `NEAR`, but within
    `most`; where they will be `healed`, all within `most`.

    `losses` and `stderrs` [n], the whole network's loss, and `most`, in nats per token; the standard error that counts
    is the lowest's.
    """
    order = np.argsort(np.asarray(losses), kind="stable").tolist()
    lowest = losses[order[0]]
    allowed = most if healed else min(most, NEAR * (lowest - whole))
    limit = lowest + max(2 * stderrs[order[0]], allowed)
    return [i for i in order if losses[i] <= limit]


def preferred(
    losses: Numbers, stderrs: Numbers, speeds: Numbers, whole: float, healed: bool = False
) -> dict[Preference, int]:
    """The index that each preference takes.

    `quality`: the lowest loss. `speed`: of the `near` ones, the fastest. `balanced`: of the near ones between these
    two, the one that loses the least in sum of loss and speed, each as a share of what lies between the two; where
    nothing does, the lowest loss.

    `losses` and `stderrs` [n] and the whole network's loss in nats per token, `speeds` [n] in tokens per second.
    """
    from search.pareto import knee  # pymoo takes longer to import than a wrong name may take to be refused

    within = near(losses, stderrs, whole, healed)
    fastest = max(within, key=lambda i: speeds[i])  # of the same speed the lower loss, which comes first
    between = [i for i in within if losses[i] <= losses[fastest] and speeds[i] >= speeds[within[0]]]
    values = np.array([[losses[i], -speeds[i]] for i in between])
    return {"quality": within[0], "speed": fastest, "balanced": between[knee(values)]}


def ordered(prefer: Preference, losses: Numbers, speeds: Numbers, whole: float) -> list[int]:
    """Indices of networks that were healed on some tokens, in the order in which they go on: by increasing loss; for
    `speed` first the near ones, the fastest first; for `balanced` first the one that is taken of these."""
    exact = [0.0] * len(losses)  # of the same text and tokens
    order = np.argsort(np.asarray(losses), kind="stable").tolist()
    first: list[int] = []
    within = near(losses, exact, whole, most=LEFT)
    if prefer == "speed":
        first = sorted(within, key=lambda i: -speeds[i])
    elif prefer == "balanced":
        of_near, as_fast = ([numbers[i] for i in within] for numbers in (losses, speeds))
        first = [within[preferred(of_near, [0.0] * len(within), as_fast, whole)["balanced"]]]
    return [*first, *(i for i in order if i not in first)]


def faster(losses: Numbers, speeds: Numbers, than: int, n: int) -> list[int]:
    """Indices of at most `n` that are worth healing to see whether they come near: none beats them in loss and speed,
    and each is faster by `STEP` at least than the one before it, number `than` first; by increasing loss."""
    from search.pareto import non_dominated  # as above

    front = non_dominated(np.array([[loss, -speed] for loss, speed in zip(losses, speeds, strict=True)])).tolist()
    chosen, speed = list[int](), speeds[than]
    for i in sorted(front, key=lambda i: losses[i]):
        if speeds[i] >= (1 + STEP) * speed and len(chosen) < n:
            chosen.append(i)
            speed = speeds[i]
    return chosen


def shortlist(
    losses: Numbers, stderrs: Numbers, speeds: Numbers, whole: float, n: int, healed: bool = False
) -> list[int]:
    """Indices of what is worth measuring closer, by increasing loss: the `n` of the lowest loss, and of the `near` ones
    at most `n` that no other of them beats in loss and speed, spread along that front."""
    from search.pareto import non_dominated, spread  # as above

    within = near(losses, stderrs, whole, healed)
    values = np.array([[losses[i], -speeds[i]] for i in within])
    front = non_dominated(values)
    chosen = {within[front[i]] for i in spread(values[front], n)}
    lowest = np.argsort(np.asarray(losses), kind="stable")[:n].tolist()
    return sorted(chosen | set(lowest), key=lambda i: (losses[i], i))
