"""Logistic regression on a few columns: soft targets, weights, an L1 or an L2 penalty, solved to the last digit.

Arrays in, arrays out. Meant for tens of columns (length control, Bradley-Terry, style control), not for features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LogisticFit:
    """Coefficients (k,), and whether the optimality conditions hold to the tolerance.

    They do not where no finite optimum exists (separable data without a penalty); the probabilities of the last
    iterate are then within rounding of 0 and 1 where they should be.
    """

    coefficients: Float
    converged: bool


def sigmoid(x: Float) -> Float:
    """1 / (1 + exp(-x)), never overflowing."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -x)), dtype=np.float64)


def log_loss(score: Float, target: Float, weight: Float) -> float:
    """sum_i weight_i (softplus(score_i) - target_i score_i) in nats: cross-entropy with targets in [0, 1]."""
    return float(weight @ (np.logaddexp(0.0, score) - target * score))


def fit_logistic(
    X: Float,
    target: Float,
    weight: Float | None = None,
    *,
    l1: float = 0.0,
    l2: float = 0.0,
    start: Float | None = None,
    tolerance: float = 1e-11,
    max_steps: int = 200,
) -> LogisticFit:
    """Minimise sum_i weight_i logloss(x_i . b, target_i) + l1 |b|_1 + l2/2 |b|^2 over b (k,), no intercept.

    X (n, k), target (n,) in [0, 1], weight (n,) at least 0. Newton steps on the quadratic model plus the L1 term, the
    model solved by coordinate descent, with a line search on the objective. ``tolerance`` bounds the subgradient
    relative to the total weight and the largest column.
    """
    n, k = X.shape
    weight = np.ones(n) if weight is None else weight
    b = np.zeros(k) if start is None else np.array(start, dtype=np.float64)
    scale = (float(weight.sum()) or 1.0) * max(float(np.abs(X).max(initial=0.0)), 1e-300)

    def objective(b: Float) -> float:
        return log_loss(X @ b, target, weight) + l1 * float(np.abs(b).sum()) + l2 / 2 * float(b @ b)

    value = objective(b)
    for _ in range(max_steps):
        p = sigmoid(X @ b)
        gradient = X.T @ (weight * (p - target)) + l2 * b
        if _residual(gradient, b, l1) <= tolerance * scale:
            return LogisticFit(b, True)
        hessian = (X.T * (weight * p * (1 - p))) @ X + l2 * np.eye(k)
        # Columns that vanish, or saturated rows, leave no curvature: a trace of it keeps the step finite.
        hessian += 1e-12 * (np.trace(hessian) + 1e-12 * scale) * np.eye(k)
        step = _l1_step(hessian, gradient, b, l1) if l1 > 0 else -np.linalg.solve(hessian, gradient)
        for _ in range(40):
            trial = objective(b + step)
            # The objective is known to about 1e-15 of itself only: a step that loses less than that is no loss.
            if trial <= value + 1e-14 * abs(value):
                break
            step = step / 2
        else:
            break
        b, value = b + step, trial
    residual = _residual(X.T @ (weight * (sigmoid(X @ b) - target)) + l2 * b, b, l1)
    return LogisticFit(b, residual <= 1e3 * tolerance * scale)


def _residual(gradient: Float, b: Float, l1: float) -> float:
    """Largest element of the smallest subgradient."""
    at_zero = np.maximum(np.abs(gradient) - l1, 0.0)
    return float(np.where(b == 0, at_zero, np.abs(gradient + l1 * np.sign(b))).max(initial=0.0))


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
