"""Linear algebra for the solvers: matrix products at full precision and preconditioned conjugate gradients.

Knows nothing of programs, patterns or losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b at the precision of its factors."""
    # Accelerators round float32 factors to 10 bits unless told otherwise, which conjugate gradients do not survive.
    return jnp.matmul(a, b, precision="highest")


class LinearSolve(NamedTuple):
    """Outcome of :func:`pcg`: the approximate solution, ||residual|| / ||right-hand side||, iterations made."""

    value: jax.Array
    relative_residual: jax.Array
    steps: jax.Array


def pcg(
    operator: Callable[[jax.Array], jax.Array],
    target: jax.Array,
    precondition: Callable[[jax.Array], jax.Array] = lambda r: r,
    *,
    tolerance: float | jax.Array = 1e-6,
    max_steps: int = 100,
) -> LinearSolve:
    """Solve ``operator(x) = target`` for a symmetric positive semi-definite operator, starting from x = 0.

    ``target`` may have any shape; ``precondition`` maps a residual to an approximate solution. Stops at
    ||target - operator(x)|| <= tolerance ||target||, after ``max_steps``, or at a direction of no curvature.
    """
    bound = tolerance * jnp.linalg.norm(target)

    class _State(NamedTuple):
        x: jax.Array
        residual: jax.Array
        direction: jax.Array
        product: jax.Array
        steps: jax.Array
        flat: jax.Array

    def unfinished(state: _State) -> jax.Array:
        short = jnp.asarray(jnp.linalg.norm(state.residual) > bound)
        return short & (state.steps < max_steps) & ~state.flat

    def advance(state: _State) -> _State:
        image = operator(state.direction)
        bend = jnp.vdot(state.direction, image)
        flat = bend <= 0
        step = jnp.where(flat, 0.0, state.product / jnp.where(flat, 1.0, bend))
        residual = state.residual - step * image
        scaled = precondition(residual)
        product = jnp.vdot(residual, scaled)
        direction = scaled + product / state.product * state.direction
        return _State(state.x + step * state.direction, residual, direction, product, state.steps + 1, flat)

    first = precondition(target)
    start = _State(jnp.zeros_like(target), target, first, jnp.vdot(target, first), jnp.asarray(0), jnp.asarray(False))
    end = jax.lax.while_loop(unfinished, advance, start)
    size = jnp.linalg.norm(target)
    return LinearSolve(end.x, jnp.linalg.norm(end.residual) / jnp.where(size > 0, size, 1.0), end.steps)
