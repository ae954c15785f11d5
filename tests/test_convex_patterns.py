"""Laws of pattern generation: descent, honest reports, certificates that enclose interior-point optima, invariances."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import pytest
from cvxpy.error import SolverError
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

from coala.convex.papers.patterns import NetworkSolution, PatternGeneration
from coala.convex.solvers import Status
from coala.values import CoalaError

from . import reference

QUICK = PatternGeneration(new_neurons=4, max_neurons=12, max_rounds=12, n_starts=32, dtype=np.float64)


def data(n: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows with a constant feature, and labels that no linear function of them explains."""
    rng = np.random.default_rng(seed)
    X = np.concatenate([rng.standard_normal((n, d - 1)), np.full((n, 1), 0.5)], axis=1) / np.sqrt(d)
    return X, np.where(np.abs(X @ rng.standard_normal(d)) > 0.5, 1.0, -1.0)


def train(X: np.ndarray, y: np.ndarray, sparsity: float, seed: int = 0, **options: Any) -> NetworkSolution:
    return QUICK.run(X, y, sparsity, jax.random.key(seed), **options)


def value(solution: NetworkSolution, X: np.ndarray, y: np.ndarray, sparsity: float) -> float:
    """J, evaluated neuron by neuron from the weights."""
    prediction, penalty = np.zeros(len(X)), 0.0
    for sign, side in zip((1.0, -1.0), solution.weights, strict=True):
        for v in side.T:
            prediction += sign * np.maximum(X @ v, 0)
            penalty += np.sqrt(v @ v)
    return float(((prediction - y) ** 2).sum() / 2 + sparsity * penalty)


def all_patterns(X: np.ndarray) -> np.ndarray:
    """Every activation pattern (n, P) of rows in the plane: one gate inside each sector between the rows' normals."""
    normals = np.arctan2(X[:, 1], X[:, 0]) + np.pi / 2
    edges = np.sort(np.concatenate([normals, normals + np.pi]) % (2 * np.pi))
    middles = (edges + np.append(edges[1:], edges[0] + 2 * np.pi)) / 2
    return np.unique(X @ np.stack([np.cos(middles), np.sin(middles)]) >= 0, axis=1)


def test_a_sparsity_of_zero_is_refused() -> None:
    # Equal rows of opposite labels pull nowhere, so that any share of their pull is nothing.
    X, y = data(6, 4, 0)
    X[1::2] = X[::2]
    y[1::2] = -y[::2]
    with pytest.raises(CoalaError, match="sparsity is 0"):
        train(X, y, 0.3 * float(np.linalg.norm(X.T @ y)))


@pytest.mark.nightly
@settings(max_examples=12)
@given(
    shape=st.sampled_from([(12, 4), (6, 9)]),
    seed=st.integers(0, 10_000),
    relative=st.sampled_from([0.3, 0.03]),
    flaw=st.sampled_from(["none", "duplicate rows", "zero feature", "equal labels"]),
)
def test_reports_are_true(shape: tuple[int, int], seed: int, relative: float, flaw: str) -> None:
    X, y = data(*shape, seed)
    if flaw == "duplicate rows":
        X[1::2] = X[::2]
    elif flaw == "zero feature":
        X[:, 0] = 0
    elif flaw == "equal labels":
        y[:] = 1
    sparsity = relative * float(np.linalg.norm(X.T @ y))
    assume(sparsity > 0)
    solution = train(X, y, sparsity)
    objectives = [row["objective"] for row in solution.history]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(objectives))
    assert objectives[0] == pytest.approx(y @ y / 2)
    assert solution.objective == pytest.approx(value(solution, X, y, sparsity), rel=1e-9)
    # The network is the same function with balanced layers: its weight decay is the penalty.
    network = solution.network
    decay = ((network.first_layer**2).sum() + (network.second_layer**2).sum()) / 2
    residual = network.hidden(X) @ network.second_layer - y
    assert residual @ residual / 2 + sparsity * decay == pytest.approx(solution.objective, rel=1e-9)
    assert solution.patterns.shape == (len(X), solution.n_neurons)
    assert 0 <= solution.gap <= solution.estimated_gap + 1e-12
    if solution.n_neurons:
        try:
            optimum, _ = reference.solve_cone(X, y, np.unique(solution.patterns, axis=1), sparsity)
        except SolverError:  # a cone can be a sliver, too thin for the interior-point method
            reject()
        rounding = 1e-6 * solution.objective
        assert solution.objective - solution.gap <= optimum + rounding
        assert optimum <= solution.objective + rounding


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in (1, 2, 3))])
def test_reaches_the_optimum_over_all_patterns(seed: int) -> None:
    X, y = data(8, 2, seed)
    sparsity = 0.05 * float(np.linalg.norm(X.T @ y))
    solution = train(X, y, sparsity)
    optimum, _ = reference.solve_cone(X, y, all_patterns(X), sparsity)
    assert optimum * (1 - 1e-6) <= solution.objective <= optimum * 1.01
    assert solution.status is Status.CONVERGED
    # No search is exhaustive, but in the plane this one misses nothing.
    assert solution.objective - solution.estimated_gap <= optimum * (1 + 1e-3)


def test_certificate_is_tight() -> None:
    X, y = data(12, 4, 5)
    solution = train(X, y, 0.1 * float(np.linalg.norm(X.T @ y)))
    assert solution.status is Status.CONVERGED
    assert solution.relative_gap <= 0.01
    assert solution.relative_estimated_gap <= 0.03


@pytest.mark.parametrize("case", ["zero rows", "zero labels", "large sparsity"])
def test_zero_network(case: str) -> None:
    X, y = data(12, 4, 0)
    # |z^T (X u)_+| <= ||z|| ||X u|| for every unit u: no neuron pays above this.
    sparsity = 1.001 * np.linalg.norm(y) * np.linalg.norm(X, 2) if case == "large sparsity" else 0.1
    X, y = (0 * X if case == "zero rows" else X), (0 * y if case == "zero labels" else y)
    solution = train(X, y, sparsity)
    assert (solution.n_neurons, solution.status) == (0, Status.CONVERGED)
    assert solution.objective == pytest.approx(y @ y / 2)
    assert solution.gap == pytest.approx(0, abs=1e-9)
    assert solution.estimated_gap == pytest.approx(0, abs=1e-9)


def test_key_decides_everything() -> None:
    X, y = data(12, 4, 1)
    first, second = (train(X, y, 0.05, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.weights, second.weights)
    assert first.history == second.history


def test_row_order_scale_and_rotation_do_not_matter() -> None:
    X, y = data(12, 4, 2)
    solution = train(X, y, 0.1)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(X))
    turn, _ = np.linalg.qr(rng.standard_normal((4, 4)))
    changed = train(3 * X[order] @ turn, y[order], 0.3)
    assert changed.objective == pytest.approx(solution.objective, rel=0.01)


def test_start_is_improved() -> None:
    X, y = data(12, 4, 4)
    start = np.random.default_rng(0).standard_normal((2, 4, 3))
    rounds: list[int] = []
    solution = train(X, y, 0.1, start=start, on_round=lambda turn, row: rounds.append(turn))
    prediction = np.maximum(X @ start[0], 0).sum(axis=1) - np.maximum(X @ start[1], 0).sum(axis=1)
    given_value = ((prediction - y) ** 2).sum() / 2 + 0.1 * np.linalg.norm(start, axis=1).sum()
    assert solution.history[0]["objective"] < given_value
    assert rounds == list(range(len(solution.history)))
    again = train(X, y, 0.1, start=solution.weights)
    assert again.objective <= solution.objective * (1 + 1e-9)


def test_float32_iterations_reach_the_same_objective() -> None:
    X, y = data(12, 4, 2)
    single = replace(QUICK, dtype=np.float32)
    solution = single.run(X, y, 0.1, jax.random.key(0))
    assert solution.objective == pytest.approx(train(X, y, 0.1).objective, rel=0.01)
    assert solution.objective == pytest.approx(value(solution, X, y, 0.1), rel=1e-9)
