"""Newton's method for group-sparse convex programs: the default solver of the gated and the pairwise program."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from coala.convex.linear import pcg
from coala.convex.program import GroupProgram, group_norms
from coala.convex.prox import group_soft_threshold


class NewtonState(NamedTuple):
    """Weights (d, P) and their predictions."""

    weights: jax.Array
    z: jax.Array


@dataclass(frozen=True)
class GatedNewton:
    """Newton's method on the groups that are not zero, for any :class:`~coala.convex.program.GroupProgram`.

    Each step solves Newton's equations on the groups that are not zero, where the objective is smooth, by conjugate
    gradients,

        (F^T diag(curvature) F + blockdiag(levels_i (I - uu^T/||u||^2)/||u|| + ridges_i I)) p = -gradient,

    searches exactly along p, which costs no product with the data, and ends with a proximal gradient step, through
    which groups enter and leave. A full Newton step on which groups that would pass through zero stay there is tried
    as well, and the better of the two is kept. The objective never rises.
    """

    max_cg_steps: int = 150
    forcing: float = 0.1

    def init(self, program: GroupProgram, start: jax.Array | None = None) -> NewtonState:
        weights = program.zeros() if start is None else start
        return NewtonState(weights, _predict(program, weights))

    def solution(self, program: GroupProgram, state: NewtonState) -> tuple[jax.Array, None]:
        return state.weights, None

    @partial(jax.jit, static_argnums=0)
    def step(self, program: GroupProgram, state: NewtonState) -> NewtonState:
        weights, z = state
        diagonal = program.diagonal(program.curvature(z))
        direction = self._direction(program, weights, z, diagonal)
        dz = program.predict(direction)
        t = _exact_step(program, weights, direction, z, dz)
        passes = ((weights * (weights + direction)).sum(axis=0) <= 0) & (program.levels > 0)
        stopped = jnp.where(passes, 0.0, weights + direction)
        trials = jnp.stack([weights, weights + t * direction, stopped])
        images = jnp.stack([z, z + t * dz, program.predict(stopped)])
        values = jnp.stack([program.loss(image) for image in images]) + _penalty(program, trials)
        best = jnp.nanargmin(values)
        return _proximal_step(program, trials[best], images[best], diagonal.max(initial=0.0))

    def _direction(self, program: GroupProgram, weights: jax.Array, z: jax.Array, diagonal: jax.Array) -> jax.Array:
        """Newton's direction on the groups that are not zero; 0 on the others."""
        norms = group_norms(weights)
        alive = (norms > 0) | (program.levels == 0)
        bending = jnp.where(norms > 0, program.levels / jnp.where(norms > 0, norms, 1.0), 0.0)
        unit = weights / jnp.where(norms > 0, norms, 1.0)
        gradient = program.predict_adjoint(program.slope(z)) + program.levels * unit + program.ridges * weights
        gradient = jnp.where(alive, gradient, 0.0)
        curvature = program.curvature(z)
        diagonal = diagonal + bending + program.ridges
        # A trace of damping keeps directions that no row sees from wandering in finite precision.
        damping = 10 * np.finfo(weights.dtype).eps * diagonal.max(initial=0.0)
        diagonal = jnp.where(diagonal + damping > 0, diagonal + damping, 1.0)

        def hessian(p: jax.Array) -> jax.Array:
            curved = program.predict_adjoint(curvature * program.predict(p))
            around = bending * (p - unit * (unit * p).sum(axis=0))
            return jnp.where(alive, curved + around + (program.ridges + damping) * p, 0.0)

        # Inexact Newton: the closer to the optimum, the more exact the linear solve.
        scale = jnp.linalg.norm(program.levels) + jnp.linalg.norm(diagonal * weights)
        size = jnp.linalg.norm(gradient) / jnp.where(scale > 0, scale, 1.0)
        tolerance = jnp.minimum(self.forcing, jnp.sqrt(size))
        newton = pcg(hessian, -gradient, lambda r: r / diagonal, tolerance=tolerance, max_steps=self.max_cg_steps)
        return newton.value


@jax.jit
def _predict(program: GroupProgram, weights: jax.Array) -> jax.Array:
    return program.predict(weights)


def _penalty(program: GroupProgram, weights: jax.Array) -> jax.Array:
    norms = group_norms(weights)
    return (program.levels * norms + program.ridges / 2 * norms**2).sum(axis=-1)


def _proximal_step(program: GroupProgram, weights: jax.Array, z: jax.Array, steepness: jax.Array) -> NewtonState:
    """One proximal gradient step, its inverse length doubled from ``steepness`` until the model majorises."""
    gradient = program.predict_adjoint(program.slope(z)) + program.ridges * weights
    loss = program.loss(z) + jnp.sum(program.ridges * weights**2) / 2
    rounding = 10 * np.finfo(weights.dtype).eps * jnp.abs(loss)
    shortest = float(np.finfo(weights.dtype).tiny) ** 0.5

    class _Trial(NamedTuple):
        state: NewtonState
        steepness: jax.Array
        too_long: jax.Array

    def attempt(trial: _Trial) -> _Trial:
        new = group_soft_threshold(weights - gradient / trial.steepness, program.levels / trial.steepness)
        image = program.predict(new)
        change = new - weights
        model = loss + jnp.vdot(gradient, change) + trial.steepness / 2 * jnp.vdot(change, change)
        value = program.loss(image) + jnp.sum(program.ridges * new**2) / 2
        return _Trial(NewtonState(new, image), 2 * trial.steepness, value > model + rounding)

    first = _Trial(NewtonState(weights, z), jnp.maximum(steepness, shortest), jnp.asarray(True))
    end = jax.lax.while_loop(lambda trial: trial.too_long & (trial.steepness < 1 / shortest), attempt, first)
    return end.state


def _exact_step(
    program: GroupProgram, weights: jax.Array, direction: jax.Array, z: jax.Array, dz: jax.Array
) -> jax.Array:
    """The t in [0, 64] that minimises the objective along ``weights + t direction``: bisection on its derivative."""
    a, b, c = ((x * y).sum(axis=0) for x, y in ((weights, weights), (weights, direction), (direction, direction)))

    def halve(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        t = (low + high) / 2
        norms = jnp.sqrt(jnp.maximum(a + 2 * t * b + t * t * c, 0.0))
        turning = (b + t * c) / jnp.where(norms > 0, norms, 1.0)
        derivative = jnp.vdot(program.slope(z + t * dz), dz)
        derivative += jnp.sum(program.levels * turning) + jnp.sum(program.ridges * (b + t * c))
        return jnp.where(derivative < 0, t, low), jnp.where(derivative < 0, high, t)

    zero = jnp.zeros((), weights.dtype)
    low, high = jax.lax.fori_loop(0, 36, halve, (zero, zero + 64))
    return jnp.asarray((low + high) / 2)
