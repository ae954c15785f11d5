"""The one logistic regression: a textbook's figures, other solvers, separation, and many columns."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.sparse import csr_array

from coala.statistics import logistic
from coala.statistics.logistic import fit_logistic, sigmoid
from tests.reference import naive_logistic

# Spector and Mazzeo (1980), as tabled by Greene: grade point average, test score and new method by student; improved.
SPECTOR = (
    *("2.66 20 0 0", "2.89 22 0 0", "3.28 24 0 0", "2.92 12 0 0", "4.00 21 0 1", "2.86 17 0 0", "2.76 17 0 0"),
    *("2.87 21 0 0", "3.03 25 0 0", "3.92 29 0 1", "2.63 20 0 0", "3.32 23 0 0", "3.57 23 0 0", "3.26 25 0 1"),
    *("3.53 26 0 0", "2.74 19 0 0", "2.75 25 0 0", "2.83 19 0 0", "3.12 23 1 0", "3.16 25 1 1", "2.06 22 1 0"),
    *("3.62 28 1 1", "2.89 14 1 0", "3.51 26 1 0", "3.54 24 1 1", "2.83 27 1 1", "3.39 17 1 1", "2.67 24 1 0"),
    *("3.65 21 1 1", "4.00 23 1 1", "3.10 21 1 0", "2.39 19 1 1"),
)


def drawn(seed: int, n: int = 120, k: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, k)) * np.resize([1, 0.2, 3, 1], k)
    return X, sigmoid(X @ np.resize([1, -2, 0.3, 0.0], k) + rng.normal(size=n)), rng.random(n)


def test_the_figures_of_a_textbook() -> None:
    table = np.array([row.split() for row in SPECTOR], float)
    fit = fit_logistic(np.column_stack([np.ones(32), table[:, :3]]), table[:, 3])
    # Greene, Econometric Analysis, the logit column of the table on this example.
    assert fit.coefficients == pytest.approx([-13.021, 2.826, 0.095, 2.379], abs=6e-4)
    assert fit.objective == pytest.approx(12.890, abs=6e-4)
    assert not fit.separated


@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.0), (0.5, 0.0), (5.0, 0.0), (60.0, 0.0), (0.0, 2.0), (1.0, 1.0)])
def test_against_another_solver(l1: float, l2: float) -> None:
    X, y, weight = drawn(0)
    fit = fit_logistic(X, y, weight, l1=l1, l2=l2)
    assert np.abs(fit.gradient).max() < 1e-8
    assert fit.coefficients == pytest.approx(naive_logistic(X, y, weight, l1, l2), abs=2e-5)
    if l1 == 60:
        assert not fit.coefficients.any()
    # The optimum satisfies its conditions to the last digits, wherever it was started.
    again = fit_logistic(X, y, weight, l1=l1, l2=l2, start=np.array([3.0, -4.0, 5.0, 6.0]))
    assert again.coefficients == pytest.approx(fit.coefficients, abs=1e-9)


@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.7), (0.7, 0.0)])
def test_against_scikit_learn(l1: float, l2: float) -> None:
    from sklearn.linear_model import LogisticRegression

    X, y, weight = drawn(1)
    labels = (y > 0.5).astype(float)
    solver = {"solver": "saga", "l1_ratio": 1.0} if l1 else {"solver": "newton-cg"}
    other = LogisticRegression(C=1 / (l1 + l2), fit_intercept=False, tol=1e-10, max_iter=100_000, **solver)
    other.fit(X, labels, weight)
    assert fit_logistic(X, labels, weight, l1=l1, l2=l2).coefficients == pytest.approx(other.coef_[0], abs=1e-6)


def test_one_target_for_all_is_a_target_for_each() -> None:
    X, _, weight = drawn(2)
    one = fit_logistic(X, 1.0, weight, l2=0.1).coefficients
    assert one == pytest.approx(fit_logistic(X, np.ones(len(X)), weight, l2=0.1).coefficients, abs=0)
    # Rows of weight 2 are rows that are there twice.
    twice = fit_logistic(np.vstack([X, X]), 1.0, np.concatenate([weight, weight]), l2=0.2).coefficients
    assert twice == pytest.approx(one, abs=1e-9)


@pytest.mark.parametrize(
    ("X", "y", "separated"),
    [
        ([[1], [-1]], [1, 0], True),
        ([[1, 1], [1, 2], [1, 3], [1, 4]], [0, 0, 1, 1], True),
        ([[1, 1], [1, 2], [1, 2], [1, 4]], [0, 0, 1, 1], True),  # apart but for the rows between
        ([[1, 1], [1, 3], [1, 2], [1, 4]], [0, 0, 1, 1], False),
        ([[1, 1], [1, 2], [1, 3], [1, 4]], [0, 0.5, 1, 1], True),
        ([[1, 1], [1, 2], [1, 3], [1, 4]], [0, 0.4, 0.6, 1], False),
        ([[1, 1000], [1, 2000], [1, 1999], [1, 4000]], [0, 0, 1, 1], False),
        ([[0, 0], [0, 0]], [1, 1], False),
        ([[1]] * 4, [1, 1, 1, 0], False),
    ],
)
def test_separation_is_said(X: list[list[float]], y: list[float], separated: bool) -> None:
    design, target = np.array(X, float), np.array(y, float)
    fit = fit_logistic(design, target)
    assert fit.separated == separated
    certain = (target == 0) | (target == 1)
    if separated:
        assert np.abs(design @ fit.coefficients).max() > logistic.HUGE
    else:
        assert np.isfinite(fit.coefficients).all()
        assert np.abs(fit.gradient).max() < 1e-6
    # A penalty always leaves finite coefficients, and a row without weight separates nothing.
    assert not fit_logistic(design, target, l2=1e-3).separated
    assert not fit_logistic(design, target, l1=1e-3).separated
    against = np.vstack([design, design]), np.concatenate([target, np.where(certain, 1 - target, target)])
    unheard = np.repeat([1.0, 0.0], len(design))
    assert fit_logistic(*against, unheard).separated == separated
    assert not fit_logistic(*against).separated


def test_limits() -> None:
    assert fit_logistic(np.array([[1.0], [-1.0]]), np.array([1.0, 0.0])).coefficients[0] > 20
    assert fit_logistic(np.zeros((3, 2)), np.ones(3)).coefficients == pytest.approx([0, 0])
    assert fit_logistic(np.ones((4, 1)), np.array([1.0, 1, 1, 0])).coefficients[0] == pytest.approx(math.log(3))
    assert sigmoid([-800.0, 0.0, 800.0]) == pytest.approx([0, 0.5, 1])


def test_many_columns_and_sparse_ones() -> None:
    X, y, weight = drawn(3, n=80, k=30)
    exact = fit_logistic(X, y, weight, l2=1.0)
    for design in (X, csr_array(X)):
        other = fit_logistic(design, y, weight, l2=1.0, many=True)
        assert other.coefficients == pytest.approx(exact.coefficients, abs=1e-3)
        assert exact.objective <= other.objective == pytest.approx(exact.objective, rel=1e-7)
        assert np.abs(other.gradient).max() > np.abs(exact.gradient).max()
