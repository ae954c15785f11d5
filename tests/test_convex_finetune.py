"""Pair losses and Phase II: convexity, curvature, certificates, and every minimiser against an independent optimum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coala.convex import Logistic, PairLoss, Pointwise, Status, certify, finetune, solve
from coala.convex.papers.finetune import WIDEST_GRAM, default_minimiser
from coala.convex.papers.losses import BLOCK, SecondLayer, TwoScores, gram
from coala.convex.papers.minimisers import LBFGS, AdamW, DampedNewton, Minimiser, Nesterov, NesterovState
from coala.convex.pytree import pytree
from coala.values import CoalaError

from . import reference
from .menagerie_convex import LOSSES, NON_CONVEX_LOSSES

N, M = 40, 5  # one shape wherever it will do: each new one is compiled
MINIMISERS: list[Minimiser] = [DampedNewton(), LBFGS(), Nesterov(), Nesterov(restart=False)]
GRID = [(c, r) for c in np.linspace(-8, 8, 9) for r in np.linspace(-8, 8, 9)]


def features(seed: int = 0, n: int = N, m: int = M) -> tuple[np.ndarray, np.ndarray]:
    """Hidden features of both sides that no head separates."""
    rng = np.random.default_rng(seed)
    chosen, rejected = np.abs(rng.standard_normal((2, n, m)))
    return chosen + 0.3, rejected


def cvx_losses(loss: PairLoss, chosen: np.ndarray, rejected: np.ndarray, theta: Any) -> Any:
    import cvxpy as cp

    scale, margin = loss.scale, loss.margin
    if isinstance(loss, Logistic):
        return cp.logistic(margin - scale * (chosen - rejected) @ theta)
    assert isinstance(loss, Pointwise)
    return (cp.logistic(margin - scale * chosen @ theta) + cp.logistic(margin + scale * rejected @ theta)) / 2


def cvx_optimum(
    loss: PairLoss,
    chosen: np.ndarray,
    rejected: np.ndarray,
    *,
    ridge: float,
    centre: np.ndarray | float = 0.0,
    cap: float | None = None,
) -> float:
    import cvxpy as cp

    theta = cp.Variable(chosen.shape[1])
    objective = cp.sum(cvx_losses(loss, chosen, rejected, theta)) / len(chosen)
    if ridge:
        objective += ridge / 2 * cp.sum_squares(theta - centre)
    constraints = [] if cap is None else [cp.norm(theta - centre) <= cap]
    return reference._solve(cp.Problem(cp.Minimize(objective), constraints))


def hessians(loss: PairLoss) -> np.ndarray:
    with jax.enable_x64(True):
        hessian = jax.jit(jax.hessian(lambda scores: loss(scores[0], scores[1])))
        return np.stack([hessian(jnp.asarray(point)) for point in GRID])


# --- losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES + NON_CONVEX_LOSSES, ids=str)
def test_losses_keep_what_they_state(loss: PairLoss) -> None:
    values = np.linalg.eigvalsh(hessians(loss))
    assert np.abs(values).max() <= loss.curvature * (1 + 1e-9)
    assert (values.min() >= -1e-12) == loss.convex
    with jax.enable_x64(True):
        chosen, rejected = jnp.asarray(GRID).T
        losses, shifted = loss(chosen, rejected), loss(chosen + 1.5, rejected + 1.5)
    assert (np.asarray(losses) >= 0).all()
    assert np.allclose(losses, shifted, rtol=1e-12) == loss.shift_invariant


@pytest.mark.parametrize("loss", [Logistic(), Pointwise()], ids=str)
def test_the_curvature_is_attained(loss: PairLoss) -> None:
    assert np.linalg.eigvalsh(hessians(loss)).max() == pytest.approx(loss.curvature, rel=1e-9)


@pytest.mark.parametrize(("scale", "smallest"), [(1.0, -0.25), (2.0, -0.5)])
def test_two_independent_scores_are_not_convex(scale: float, smallest: float) -> None:
    """The infimum is -scale/4, approached where the chosen reply is hopeless."""
    assert np.linalg.eigvalsh(hessians(TwoScores(scale))).min() == pytest.approx(smallest, abs=2e-3)


def test_two_scores_that_are_one_preference_are_the_point_loss_of_equation_nine() -> None:
    """With pi(rejected) = 1 - pi(chosen), log-odds are the score, and Eq. 8 becomes Eq. 9 on one feature vector."""
    score = jnp.linspace(-3, 3, 7)
    np.testing.assert_allclose(TwoScores(1.5, 0.2)(score, -score), Logistic(1.5, 0.2)(score, 0 * score), rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES + NON_CONVEX_LOSSES, ids=str)
def test_losses_rise_with_the_rejected_and_fall_with_the_chosen(loss: PairLoss) -> None:
    with jax.enable_x64(True):
        at = lambda c, r: float(loss(jnp.asarray(c), jnp.asarray(r)))  # noqa: E731
        assert at(1.0, 0.0) < at(0.0, 0.0) < at(0.0, 1.0)
        step = 1e-5
        slope = jax.grad(lambda c: loss(c, jnp.asarray(0.3)))(jnp.asarray(0.7))
        assert float(slope) == pytest.approx((at(0.7 + step, 0.3) - at(0.7 - step, 0.3)) / (2 * step), rel=1e-6)


def test_the_reference_margin_has_the_sign_of_dpo() -> None:
    rng = np.random.default_rng(0)
    chosen, rejected, ref_chosen, ref_rejected = rng.standard_normal((4, 20)) - 2
    beta = 0.3
    dpo = np.log1p(np.exp(-(beta * (chosen - ref_chosen) - beta * (rejected - ref_rejected))))
    loss = Logistic.with_reference(ref_chosen - ref_rejected, beta)
    scores = jnp.asarray(chosen), jnp.asarray(rejected)
    np.testing.assert_allclose(loss(*scores), dpo, rtol=1e-5)
    assert np.abs(Logistic.with_reference(ref_rejected - ref_chosen, beta)(*scores) - dpo).max() > 0.1


# --- the program -------------------------------------------------------------------------------------------------


@pytree()
@dataclass(frozen=True)
class Uneven:
    """A loss of someone else's: convex, both scores in one term, and not shift-invariant."""

    convex: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = False
    curvature: ClassVar[float] = 1.25 / 4

    def __call__(self, chosen: jax.Array, rejected: jax.Array) -> jax.Array:
        return jax.nn.softplus(rejected / 2 - chosen)


@pytest.mark.parametrize("loss", [*LOSSES, Uneven()], ids=str)
def test_gradient_and_hessian_are_those_of_the_objective(loss: PairLoss) -> None:
    with jax.enable_x64(True):
        chosen, rejected = map(jnp.asarray, features(1))
        weight = jnp.linspace(0, 1, N) / 10
        program = SecondLayer.of(chosen, rejected, loss, ridge=0.3, weight=weight, centre=jnp.ones(M))
        theta = jnp.linspace(-1, 1, M)

        def plain(theta: jax.Array) -> jax.Array:
            return weight @ loss(chosen @ theta, rejected @ theta) + 0.15 * jnp.sum((theta - 1) ** 2)

        @jax.jit
        def found(theta: jax.Array) -> tuple[jax.Array, ...]:
            scores = program.scores(theta)
            return program.objective(theta), program.gradient(theta, scores), program.loss_hessian(scores)

        value, gradient, hessian = found(theta)
        hessian = np.asarray(hessian) + 0.3 * np.eye(M)
        assert float(value) == pytest.approx(float(plain(theta)), rel=1e-12)
        np.testing.assert_allclose(gradient, jax.jit(jax.grad(plain))(theta), atol=1e-12)
        np.testing.assert_allclose(hessian, jax.jit(jax.hessian(plain))(theta), atol=1e-12)
        assert np.linalg.eigvalsh(hessian)[-1] <= float(program.smoothness()) * (1 + 1e-12)


@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_the_gram_matrix_in_blocks(n: int) -> None:
    with jax.enable_x64(True):
        rows = np.random.default_rng(n).standard_normal((3, n))
        np.testing.assert_allclose(gram(jnp.asarray(rows)), rows @ rows.T, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_the_gap_is_the_squared_gradient_and_fenchel_s_gap_at_once(margin: float) -> None:
    """The dual written out: mean(margin a + H(a)) - ||A^T a / n||^2 / (2 ridge), a the slope of the loss."""
    chosen, rejected = features(2)
    ridge, theta = 0.02, np.linspace(-1, 2, M)
    with jax.enable_x64(True):
        program = SecondLayer.of(
            jnp.asarray(chosen), jnp.asarray(rejected), Logistic(margin=jnp.asarray(margin)), ridge=ridge
        )
        objective, lower = certify(program, theta)
        gradient = np.asarray(program.gradient(jnp.asarray(theta), program.scores(jnp.asarray(theta))))
    difference = chosen - rejected
    a = 1 / (1 + np.exp(difference @ theta - margin))
    entropy = -(a * np.log(a) + (1 - a) * np.log(1 - a))
    dual = np.mean(margin * a + entropy) - np.sum((a @ difference / N) ** 2) / (2 * ridge)
    assert lower == pytest.approx(dual, rel=1e-12)
    assert objective - lower == pytest.approx(gradient @ gradient / (2 * ridge), rel=1e-10)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize(("ridge", "cap"), [(0.1, None), (1e-3, None), (0.0, 0.5), (0.0, 4.0), (0.05, 0.5)])
def test_bounds_enclose_the_optimum_wherever_they_are_taken(loss: PairLoss, ridge: float, cap: float | None) -> None:
    chosen, rejected = features(3)
    centre = np.linspace(0, 0.5, M)
    optimum = cvx_optimum(loss, chosen, rejected, ridge=ridge, centre=centre, cap=cap)
    with jax.enable_x64(True):
        program = SecondLayer.of(
            jnp.asarray(chosen), jnp.asarray(rejected), loss, ridge=ridge, centre=jnp.asarray(centre), cap=cap
        )
    for theta in np.random.default_rng(4).standard_normal((5, M)):
        inside = theta if cap is None else centre + theta * min(1, cap / np.linalg.norm(theta))
        objective, lower = certify(program, inside)
        assert lower <= optimum * (1 + 1e-8)
        assert objective >= optimum * (1 - 1e-8)


# --- minimisers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minimiser", MINIMISERS, ids=str)
@pytest.mark.parametrize("loss", LOSSES[1:4], ids=str)
def test_minimisers_reach_the_interior_point_optimum(loss: PairLoss, minimiser: Minimiser) -> None:
    chosen, rejected = features()
    solution = finetune(np.zeros(M), chosen, rejected, loss, ridge=1e-2, minimiser=minimiser, tolerance=1e-9)
    expected = cvx_optimum(loss, chosen, rejected, ridge=1e-2)
    assert solution.status is Status.CONVERGED
    assert solution.objective == pytest.approx(expected, rel=2e-9)
    assert solution.objective - solution.gap <= expected * (1 + 1e-9)


@pytest.mark.parametrize("minimiser", [DampedNewton(), Nesterov()], ids=str)
@pytest.mark.parametrize(("ridge", "cap"), [(0.0, 0.5), (0.0, 3.0), (1e-2, 0.5), (1e-2, 50.0)])
def test_the_constrained_optimum(minimiser: Minimiser, ridge: float, cap: float) -> None:
    """A cap that binds, with and without a ridge, and one that does not."""
    chosen, rejected = features(5)
    chosen = chosen + 0.5  # separable enough that the free optimum lies far out
    centre = np.linspace(0, 0.5, M)
    common: dict[str, Any] = {"ridge": ridge, "centre": centre}
    solution = finetune(np.ones(M), chosen, rejected, Logistic(), norm_cap=cap, minimiser=minimiser, **common)
    assert solution.status is Status.CONVERGED
    expected = cvx_optimum(Logistic(), chosen, rejected, cap=cap, **common)
    assert solution.objective == pytest.approx(expected, rel=2e-8)
    assert np.linalg.norm(solution.value - centre) <= cap * (1 + 1e-12)
    if cap == 50.0:
        free = finetune(np.ones(M), chosen, rejected, Logistic(), **common)
        apart = np.sqrt(2 * solution.gap / ridge) + np.sqrt(2 * free.gap / ridge)
        assert np.linalg.norm(solution.value - free.value) <= apart + 1e-9


class Descent(Nesterov):
    """Gradient descent: Nesterov's method without its momentum."""

    def step(self, program: SecondLayer, state: NesterovState) -> NesterovState:
        return super().step(program, state._replace(ahead=state.theta))


def test_nesterov_keeps_the_rate_of_theorem_4_3_and_descent_does_not() -> None:
    """(k + 1)^2 (F_k - F*) <= 2 L ||theta_0 - theta*||^2 at every k, nearly without strong convexity."""
    chosen, rejected = np.random.default_rng(6).standard_normal((2, N, M)) * np.logspace(0, -1, M)
    ridge = 1e-6
    best = finetune(np.zeros(M), chosen, rejected, Logistic(), ridge=ridge, tolerance=1e-13)
    with jax.enable_x64(True):
        program = SecondLayer.of(jnp.asarray(chosen), jnp.asarray(rejected), Logistic(), ridge=ridge)
        limit = 2 * float(program.smoothness()) * float(np.sum(best.value**2))
        largest = []
        for method in (Nesterov(restart=False), Descent()):
            rows = solve(program, method, tolerance=0.0, max_steps=300, patience=None, exact=False).history
            largest.append(max((row["step"] + 1) ** 2 * (row["objective"] - best.objective) for row in rows))
    assert largest[0] <= limit < largest[1]


def test_adamw_descends_and_repeats_itself() -> None:
    chosen, rejected = features(7, n=600)
    best = finetune(np.zeros(M), chosen, rejected, Logistic(), ridge=1e-2).objective
    runs = [
        finetune(
            np.zeros(M), chosen, rejected, Logistic(), ridge=1e-2, max_steps=1000, minimiser=AdamW(jax.random.key(seed))
        )
        for seed in (0, 0, 1)
    ]
    assert (runs[0].value == runs[1].value).all()
    assert (runs[0].value != runs[2].value).any()
    for run in runs:
        assert run.status is Status.MAX_STEPS
        assert best <= run.objective <= best + 1e-2 < run.history[0]["objective"]
        assert run.objective - run.gap <= best


def test_an_adamw_epoch_sees_every_pair_once() -> None:
    """One pair matters to each weight: after an epoch every weight has moved, whatever the order."""
    n = 12
    adamw = AdamW(jax.random.key(3), batch=4)
    with jax.enable_x64(True):
        program = SecondLayer.of(jnp.eye(n), jnp.zeros((n, n)), Logistic(), ridge=1e-9)
        state = adamw.init(program)
        for batch in range(3):
            assert int((np.asarray(state.theta) != 0).sum()) == 4 * batch
            state = adamw.step(program, state)
        assert (np.asarray(state.theta) != 0).all()


@pytest.mark.parametrize("loss", NON_CONVEX_LOSSES, ids=str)
@pytest.mark.parametrize("minimiser", [LBFGS(), AdamW(jax.random.key(0), rate=1e-2)], ids=["lbfgs", "adamw"])
def test_a_loss_that_is_not_convex_is_descended_without_certificate(loss: PairLoss, minimiser: Minimiser) -> None:
    chosen, rejected = features(8)
    solution = finetune(np.zeros(M), chosen, rejected, loss, ridge=0.1, minimiser=minimiser, max_steps=1000)
    with jax.enable_x64(True):
        program = SecondLayer.of(jnp.asarray(chosen), jnp.asarray(rejected), loss, ridge=0.1)
        theta = jnp.asarray(solution.value)
        gradient = program.gradient(theta, program.scores(theta))
    assert solution.status is not Status.CONVERGED
    assert solution.relative_gap == 1.0
    assert solution.objective < solution.history[0]["objective"] - 1e-3
    assert np.linalg.norm(gradient) <= 1e-3


# --- finetune ----------------------------------------------------------------------------------------------------


def test_the_default_minimiser() -> None:
    assert isinstance(default_minimiser(Logistic(), WIDEST_GRAM), DampedNewton)
    assert isinstance(default_minimiser(Logistic(), WIDEST_GRAM + 1), LBFGS)
    assert isinstance(default_minimiser(Logistic(), WIDEST_GRAM + 1, capped=True), Nesterov)
    assert isinstance(default_minimiser(TwoScores(), 3), LBFGS)


def test_pairwise_finetune_is_ridge_bradley_terry() -> None:
    chosen, rejected = np.random.default_rng(1).standard_normal((2, N, M))
    theta = finetune(np.zeros(M), chosen, rejected, Logistic(), ridge=1e-3).value
    np.testing.assert_allclose(theta, reference.ridge_bradley_terry(chosen - rejected, 1e-3), atol=1e-6)
    flipped = finetune(np.zeros(M), rejected, chosen, Logistic(), ridge=1e-3).value
    np.testing.assert_allclose(theta, -flipped, atol=1e-7)
    shifted = finetune(np.zeros(M), chosen + 5, rejected + 5, Logistic(), ridge=1e-3).value
    np.testing.assert_allclose(theta, shifted, atol=1e-7)


def test_a_margin_per_pair_and_a_weight_per_pair() -> None:
    rng = np.random.default_rng(2)
    chosen, rejected = rng.standard_normal((2, N, M))
    margin, weight = rng.standard_normal(N), rng.random(N) / N
    theta = finetune(np.zeros(M), chosen, rejected, Logistic(), ridge=1e-2, weight=weight).value
    np.testing.assert_allclose(theta, reference.ridge_bradley_terry(chosen - rejected, 1e-2, weight), atol=1e-5)
    # Spoiling pairs without weight, margins included, changes nothing; spoiling one pair with weight does.
    for out in (np.arange(N) >= 25, np.arange(N) >= 24):
        used = np.where(np.arange(N) < 25, weight, 0)
        first = finetune(np.zeros(M), chosen, rejected, Logistic(margin=margin), ridge=1e-2, weight=used).value
        spoilt = Logistic(margin=np.where(out, 9.0, margin))
        other = finetune(np.zeros(M), chosen + 7 * out[:, None], rejected, spoilt, ridge=1e-2, weight=used).value
        assert np.allclose(first, other, atol=1e-7) == (not out[24])


def test_a_heavy_ridge_returns_the_centre() -> None:
    centre = np.linspace(-2, 2, M)
    theta = finetune(np.zeros(M), *features(), Logistic(), ridge=1e6, centre=centre).value
    np.testing.assert_allclose(theta, centre, atol=1e-5)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_separable_pairs_stay_bounded_and_are_certified(margin: float) -> None:
    chosen = np.abs(np.random.default_rng(3).standard_normal((N, M)))
    lengths = []
    for ridge in (1e-2, 1e-4, 1e-6, 1e-8):
        solution = finetune(np.zeros(M), chosen, -chosen, Logistic(margin=margin), ridge=ridge)
        assert solution.status is Status.CONVERGED
        assert 0 <= solution.gap <= 1e-9 * solution.objective
        lengths.append(np.linalg.norm(solution.value))
        assert lengths[-1] <= np.sqrt(2 * np.logaddexp(0, margin) / ridge)
    assert (np.diff(lengths) > 1).all()


def test_separable_pairs_without_ridge_meet_the_cap() -> None:
    chosen = np.abs(np.random.default_rng(3).standard_normal((N, M)))
    for cap in (1.0, 10.0, 30.0):
        solution = finetune(np.zeros(M), chosen, -chosen, Logistic(), ridge=0.0, norm_cap=cap)
        assert solution.status is Status.CONVERGED
        assert np.linalg.norm(solution.value) == pytest.approx(cap, rel=1e-9)


@pytest.mark.parametrize("loss", [Logistic(), Pointwise()], ids=str)
@pytest.mark.parametrize("minimiser", [DampedNewton(), LBFGS(), Nesterov()], ids=str)
def test_double_precision_reaches_gaps_of_1e_9(loss: PairLoss, minimiser: Minimiser) -> None:
    for seed in range(3):
        solution = finetune(np.zeros(M), *features(seed), loss, ridge=1e-3, minimiser=minimiser, tolerance=1e-9)
        assert solution.status is Status.CONVERGED
        assert 0 <= solution.gap <= 1e-9


DEGENERATE = (
    "gaussian",
    "duplicate rows",
    "zero features",
    "one feature is zero",
    "all equal",
    "huge",
    "contradicting",
)


DEGENERATE_CASES = (  # shape, loss, ridge, cap
    ((N, M), Logistic(), 1e-4, None),
    ((3, 8), Logistic(), 1e-4, None),
    ((3, 8), Pointwise(), 0.0, 2.0),
)


@settings(max_examples=25)
@given(kind=st.sampled_from(DEGENERATE), case=st.sampled_from(DEGENERATE_CASES), seed=st.integers(0, 99))
def test_degenerate_features_are_solved_and_certified(kind: str, case: Any, seed: int) -> None:
    shape, loss, ridge, cap = case
    chosen, rejected = np.random.default_rng(seed).standard_normal((2, *shape))
    match kind:
        case "duplicate rows":
            chosen, rejected = (np.repeat(rows[:1], len(rows), axis=0) for rows in (chosen, rejected))
        case "zero features":
            chosen, rejected = 0 * chosen, 0 * rejected
        case "one feature is zero":
            chosen[:, 0] = rejected[:, 0] = 0
        case "all equal":
            chosen = rejected
        case "huge":
            chosen, rejected = 1e3 * chosen, 1e3 * rejected
        case "contradicting":
            half = len(chosen) // 2
            chosen[:half], rejected[:half] = rejected[half : 2 * half], chosen[half : 2 * half]
    solution = finetune(np.zeros(shape[1]), chosen, rejected, loss, ridge=ridge, norm_cap=cap, tolerance=1e-7)
    assert solution.status is Status.CONVERGED
    assert np.isfinite(solution.value).all()
    assert solution.objective <= solution.history[0]["objective"]
    if kind == "zero features" or (kind == "all equal" and cap is None):
        assert solution.objective == pytest.approx(np.log(2))


def test_one_pair_is_a_scalar_equation() -> None:
    """theta = a d / ridge with a = sigma(-d.theta): the features of one pair span the answer."""
    d = np.array([1.0, -2.0, 0.5])
    theta = finetune(np.zeros(3), d[None], 0 * d[None], Logistic(), ridge=0.1, tolerance=1e-12).value
    np.testing.assert_allclose(theta, d / 0.1 / (1 + np.exp(d @ theta)), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ridge": 0.0}, "can separate"),
        ({"ridge": -1.0, "norm_cap": 1.0}, "ridge=-1"),
        ({"norm_cap": 0.0}, "norm_cap=0"),
        ({"norm_cap": 1.0, "minimiser": LBFGS()}, "knows no norm_cap"),
        ({"loss": TwoScores(), "minimiser": DampedNewton()}, "not convex"),
        ({"loss": TwoScores(), "minimiser": Nesterov()}, "not convex"),
        ({"loss": TwoScores(), "norm_cap": 1.0}, "knows no norm_cap"),
        ({"hidden_chosen": np.full((N, M), np.nan)}, "finite"),
        ({"second_layer": np.zeros(M + 1)}, r"\(m,\)"),
    ],
    ids=str,
)
def test_what_cannot_be_solved_is_refused(change: dict[str, Any], message: str) -> None:
    chosen, rejected = features()
    common = {"second_layer": np.zeros(M), "hidden_chosen": chosen, "hidden_rejected": rejected, "loss": Logistic()}
    with pytest.raises(CoalaError, match=message):
        finetune.__wrapped__(**{**common, **change})  # as for users, whose shapes nothing checks before
