"""Laws of the output-layer program: its derivatives, its bound, its optimum beside an interior-point method's."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coala.convex import OutputLBFGS, Status, certify, fit_output, output_solver, solve, solvers
from coala.convex.output_data import OutputData
from coala.convex.output_layer import CHUNK, OutputProgram, Support, scattered
from coala.convex.output_vocabulary import VocabularyProgram
from coala.convex.program import in_double
from coala.costs import output_fit_bytes
from coala.policies import DistilledPolicy, DistilStates
from coala.store import write_rows
from coala.values import CoalaError, Estimate, FeatureSpec

from . import reference

N, D, V, K = 60, 4, 30, 8
RIDGE = 0.05


@cache
def instance(hard: bool = False) -> tuple[DistilStates, np.ndarray]:
    """Random states with soft targets (or one token each), nuclei of 1 to K tokens, and an output layer."""
    rng = np.random.default_rng(3)
    states = (2 * rng.standard_normal((N, D))).astype(np.float32)
    output = rng.standard_normal((V, D)).astype(np.float32)
    tokens = np.argsort(-states @ output.T, axis=1)[:, :K].astype(np.int32)
    size = rng.integers(1, K + 1, N).astype(np.int32)
    target = rng.random((N, K)) * (np.arange(K) < size[:, None])
    if hard:
        target = (np.arange(K) == rng.integers(0, size)[:, None]).astype(float)
    target = (target / target.sum(1, keepdims=True)).astype(np.float32)
    return DistilStates(states, tokens, size, target, rng.random(N), np.arange(N) // 4), output


def dense(states: DistilStates, output: np.ndarray, whole: bool = False) -> list[tuple[Any, ...]]:
    """(rows of W, state, target, weight) of every step, in float64; of whole vocabularies if asked for."""
    weight = states.weight / states.weight.sum()
    steps = []
    for t in range(len(states)):
        named = states.tokens[t, : states.size[t]]
        over = np.arange(len(output)) if whole else named
        target = np.zeros(len(over))
        if whole:
            target[states.tokens[t]] = states.target[t]
        else:
            target[:] = states.target[t, : len(named)]
        steps.append((output[over].astype(float), states.states[t].astype(float), target, weight[t]))
    return steps


def objective(steps: list[tuple[Any, ...]], change: np.ndarray, ridge: float = RIDGE) -> float:
    """f(change) - f(0), plainly."""
    total = ridge / 2 * float((change**2).sum())
    for W, h, q, w in steps:
        z, b = W @ (h + change @ h), W @ h
        total += w * (np.logaddexp.reduce(z) - q @ z - np.logaddexp.reduce(b) + q @ b)
    return total


def slope(steps: list[tuple[Any, ...]], change: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    total = ridge * change
    for W, h, q, w in steps:
        z = W @ (h + change @ h)
        p = np.exp(z - np.logaddexp.reduce(z))
        total = total + w * np.outer(W.T @ (p - q), h)
    return total


def changes(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [scale * rng.standard_normal((D, D)) for scale in np.geomspace(0.03, 1.0, count)]


def data(support: Any = "nucleus") -> OutputData:
    return OutputData(*instance(), support)


@cache
def solved(support: Any = "nucleus") -> Any:
    program, solver = data(support).problem(RIDGE)
    return solve(program, solver, tolerance=1e-5)


@pytest.mark.parametrize("support", ["nucleus", "vocabulary"])
def test_the_bound_is_that_of_plain_float64_arithmetic(support: Any) -> None:
    states, output = instance()
    steps = dense(states, output, support == "vocabulary")
    program, _ = data(support).problem(RIDGE)
    for change in changes(3):
        found, lower = certify(program, jnp.asarray(change, jnp.float32))
        rounded = change.astype(np.float32).astype(float)
        # Weights and ridge are given in float32, all else is computed in float64.
        assert found == pytest.approx(objective(steps, rounded), rel=1e-6)
        assert found - lower == pytest.approx((slope(steps, rounded) ** 2).sum() / (2 * RIDGE), rel=1e-6)


def test_a_bound_from_anywhere_lies_below_the_objective_anywhere() -> None:
    program, _ = data().problem(RIDGE)
    found = [certify(program, jnp.asarray(change, jnp.float32)) for change in [*changes(3), solved().value]]
    assert max(lower for _, lower in found) <= min(value for value, _ in found)


def test_strongly_convex_with_the_ridge() -> None:
    steps = dense(*instance())
    program, _ = data().problem(RIDGE)
    a, b = changes(2)
    values = [certify(program, jnp.asarray(at, jnp.float32))[0] for at in (a, b)]
    for at, value, other, beyond in ((a, values[0], b, values[1]), (b, values[1], a, values[0])):
        model = value + (slope(steps, at) * (other - at)).sum() + RIDGE / 2 * ((other - at) ** 2).sum()
        assert beyond >= model - 1e-6


@pytest.mark.parametrize("support", ["nucleus", "vocabulary"])
def test_the_optimum_is_the_interior_point_methods(support: Any) -> None:
    states, output = instance()
    found = solved(support)
    value, change = reference.solve_output(dense(states, output, support == "vocabulary"), RIDGE)
    assert found.status is Status.CONVERGED
    assert found.objective - found.gap - 1e-6 <= value <= found.objective + 1e-6
    # Strong convexity bounds the way to the optimum by the gap.
    assert ((found.value - change) ** 2).sum() <= 2 * found.gap / RIDGE + 1e-4
    assert found.gap <= 1e-5 * -found.objective


def test_products_are_adjoint() -> None:
    program, _ = data().problem(RIDGE)
    rng = np.random.default_rng(1)
    direction = jnp.asarray(rng.standard_normal((D, D)), jnp.float32)
    moved = program.moves(direction)
    slopes = tuple(jnp.asarray(rng.standard_normal(z.shape), jnp.float32) for z in moved)
    forth = sum(float((a * b).sum()) for a, b in zip(moved, slopes, strict=True))
    assert forth == pytest.approx(float((direction * program.adjoint(slopes)).sum()), rel=1e-4)
    base, again = program.logits(direction)
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(moved, again, strict=True))
    assert all(np.isfinite(z).all() for z in base)


def test_the_metric_has_the_trace_of_the_hessian_in_the_mean() -> None:
    states, output = instance()
    program, _ = data().problem(RIDGE)
    exact = 0.0
    for W, h, _, w in dense(states, output):
        p = np.exp(W @ h - np.logaddexp.reduce(W @ h))
        exact += w * float(np.trace(W.T @ (np.diag(p) - np.outer(p, p)) @ W) * (h @ h))
    base, _ = program.logits(program.zeros())
    draws = []
    for seed in range(24):
        left, right = program.factors(scattered(program, base, jax.random.key(seed)))
        draws.append(float(np.trace(left) * np.trace(right)))
    assert abs(np.mean(draws) - exact) <= 5 * np.std(draws) / np.sqrt(len(draws))


def test_the_rest_as_one_token_lies_below_the_vocabulary_and_touches_it() -> None:
    program, _ = data("vocabulary").problem(RIDGE)
    at, *others = (jnp.asarray(change, jnp.float32) for change in changes(3))
    with jax.enable_x64(True):
        whole: VocabularyProgram = in_double(program)
        at = at.astype(jnp.float64)
        seen = whole.look(at)
        small = whole.with_rest(seen.rest, seen.rest_offset)

        def loss(change: Any) -> float:
            base, moved = small.logits(change)
            z = tuple(a + b for a, b in zip(base, moved, strict=True))
            return float(sum((part.weight * x).sum() for part, x in zip(small.parts, small.losses(z), strict=True)))

        assert loss(at) == pytest.approx(float(seen.loss), rel=1e-12)
        base, moved = small.logits(at)
        gradient = small.adjoint(small.slopes(tuple(a + b for a, b in zip(base, moved, strict=True))))
        assert np.allclose(gradient + small.ridge * at, seen.gradient, atol=1e-12)
        for other in others:
            assert loss(other.astype(jnp.float64)) < float(whole.look(other.astype(jnp.float64)).loss)


def test_steps_held_out_are_as_good_as_gone_and_the_order_is_nothing() -> None:
    states, output = instance()
    used = states.group % 3 > 0
    held = data().program(RIDGE, used)
    order = np.random.default_rng(2).permutation(np.flatnonzero(used))
    fewer = DistilStates(**{name: getattr(states, name)[order] for name in vars(states)})
    for change in changes(2):
        at = jnp.asarray(change, jnp.float32)
        assert certify(held, at) == pytest.approx(certify(OutputData(fewer, output).program(RIDGE), at), rel=1e-6)


def test_losses_add_up_to_the_objective() -> None:
    for support in ("nucleus", "vocabulary"):
        some, change = data(support), changes(1)[0]
        mean = (some.losses(change) * some.states.weight).sum() / some.states.weight[some.counted].sum()
        value = certify(some.problem(RIDGE)[0], jnp.asarray(change, jnp.float32))[0]
        assert mean + RIDGE / 2 * (change**2).sum() == pytest.approx(value, rel=1e-4)


def test_states_mapped_from_a_file_give_the_same_change(tmp_path: Path) -> None:
    states, output = instance()
    write_rows(tmp_path / "states.npy", [states.states], len(states))
    mapped = OutputData(replace(states, states=np.load(tmp_path / "states.npy", mmap_mode="r")), output)
    found = solve(mapped.program(RIDGE), OutputLBFGS(), tolerance=1e-5)
    assert np.array_equal(found.value, solved().value)


def test_a_fit_chooses_on_held_out_prompts_and_states_its_gap(tmp_path: Path) -> None:
    states, output = instance(hard=True)
    found = fit_output(states, output, tolerance=1e-4)
    certificate = found.certificate
    value, lower = certify(OutputData(states, output).program(found.ridge), jnp.asarray(found.change, jnp.float32))
    assert certificate.objective == pytest.approx(value, rel=1e-6)
    assert lower <= certificate.lower_bound * (1 - 1e-9) <= certificate.objective
    ranks = {row["rank"] for row in found.path}
    assert ranks == {None, 1, 2}
    tried = [row for row in found.path if row["rank"] is None]
    assert found.ridge == min(tried, key=lambda row: row["held_out"])["ridge"]
    rank = None if found.right is None else found.left.shape[1]
    cut = next(row for row in found.path if (row["rank"], row["ridge"]) == (rank, found.ridge))
    assert found.held_out is not None
    assert found.held_out.value == pytest.approx(cut["held_out"], rel=1e-6)
    assert found.held_out.low < found.held_out.value < found.held_out.high
    spec = FeatureSpec("tiny", "", "w", "dialogue:0", 1, "mean", False, 64)
    policy = DistilledPolicy(found.left, found.right, spec, "guided", "nucleus", found.ridge, certificate)
    policy.save(tmp_path)
    again = DistilledPolicy.load(tmp_path)
    assert np.array_equal(again.change, policy.change)
    assert again.certificate is not None
    assert again.certificate.statement == certificate.statement
    assert json.loads((tmp_path / "policy.json").read_text())["certificate"]["facts"]["n_states"] == N
    (tmp_path / "policy.safetensors").write_bytes(b"other")
    with pytest.raises(CoalaError, match="Distil again"):
        DistilledPolicy.load(tmp_path)


def test_a_change_is_taken_as_often_as_held_out_prompts_ask_and_its_objective_is_its_own() -> None:
    states, output = instance()
    once = fit_output(states, output, tolerance=1e-4)
    asked: list[tuple[float, np.ndarray]] = []

    def lead_of(times: float, change: np.ndarray, groups: np.ndarray) -> Estimate:
        asked.append((float(np.linalg.norm(change)), groups))
        value = asked[-1][0] / asked[0][0] - times
        return Estimate(value, value, value, len(groups), "size")

    for times, strength in ((0.9, 1.0), (1.2, 1.25)):
        asked.clear()
        found = fit_output(states, output, tolerance=1e-4, lead=partial(lead_of, times))
        assert found.strength == found.certificate.facts["strength"] == strength
        assert np.allclose(found.change, strength * once.change, rtol=1e-6)
        assert all(0 < len(groups) < len(np.unique(states.group)) for _, groups in asked)
        data = OutputData(states, output)
        value = certify(data.program(found.ridge), jnp.asarray(found.change, jnp.float32))[0]
        assert found.certificate.objective == pytest.approx(value, rel=1e-5)
        assert found.certificate.lower_bound == pytest.approx(once.certificate.lower_bound, rel=1e-6)
        assert (f"taken {strength:g} times" in found.certificate.statement) == (strength != 1)
    # Nothing has it: the largest whose held-out loss is below that of no change.
    asked.clear()
    found = fit_output(states, output, tolerance=1e-4, lead=partial(lead_of, 1e9))
    rows = [row for row in found.path if "lead" in row]
    assert found.strength == rows[-1]["strength"]
    assert found.held_out is not None
    assert found.held_out.value == pytest.approx(rows[0]["held_out"], rel=1e-6)
    assert all(row["held_out"] < 0 for row in rows)


def test_a_cut_change_is_held_to_the_bound_of_the_full_one() -> None:
    states, output = instance()
    full = fit_output(states, output, ridge=RIDGE, rank="full", tolerance=1e-4)
    cut = fit_output(states, output, ridge=RIDGE, rank=2, tolerance=1e-4)
    assert np.linalg.matrix_rank(cut.change, tol=1e-5) == 2
    assert cut.certificate.lower_bound == full.certificate.lower_bound
    assert cut.certificate.gap > full.certificate.gap
    left, values, right = np.linalg.svd(full.change)
    plain = (left[:, :2] * values[:2]) @ right[:2]
    assert cut.certificate.objective <= objective(dense(states, output), plain) + 1e-6


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("weight", np.full(N, -1.0), "weight below 0"),
        ("size", np.zeros(N, np.int32), "nuclei"),
        ("target", np.ones((N, K), np.float32), "not a distribution"),
        ("tokens", np.zeros((N, K + 1), np.int32), "expected"),
    ],
)
def test_states_that_are_no_program_are_refused(field: str, value: np.ndarray, told: str) -> None:
    with pytest.raises(CoalaError, match=told):
        replace(instance()[0], **{field: value})


def memory_of(n: int, d: int, vocabulary: int, tokens: int) -> int:
    """Bytes, by the compiler's own account of every piece of a step and of the certificate, without running any."""
    lead, solver = (-(-n // CHUNK), CHUNK), OutputLBFGS()

    def everything() -> Any:
        places = jnp.zeros(lead, jnp.int32)
        named = jnp.zeros((*lead, tokens), jnp.int32)
        part = Support(places, named, places, jnp.zeros(named.shape), jnp.zeros(lead))
        program = OutputProgram(jnp.zeros((n, d)), jnp.zeros((vocabulary, d)), (part,), jnp.zeros(()))
        change, z, history = program.zeros(), (jnp.zeros(named.shape),), jnp.zeros((solver.memory, d, d))
        metric = output_solver.Metric(change, jnp.zeros(d), change, jnp.zeros(d))
        return program, output_solver.OutputState(change, z, z, jnp.zeros(()), change, metric, history, history)

    program, state = jax.eval_shape(everything)
    change, z = state.change, state.z
    pieces: list[tuple[Any, ...]] = [
        (output_solver._begin, program, change),
        (output_solver._metric, program, z, 0),
        (output_solver._direction, program, state),
        (output_solver._moves, program, change),
        (output_solver._advance, program, state, change, z),
        (output_solver._adjoint, program, z, change),
        (output_solver._remember, state, change, change),
    ]
    sizes = [piece.lower(*arguments).compile().memory_analysis() for piece, *arguments in pieces]
    with jax.enable_x64(True):
        sizes.append(solvers._bounds_in_double.lower(program, change, None).compile().memory_analysis())
    held = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves((program, state)))
    return held + max(size.temp_size_in_bytes + size.output_size_in_bytes for size in sizes)


@pytest.mark.nightly
def test_a_model_of_eight_billion_weights_fits_in_24_gib() -> None:
    n, d, vocabulary, tokens = 50_000, 4096, 128_256, 64
    bound = sum(output_fit_bytes(n, n * tokens, d, vocabulary).values())
    assert memory_of(n, d, vocabulary, tokens) <= bound < 8 * 2**30
