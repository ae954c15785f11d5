"""Pair losses and Phase II: convexity, curvature, gradient, optimum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coala.convex import Logistic, PairLoss, Pointwise, Status, finetune
from coala.values import CoalaError

from . import reference
from .menagerie_convex import LOSSES


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_losses_are_convex_with_the_curvature_they_state(loss: PairLoss) -> None:
    largest = 0.0
    hessian = jax.jit(jax.hessian(lambda scores: loss(scores[0], scores[1])))
    for chosen in np.linspace(-4, 4, 9):
        for rejected in np.linspace(-4, 4, 9):
            values = np.linalg.eigvalsh(hessian(jnp.asarray([chosen, rejected], jnp.float32)))
            assert values.min() >= -1e-6
            largest = max(largest, values.max())
    assert largest <= loss.curvature * (1 + 1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_losses_rise_with_the_rejected_and_fall_with_the_chosen(loss: PairLoss) -> None:
    with jax.enable_x64(True):
        at = lambda c, r: float(loss(jnp.asarray(c), jnp.asarray(r)))  # noqa: E731
        assert at(1.0, 0.0) < at(0.0, 0.0) < at(0.0, 1.0)
        step = 1e-5
        slope = jax.grad(lambda c: loss(c, jnp.asarray(0.3)))(jnp.asarray(0.7))
        assert float(slope) == pytest.approx((at(0.7 + step, 0.3) - at(0.7 - step, 0.3)) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_finetune_reaches_the_interior_point_optimum(loss: PairLoss) -> None:
    import cvxpy as cp

    rng = np.random.default_rng(0)
    chosen, rejected = np.abs(rng.standard_normal((2, 40, 5)))
    chosen = chosen + 0.3
    solution = finetune(np.zeros(5), chosen, rejected, loss, ridge=1e-2)
    theta = cp.Variable(5)
    scale, margin = loss.scale, loss.margin
    if isinstance(loss, Logistic):
        losses = cp.logistic(margin - scale * (chosen - rejected) @ theta)
    else:
        losses = (cp.logistic(margin - scale * chosen @ theta) + cp.logistic(margin + scale * rejected @ theta)) / 2
    expected = reference._solve(cp.Problem(cp.Minimize(cp.sum(losses) / 40 + 0.005 * cp.sum_squares(theta))))
    assert solution.status is Status.CONVERGED
    assert solution.objective == pytest.approx(expected, rel=1e-7)
    assert solution.objective - solution.gap <= expected * (1 + 1e-7)


def test_pairwise_finetune_is_ridge_bradley_terry() -> None:
    rng = np.random.default_rng(1)
    chosen, rejected = rng.standard_normal((2, 40, 5))
    theta = finetune(np.zeros(5), chosen, rejected, Logistic(), ridge=1e-3).value
    np.testing.assert_allclose(theta, reference.ridge_bradley_terry(chosen - rejected, 1e-3), atol=1e-6)
    flipped = finetune(np.zeros(5), rejected, chosen, Logistic(), ridge=1e-3).value
    np.testing.assert_allclose(theta, -flipped, atol=1e-8)


def test_a_margin_per_pair_and_a_weight_per_pair() -> None:
    rng = np.random.default_rng(2)
    chosen, rejected = rng.standard_normal((2, 40, 5))
    used = np.arange(40) < 25
    margin = rng.standard_normal(40)
    part = finetune(np.zeros(5), chosen[used], rejected[used], Logistic(margin=margin[used]), ridge=1e-2)
    weighted = finetune(np.zeros(5), chosen, rejected, Logistic(margin=margin), ridge=1e-2, weight=used / used.sum())
    np.testing.assert_allclose(part.value, weighted.value, atol=1e-8)


def test_separable_pairs_stay_bounded_and_are_certified() -> None:
    chosen = np.abs(np.random.default_rng(3).standard_normal((40, 5)))
    for ridge in (1e-2, 1e-6):
        solution = finetune(np.zeros(5), chosen, -chosen, Logistic(), ridge=ridge)
        assert solution.status is Status.CONVERGED
        assert np.linalg.norm(solution.value) <= np.sqrt(2 * np.log(2) / ridge)
    with pytest.raises(CoalaError, match="ridge"):
        finetune(np.zeros(5), chosen, -chosen, Pointwise(), ridge=0.0)
