"""Newton's method for group-sparse convex programs: the default solver of the gated and the pairwise program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Scalar

from coala.convex.linear import matmul, pcg
from coala.convex.program import Bounds, GroupProgram, group_norms
from coala.convex.prox import group_soft_threshold


class NewtonState(NamedTuple):
    """Weights (d, P), their predictions, the gradient of the loss (d, P), and the bounds that follow from them.

    ``crossed`` says that groups were to pass through zero in the last step; ``spectrum`` and ``overlap`` are the
    moments at the start, for the preconditioner.
    """

    weights: Float[Array, "d P"]
    z: Float[Array, "n"]
    gradient: Float[Array, "d P"]
    bounds: Bounds
    crossed: Scalar
    spectrum: Float[Array, "d"]
    overlap: Float[Array, "P P"]


@dataclass(frozen=True)
class GatedNewton:
    """Newton's method on the groups that are not zero, for any :class:`~coala.convex.program.GroupProgram`.

    A step begins with a proximal gradient step if that lets groups enter or leave, or if the last step was to take
    groups through zero, where the objective has a kink that can hold Newton's method up. It then solves Newton's
    equations on the groups that are not zero, where the objective is smooth, by conjugate gradients,

        (F^T diag(curvature) F + blockdiag(levels_i (I - uu^T/||u||^2)/||u|| + ridges_i I)) p = -gradient,

    and searches exactly along p, which costs no product with the data. If groups would pass through zero on the way,
    the full step on which they stay there is tried as well, and the better of the two is kept. But for rounding, the
    objective never rises.
    """

    max_cg_steps: int = 150
    forcing: float = 0.1

    def init(self, program: GroupProgram, start: Float[Array, "d P"] | None = None) -> NewtonState:
        first: NewtonState = _first(program, program.zeros() if start is None else start)
        return first

    def solution(self, program: GroupProgram, state: NewtonState) -> tuple[Float[Array, "d P"], None]:
        return state.weights, None

    def bounds(self, program: GroupProgram, state: NewtonState) -> Bounds:
        return state.bounds

    @partial(jax.jit, static_argnums=0)
    def step(self, program: GroupProgram, state: NewtonState) -> NewtonState:
        weights, z, slopes = _proximal_step(program, state)
        curvature = program.curvature(z)
        overlap = state.overlap * curvature.sum()
        direction = self._direction(program, weights, curvature, slopes, state.spectrum, overlap)
        dz = program.predict(direction)
        t = _exact_step(program, weights, direction, z, dz)
        ahead, image = weights + t * direction, z + t * dz
        passes = ((weights * (weights + direction)).sum(axis=0) <= 0) & (group_norms(weights) > 0)
        passes = passes & (program.levels > 0)

        def stop_at_zero() -> tuple[Float[Array, "d P"], Float[Array, "n"]]:
            stopped = jnp.where(passes[None], 0.0, weights + direction)
            stopped_image = program.predict(stopped)
            better = _value(program, stopped, stopped_image) < _value(program, ahead, image)
            return jnp.where(better, stopped, ahead), jnp.where(better, stopped_image, image)

        ahead, image = jax.lax.cond(passes.any(), stop_at_zero, lambda: (ahead, image))
        failed = ~jnp.isfinite(_value(program, ahead, image))
        weights, z = jnp.where(failed, weights, ahead), jnp.where(failed, z, image)
        slopes = program.predict_adjoint(program.slope(z))
        bounds = program.bounds_at(weights, z, slopes)
        return NewtonState(weights, z, slopes, bounds, passes.any(), state.spectrum, state.overlap)

    def _direction(
        self,
        program: GroupProgram,
        weights: Float[Array, "d P"],
        curvature: Float[Array, "n"],
        slopes: Float[Array, "d P"],
        spectrum: Float[Array, "d"],
        overlap: Float[Array, "P P"],
    ) -> Float[Array, "d P"]:
        """Newton's direction on the groups that are not zero; 0 on the others."""
        norms, levels, ridges = group_norms(weights)[None], program.levels[None], program.ridges[None]
        alive = (norms > 0) | (levels == 0)
        bending = jnp.where(norms > 0, levels / jnp.where(norms > 0, norms, 1.0), 0.0)
        unit = weights / jnp.where(norms > 0, norms, 1.0)
        gradient = jnp.where(alive, slopes + levels * unit + ridges * weights, 0.0)
        diagonal = spectrum[:, None] * jnp.diagonal(overlap)[None] + bending + ridges
        # A trace of damping keeps directions that no row sees from wandering in finite precision.
        damping = 10 * np.finfo(weights.dtype).eps * diagonal.max(initial=0.0)

        def hessian(p: Float[Array, "d P"]) -> Float[Array, "d P"]:
            around = bending * (p - unit * (unit * p).sum(axis=0, keepdims=True))
            return jnp.where(alive, program.normal_product(curvature, p) + around + (ridges + damping) * p, 0.0)

        # Inexact Newton: the closer to the optimum, the more exact the linear solve.
        scale = jnp.linalg.norm(program.levels) + jnp.linalg.norm(diagonal * weights)
        size = jnp.linalg.norm(gradient) / jnp.where(scale > 0, scale, 1.0)
        tolerance = jnp.minimum(self.forcing, jnp.sqrt(size))
        precondition = _kronecker_inverse(spectrum, overlap, (bending + ridges + damping)[0], alive[0])
        return pcg(hessian, -gradient, precondition, tolerance=tolerance, max_steps=self.max_cg_steps).value


def _kronecker_inverse(
    spectrum: Float[Array, "d"], overlap: Float[Array, "P P"], shift: Float[Array, "P"], alive: Bool[Array, "P"]
) -> Callable[[Array], Array]:
    """r -> (diag(spectrum) x overlap + I x diag(shift))^-1 r on the groups alive, for r (d, P).

    One eigenvalue problem of size P diagonalises all d blocks: with S = diag(shift)^(-1/2) and S overlap S =
    Q diag(values) Q^T, the block of feature k is S^-1 Q (spectrum_k diag(values) + I) Q^T S^-1.
    """
    root = jax.lax.rsqrt(jnp.where(alive & (shift > 0), shift, 1.0))
    inside = jnp.where(alive[:, None] & alive[None], overlap, 0.0)
    values, vectors = jnp.linalg.eigh(root[:, None] * inside * root[None])
    strength = 1 + spectrum[:, None] * jnp.maximum(values, 0.0)[None]

    def apply(r: Float[Array, "d P"]) -> Float[Array, "d P"]:
        return jnp.where(alive[None], matmul(matmul(r * root[None], vectors) / strength, vectors.T) * root[None], 0.0)

    return apply


@jax.jit
def _first(program: GroupProgram, weights: Float[Array, "d P"]) -> NewtonState:
    z = program.predict(weights)
    slopes = program.predict_adjoint(program.slope(z))
    bounds = program.bounds_at(weights, z, slopes)
    return NewtonState(weights, z, slopes, bounds, jnp.asarray(False), *program.moments(program.curvature(z)))


def _value(program: GroupProgram, weights: Float[Array, "d P"], z: Float[Array, "n"]) -> Scalar:
    norms = group_norms(weights)
    return program.loss(z) + (program.levels * norms + program.ridges / 2 * norms**2).sum()


def _proximal_step(
    program: GroupProgram, state: NewtonState
) -> tuple[Float[Array, "d P"], Float[Array, "n"], Float[Array, "d P"]]:
    """Weights, predictions and gradient after a proximal gradient step, if one is called for: see :class:`GatedNewton`.

    The inverse length of the step starts at an estimate of the largest curvature and doubles until the model
    majorises.
    """
    weights, z, slopes = state.weights, state.z, state.gradient
    gradient = slopes + program.ridges[None] * weights
    loss = program.loss(z) + jnp.sum(program.ridges[None] * weights**2) / 2
    rounding = 10 * np.finfo(weights.dtype).eps * jnp.abs(loss)
    shortest = float(np.finfo(weights.dtype).tiny) ** 0.5
    # Row sums bound the largest eigenvalue of the overlap, closely where gates overlap evenly.
    largest = state.spectrum.max(initial=0.0) * jnp.abs(state.overlap).sum(axis=0).max(initial=0.0)
    largest = largest * program.curvature(z).sum()
    steepness = jnp.maximum(largest + program.ridges.max(initial=0.0), shortest)

    def moved(steepness: Scalar) -> Float[Array, "d P"]:
        return group_soft_threshold(weights - gradient / steepness, program.levels / steepness)

    class _Trial(NamedTuple):
        weights: Float[Array, "d P"]
        z: Float[Array, "n"]
        steepness: Scalar
        too_long: Scalar

    def attempt(trial: _Trial) -> _Trial:
        new = moved(trial.steepness)
        image = program.predict(new)
        change = new - weights
        model = loss + jnp.vdot(gradient, change) + trial.steepness / 2 * jnp.vdot(change, change)
        value = program.loss(image) + jnp.sum(program.ridges[None] * new**2) / 2
        return _Trial(new, image, 2 * trial.steepness, value > model + rounding)

    def change() -> tuple[Float[Array, "d P"], Float[Array, "n"], Float[Array, "d P"]]:
        first = _Trial(weights, z, steepness, jnp.asarray(True))
        end = jax.lax.while_loop(lambda trial: trial.too_long & (trial.steepness < 1 / shortest), attempt, first)
        return end.weights, end.z, program.predict_adjoint(program.slope(end.z))

    changes = (group_norms(moved(steepness)) > 0) != (group_norms(weights) > 0)
    after: tuple[Float[Array, "d P"], Float[Array, "n"], Float[Array, "d P"]]
    after = jax.lax.cond(changes.any() | state.crossed, change, lambda: (weights, z, slopes))
    return after


def _exact_step(
    program: GroupProgram,
    weights: Float[Array, "d P"],
    direction: Float[Array, "d P"],
    z: Float[Array, "n"],
    dz: Float[Array, "n"],
) -> Scalar:
    """The t in [0, 64] that minimises the objective along ``weights + t direction``: bisection on its derivative."""
    # Nor beyond where the penalties alone exceed the objective: in a direction that no row sees, a tiny step is far.
    reach, length = (jnp.sum(program.levels * group_norms(x)) for x in (weights, direction))
    farthest = (_value(program, weights, z) + reach) / jnp.where(length > 0, length, 1.0)
    end = jnp.where(length > 0, jnp.minimum(farthest, 64.0), 64.0)
    a, b, c = ((x * y).sum(axis=0) for x, y in ((weights, weights), (weights, direction), (direction, direction)))

    def halve(_: int, bracket: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
        low, high = bracket
        t = (low + high) / 2
        norms = jnp.sqrt(jnp.maximum(a + 2 * t * b + t * t * c, 0.0))
        turning = (b + t * c) / jnp.where(norms > 0, norms, 1.0)
        derivative = jnp.vdot(program.slope(z + t * dz), dz)
        derivative += jnp.sum(program.levels * turning) + jnp.sum(program.ridges * (b + t * c))
        return jnp.where(derivative < 0, t, low), jnp.where(derivative < 0, high, t)

    zero = jnp.zeros((), weights.dtype)
    low, high = jax.lax.fori_loop(0, 36, halve, (zero, end.astype(zero.dtype)))
    return jnp.asarray((low + high) / 2)
