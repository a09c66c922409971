"""Least squares with a ridge, from sums over tokens; the ridge is chosen by the error on held-out tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Ridges to choose from, as shares of the second moments' mean diagonal."""
RIDGES_OF_WIDE = (1e-3, 1e-2, 1e-1)
"""The same where there are more than `WIDE` inputs, since trying one takes a factorisation."""
WIDE = 4096
JUDGED_OUTPUTS = 64
"""Outputs of a projection, about so many, whose errors judge a ridge."""
JUDGED_SHARES = (0.75, 0.5, 0.25)
"""Shares of the inputs that are kept where the ridge for all sizes is judged."""


class Sums:
    """Sums over tokens, in float64, of inputs x [tokens, inputs], targets t [tokens, outputs], and their products."""

    def __init__(self, inputs: int, outputs: int = 0, device: torch.device | str = "cpu") -> None:
        self.tokens, self.tt = 0, 0.0
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.xt = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self.x = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.t = torch.zeros(outputs, dtype=torch.float64, device=device)

    def add(self, x: Tensor, t: Tensor | None = None) -> None:
        """Add some tokens. Products are taken in float32, of values less the batch's means, which may be far larger
        than how they vary; of one batch, that is precise enough."""
        if not len(x):
            return
        x, mean, rest = _less_mean(x)
        self.tokens += len(x)
        self.xx += x.T @ x
        self.xx.addr_(mean, rest + len(x) * mean).addr_(rest, mean)
        self.x += rest + len(x) * mean
        if t is not None:
            t, t_mean, t_rest = _less_mean(t)
            self.xt += x.T @ t
            self.xt.addr_(mean, t_rest + len(t) * t_mean).addr_(rest, t_mean)
            self.t += t_rest + len(t) * t_mean
            self.tt += float(t.double().square().sum() + t_mean @ (2 * t_rest + len(t) * t_mean))

    def __add__(self, other: Sums) -> Sums:
        both = Sums(0)
        both.tokens, both.tt = self.tokens + other.tokens, self.tt + other.tt
        both.xx, both.xt, both.x, both.t = (
            mine + its for mine, its in ((self.xx, other.xx), (self.xt, other.xt), (self.x, other.x), (self.t, other.t))
        )
        return both

    def moments(self, centred: bool) -> tuple[Tensor, Tensor, float]:
        """E[x xᵀ], E[x tᵀ] and E[|t|²]; with `centred`, of x and t less their means."""
        n = max(1, self.tokens)
        xx, xt, tt = self.xx / n, self.xt / n, self.tt / n
        if centred:
            x, t = self.x / n, self.t / n
            xx, xt, tt = xx - torch.outer(x, x), xt - torch.outer(x, t), tt - float(t.square().sum())
        return xx, xt, tt


def _less_mean(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values [tokens, n] less about their means over tokens, in float32; these means, and the sums of what is left, in
    float64."""
    mean = values.float().mean(0)
    values = values.float() - mean
    return values, mean.double(), values.sum(0, dtype=torch.float64)


def factorised(second: Tensor, ridge: float) -> Tensor:
    """The lower Cholesky factor of second moments and a ridge, a share of their mean diagonal."""
    penalty = ridge * second.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    second = second.clone()
    second.diagonal().add_(penalty)
    return torch.linalg.cholesky(second)


def prefix_weight(products: Tensor, factor: Tensor, count: int) -> Tensor:
    """The refitted weight [outputs, count] of the first inputs, from the weight times the factor, and the factor.

    With H = L Lᵀ, W'_K = W H[:, K] H[K, K]⁻¹ = (W L)[:, K] L[K, K]⁻¹: one factorisation serves all prefixes.
    """
    return torch.linalg.solve_triangular(factor[:count, :count], products[:, :count], upper=False, left=False)


def choose_ridge(weight: Tensor, training: Sums, held: Sums, centred: bool) -> float:
    """The ridge of the least error on held-out tokens, over three sizes; infinite where the plain slice's is less."""
    weight = weight[_judged(len(weight))]
    inputs = weight.shape[1]
    counts = [max(1, round(share * inputs)) for share in JUDGED_SHARES]

    def second_moments(sums: Sums, less_means: bool) -> Tensor:
        moments = sums.moments(less_means)[0]
        # Half the time and memory, and precise enough for ridges of that many inputs.
        return moments.float() if inputs > WIDE else moments

    second, judged = second_moments(training, centred), second_moments(held, centred)
    # The bias of a plain slice does not carry what the removed inputs meant.
    plain = second_moments(held, False) if centred else judged
    weight = weight.to(second.dtype)

    def error(count: int, refitted: Tensor, judged: Tensor = judged) -> float:
        gap = weight.clone()
        gap[:, :count] -= refitted
        return float(((gap @ judged) * gap).sum())

    sliced = [max(error(count, weight[:, :count], plain), 1e-300) for count in counts]

    def ratios(ridge: float) -> float:
        factor = factorised(second, ridge)
        products = weight @ factor
        return sum(error(n, prefix_weight(products, factor, n)) / s for n, s in zip(counts, sliced, strict=True))

    best, least = least_error(ratios, inputs)
    return best if least < len(counts) else math.inf


def _judged(outputs: int) -> slice:
    return slice(None, None, max(1, outputs // JUDGED_OUTPUTS))


def least_error(error: Callable[[float], float], inputs: int) -> tuple[float, float]:
    """The ridge of the least error, for so many inputs, and that error. Errors fall and then rise with the ridge, so it
    is looked for from the middle on, in the direction in which they fall."""
    ridges = RIDGES if inputs <= WIDE else RIDGES_OF_WIDE
    errors: dict[int, float] = {}

    def at(place: int) -> float:
        if not 0 <= place < len(ridges):
            return math.inf
        if place not in errors:
            errors[place] = error(ridges[place])
        return errors[place]

    place = len(ridges) // 2
    while at(nearer := min(place - 1, place + 1, key=at)) < at(place):
        place = nearer
    return ridges[place], at(place)


def refit(start: Tensor, training: Sums, held: Sums, centred: bool) -> tuple[Tensor, float]:
    """The weight W [outputs, inputs] of least E|t - W x|² + λ|W - start|², and λ as a share of the moments' mean
    diagonal: of several, the one of the least held-out error. The weight is `start`, and λ infinite, where no other is
    better."""
    rows = _judged(len(start))
    second, product, _ = training.moments(centred)
    held_second, held_product, _ = held.moments(centred)

    def solved(start: Tensor, xx: Tensor, xt: Tensor, ridge: float) -> Tensor:
        return start + torch.cholesky_solve(xt - xx @ start.T, factorised(xx, ridge)).T

    def error(weight: Tensor) -> float:
        """Less what no weight changes, E|t|²."""
        return float(((weight @ held_second) * weight).sum()) - 2 * float((weight.T * held_product[:, rows]).sum())

    best, least = least_error(lambda ridge: error(solved(start[rows], second, product[:, rows], ridge)), start.shape[1])
    if not least < error(start[rows]):
        return start, math.inf
    return solved(start, *(training + held).moments(centred)[:2], best), best
