"""A program kept at its optimum while pairs come and go: its certificate, removals, and which pair is worth asking."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from coala.convex.path import DEFAULT_RIDGE, RIDGES
from coala.convex.questions import gains, outlook
from coala.convex.sequential import SequentialProgram, choose_ridge, solved, unit_of


def drawn(n: int, width: int, seed: int, signal: float = 2.0) -> np.ndarray:
    """Rows of pairs, the preferred side first, of a linear taste."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, width)) * np.linspace(1, 0.2, width)
    taste = np.random.default_rng(seed + 1).standard_normal(width)
    margins = rows @ taste
    kept = rng.random(n) < 1 / (1 + np.exp(-signal * margins / max(1e-9, margins.std())))
    return rows * np.where(kept, 1.0, -1.0)[:, None]


def gated(n: int, width: int, seed: int) -> np.ndarray:
    """Rows of a network with held gates: each side behind each gate, then the difference."""
    rng = np.random.default_rng(seed)
    gates = rng.standard_normal((3, width))

    def sides() -> np.ndarray:
        h = rng.standard_normal((n, width))
        return np.concatenate([h, *(h * (h @ gate >= 0)[:, None] for gate in gates)], axis=1)

    return sides() - sides()


@pytest.mark.parametrize("rows", [drawn(40, 6, 1), gated(40, 4, 2), drawn(3, 30, 3)])
def test_the_certificate_holds_against_another_solver(rows: np.ndarray) -> None:
    ridge = 0.05
    program = SequentialProgram(rows.shape[1], ridge)
    for key, row in enumerate(rows):
        program.add(key, row)
        found = program.refit()

        def objective(w: np.ndarray, some: np.ndarray = rows[: key + 1]) -> float:
            return float(np.logaddexp(0, -(some @ w)).mean() + ridge / 2 * w @ w)

        assert found.objective == pytest.approx(objective(program.weights), rel=1e-12)
        assert found.gap <= 1e-12
    best = minimize(objective, np.zeros(rows.shape[1]), method="BFGS", options={"gtol": 1e-9})
    assert found.objective - found.gap <= best.fun + 1e-14
    # BFGS stops at a gradient of 1e-9 or so, which is known as far as its objective's rounding.
    assert np.linalg.norm(program.weights - best.x) <= found.radius + 1e-6


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(0, 3))
def test_a_pair_taken_back_is_as_if_it_had_never_come(events: list[int], seed: int) -> None:
    """Any sequence of pairs that come and go ends at the weights of those that are there, to what is proved."""
    rows = drawn(31, 5, seed)
    program = SequentialProgram(5, 0.1)
    for key in events:
        if key in program:
            program.remove(key)
        else:
            program.add(key, rows[key])
        program.refit()
    there = sorted(key for key in range(31) if events.count(key) % 2)
    afresh = solved(rows[there], 0.1)
    assert len(program) == len(there)
    apart = float(np.linalg.norm(program.weights - afresh.weights))
    assert apart <= program.optimality.radius + afresh.optimality.radius + 1e-12
    assert program.optimality.radius < 1e-4


def test_a_start_far_away_ends_at_the_same_weights() -> None:
    rows = drawn(50, 8, 5, signal=20)
    near, far = solved(rows, 1e-4), solved(rows, 1e-4, start=1e3 * np.ones(8))
    assert np.linalg.norm(near.weights - far.weights) <= near.optimality.radius + far.optimality.radius


def test_nothing_is_known_of_no_pairs() -> None:
    program = solved(np.zeros((0, 4)), 0.1)
    assert not program.weights.any()
    assert program.optimality.gap == 0
    with pytest.raises(KeyError):
        program.remove(0)
    program.add("a", np.ones(4))
    with pytest.raises(ValueError, match="there already"):
        program.add("a", np.ones(4))


def test_a_step_in_hand_serves_many_pairs() -> None:
    """With hundreds of pairs, one more is a step or two of Newton's method and a few of conjugate gradients."""
    rows = drawn(400, 20, 7)
    program = solved(rows[:390], 0.02 * unit_of(rows))
    for key in range(390, 400):
        program.add(key, rows[key])
        found = program.refit()
        assert found.newton_steps <= 2
        assert found.cg_steps <= 12


def test_ridge_is_that_of_a_fits_own_path() -> None:
    """The same ridge as ``fit`` chooses for a linear head on the same rows, folds and groups."""
    import jax

    from coala.convex.path import PairTask, choose
    from coala.convex.validation import grouped_folds

    rows = drawn(120, 6, 11, signal=1.0)
    group = np.array([f"g{i // 2}" for i in range(120)])
    with jax.enable_x64(True):
        both = np.stack([rows, np.zeros_like(rows)])
        task = PairTask(both, np.zeros(120), group, grouped_folds(group, 4, 0), 0, np.float64)
        usual = choose(task, [], lambda *_: None)
    assert choose_ridge(rows, group) == pytest.approx(usual.ridge, rel=1e-9)
    assert choose_ridge(rows, np.full(120, "one")) == pytest.approx(DEFAULT_RIDGE * unit_of(rows))
    assert len(RIDGES) > 3


def test_gains_are_what_an_answer_does_to_the_hessian() -> None:
    program = solved(drawn(25, 5, 13), 0.1)
    hessian, candidates = program.hessian(), drawn(6, 5, 14)
    to_come = drawn(9, 5, 15)
    chance = 1 / (1 + np.exp(-candidates @ program.weights))
    after = [hessian + s * (1 - s) * np.outer(x, x) for s, x in zip(chance, candidates, strict=True)]
    log_det = [np.linalg.slogdet(one)[1] - np.linalg.slogdet(hessian)[1] for one in after]
    assert np.allclose(gains(hessian, program.weights, candidates), log_det)

    def variance(inside: np.ndarray) -> float:
        return float(np.einsum("ij,jk,ik->i", to_come, np.linalg.inv(inside), to_come).mean())

    falls = [variance(hessian) - variance(one) for one in after]
    assert np.allclose(gains(hessian, program.weights, candidates, to_come, by="variance"), falls)


def test_outlook_falls_with_answers_and_counts_pairs_of_an_open_order() -> None:
    rows, pairs = drawn(60, 5, 21), drawn(200, 5, 22)
    program = solved(rows, 0.02)
    found = outlook(program.hessian(), program.weights, pairs)
    assert all(a >= b for a, b in zip(found.unsettled, found.unsettled[1:], strict=False))
    # An independent count: weights drawn from the same Gaussian, and how often they order a pair otherwise.
    rng = np.random.default_rng(0)
    others = rng.multivariate_normal(program.weights, np.linalg.inv(program.hessian()), 4000)
    turned = ((pairs @ others.T) * (pairs @ program.weights)[:, None] < 0).mean()
    assert found.now == pytest.approx(turned, abs=0.01)
    assert found.needed(0.5) == 0
    assert found.needed(0.0) is None
    nothing = outlook(solved(np.zeros((0, 5)), 0.1).hessian(), np.zeros(5), pairs)
    assert nothing.now == pytest.approx(0.5)
