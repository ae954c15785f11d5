"""L1 logistic regression stopped where liblinear stops, to reproduce published coefficients; for new work there is
:func:`coala.evaluation.logistic.fit_logistic`, which goes on to the optimum.

The method is newGLMNET (Yuan, Ho and Lin 2012, "An improved GLMNET for L1-regularized logistic regression"): Newton
steps whose quadratic models are solved inexactly by coordinate descent in a random order. It ends once the optimality
conditions hold to a ten-thousandth of what they were violated by at zero, so that where it ends depends on tolerance,
schedule and order; all three are liblinear's as scikit-learn (1.5) calls it. What is left out concerns many columns.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from coala.evaluation.logistic import Float, sigmoid

Draw = Callable[[int], int]
SEED = 123  # of the published AlpacaEval figures
TOLERANCE = 1e-4
NEWTON_STEPS, SWEEPS, HALVINGS = 100, 1000, 20
TRACE = 1e-12  # added to every curvature
LONGEST = 10.0  # of a coordinate's step
ENOUGH = 0.01  # of the decrease that the slope promises


def fit_as_liblinear(X: Float, target: Float, weight: Float, *, c: float, seed: int = SEED) -> Float:
    """Coefficients (k,) of min c sum_i weight_i logloss(x_i . b, target_i) + |b|_1, as far as liblinear gets.

    X (n, k), ``target`` (n,) in [0, 1], ``weight`` (n,). Soft targets are two rows each, labelled 1 and 0 with weights
    in proportion; ``seed`` is that of scikit-learn's ``random_state``.
    """
    rows = np.vstack([X, X])
    one = np.repeat([True, False], len(X))
    cost = c * np.concatenate([weight * target, weight * (1 - target)])
    rows, one, cost = rows[cost > 0], one[cost > 0], cost[cost > 0]
    enough = TOLERANCE * max(min(int(one.sum()), int((~one).sum())), 1) / max(len(one), 1)
    draw, order = _drawn(seed), list(range(X.shape[1]))
    b = np.zeros(X.shape[1])
    inner, start = 1.0, 0.0
    for _ in range(NEWTON_STEPS):
        p = sigmoid(rows @ b)
        gradient = rows.T @ (cost * (p - one))
        curvature = cost * p * (1 - p)
        violation = float(_violation(gradient, b).sum())
        start = start or violation
        if violation <= enough * start:
            break
        new, sweeps = _model(rows, curvature, gradient, b, inner * start, draw, order)
        step = _line_search(rows, one, cost, gradient, b, new - b)
        if step is None:
            break
        b = b + step
        if sweeps == 1:
            inner /= 4
    return b


def _violation(gradient: Float, b: Float) -> Float:
    """By how much the smallest subgradient of each coordinate is not 0."""
    return np.where(b == 0, np.maximum(np.abs(gradient) - 1, 0.0), np.abs(gradient + np.sign(b)))


def _model(
    rows: Float,
    curvature: Float,
    gradient: Float,
    b: Float,
    enough: float,
    draw: Callable[[int], int],
    order: list[int],
) -> tuple[Float, int]:
    """The quadratic model's argument after as many sweeps as leave a violation of at most ``enough``, and their number.

    ``order`` is shuffled in place before every sweep, and goes on from where the last Newton step left it.
    """
    hessian = (rows.T * curvature) @ rows + TRACE * np.eye(len(b))
    new = b.copy()
    sweeps = 0
    while sweeps < SWEEPS:
        sweeps += 1
        for place in range(len(order)):
            other = place + draw(len(order) - place)
            order[place], order[other] = order[other], order[place]
        violation = 0.0
        for j in order:
            slope, bend = float(gradient[j] + hessian[j] @ (new - b)), float(hessian[j, j])
            violation += float(_violation(np.array(slope), np.array(new[j])))
            centre = new[j] - slope / bend
            step = np.sign(centre) * max(abs(centre) - 1 / bend, 0.0) - new[j]
            if abs(step) >= 1e-12:
                new[j] += min(max(step, -LONGEST), LONGEST)
        if violation <= enough:
            break
    return new, sweeps


def _line_search(rows: Float, one: Float, cost: Float, gradient: Float, b: Float, step: Float) -> Float | None:
    """The step halved until the objective falls by enough of what the slope promises; None if it never does."""

    def objective(b: Float) -> float:
        score = rows @ b
        return float(cost @ (np.logaddexp(0.0, score) - one * score)) + float(np.abs(b).sum())

    here = objective(b)
    promised = float(gradient @ step) + float(np.abs(b + step).sum() - np.abs(b).sum())
    for halving in range(HALVINGS):
        share = 0.5**halving
        # The objective is known to about 1e-15 of itself, and near the end a step gains less.
        if objective(b + share * step) - here <= ENOUGH * share * promised + 1e-14 * here:
            return share * step
    return None


def _drawn(seed: int) -> Draw:
    """Whole numbers below n as liblinear draws them, seeded the way scikit-learn does."""
    raw = np.random.RandomState(np.random.RandomState(seed).randint(2**31 - 1))._bit_generator.random_raw

    def below(n: int) -> int:
        while True:
            product = int(raw()) * n
            # The low word tells whether this number comes up as often as the others (Lemire 2019).
            if product % 2**32 >= 2**32 % n:
                return product >> 32

    return below
