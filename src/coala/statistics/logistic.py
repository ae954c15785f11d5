"""Logistic regression: soft targets, weights, an L1 or an L2 penalty, solved to the last digit where columns are few.

An intercept or an effect that is known is a column, or one less; no caller has needed more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float = NDArray[np.float64]
HUGE = 15.0  # log-odds above which it is asked whether any finite ones fit best


@dataclass(frozen=True, eq=False)
class LogisticFit:
    """Coefficients (k,) with the ``objective`` there and its smallest subgradient ``gradient`` (k,).

    ``separated``: no finite coefficients fit best, as some combination of columns never speaks against a row that it
    tells anything of; the probabilities of the last iterate are then within rounding of 0 and 1 where they should be.
    """

    coefficients: Float
    objective: float
    gradient: Float
    separated: bool


def sigmoid(x: ArrayLike) -> Float:
    """1 / (1 + exp(-x)), never overflowing."""
    return np.asarray(np.exp(-np.logaddexp(0.0, np.negative(x))), dtype=np.float64)


def log_loss(score: Float, target: Float | float, weight: Float) -> float:
    """sum_i weight_i (softplus(score_i) - target_i score_i) in nats: cross-entropy with targets in [0, 1]."""
    return float(weight @ (np.logaddexp(0.0, score) - target * score))


def fit_logistic(
    X: Any,
    target: Float | float = 1.0,
    weight: Float | None = None,
    *,
    l1: float = 0.0,
    l2: float = 0.0,
    start: Float | None = None,
    tolerance: float = 1e-11,
    many: bool = False,
) -> LogisticFit:
    """Minimise sum_i weight_i logloss(x_i . b, target_i) + l1 |b|_1 + l2/2 |b|^2 over b (k,), no intercept.

    X (n, k), target (n,) in [0, 1] or one for all rows, weight (n,) at least 0. Newton steps on the quadratic model
    plus the L1 term, the model solved by coordinate descent, with a line search on the objective. ``tolerance`` bounds
    the subgradient relative to the total weight and the largest column. ``many`` columns, without an L1 term, are left
    to L-BFGS, which forms no Hessian, takes a sparse X and finds the objective to about 1e-9 of itself.
    """
    n, k = X.shape
    weight = np.ones(n) if weight is None else weight
    b = np.zeros(k) if start is None else np.array(start, dtype=np.float64)

    def at(b: Float) -> tuple[float, Float]:
        """The objective, and the gradient of all of it but the L1 term."""
        score = X @ b
        value = log_loss(score, target, weight) + l1 * float(np.abs(b).sum()) + l2 / 2 * float(b @ b)
        return value, np.asarray(X.T @ (weight * (sigmoid(score) - target)) + l2 * b)

    if many:
        from scipy.optimize import minimize

        found = minimize(at, b, jac=True, method="L-BFGS-B", options={"maxiter": 300, "ftol": 1e-9, "gtol": 1e-5})
        return LogisticFit(found.x, float(found.fun), found.jac, False)
    scale = (float(weight.sum()) or 1.0) * max(float(np.abs(X).max(initial=0.0)), 1e-300)
    value, gradient = at(b)
    for _ in range(200):
        if float(np.abs(_subgradient(gradient, b, l1)).max(initial=0.0)) <= tolerance * scale:
            break
        p = sigmoid(X @ b)
        hessian = (X.T * (weight * p * (1 - p))) @ X + l2 * np.eye(k)
        # Columns that vanish, or saturated rows, leave no curvature: a trace of it keeps the step finite.
        hessian += 1e-12 * (np.trace(hessian) + 1e-12 * scale) * np.eye(k)
        step = _l1_step(hessian, gradient, b, l1) if l1 > 0 else -np.linalg.solve(hessian, gradient)
        for _ in range(40):
            trial, slope = at(b + step)
            # The objective is known to about 1e-15 of itself only: a step that loses less than that is no loss.
            if trial <= value + 1e-14 * abs(value):
                break
            step = step / 2
        else:
            break
        b, value, gradient = b + step, trial, slope
    gradient = _subgradient(gradient, b, l1)
    separated = not l1 and not l2 and float(np.abs(X @ b).max(initial=0.0)) > HUGE and _separated(X, target, weight)
    return LogisticFit(b, value, gradient, separated)


def _separated(X: Float, target: Float | float, weight: Float) -> bool:
    """Whether some b scores no row against its target and one for it (Albert and Anderson 1984): a linear program."""
    from scipy.optimize import linprog

    target = np.broadcast_to(target, len(X))
    certain, torn = (weight > 0) & ((target == 0) | (target == 1)), (weight > 0) & (target > 0) & (target < 1)
    signed = X[certain] * np.where(target[certain] > 0, 1.0, -1.0)[:, None]
    # A row with a target in between is torn both ways: it must have no score at all.
    level = np.zeros(int(torn.sum())) if torn.any() else None
    found = linprog(
        -signed.sum(axis=0), -signed, np.zeros(len(signed)), X[torn] if torn.any() else None, level, bounds=(-1, 1)
    )
    return bool(-found.fun > 1e-9 * max(float(np.abs(signed).sum()), 1e-300))


def _subgradient(gradient: Float, b: Float, l1: float) -> Float:
    """The smallest one, (k,)."""
    at_zero = np.sign(gradient) * np.maximum(np.abs(gradient) - l1, 0.0)
    return np.where(b == 0, at_zero, gradient + l1 * np.sign(b))


def _l1_step(hessian: Float, gradient: Float, b: Float, l1: float) -> Float:
    """argmin_s gradient . s + s' hessian s / 2 + l1 |b + s|_1 by coordinate descent."""
    new = b.copy()
    slope = gradient.copy()
    for _ in range(1000):
        largest = 0.0
        for j in range(len(b)):
            curvature = hessian[j, j]
            centre = new[j] - slope[j] / curvature
            moved = np.sign(centre) * max(abs(centre) - l1 / curvature, 0.0) - new[j]
            if moved:
                slope += hessian[:, j] * moved
                new[j] += moved
                largest = max(largest, abs(moved) / (1 + abs(new[j])))
        if largest < 1e-15:
            break
    return np.asarray(new - b)
