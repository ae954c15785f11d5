"""Laws of the solvers of the cone-constrained program: certificates, agreement with CVXPY, degenerate data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cvxpy.error import SolverError
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from coala.convex import GatedNewton, Program, Status, certify, largest_sparsity, sample_patterns, solve
from coala.convex.linear import nystrom, nystrom_preconditioner, pcg, weighted_grams
from coala.convex.papers.barrier import Barrier
from coala.convex.papers.cones import interior_directions
from coala.convex.papers.cones import nearest as plain_nearest
from coala.convex.papers.cronos import Cronos, Penalties, exact_u_step
from coala.convex.program import in_double

from . import reference
from .menagerie_convex import THIN_KINDS, Instance, thin

nearest = jax.jit(plain_nearest)
KINDS = ("plain", "duplicate rows", "constant columns", "zero row", "equal labels", "zero features", "one open pattern")
# The shapes of the menagerie, so that what compiles once serves both.
WIDE = (12, 16, 4)
TALL = (40, 7, 5)


def degenerate(kind: str, shape: tuple[int, int, int], relative: float, seed: int) -> Program:
    """A float64 program of one shape (n, d, P) and kind; closed patterns fill up for duplicates."""
    n, d, P = shape
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    if kind == "duplicate rows":
        X[n // 2 : 2 * (n // 2)] = X[: n // 2]
    elif kind == "constant columns":
        X[:, -2:] = 0.5
    elif kind == "zero row":
        X[0] = 0
    elif kind == "zero features":
        X[:] = 0
    y = np.ones(n) if kind == "equal labels" else np.where(rng.random(n) < 0.5, 1.0, -1.0)
    patterns, _ = sample_patterns(X, 1 if kind == "one open pattern" else P, jax.random.key(seed))
    patterns = np.pad(patterns, ((0, 0), (0, P - patterns.shape[1])))
    program = Program(jnp.asarray(X), jnp.asarray(y), jnp.asarray(patterns), jnp.asarray(1.0))
    level = relative * float(largest_sparsity(program))
    return replace(program, sparsity=jnp.asarray(level if level > 0 else 1.0))


def narrow(program: Program) -> Program:
    """The same program in float32."""
    return jax.tree.map(
        lambda a: jnp.asarray(np.asarray(a, np.float32)) if jnp.issubdtype(a.dtype, jnp.floating) else a, program
    )


def optimum(program: Program) -> float:
    """By Clarabel, whose own error is some 1e-8."""
    arrays = (np.asarray(a, float) for a in (program.X, program.y))
    value, _ = reference.solve_cone(*arrays, np.asarray(program.patterns), float(program.sparsity))
    return value


def optimum_or_other(program: Program) -> float:
    """Of a drawn program; another is drawn where a cone is too thin a sliver for the reference."""
    try:
        return optimum(program)
    except SolverError:
        reject()


def assert_encloses(solution: Any, best: float, slack: float = 1e-7) -> None:
    """objective - gap <= optimum <= objective, up to the error of the reference."""
    room = slack * max(best, 1.0)
    assert np.isfinite(solution.objective)
    assert solution.objective - solution.gap <= best + room
    assert best <= solution.objective + room


def feasible(program: Program, u: np.ndarray) -> bool:
    X, signs = np.asarray(program.X, float), np.where(program.patterns, 1.0, -1.0)
    inside = signs * (X @ u)
    return bool(inside.min(initial=0.0) >= -1e-13 * np.abs(inside).max(initial=1.0))


def programs(*shapes: tuple[int, int, int]) -> Any:
    relative = st.sampled_from([2.0, 0.3, 0.03, 0.003])
    return given(st.sampled_from(KINDS), st.sampled_from(shapes), relative, st.integers(0, 1000))


def both_enclose(kind: str, shape: tuple[int, int, int], relative: float, seed: int) -> None:
    with jax.enable_x64(True):
        program = degenerate(kind, shape, relative, seed)
        best = optimum_or_other(program)
        found = solve(program, Barrier(), tolerance=1e-8, max_steps=40)
        assert_encloses(found, best)
        assert found.gap <= 1e-6 * max(found.objective, 1e-6)
        assert feasible(program, found.value)
        rough = solve(program, Cronos(), tolerance=1e-4, max_steps=400, check_every=100, patience=None)
        assert_encloses(rough, best)
        assert rough.objective <= best * 1.05 + 1e-6
        assert feasible(program, rough.value)


test_barrier_and_cronos_enclose_the_optimum = settings(max_examples=2)(programs(TALL)(both_enclose))
test_barrier_and_cronos_enclose_many_optima = pytest.mark.nightly(
    settings(max_examples=40)(programs(TALL, WIDE)(both_enclose))
)


@pytest.mark.nightly
@settings(max_examples=20)
@given(kind=st.sampled_from(KINDS), relative=st.sampled_from([2.0, 0.3, 0.03]), seed=st.integers(0, 1000))
def test_float32_programs_are_certified_in_float64(kind: str, relative: float, seed: int) -> None:
    with jax.enable_x64(True):
        wide = degenerate(kind, TALL, relative, seed)
    program = narrow(wide)
    best = optimum_or_other(program)
    for solver, steps in ((Barrier(), 40), (Cronos(), 300)):
        found = solve(program, solver, tolerance=1e-5, max_steps=steps, check_every=20, patience=None)
        assert_encloses(found, best)
        assert feasible(program, found.value)
        assert found.objective <= best * 1.05 + 1e-6


def thin_in_tall(kind: str, seed: int) -> Program:
    """A program with thin cones, filled up to the shape the other tests have compiled."""
    return thin(kind, seed, TALL[0], TALL[1] - 1, TALL[2], (0.02, 0.05, 0.1)[seed % 3], TALL)


@pytest.mark.parametrize(("kind", "seeds"), [(kind, range(2)) for kind in THIN_KINDS])
def test_no_solver_stalls_on_thin_cones(kind: str, seeds: range) -> None:
    with jax.enable_x64(True):
        for seed in seeds:
            program = thin_in_tall(kind, seed)
            sharp = solve(program, Barrier(), tolerance=1e-6)
            ours = solve(program, Cronos(), tolerance=1e-3, max_steps=20_000, check_every=20)
            gated = solve(program.relaxation, GatedNewton(), tolerance=1e-6)
            assert [found.status for found in (sharp, ours, gated)] == [Status.CONVERGED] * 3
            assert feasible(program, ours.value)
            rounding = 1e-9 * sharp.objective
            assert max(found.objective - found.gap for found in (sharp, ours)) <= sharp.objective + rounding
            assert gated.objective - gated.gap <= sharp.objective <= ours.objective + 1e-6 * sharp.objective
            # Newton's objective never rises, whatever directions no row sees.
            assert max(np.diff([row["objective"] for row in gated.history]), default=0) <= 1e-12 * gated.objective


@pytest.mark.nightly
def test_thin_cones_in_float32() -> None:
    with jax.enable_x64(True):
        programs = [narrow(thin_in_tall("plain", seed)) for seed in range(5)]
    for program in programs:
        found = solve(program, Cronos(), tolerance=1e-4, max_steps=20_000, check_every=20)
        assert found.status is Status.CONVERGED
        assert feasible(program, found.value)


@pytest.mark.nightly
@pytest.mark.parametrize(("tolerance", "number"), [(1e-3, 200), (1e-6, 40)])
def test_admm_closes_in_on_two_hundred_thin_programs(tolerance: float, number: int) -> None:
    with jax.enable_x64(True):
        for seed in range(number):
            rng = np.random.default_rng(seed)
            n, d, P = (int(rng.integers(low, high + 1)) for low, high in ((40, 120), (6, 12), (5, 8)))
            program = thin("plain", seed, n, d, P, rng.uniform(0.02, 0.1), (120, 13, 8))
            found = solve(program, Cronos(), tolerance=tolerance, max_steps=50_000, check_every=10)
            assert found.status is Status.CONVERGED


@pytest.mark.nightly
def test_a_solve_stalls_at_rest_and_not_before() -> None:
    """ADMM asked for the impossible ends at the precision of its numbers, whatever penalty slows it down."""
    with jax.enable_x64(True):
        wide = thin_in_tall("plain", 0)
    program = narrow(wide)
    found = solve(program, Cronos(), tolerance=0.0, max_steps=20_000, check_every=50)
    assert found.status is Status.STALLED
    assert found.relative_gap <= 64 * TALL[0] * np.finfo(np.float32).eps
    slow = solve(program, Cronos(penalty=1e-3, balance=False), tolerance=0.0, max_steps=300)
    assert slow.status is Status.MAX_STEPS


@pytest.mark.parametrize("kind", KINDS)
def test_barrier_solves_degenerate_programs(kind: str) -> None:
    with jax.enable_x64(True):
        program = degenerate(kind, WIDE, 0.1, 17)
        found = solve(program, Barrier(), tolerance=1e-8, max_steps=40)
        assert_encloses(found, optimum(program))
        assert found.gap <= 1e-6 * found.objective
        assert feasible(program, found.value)


SOLVERS = {
    "barrier": (Barrier(), 40, 1),
    "barrier by patterns": (Barrier(direct_width=1), 40, 1),
    "exact": (Cronos(), 6000, 100),
    "block": (Cronos("block"), 15000, 100),
    "nystrom": (Cronos("nystrom"), 15000, 100),
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    "instance",
    [Instance(40, 6, 5, 0.1, 0), pytest.param(Instance(12, 15, 4, 0.05, 4), marks=pytest.mark.nightly)],
    ids=str,
)
def test_every_solver_reaches_the_reference(name: str, instance: Instance) -> None:
    solver, steps, every = SOLVERS[name]
    with jax.enable_x64(True):
        program = instance.cone()
        found = solve(program, solver, tolerance=1e-6, max_steps=steps, check_every=every, patience=None)
        best = optimum(program)
    assert found.status is Status.CONVERGED
    assert found.objective == pytest.approx(best, rel=2e-6)
    assert_encloses(found, best)


def dense_blocks(program: Program) -> tuple[np.ndarray, np.ndarray]:
    """F (n, 2 d P) and G (2 n P, 2 d P) as matrices, from the operators' images of unit vectors."""
    shape = program.zeros().shape
    basis = jnp.eye(int(np.prod(shape))).reshape(-1, *shape)
    F = np.stack([np.asarray(program.predict(e)) for e in basis], axis=1)
    G = np.stack([np.asarray(program.cone(e)).ravel() for e in basis], axis=1)
    return F, G


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=["primal", "woodbury"])
def test_exact_u_step_solves_the_dense_system(shape: tuple[int, int, int]) -> None:
    with jax.enable_x64(True):
        program = degenerate("plain", shape, 0.1, 0)
        state = Cronos(penalty=0.3, balance=False).init(program)
        rotated, penalties = state.rotated, Penalties(*state.penalties)
        target = np.random.default_rng(1).standard_normal(program.zeros().shape)
        found = exact_u_step(rotated, state.spectrum, penalties, state.factor[0], jnp.asarray(target))
        F, G = dense_blocks(rotated)
    matrix = F.T @ F + 0.3 * np.eye(F.shape[1]) + 0.3 * G.T @ G
    np.testing.assert_allclose(np.asarray(found).ravel(), np.linalg.solve(matrix, target.ravel()), atol=1e-9)


def test_a_step_of_every_kind_is_the_same_step() -> None:
    with jax.enable_x64(True):
        program = degenerate("plain", TALL, 0.1, 3)
        ends = []
        for u_step in ("exact", "block", "nystrom"):
            solver = Cronos(u_step, penalty=0.5, max_cg_steps=300)
            state = solver.init(program)
            # Far along, conjugate gradients are asked for (1 + step)^-1.2.
            state = state._replace(steps=10**9)
            ends.append(solver._iterate(*(state[i] for i in (4, 5, 1, 2, 0, 3))))
    for end in ends[1:]:
        for a, b in zip(ends[0], end, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-8)


def test_fixed_point_is_the_optimum() -> None:
    """ADMM started at the optimum with the optimal duals stays: what it converges to depends on no penalty."""
    with jax.enable_x64(True):
        program = degenerate("plain", TALL, 0.1, 5)
        sharp = Barrier()
        inner = sharp.init(program)
        for _ in range(25):
            inner = sharp.step(program, inner)
        solver = Cronos(penalty=0.7, balance=False)
        state = solver.init(program, inner.weights)
        lam = jnp.swapaxes(state.rotation, 0, 1) @ -inner.pull / 0.7
        iterate = state.iterate._replace(lam=lam, nu=-inner.multipliers / 0.7)
        moved = solver.step(program, state._replace(iterate=iterate)).iterate
    for a, b in zip(iterate[:5], moved[:5], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "duplicate rows", "zero row"])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_nearest_feasible_weights_are_the_projection_on_the_cones(kind: str, scale: float) -> None:
    """Of weights far outside and of weights a hair outside: the error is relative to the distance."""
    from scipy.optimize import nnls

    with jax.enable_x64(True):
        program = degenerate(kind, TALL, 0.1, 7)
        inside = interior_directions(program)
        rng = np.random.default_rng(0)
        u = np.asarray(nearest(program, jnp.asarray(rng.standard_normal(program.zeros().shape)), inside))
        u = u + scale * rng.standard_normal(u.shape)
        found = np.asarray(nearest(program, jnp.asarray(u), inside))
        np.testing.assert_array_equal(nearest(program, jnp.asarray(found), inside), found)
    assert feasible(program, found)
    for side in range(2):
        for i in np.flatnonzero(program.patterns.any(axis=0)):
            signed = np.where(program.patterns[:, i, None], program.X, -np.asarray(program.X))
            # Moreau: what a projection on the cone adds is minus the projection on its polar.
            distance = np.linalg.norm(signed.T @ nnls(signed.T, -u[side, :, i])[0])
            assert np.linalg.norm((found - u)[side, :, i]) <= 1.02 * distance + 1e-13 * np.linalg.norm(u[side, :, i])


def test_interior_directions_have_nearly_the_largest_margin() -> None:
    import cvxpy as cp

    with jax.enable_x64(True):
        program = degenerate("plain", TALL, 0.1, 11)
        found = np.asarray(interior_directions(program))
    rows = np.asarray(program.X) / np.linalg.norm(program.X, axis=1, keepdims=True)
    for i in range(program.patterns.shape[1]):
        signed = np.where(program.patterns[:, i, None], rows, -rows)
        h = cp.Variable(rows.shape[1])
        widest = 1 / cp.Problem(cp.Minimize(cp.norm(h)), [signed @ h >= 1]).solve(solver="CLARABEL")
        margin = (signed @ found[:, i]).min() / np.linalg.norm(found[:, i])
        assert 0.25 * widest <= margin <= widest * (1 + 1e-6)


def test_patterns_no_gate_makes_are_left_at_zero() -> None:
    with jax.enable_x64(True):
        program = degenerate("duplicate rows", TALL, 0.1, 13)
        torn = program.patterns.at[0, 0].set(~program.patterns[0, 0])  # its duplicate keeps the other side
        program = replace(program, patterns=torn)
        best = optimum(program)
        for solver in (Barrier(), Cronos()):
            found = solve(program, solver, max_steps=20, check_every=20)
            assert not found.value[:, :, 0].any()
            assert_encloses(found, best)


@pytest.mark.parametrize("solver", [Barrier(), Cronos()], ids=["barrier", "cronos"])
def test_no_labels_no_weights(solver: Any) -> None:
    with jax.enable_x64(True):
        program = replace(degenerate("plain", TALL, 0.1, 1), y=jnp.zeros(TALL[0]))
        found = solve(program, solver, tolerance=1e-9, max_steps=3)
    assert found.status is Status.CONVERGED
    assert not found.value.any()


def test_barrier_steps_past_convergence_change_nothing_for_the_worse() -> None:
    with jax.enable_x64(True):
        program = degenerate("plain", TALL, 0.1, 2)
        solver = Barrier()
        state = solver.init(program)
        gaps = []
        for _ in range(45):
            state = solver.step(program, state)
            objective, lower = certify(program, *solver.solution(program, state))
            gaps.append((objective - lower) / objective)
    assert gaps[20] <= 1e-9
    assert -1e-12 <= min(gaps[20:]) <= max(gaps[20:]) <= 1e-8


def test_barrier_ignores_the_order_of_rows_and_patterns() -> None:
    with jax.enable_x64(True):
        program = degenerate("plain", TALL, 0.05, 8)
        rows, columns = (np.random.default_rng(0).permutation(k) for k in program.patterns.shape)
        other = Program(program.X[rows], program.y[rows], program.patterns[rows][:, columns], program.sparsity)
        one, two = (solve(p, Barrier(), tolerance=1e-9, max_steps=40) for p in (program, other))
    np.testing.assert_allclose(one.value[:, :, columns], two.value, atol=1e-4)
    assert one.objective == pytest.approx(two.objective, rel=1e-8)


def test_averages_of_the_iterates_close_in_like_one_over_k() -> None:
    """Theorem 4.2 is for ergodic averages: k times their suboptimality stays bounded."""
    with jax.enable_x64(True):
        program = degenerate("plain", TALL, 0.1, 6)
        best = optimum(program)
        iterates: list[np.ndarray] = []
        solve(
            program,
            Cronos(relaxation=1.0, balance=False),
            tolerance=0.0,
            max_steps=400,
            patience=None,
            on_step=lambda step, u, row: iterates.append(u),
        )
        averages = jnp.asarray(np.cumsum(iterates, axis=0) / np.arange(1, len(iterates) + 1)[:, None, None, None])
        excess = np.array([k * (float(program.objective(averages[k])) - best) for k in (25, 50, 100, 200, 400)])
    assert (excess > -1e-5).all()
    assert excess[2:].max() <= 1.5 * excess[:2].max()


def test_paper_settings_stop_far_from_the_optimum_and_say_so() -> None:
    with jax.enable_x64(True):
        program = Instance(40, 6, 5, 0.01, 1).cone()
        best = optimum(program)
        published = solve(program, Cronos.paper(), max_steps=7, check_every=7)
        exact = solve(program, Cronos(), max_steps=2000, check_every=50, patience=None)
    assert_encloses(published, best)
    assert published.status is Status.MAX_STEPS
    assert published.objective > 1.1 * best
    assert exact.objective == pytest.approx(best, rel=1e-3)


def test_float32_and_float64_iterations_agree() -> None:
    with jax.enable_x64(True):
        program = degenerate("plain", TALL, 0.1, 9)
        wide = solve(program, Cronos(), tolerance=0.0, max_steps=64, check_every=64)
    slim = solve(narrow(program), Cronos(), tolerance=0.0, max_steps=64, check_every=64)
    np.testing.assert_allclose(wide.value, slim.value, atol=2e-3)
    assert wide.objective == pytest.approx(slim.objective, rel=1e-4)


def test_grams() -> None:
    rng = np.random.default_rng(0)
    X, weights = rng.standard_normal((10, 4)), rng.random((10, 3))
    with jax.enable_x64(True):
        found = weighted_grams(jnp.asarray(X), jnp.asarray(weights))
    np.testing.assert_allclose(found, [X.T @ np.diag(column) @ X for column in weights.T], atol=1e-12)


@pytest.mark.nightly
def test_nystrom_is_exact_on_low_rank_and_saves_conjugate_gradients() -> None:
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        root = jnp.asarray(rng.standard_normal((60, 5)) * 10.0 ** np.arange(5))
        probes = jnp.asarray(rng.standard_normal((8, 60)))
        sketch = nystrom(lambda x: root @ (root.T @ x), probes)
        low_rank = np.asarray(sketch.basis) @ np.diag(sketch.values) @ np.asarray(sketch.basis).T
        np.testing.assert_allclose(low_rank, root @ root.T, atol=1e-5 * float(sketch.values[0]))
        target = jnp.asarray(rng.standard_normal(60))
        system = lambda x: root @ (root.T @ x) + 0.1 * x  # noqa: E731
        plain = pcg(system, target, tolerance=1e-8, max_steps=300)
        helped = pcg(system, target, nystrom_preconditioner(sketch, jnp.asarray(0.1)), tolerance=1e-8, max_steps=300)
    assert int(helped.steps) <= 3 < int(plain.steps)
    narrow_sketch = nystrom(lambda x: 0 * x, jnp.asarray(np.asarray(probes, np.float32)))
    assert np.isfinite(np.asarray(narrow_sketch.basis)).all()
    np.testing.assert_allclose(narrow_sketch.values, 0, atol=1e-30)


def test_in_double_is_what_the_barrier_solves() -> None:
    """The barrier's answer to a float32 program is its answer to the same numbers in float64."""
    with jax.enable_x64(True):
        slim = narrow(degenerate("plain", TALL, 0.1, 4))
        wide = solve(in_double(slim), Barrier(), tolerance=1e-9, max_steps=30, patience=None)
    found = solve(slim, Barrier(), tolerance=0.0, max_steps=wide.steps, patience=None)
    assert found.objective == pytest.approx(wide.objective, rel=1e-12)
