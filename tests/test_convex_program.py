"""Laws of the programs: adjoints, certificates, agreement with interior-point optima."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coala.convex import GatedNewton, GatedProgram, Program, Status, certify, sample_patterns, solve
from coala.convex.linear import pcg
from coala.convex.pairwise import PairProgram
from coala.convex.papers.recover import recover_gated, recover_network
from coala.convex.program import in_double, largest_sparsity
from coala.convex.prox import group_soft_threshold, project_orthant
from coala.convex.selftest import check_operators

from . import reference
from .menagerie_convex import GATED, PAIRWISE, Instance, PairInstance, others_by_night

adjoint_of = jax.jit(lambda program, u, z: (program.predict(u), program.predict_adjoint(z)))
cone_of = jax.jit(lambda program, u, s: (program.cone(u), program.cone_adjoint(s)))


def relative_mismatch(a: np.ndarray, b: np.ndarray, c: np.ndarray, e: np.ndarray) -> float:
    """|<a, b> - <c, e>| over the sizes of the vectors, summed in float64."""
    a, b, c, e = (np.asarray(x, np.float64).ravel() for x in (a, b, c, e))
    return abs(a @ b - c @ e) / (np.linalg.norm(a) * np.linalg.norm(b) + np.linalg.norm(c) * np.linalg.norm(e))


@pytest.mark.parametrize("shape", [(40, 5, 1), (400, 33, 9), (401, 33, 33), (64, 65, 8), (7, 20, 32)])
def test_operators_are_adjoint_and_right_in_float32(shape: tuple[int, int, int]) -> None:
    n, d, P = shape
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, d)).astype(np.float32)
    patterns = rng.random((n, P)) < 0.5
    y = np.ones(n, np.float32)
    program = Program(jnp.asarray(X), jnp.asarray(y), jnp.asarray(patterns), jnp.ones((), jnp.float32))
    u = rng.standard_normal((2, d, P)).astype(np.float32)
    z = rng.standard_normal(n).astype(np.float32)
    s = rng.standard_normal((2, n, P)).astype(np.float32)
    image, back = adjoint_of(program, u, z)
    assert relative_mismatch(image, z, u, back) <= 1e-6
    expected = reference.dense_gated(X.astype(float), patterns) @ reference.stack(u[0].astype(float) - u[1])
    assert np.abs(image - expected).max() <= 1e-5 * np.abs(expected).max()
    inside, out = cone_of(program, u, s)
    assert relative_mismatch(inside, s, u, out) <= 1e-6
    gated = program.relaxation
    image, back = adjoint_of(gated, u[0], z)
    assert relative_mismatch(image, z, u[0], back) <= 1e-6


@pytest.mark.parametrize("shape", [(20, 5, 1), (200, 33, 9), (400, 33, 33), (8, 65, 9)])
def test_pair_operators(shape: tuple[int, int, int]) -> None:
    assert check_operators(*shape) <= 1e-5
    n, d, columns = shape
    rng = np.random.default_rng(1)
    one = jnp.ones((), jnp.float32)
    program = PairProgram(
        jnp.asarray(rng.standard_normal((2, n, d)), jnp.float32),
        jnp.asarray(rng.random((2, n, columns)) < 0.5),
        jnp.zeros(n),
        jnp.ones(n),
        one,
        one,
    )
    u, z = rng.standard_normal((d, columns)).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    image, back = adjoint_of(program, u, z)
    assert relative_mismatch(image, z, u, back) <= 1e-6
    bend = rng.random(n).astype(np.float32)
    v = rng.standard_normal((d, columns)).astype(np.float32)
    twice = program.predict_adjoint(jnp.asarray(bend) * program.predict(jnp.asarray(v)))
    once = program.normal_product(jnp.asarray(bend), jnp.asarray(v))
    np.testing.assert_allclose(once, twice, atol=1e-5 * float(jnp.abs(twice).max()))
    if d * columns <= 200:
        basis = np.eye(d * columns, dtype=np.float32).reshape(-1, d, columns)
        F = np.stack([program.predict(jnp.asarray(e)) for e in basis], axis=1).reshape(n, d, columns)
        spectrum, overlap = program.moments(jnp.asarray(bend))
        traces = np.einsum("n,nki,nkj->ij", bend, F, F) / bend.sum()
        np.testing.assert_allclose(overlap, traces, rtol=1e-3, atol=1e-4)
        assert float(spectrum.sum()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("instance", others_by_night(GATED), ids=str)
def test_gated_optimum_is_the_interior_point_optimum(instance: Instance) -> None:
    X, y, patterns, _ = instance.data()
    with jax.enable_x64(True):
        program = instance.gated()
        solution = solve(program, GatedNewton(), tolerance=1e-9)
        expected = reference.solve_gated(X, y, patterns, float(program.sparsity))
        assert solution.status is Status.CONVERGED
        assert solution.objective == pytest.approx(expected, rel=1e-8)
        rounding = 1e-8 * expected
        assert solution.objective - solution.gap <= expected + rounding
        assert expected <= solution.objective + rounding
        assert float(program.kkt(jnp.asarray(solution.value))) <= 1e-3


def awkward(shape: tuple[int, int, int], seed: int, flaws: set[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Data (X, y, patterns) of float32 numbers with the flaws named."""
    n, d, P = shape
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)).astype(np.float32)
    y = np.where(rng.random(n) < 0.5, 1.0, -1.0)
    if "duplicate rows" in flaws:
        X[n // 2 :] = X[: n - n // 2]
    if "zero features" in flaws:
        X[:, : d // 2] = 0
        X[0] = 0
    if "constant columns" in flaws:
        X[:, -2:] = 1
    if "equal labels" in flaws:
        y[:] = 1
    patterns = X @ rng.standard_normal((d, P)) >= 0
    if "one pattern" in flaws:
        patterns[:, 1:] = False
    return X.astype(float), y, patterns


FLAWS = ("duplicate rows", "zero features", "constant columns", "equal labels", "one pattern")


@pytest.mark.slow
@settings(max_examples=8)
@given(
    shape=st.sampled_from([(8, 12, 3), (20, 4, 5)]),
    seed=st.integers(0, 2**16),
    flaws=st.sets(st.sampled_from(FLAWS)),
    # Closer to the largest sparsity the reference itself is right to 1e-7 only.
    relative=st.sampled_from([0.3, 0.1, 0.03, 0.01]),
)
@pytest.mark.nightly
def test_the_certificate_encloses_the_reference_whatever_the_data(
    shape: tuple[int, int, int], seed: int, flaws: set[str], relative: float
) -> None:
    X, y, patterns = awkward(shape, seed, flaws)
    largest = max(np.linalg.norm(X.T @ (patterns[:, i] * y)) for i in range(patterns.shape[1]))
    level = float(np.float32(relative * largest)) or 1.0
    expected = reference.solve_gated(X, y, patterns, level)
    for dtype, tolerance, agreement in ((np.float64, 1e-9, 1e-8), (np.float32, 1e-4, 1e-4)):
        with jax.enable_x64(dtype is np.float64):
            program = GatedProgram(
                jnp.asarray(X, dtype), jnp.asarray(y, dtype), jnp.asarray(patterns), jnp.asarray(level, dtype)
            )
            solution = solve(program, GatedNewton(), tolerance=tolerance)
        assert solution.status is Status.CONVERGED
        rounding = 1e-8 * abs(expected)
        assert solution.objective - solution.gap <= expected + rounding
        assert expected <= solution.objective + rounding
        assert solution.objective == pytest.approx(expected, rel=agreement)


@pytest.mark.parametrize("instance", others_by_night(PAIRWISE), ids=str)
def test_pairwise_optimum_is_the_interior_point_optimum(instance: PairInstance) -> None:
    rows, gates, margin, weight, _ = instance.data()
    with jax.enable_x64(True):
        program = instance.program()
        solution = solve(program, GatedNewton(), tolerance=1e-9)
    expected = reference.solve_pairwise(*rows, gates, margin, weight, instance.sparsity, instance.ridge)
    assert solution.status is Status.CONVERGED
    assert solution.objective == pytest.approx(expected, rel=2e-8)
    assert solution.objective - solution.gap <= expected * (1 + 1e-8)
    assert expected <= solution.objective * (1 + 1e-8)


@pytest.mark.parametrize("instance", GATED[::5], ids=str)
def test_certificate_of_the_cone_program_encloses_its_optimum(instance: Instance) -> None:
    X, y, patterns, _ = instance.data()
    with jax.enable_x64(True):
        program = instance.cone()
        expected, weights = reference.solve_cone(X, y, patterns, float(program.sparsity))
        zero = program.zeros()
        multipliers = jnp.zeros((2, *patterns.shape))
        bounds = program.bounds(zero, multipliers)
        assert bounds.lower <= expected * (1 + 1e-8)
        assert expected <= bounds.objective * (1 + 1e-8)
        assert float(program.objective(jnp.asarray(weights))) == pytest.approx(expected, rel=1e-6)
        relaxed = solve(program.relaxation, GatedNewton(), tolerance=1e-9)
        assert relaxed.objective <= expected * (1 + 1e-7)
        outside = -100 * np.abs(weights) - 1
        assert np.isinf(program.bounds(jnp.asarray(outside), multipliers).objective)


@pytest.mark.parametrize("instance", [*GATED[:16:6], *PAIRWISE[:7:3]], ids=str)
def test_float32_and_float64_agree(instance: Instance | PairInstance) -> None:
    make = instance.gated if isinstance(instance, Instance) else instance.program
    single = solve(make(np.float32), GatedNewton(), tolerance=1e-5)
    with jax.enable_x64(True):
        double = solve(make(np.float64), GatedNewton(), tolerance=1e-9)
    assert single.objective == pytest.approx(double.objective, rel=2e-5)
    assert single.objective - single.gap <= double.objective * (1 + 1e-6)
    assert single.value.dtype == np.float32


def test_lower_bounds_hold_everywhere() -> None:
    for instance in (GATED[5], PAIRWISE[1], PAIRWISE[3]):
        with jax.enable_x64(True):
            program = instance.gated() if isinstance(instance, Instance) else instance.program()
            best = solve(program, GatedNewton(), tolerance=1e-9).objective
            rng = np.random.default_rng(3)
            for size in (0, 1e-3, 0.1, 1, 30):
                u = jnp.asarray(size * rng.standard_normal(program.zeros().shape))
                bounds = program.bounds(u)
                assert bounds.lower <= best * (1 + 1e-9)
                assert best <= bounds.objective * (1 + 1e-9)


def test_zero_data_zero_labels_and_large_sparsity_give_zero_weights() -> None:
    program = GATED[0].gated(np.float32)
    for changed in (
        replace(program, X=0 * program.X),
        replace(program, y=0 * program.y),
        replace(program, sparsity=1.001 * largest_sparsity(program)),
    ):
        solution = solve(changed, GatedNewton())
        assert solution.status is Status.CONVERGED
        assert not solution.value.any()
    pairs = PAIRWISE[0].program(np.float32)
    pairs = replace(pairs, margin=0 * pairs.margin)
    solution = solve(replace(pairs, rows=0 * pairs.rows), GatedNewton())
    assert solution.objective == pytest.approx(np.log(2), rel=1e-6)
    assert not solution.value.any()


def test_row_order_does_not_matter() -> None:
    X, y, patterns, _ = GATED[5].data()
    order = np.random.default_rng(0).permutation(len(X))
    with jax.enable_x64(True):
        level = GATED[5].gated().sparsity
        values = [
            solve(
                GatedProgram(jnp.asarray(X[o]), jnp.asarray(y[o]), jnp.asarray(patterns[o]), level),
                GatedNewton(),
                tolerance=1e-9,
            ).value
            for o in (np.arange(len(X)), order)
        ]
    np.testing.assert_allclose(values[0], values[1], atol=1e-5)


def test_a_held_out_row_changes_nothing() -> None:
    X, y, patterns, _ = GATED[1].data()
    used = np.arange(len(X)) % 4 != 0
    with jax.enable_x64(True):
        level = GATED[1].gated().sparsity
        part = GatedProgram(jnp.asarray(X[used]), jnp.asarray(y[used]), jnp.asarray(patterns[used]), level)
        closed = GatedProgram(jnp.asarray(X), jnp.asarray(y * used), jnp.asarray(patterns & used[:, None]), level)
        a, b = (solve(program, GatedNewton(), tolerance=1e-9).objective for program in (part, closed))
    assert a == pytest.approx(b, rel=1e-8)


def test_new_data_of_a_shape_compiles_nothing() -> None:
    program = GATED[0].gated(np.float32)
    solver = GatedNewton()
    state = solver.step(program, solver.init(program, None))
    before = GatedNewton.step._cache_size()
    other = replace(program, X=program.X + 1, y=-program.y, patterns=~program.patterns, sparsity=program.sparsity / 2)
    solver.step(other, state)
    assert GatedNewton.step._cache_size() == before


def test_certify_leaves_process_options_alone() -> None:
    program = GATED[0].gated(np.float32)
    before = jax.config.jax_enable_x64
    objective, lower = certify(program, program.zeros())
    assert lower <= objective == pytest.approx(len(program.y) / 2)
    assert jax.config.jax_enable_x64 == before
    assert jnp.zeros(1).dtype == jnp.float32
    with jax.enable_x64(True):
        wide = in_double(program)
        assert wide.predict(wide.zeros()).dtype == wide.bounds(wide.zeros()).lower.dtype == jnp.float64


def test_solve_reports_when_it_stops_early() -> None:
    with jax.enable_x64(True):
        solution = solve(GATED[3].gated(), GatedNewton(), tolerance=1e-12, max_steps=1)
    assert solution.status is Status.MAX_STEPS
    assert solution.steps == 1
    assert solution.gap > 0
    seen: list[int] = []
    solve(GATED[0].gated(np.float32), GatedNewton(), on_step=lambda step, value, row: seen.append(step))
    assert seen == list(range(len(seen)))


def test_patterns_are_distinct_and_open_something() -> None:
    X = np.random.default_rng(0).standard_normal((6, 2))
    patterns, gates = sample_patterns(X, 200, jax.random.key(0))
    assert patterns.shape[1] <= 12
    assert len(np.unique(patterns, axis=1).T) == patterns.shape[1]
    assert patterns.any(axis=0).all()
    np.testing.assert_array_equal(patterns, X @ gates >= 0)
    again, _ = sample_patterns(X, 200, jax.random.key(0))
    np.testing.assert_array_equal(patterns, again)


def test_prox_is_the_minimiser() -> None:
    rng = np.random.default_rng(0)
    z = rng.standard_normal((3, 5)).astype(np.float32)
    z[:, 0] = 0
    level = 0.8

    def value(v: np.ndarray) -> float:
        return float(level * np.linalg.norm(v, axis=0).sum() + ((v - z) ** 2).sum() / 2)

    best = np.asarray(group_soft_threshold(jnp.asarray(z), level))
    assert np.isfinite(best).all()
    for _ in range(200):
        assert value(best) <= value(best + 0.1 * rng.standard_normal(z.shape)) + 1e-6
    np.testing.assert_array_equal(project_orthant(jnp.asarray(z)), np.maximum(z, 0))


def test_pcg_solves_and_handles_zero() -> None:
    rng = np.random.default_rng(0)
    A = rng.standard_normal((12, 12))
    A = (A @ A.T + 0.1 * np.eye(12)).astype(np.float32)
    b = rng.standard_normal(12).astype(np.float32)
    plain = pcg(lambda x: A @ x, jnp.asarray(b), tolerance=1e-5, max_steps=200)
    exact = pcg(lambda x: A @ x, jnp.asarray(b), lambda r: jnp.linalg.solve(A, r), tolerance=1e-3)
    np.testing.assert_allclose(A @ plain.value, b, atol=1e-3)
    assert exact.steps <= 2 < plain.steps
    assert not pcg(lambda x: A @ x, jnp.zeros(12)).value.any()


def test_recovered_networks_predict_what_the_program_predicts() -> None:
    instance = GATED[6]
    X, y, patterns, gates = instance.data()
    _, u = reference.solve_cone(X, y, patterns, float(instance.gated(np.float32).sparsity))
    network = recover_network(u)
    D = reference.dense_gated(X, patterns)
    np.testing.assert_allclose(network.hidden(X) @ network.second_layer, D @ reference.stack(u[0] - u[1]), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(network.first_layer, axis=1), np.abs(network.second_layer))
    gated_u = np.random.default_rng(0).standard_normal(gates.shape)
    gated_u[:, 1] = 0
    gated = recover_gated(gated_u, gates)
    assert len(gated.gates) == np.abs(gated_u).any(axis=0).sum()
    np.testing.assert_allclose(gated.hidden(X) @ gated.second_layer, D @ reference.stack(gated_u))
