"""The solver of the output-layer program: L-BFGS in the metric of the Hessian's Kronecker factors.

The Hessian is sum_t weight_t C_t (x) x_t x_t^T with C_t = W_S^T (diag p - p p^T) W_S, about (sum_t weight_t C_t) (x)
the second moments of the x_t. Two eigenvalue problems of size d invert that with the ridge; L-BFGS learns what is left.
A step is one product with W forth, for the direction, and one back, for the gradient; the line search costs none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Scalar

from coala.convex.linear import matmul
from coala.convex.output_layer import Change, Logits, OutputProgram, added, scattered
from coala.convex.program import Bounds

SEARCHES = 12  # looks of a line search, which cost no product


class Metric(NamedTuple):
    """Eigenvectors and eigenvalues of the Hessian's Kronecker factors; the product of their eigenvalues is in nats."""

    left: Float[Array, "d d"]
    left_values: Float[Array, "d"]
    right: Float[Array, "e e"]
    right_values: Float[Array, "e"]

    def solve(self, r: Change, ridge: Scalar) -> Change:
        """(factor (x) factor + ridge I)^-1 r."""
        inner = matmul(matmul(self.left.T, r), self.right)
        inner = inner / (self.left_values[:, None] * self.right_values[None] + ridge)
        return matmul(matmul(self.left, inner), self.right.T)


class OutputState(NamedTuple):
    """The change, its logits and those of no change, its gradient; the last steps and what they did to the gradient.

    ``steps`` and ``turns`` are (memory, d, e), the newest last.
    """

    change: Change
    z: Logits
    base: Logits
    objective: Scalar
    gradient: Change
    metric: Metric
    steps: Float[Array, "memory d e"]
    turns: Float[Array, "memory d e"]


@dataclass(frozen=True)
class OutputLBFGS:
    """L-BFGS with an exact line search; starts in the metric of the Kronecker factors at ``start``."""

    max_steps: ClassVar[int] = 500

    memory: int = 8
    seed: int = 0  # of the draws that the metric is estimated from

    def init(self, program: OutputProgram, start: Change | None = None) -> OutputState:
        change = program.zeros() if start is None else start
        base, z, objective, slopes = _begin(program, change)
        gradient = _adjoint(program, slopes, change)
        none = jnp.zeros((self.memory, *change.shape), change.dtype)
        return OutputState(change, z, base, objective, gradient, _metric(program, z, self.seed), none, none)

    def solution(self, program: OutputProgram, state: OutputState) -> tuple[Change, None]:
        return state.change, None

    def bounds(self, program: OutputProgram, state: OutputState) -> Bounds:
        bounds: Bounds = _bounds_at(program, state.objective, state.gradient)
        return bounds

    def step(self, program: OutputProgram, state: OutputState) -> OutputState:
        # In pieces, each compiled once: the products take long to compile, and the start needs them too.
        direction = _direction(program, state)
        change, z, objective, slopes = _advance(program, state, direction, _moves(program, direction))
        gradient = _adjoint(program, slopes, change)
        steps, turns = _remember(state, change - state.change, gradient - state.gradient)
        return OutputState(change, z, state.base, objective, gradient, state.metric, steps, turns)


@jax.jit
def _begin(program: OutputProgram, change: Change) -> tuple[Logits, Logits, Scalar, Logits]:
    base, moved = program.logits(change)
    z = added(base, moved)
    return base, z, program.gain(z, base) + program.ridge / 2 * jnp.sum(change**2), program.slopes(z)


@jax.jit
def _adjoint(program: OutputProgram, slopes: Logits, change: Change) -> Change:
    return program.adjoint(slopes) + program.ridge * change


@jax.jit
def _moves(program: OutputProgram, direction: Change) -> Logits:
    return program.moves(direction)


@jax.jit
def _bounds_at(program: OutputProgram, objective: Scalar, gradient: Change) -> Bounds:
    return program.bounds_at(objective, gradient)


@jax.jit
def _metric(program: OutputProgram, z: Logits, seed: int) -> Metric:
    left, right = program.factors(scattered(program, z, jax.random.key(seed)))
    left_values, left_vectors = jnp.linalg.eigh(left)
    right_values, right_vectors = jnp.linalg.eigh(right)
    return Metric(left_vectors, jnp.maximum(left_values, 0.0), right_vectors, jnp.maximum(right_values, 0.0))


@jax.jit
def _advance(
    program: OutputProgram, state: OutputState, direction: Change, moved: Logits
) -> tuple[Change, Logits, Scalar, Logits]:
    t = _exact_step(program, state, direction, moved)
    change, z = state.change + t * direction, added(state.z, moved, t)
    return change, z, program.gain(z, state.base) + program.ridge / 2 * jnp.sum(change**2), program.slopes(z)


@jax.jit
def _remember(state: OutputState, step: Change, turn: Change) -> tuple[Array, Array]:
    # Positive but for rounding, which would do harm.
    useful = jnp.vdot(step, turn) > np.finfo(step.dtype).eps * jnp.vdot(turn, turn)
    steps = jnp.where(useful, jnp.roll(state.steps, -1, axis=0).at[-1].set(step), state.steps)
    turns = jnp.where(useful, jnp.roll(state.turns, -1, axis=0).at[-1].set(turn), state.turns)
    return steps, turns


@jax.jit
def _direction(program: OutputProgram, state: OutputState) -> Change:
    """Minus the inverse Hessian of metric and last steps, times the gradient; an empty row of zeros changes nothing."""
    products = jnp.sum(state.steps * state.turns, axis=(1, 2))
    inverse = jnp.where(products > 0, 1 / jnp.where(products > 0, products, 1.0), 0.0)
    rows = (state.steps, state.turns, inverse)

    def back(q: Change, row: tuple[Array, ...]) -> tuple[Change, Scalar]:
        step, turn, rho = row
        share = rho * jnp.vdot(step, q)
        return q - share * turn, share

    def forth(r: Change, row: tuple[Array, ...]) -> tuple[Change, None]:
        step, turn, rho, share = row
        return r + step * (share - rho * jnp.vdot(turn, r)), None

    q, shares = jax.lax.scan(back, state.gradient, rows, reverse=True)
    first = state.metric.solve(q, program.ridge)
    newest = state.metric.solve(state.turns[-1], program.ridge)
    size = jnp.vdot(state.turns[-1], newest)
    scale = jnp.where(size > 0, products[-1] / jnp.where(size > 0, size, 1.0), 1.0)
    return -jax.lax.scan(forth, scale * first, (*rows, shares))[0]


def _exact_step(program: OutputProgram, state: OutputState, direction: Change, dz: Logits) -> Scalar:
    """The t > 0 that minimises the objective along ``direction``: Newton's method on its derivative, in a bracket."""
    linear = program.ridge * jnp.vdot(state.change, direction)
    square = program.ridge * jnp.vdot(direction, direction)

    def derivatives(t: Scalar) -> tuple[Scalar, Scalar]:
        first, second = linear + t * square, square
        z = added(state.z, dz, t)
        for part, p, slope, move in zip(program.parts, program.probabilities(z), program.slopes(z), dz, strict=True):
            first = first + jnp.sum(slope * move)
            mean = jnp.sum(p * move, axis=-1, keepdims=True)
            second = second + jnp.sum(part.weight * jnp.sum(p * (move - mean) ** 2, axis=-1))
        return first, second

    class _Search(NamedTuple):
        low: Scalar
        high: Scalar
        t: Scalar
        looks: Scalar
        done: Scalar

    steepest = jnp.abs(derivatives(jnp.zeros_like(program.ridge))[0])

    def look(search: _Search) -> _Search:
        first, second = derivatives(search.t)
        low = jnp.where(first < 0, search.t, search.low)
        high = jnp.where(first < 0, search.high, search.t)
        # Beyond the bracket, or with no curvature, halve it, or double while nothing bounds it.
        newton = search.t - first / jnp.where(second > 0, second, 1.0)
        outside = ~((newton > low) & (newton < high)) | (second <= 0)
        t = jnp.where(outside, jnp.where(jnp.isfinite(high), (low + high) / 2, 2 * search.t), newton)
        done = jnp.abs(first) <= 0.02 * steepest
        return _Search(low, high, jnp.where(done, search.t, t), search.looks + 1, done)

    zero = jnp.zeros_like(program.ridge)
    start = _Search(zero, zero + jnp.inf, zero + 1, jnp.asarray(0), jnp.asarray(False))
    end: Any = jax.lax.while_loop(lambda search: ~search.done & (search.looks < SEARCHES), look, start)
    return jnp.where(end.done, end.t, end.low)
