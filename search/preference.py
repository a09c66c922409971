"""Which of several networks that are as good as equal to take: the best, the fastest, or one between the two.

Networks count as equal where scores and held-out loss do not tell them apart: both within two standard errors of the
best (scores: `pareto.contenders`; losses: here).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Preference = Literal["quality", "speed", "balanced"]
PREFERENCES: tuple[Preference, ...] = get_args(Preference)

Numbers = Sequence[float] | NDArray[np.float64]


def equals(losses: Numbers, stderrs: Numbers) -> list[int]:
    """Indices of those whose loss is within two standard errors of the lowest, the lowest first.

    `losses` and `stderrs` [n] in the same unit; the standard error that counts is that of the lowest.
    """
    order = np.argsort(np.asarray(losses), kind="stable").tolist()
    limit = losses[order[0]] + 2 * stderrs[order[0]]
    return [i for i in order if losses[i] <= limit]


def preferred(losses: Numbers, stderrs: Numbers, speeds: Numbers) -> dict[Preference, int]:
    """The index that each preference takes.

    `quality`: the lowest loss. `speed`: of the `equals`, the fastest. `balanced`: of the `equals` between these two,
    the one that loses the least in sum of loss and speed, each as a share of what lies between the two; where nothing
    does, the lowest loss.

    `losses` and `stderrs` [n] in nats per token, `speeds` [n] in tokens per second.
    """
    from search.pareto import knee  # pymoo takes longer to import than a wrong name may take to be refused

    within = equals(losses, stderrs)
    fastest = max(within, key=lambda i: speeds[i])  # of the same speed the lower loss, which comes first
    between = [i for i in within if losses[i] <= losses[fastest] and speeds[i] >= speeds[within[0]]]
    values = np.array([[losses[i], -speeds[i]] for i in between])
    return {"quality": within[0], "speed": fastest, "balanced": between[knee(values)]}


def shortlist(losses: Numbers, stderrs: Numbers, speeds: Numbers, n: int) -> list[int]:
    """Indices of what is worth measuring closer, by increasing loss: the `n` of the lowest loss, and of the `equals`
    at most `n` that no other of them beats in loss and speed, spread along that front."""
    from search.pareto import non_dominated, spread  # as above

    within = equals(losses, stderrs)
    values = np.array([[losses[i], -speeds[i]] for i in within])
    front = non_dominated(values)
    chosen = {within[front[i]] for i in spread(values[front], n)}
    lowest = np.argsort(np.asarray(losses), kind="stable")[:n].tolist()
    return sorted(chosen | set(lowest), key=lambda i: (losses[i], i))
