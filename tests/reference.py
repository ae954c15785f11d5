"""Independent oracles for the convex programs: dense NumPy operators, CVXPY optima, SciPy probes. Nothing of coala.

Written for plainness; every matrix is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize


def dense_gated(X: np.ndarray, patterns: np.ndarray) -> np.ndarray:
    """[D_1 X ... D_P X], (n, P d): acts on u stacked pattern by pattern."""
    return np.concatenate([patterns[:, i, None] * X for i in range(patterns.shape[1])], axis=1)


def stack(u: np.ndarray) -> np.ndarray:
    """(d, P) weights as one vector, pattern by pattern."""
    return u.T.reshape(-1)


def solve_gated(X: np.ndarray, y: np.ndarray, patterns: np.ndarray, sparsity: float) -> float:
    """Optimal value of the gated program, by an interior-point method."""
    import cvxpy as cp

    d, P = X.shape[1], patterns.shape[1]
    blocks = [cp.Variable(d) for _ in range(P)]
    prediction = sum(cp.multiply(patterns[:, i].astype(float), X @ blocks[i]) for i in range(P))
    objective = cp.sum_squares(prediction - y) / 2 + sparsity * sum(cp.norm(block) for block in blocks)
    return _solve(cp.Problem(cp.Minimize(objective)))


def solve_cone(X: np.ndarray, y: np.ndarray, patterns: np.ndarray, sparsity: float) -> tuple[float, np.ndarray]:
    """Optimal value and weights (2, d, P) of the cone-constrained program."""
    import cvxpy as cp

    d, P = X.shape[1], patterns.shape[1]
    v = [cp.Variable(d) for _ in range(P)]
    w = [cp.Variable(d) for _ in range(P)]
    signs = 2.0 * patterns - 1
    prediction = sum(cp.multiply(patterns[:, i].astype(float), X @ (v[i] - w[i])) for i in range(P))
    objective = cp.sum_squares(prediction - y) / 2 + sparsity * sum(cp.norm(block) for block in v + w)
    constraints = [cp.multiply(signs[:, i], X @ block[i]) >= 0 for i in range(P) for block in (v, w)]
    value = _solve(cp.Problem(cp.Minimize(objective), constraints))
    return value, np.stack([np.stack([b.value for b in v], 1), np.stack([b.value for b in w], 1)])


def solve_pairwise(
    chosen: np.ndarray,
    rejected: np.ndarray,
    gates: np.ndarray,
    margin: np.ndarray,
    weight: np.ndarray,
    sparsity: float,
    ridge: float,
) -> float:
    """Optimal value of the pairwise program with gates (d, m)."""
    import cvxpy as cp

    d, m = gates.shape
    b = cp.Variable(d)
    u = [cp.Variable(d) for _ in range(m)]
    margins = (chosen - rejected) @ b
    for i in range(m):
        opened = (chosen @ gates[:, i] >= 0)[:, None] * chosen - (rejected @ gates[:, i] >= 0)[:, None] * rejected
        margins = margins + opened @ u[i]
    loss = weight @ cp.logistic(margin - margins)
    penalty = sparsity * sum(cp.norm(block) for block in u) + ridge / 2 * cp.sum_squares(b)
    return _solve(cp.Problem(cp.Minimize(loss + penalty)))


def solve_raters(
    rows: np.ndarray, member: np.ndarray, margin: np.ndarray, ridge: float, levels: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Optimal value, w (d,) and deviations (R, d) of the program of a shared head and a deviation for each rater."""
    import cvxpy as cp

    n, d = rows.shape
    w, deviations = cp.Variable(d), cp.Variable((len(levels), d))
    own = np.eye(len(levels))[member] * (member >= 0)[:, None]
    scores = rows @ w + cp.sum(cp.multiply(rows, own @ deviations), axis=1)
    penalty = levels @ cp.norm(deviations, axis=1) + ridge / 2 * cp.sum_squares(deviations)
    value = _solve(
        cp.Problem(cp.Minimize(cp.sum(cp.logistic(margin - scores)) / n + ridge / 2 * cp.sum_squares(w) + penalty))
    )
    return value, w.value, deviations.value


def _solve(problem: Any) -> float:
    """The optimal value to 1e-12, or as near as this machine's rounding lets the reference come.

    Raises ``cvxpy.error.SolverError`` where no tolerance is reached: a cone can be a sliver.
    """
    import cvxpy as cp

    loosest = 1e-9
    for tolerance in (1e-12, 1e-10, loosest):
        tolerances = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), tolerance)
        try:
            problem.solve(solver="CLARABEL", max_iter=500, **tolerances)
        except cp.error.SolverError:
            if tolerance == loosest:
                raise
        else:
            break
    return float(problem.value)


def ridge_bradley_terry(differences: np.ndarray, ridge: float, weight: np.ndarray | None = None) -> np.ndarray:
    """argmin_b sum_j weight_j softplus(-z_j.b) + ridge/2 ||b||^2 for rows z_j, by L-BFGS; weight 1/n by default."""
    n, d = differences.shape
    share = np.full(n, 1 / n) if weight is None else weight

    def value_and_gradient(b: np.ndarray) -> tuple[float, np.ndarray]:
        margins = differences @ b
        slope = -share / (1 + np.exp(np.clip(margins, -500, 500)))
        value = share @ np.logaddexp(0, -margins) + ridge / 2 * b @ b
        return float(value), differences.T @ slope + ridge * b

    options = {"maxiter": 10_000, "maxcor": 30, "ftol": 1e-15, "gtol": 1e-10}
    return minimize(value_and_gradient, np.zeros(d), jac=True, method="L-BFGS-B", options=options).x


def linear_probe(
    train: Any, test: Any, ridges: Sequence[float] = tuple(10.0 ** (-k / 2) for k in range(13)), n_folds: int = 5
) -> np.ndarray:
    """Score differences (n,) on ``test`` of a linear Bradley-Terry probe; its ridge is chosen on folds of ``train``.

    ``train`` and ``test`` have ``chosen``, ``rejected`` (n, d) and ``train`` a ``group`` (n,), as a ``FeatureSet``.
    """
    rows = np.concatenate([train.chosen, train.rejected]).astype(float)
    center, scale = rows.mean(axis=0), rows.std(axis=0)
    factor = np.where(scale > 1e-9, 1 / np.where(scale > 1e-9, scale, 1), 0) / np.sqrt(rows.shape[1])
    differences = (train.chosen.astype(float) - train.rejected) * factor
    del center  # differences do not feel it
    names = np.unique(train.group)
    fold_of = dict(zip(names, np.random.default_rng(0).permutation(len(names)) % n_folds, strict=True))
    fold = np.array([fold_of[name] for name in train.group])
    losses = []
    for ridge in ridges:
        margins = np.zeros(len(differences))
        for k in range(n_folds):
            out = fold == k
            if out.any() and not out.all():
                margins[out] = differences[out] @ ridge_bradley_terry(differences[~out], ridge)
        losses.append(np.logaddexp(0, -margins).mean())
    weights = ridge_bradley_terry(differences, ridges[int(np.argmin(losses))]) * factor
    return np.asarray((test.chosen.astype(float) - test.rejected) @ weights)


def naive_logistic(X: np.ndarray, y: np.ndarray, weight: np.ndarray, l1: float, l2: float = 0.0) -> np.ndarray:
    """Logistic regression: positive and negative parts by L-BFGS-B, every row twice with its two labels."""
    k = X.shape[1]

    def objective(parts: np.ndarray) -> tuple[float, np.ndarray]:
        b = parts[:k] - parts[k:]
        z = X @ b
        loss = weight @ (y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z))
        slope = X.T @ (weight * (1 / (1 + np.exp(-z)) - y)) + l2 * b
        return loss + l1 * parts.sum() + l2 / 2 * b @ b, np.concatenate([slope + l1, l1 - slope])

    options = {"maxiter": 5000, "ftol": 1e-16, "gtol": 1e-10}
    found = minimize(
        objective, np.zeros(2 * k), jac=True, method="L-BFGS-B", bounds=[(0, None)] * (2 * k), options=options
    )
    return np.asarray(found.x[:k] - found.x[k:])


def solve_output(steps: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, float]], ridge: float) -> tuple[float, Any]:
    """Optimal value, less that of no change, and change of the output-layer program.

    A step is (rows of the output layer, state, target, weight).
    """
    import cvxpy as cp

    d = len(steps[0][1])
    change = cp.Variable((d, d))
    total, none = ridge / 2 * cp.sum_squares(change), 0.0
    for rows, state, target, weight in steps:
        z, base = rows @ (state + change @ state), rows @ state
        total += weight * (cp.log_sum_exp(z) - target @ z)
        none += weight * (np.logaddexp.reduce(base) - target @ base)
    return _solve(cp.Problem(cp.Minimize(total))) - none, change.value
