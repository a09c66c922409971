"""Predictors of costs, from few samples: ridge, support vectors, boosting, a Gaussian process, and a stack of them, of
the cost itself or of its logarithm. A cost is what evaluations measure, turned so that less is better. Cross-validation
chooses; one that ranked the newest measurements no better than chance is set aside.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.special import ndtr
from scipy.stats import kendalltau, spearmanr
from sklearn import config_context
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold
from sklearn.svm import SVR

unchecked = config_context(assume_finite=True, skip_parameter_validation=True)
"""Decorates what calls scikit-learn often: its checks of our arguments cost as much as training on so few samples."""

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]
Folds = list[tuple[NDArray[np.intp], NDArray[np.intp]]]
"""Rows to train on and rows held out, for each fold."""

KINDS = ("ridge", "svr", "boosting", "gp", "stack")
FEWEST = 8
"""Fewest samples that anything is trained on."""
JUDGED = 4
"""Fewest new measurements from which a predictor's ranking can be told from chance."""
BENDS = (None, 0.1)
"""Scales that are tried (`Scale`)."""
OWN_SCALES = 3
"""Samples for each gene from which the Gaussian process learns how much each of them matters."""
CHANCE = 0.2
"""A ranking is no better than chance if a random one would be as good with at least this probability."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """How well predictions rank and match measurements: Kendall's tau-b, Spearman's rho, mean absolute error.

    `chance` is the probability that a random ranking has at least this tau. Correlations are 0 and `chance` 1 where
    either side is constant. `mae` is in the objective's units, `n` the number of samples.
    """

    kendall: float
    spearman: float
    mae: float
    chance: float
    n: int

    @property
    def useful(self) -> bool:
        """False where there is enough to judge by and the ranking is no better than chance."""
        return self.n < JUDGED or self.chance < CHANCE


def judge(y_true: Vector, y_pred: Vector) -> Judgement:
    """How well predictions match measurements, [n] each."""
    y_true, y_pred = np.asarray(y_true, dtype=float), np.asarray(y_pred, dtype=float)
    mae = float(np.abs(y_true - y_pred).mean()) if len(y_true) else float("nan")
    if len(y_true) < 2 or np.ptp(y_true) == 0 or np.ptp(y_pred) == 0:
        return Judgement(0.0, 0.0, mae, 1.0, len(y_true))
    tau = kendalltau(y_true, y_pred, alternative="greater")
    return Judgement(
        float(tau.statistic), float(spearmanr(y_true, y_pred).statistic), mae, float(tau.pvalue), len(y_true)
    )


@dataclass
class Regressor:
    """A trained regressor, as functions of features [n, features]: means [n], and standard deviations [n] where it has
    them, both of standardised targets."""

    mean: Callable[[Matrix], Vector]
    deviation: Callable[[Matrix], Vector] | None = None


Fit = Callable[[Matrix, Vector, int], Regressor]
"""Trains on features [n, features] and targets [n], given how many features are ordinal."""


def _ridge(x: Matrix, y: Vector, ordinals: int, alpha: float) -> Regressor:
    return Regressor(Ridge(alpha=alpha).fit(x, y).predict)


def _svr(x: Matrix, y: Vector, ordinals: int, c: float, gamma: float) -> Regressor:
    spread = max(float(x.var(axis=0).sum()), 1e-12)
    return Regressor(SVR(C=c, gamma=gamma / spread, epsilon=0.02).fit(x, y).predict)


def _boosting(x: Matrix, y: Vector, ordinals: int, seed: int) -> Regressor:
    trees = GradientBoostingRegressor(
        n_estimators=60, max_depth=3, learning_rate=0.15, subsample=0.7, min_samples_leaf=2, random_state=seed
    ).fit(x[:, :ordinals], y)
    return Regressor(lambda z: trees.predict(z[:, :ordinals]))


def _kernel(x: Matrix, y: Vector, ordinals: int) -> ConstantKernel:
    """The Gaussian process's kernel, its length scale and noise fitted to the marginal likelihood of at most 120
    rows; with `OWN_SCALES` rows for each gene and more, every gene has a length scale of its own."""
    rows = np.linspace(0, len(x) - 1, min(len(x), 120)).astype(int)
    scale = max(float(np.sqrt(x[:, :ordinals].var(axis=0).sum())), 1e-3)
    scales = np.full(ordinals, scale) if len(rows) >= OWN_SCALES * ordinals else scale
    kernel = ConstantKernel(1.0, (1e-2, 1e3)) * Matern(scales, (scale / 20, scale * 50), nu=2.5) + WhiteKernel(
        1e-2, (1e-6, 1.0)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a hyperparameter may end at its bound
        return GaussianProcessRegressor(kernel).fit(x[rows, :ordinals], y[rows]).kernel_


def _gp(x: Matrix, y: Vector, ordinals: int, kernel: ConstantKernel) -> Regressor:
    process = GaussianProcessRegressor(kernel, optimizer=None).fit(x[:, :ordinals], y)
    return Regressor(
        lambda z: process.predict(z[:, :ordinals]),
        lambda z: process.predict(z[:, :ordinals], return_std=True)[1],
    )


@dataclass(frozen=True)
class Scale:
    """What costs are trained as: themselves, or, with a `bend`, log((cost - best) / range + bend), since losses grow
    the faster the more is cut, and what matters is at the lower end; then standardised.

    The logarithm spreads what is near the best: by (1 + bend) / bend times as much as what is near the worst.
    """

    best: float
    range: float
    bend: float | None
    offset: float = 0.0
    unit: float = 1.0

    @classmethod
    def of(cls, costs: Vector, bend: float | None) -> Scale:
        """The scale of training costs [n], which must differ."""
        plain = cls(float(costs.min()), float(np.ptp(costs)), bend)
        trained = plain.trained(costs)
        return cls(plain.best, plain.range, bend, float(trained.mean()), float(trained.std()))

    def trained(self, costs: Vector) -> Vector:
        """Costs as models are trained on them. Below the best by `bend` ranges and more there is nothing but minus
        infinity."""
        if self.bend is None:
            return (costs - self.offset) / self.unit
        with np.errstate(divide="ignore"):
            bent = np.log(np.maximum((costs - self.best) / self.range + self.bend, 0.0))
        return (bent - self.offset) / self.unit

    def costs(self, trained: Vector) -> Vector:
        """The costs of what models predict."""
        plain = trained * self.unit + self.offset
        if self.bend is None:
            return plain
        return self.best + self.range * (np.exp(np.minimum(plain, 50.0)) - self.bend)


@dataclass
class _Trained:
    """Every kind of predictor, trained on one scale, and how cross-validation judges each."""

    scale: Scale
    models: dict[str, Regressor]
    scores: dict[str, Judgement]

    def best(self, kinds: Collection[str]) -> str:
        """The kind of the highest tau, the least error among equals."""
        return min(kinds, key=lambda name: (-self.scores[name].kendall, self.scores[name].mae))


@dataclass
class Predictor:
    """All kinds of predictors of one cost, and which of them is in use.

    `ordinals` is the number of leading features that are ordinal: trees and the Gaussian process see those only, the
    one-hot codes serve the linear and kernel models.
    """

    ordinals: int
    seed: int = 0
    models: dict[str, Regressor] = field(default_factory=dict)
    scores: dict[str, Judgement] = field(default_factory=dict)
    chosen: str | None = None
    scale: Scale = field(default_factory=lambda: Scale(0.0, 1.0, None))

    def predictions(self, x: Matrix) -> dict[str, Vector]:
        """Costs by each trained kind, [n], at features [n, features]."""
        return {name: self._predict(model, x) for name, model in self.models.items()}

    @unchecked
    def fit(self, x: Matrix, y: Vector, set_aside: Collection[str] = ()) -> None:
        """Train every kind on features [n, features] and costs [n], and choose one.

        Five-fold cross-validation gives each kind's out-of-fold predictions; the highest Kendall tau is chosen, the
        lower error among equals, from those not `set_aside`, and with it the scale of all. None is chosen if all are,
        or with fewer than 8 samples.
        """
        self.models, self.scores, self.chosen = {}, {}, None
        if len(x) < FEWEST or np.ptp(y) == 0:
            return
        folds = list(KFold(5, shuffle=True, random_state=self.seed).split(x))
        tried = [self._train(x, y, Scale.of(y, bend), folds) for bend in BENDS]
        eligible = [name for name in KINDS if name not in set_aside]
        used = max(tried, key=lambda trained: trained.scores[trained.best(eligible or KINDS)].kendall)
        self.scale, self.models, self.scores = used.scale, used.models, used.scores
        if eligible:
            self.chosen = used.best(eligible)

    def _train(self, x: Matrix, y: Vector, scale: Scale, folds: Folds) -> _Trained:
        z = scale.trained(y)
        # 1. Each kind with the hyperparameters of the least out-of-fold error, trained on everything.
        models: dict[str, Regressor] = {}
        outside: dict[str, Vector] = {}
        for name, candidates in self._candidates(x, z).items():
            tried = [(_out_of_fold(fit, x, z, self.ordinals, folds), fit) for fit in candidates]
            outside[name], best = min(tried, key=lambda pair: float(np.abs(pair[0] - z).mean()))
            models[name] = best(x, z, self.ordinals)
        # 2. A stack of all kinds.
        weights, outside["stack"] = _stack(np.column_stack(list(outside.values())), z, folds)
        models["stack"] = _weighted(list(models.values()), weights)
        return _Trained(scale, models, {name: judge(y, scale.costs(p)) for name, p in outside.items()})

    def _candidates(self, x: Matrix, z: Vector) -> Mapping[str, list[Fit]]:
        """For each kind, how to train it with each of its hyperparameters."""
        kernel = _kernel(x, z, self.ordinals)
        return {
            "ridge": [partial(_ridge, alpha=alpha) for alpha in (0.1, 1.0, 10.0, 100.0)],
            "svr": [partial(_svr, c=c, gamma=gamma) for c in (1.0, 10.0) for gamma in (0.1, 0.5)],
            "boosting": [partial(_boosting, seed=self.seed)],
            "gp": [partial(_gp, kernel=kernel)],
        }

    def predict(self, x: Matrix) -> Vector:
        """Costs by the chosen kind, [n]. Raises ValueError where none is in use."""
        return self._predict(self._used(), x)

    @unchecked
    def probability(self, x: Matrix, bounds: Vector) -> Matrix:
        """How likely costs are at most each of `bounds`, [n, bounds]: around what the chosen kind predicts, with the
        Gaussian process's deviation. Raises ValueError where none is in use."""
        mean, deviation = self._used().mean(x), self.models["gp"].deviation
        assert deviation is not None
        gap = self.scale.trained(bounds)[None] - mean[:, None]
        probabilities: Matrix = ndtr(gap / np.maximum(deviation(x), 1e-9)[:, None])
        return probabilities

    def _used(self) -> Regressor:
        if self.chosen is None:
            raise ValueError("no predictor is in use")
        return self.models[self.chosen]

    @unchecked
    def _predict(self, model: Regressor, x: Matrix) -> Vector:
        return self.scale.costs(model.mean(x))


def _out_of_fold(fit: Fit, x: Matrix, y: Vector, ordinals: int, folds: Folds) -> Vector:
    """Predictions for every row, [n], from models trained without it."""
    predicted = np.empty(len(y))
    for inside, outside in folds:
        predicted[outside] = fit(x[inside], y[inside], ordinals).mean(x[outside])
    return predicted


def _stack(predictions: Matrix, y: Vector, folds: Folds) -> tuple[Vector, Vector]:
    """Non-negative weights of the models, [models], from their out-of-fold predictions [n, models] (Breiman 1996,
    stacked regressions), and the stack's out-of-fold predictions, [n]."""
    outside = np.empty(len(y))
    for rows, held_out in folds:
        outside[held_out] = predictions[held_out] @ nnls(predictions[rows], y[rows])[0]
    return nnls(predictions, y)[0], outside


def _weighted(models: list[Regressor], weights: Vector) -> Regressor:
    """The weighted sum of models."""
    used = [(model, weight) for model, weight in zip(models, weights, strict=True) if weight > 0]
    return Regressor(lambda x: sum((w * m.mean(x) for m, w in used), np.zeros(len(x))))
