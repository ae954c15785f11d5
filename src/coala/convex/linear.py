"""Linear algebra for the solvers: matrix products at full precision and preconditioned conjugate gradients.

Knows nothing of programs, patterns or losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Scalar


def matmul(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """a @ b at the precision of its factors."""
    # Accelerators round float32 factors to 10 bits unless told otherwise, which conjugate gradients do not survive.
    return jnp.matmul(a, b, precision="highest")


def cholesky(A: Float[Array, "*k d d"]) -> Float[Array, "*k d d"]:
    """The lower factors L of L L^T = A, (..., d, d)."""
    return jnp.asarray(jnp.linalg.cholesky(A, symmetrize_input=False))


def cholesky_solve(factor: Float[Array, "*k d d"], right: Float[Array, "*k d columns"]) -> Float[Array, "*k d columns"]:
    """(L L^T)^-1 ``right`` (..., d, k) for lower factors L."""
    return jnp.asarray(jax.scipy.linalg.cho_solve((factor, True), right))


class LinearSolve(NamedTuple):
    """Outcome of :func:`pcg`: the approximate solution and the iterations made."""

    value: Float[Array, "..."]
    steps: Scalar


def pcg(
    operator: Callable[[Array], Array],
    target: Float[Array, "*shape"],
    precondition: Callable[[Array], Array] = lambda r: r,
    *,
    tolerance: float | Scalar = 1e-6,
    max_steps: int = 100,
) -> LinearSolve:
    """Solve ``operator(x) = target`` for a symmetric positive semi-definite operator, starting from x = 0.

    ``target`` may have any shape; ``precondition`` maps a residual to an approximate solution. Stops at
    ||target - operator(x)|| <= tolerance ||target||, after ``max_steps``, or at a direction of no curvature.
    """
    bound = tolerance * jnp.linalg.norm(target)

    class _State(NamedTuple):
        x: Float[Array, "*shape"]
        residual: Float[Array, "*shape"]
        direction: Float[Array, "*shape"]
        product: Scalar
        steps: Scalar
        flat: Scalar

    def unfinished(state: _State) -> Scalar:
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
    return LinearSolve(end.x, end.steps)


def weighted_grams(X: Float[Array, "n d"], weights: Float[Array, "n k"]) -> Float[Array, "k d d"]:
    """X^T diag(weights_k) X for every column k of ``weights`` (n, K), as (K, d, d); X is (n, d)."""
    # One at a time: n d numbers of scratch memory rather than n d K.
    return jnp.asarray(jax.lax.map(lambda column: matmul((column[:, None] * X).T, X), weights.T))


class NystromSketch(NamedTuple):
    """A positive semi-definite H, nearly ``basis diag(values) basis^T``: basis (..., k) orthonormal, values falling."""

    basis: Float[Array, "*shape k"]
    values: Float[Array, "k"]


def nystrom(operator: Callable[[Array], Array], probes: Float[Array, "k *shape"]) -> NystromSketch:
    """Randomised Nystrom approximation of a positive semi-definite operator from its products with k random ``probes``.

    ``probes`` is (k, ...) with the shape of the operator's arguments behind; Gaussian ones suit any spectrum. The
    stabilising shift follows the precision of the numbers, without which float32 gives nan (Frangella et al., 2023).
    """
    shape = probes.shape[1:]
    orthonormal, _ = jnp.linalg.qr(probes.reshape(len(probes), -1).T)
    image = jax.lax.map(lambda column: operator(column.reshape(shape)).reshape(-1), orthonormal.T).T
    epsilon = float(np.finfo(probes.dtype).eps)
    shift = epsilon * (jnp.sqrt(1.0 * len(image)) * jnp.linalg.norm(image) + float(np.finfo(probes.dtype).tiny) ** 0.5)
    image = image + shift * orthonormal
    core = matmul(orthonormal.T, image)
    values, vectors = jnp.linalg.eigh((core + core.T) / 2)
    # The square root of the pseudo-inverse of the core; its smallest eigenvalues are rounding.
    kept = values > epsilon * len(values) * values[-1]
    root = vectors * jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1.0)), 0.0)[None]
    basis, singular, _ = jnp.linalg.svd(matmul(image, root), full_matrices=False)
    return NystromSketch(basis.reshape(*shape, -1), jnp.maximum(singular**2 - shift, 0.0))


def nystrom_preconditioner(sketch: NystromSketch, shift: Scalar) -> Callable[[Array], Array]:
    """An approximate inverse of H + shift I, up to a factor, from a sketch of H; exact on the sketched directions."""
    axes = tuple(range(sketch.basis.ndim - 1))
    gain = (sketch.values[-1] + shift) / (sketch.values + shift) - 1

    def apply(r: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        coordinates = jnp.tensordot(sketch.basis, r, (axes, axes), precision="highest")
        return r + jnp.tensordot(sketch.basis, gain * coordinates, 1, precision="highest")

    return apply
