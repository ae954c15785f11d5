"""The compiled steps of :mod:`coala.convex.papers.patterns`: Newton's on neurons at hand, and the search for more."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Scalar

from coala.convex.linear import matmul, pcg
from coala.convex.program import group_norms
from coala.convex.pytree import pytree


@pytree()
@dataclass(frozen=True)
class Layer:
    """J with neurons of fixed signs: rows X (n, d), labels y (n,), signs (m,) of +-1; weights are (d, m)."""

    X: Float[Array, "n d"]
    y: Float[Array, "n"]
    signs: Float[Array, "m"]
    sparsity: Scalar

    def value(self, activations: Float[Array, "n m"], weights: Float[Array, "d m"]) -> Scalar:
        residual = self.y - matmul(activations, self.signs)
        return jnp.vdot(residual, residual) / 2 + self.sparsity * group_norms(weights).sum()


class Neurons(NamedTuple):
    """Weights (d, m), how far each is open at each row (n, m) in [0, 1], and the decrease the last step promised."""

    weights: Float[Array, "d m"]
    opening: Float[Array, "n m"]
    promise: Scalar


def _rectify(
    a: Float[Array, "n m"], opening: Float[Array, "n m"], width: Float[Array, "1 m"]
) -> tuple[Float[Array, "n m"], Float[Array, "n m"]]:
    """max_{0<=t<=1} t a - width/2 (t - opening)^2 and its derivative t: the rectifier (a)_+ = max_t t a, smoothed.

    Rows at a kink of the optimum keep a = 0 and 0 < t < 1. As the opening tends to t the smoothing vanishes there at
    any width: this is the method of multipliers, and needs no width that tends to zero.
    """
    t = jnp.clip(opening + a / width, 0.0, 1.0)
    return t * a - width / 2 * (t - opening) ** 2, t


@jax.jit
def newton_step(layer: Layer, neurons: Neurons, softness: Scalar) -> Neurons:
    """Newton's direction on the smoothed J, halved until it descends, then one update of the openings.

    The Hessian leaves out what is concave; its block for each neuron, factored, preconditions the conjugate gradients.
    A neuron that would pass through zero stays there, and stays dead.
    """
    X, signs, weights = layer.X, layer.signs, neurons.weights
    norms = group_norms(weights)[None]
    alive = norms > 0
    unit = weights / jnp.where(alive, norms, 1.0)
    bending = layer.sparsity / jnp.where(alive, norms, 1.0)
    a = matmul(X, weights)
    size = jnp.sqrt((a**2).mean(axis=0, keepdims=True))
    width = jnp.where(size > 0, softness * size, 1.0)
    active, t = _rectify(a, neurons.opening, width)
    pull = (layer.y - matmul(active, signs))[:, None] * signs[None]
    gradient = jnp.where(alive, layer.sparsity * unit - matmul((t * pull).T, X).T, 0.0)
    kinked = jnp.where((t > 0) & (t < 1), jnp.maximum(-pull, 0.0), 0.0) / width
    steepest = matmul((t**2 + kinked).T, X**2).max(axis=1, initial=0.0) + bending[0]
    damping = 10 * np.finfo(X.dtype).eps * steepest

    def hessian(p: Float[Array, "d m"]) -> Float[Array, "d m"]:
        b = matmul(X, p)
        onto = t * signs[None] * matmul(t * b, signs)[:, None] + kinked * b
        curved = matmul(onto.T, X).T + bending * (p - unit * (unit * p).sum(axis=0, keepdims=True)) + damping[None] * p
        return jnp.where(alive, curved, 0.0)

    identity = jnp.eye(X.shape[1], dtype=X.dtype)

    def inverse_root(neuron: tuple[Array, ...]) -> Float[Array, "d d"]:
        curvature, bend, along, damp = neuron
        block = matmul((X * curvature[:, None]).T, X) + bend * (identity - jnp.outer(along, along))
        root = jnp.linalg.cholesky(block + 10 * damp * identity)
        return jnp.asarray(jax.scipy.linalg.solve_triangular(root, identity, lower=True))

    roots = jax.lax.map(inverse_root, ((t**2 + kinked).T, bending[0], unit.T, damping))

    def precondition(r: Float[Array, "d m"]) -> Float[Array, "d m"]:
        half = jnp.einsum("mde,em->md", roots, r, precision="highest")
        return jnp.einsum("mde,md->em", roots, half, precision="highest")

    accuracy = jnp.linalg.norm(gradient) / (layer.sparsity * jnp.sqrt(jnp.maximum(alive.sum(dtype=X.dtype), 1)))
    direction = pcg(
        hessian,
        -gradient,
        precondition,
        tolerance=jnp.minimum(0.1, jnp.sqrt(accuracy)),
        max_steps=100,
    ).value
    b = matmul(X, direction)
    slope = jnp.vdot(gradient, direction)
    before = layer.value(active, weights)
    rounding = 10 * np.finfo(X.dtype).eps * before

    def attempt(length: Scalar) -> tuple[Array, ...]:
        moved = weights + length * direction
        kept = (weights * moved).sum(axis=0, keepdims=True) > 0
        new = jnp.where(kept, moved, 0.0)
        image = jnp.where(kept, a + length * b, 0.0)
        value = layer.value(_rectify(image, neurons.opening, width)[0], new)
        too_long = (value > before + 1e-4 * length * slope + rounding) & (length > 1e-6)
        return length, new, image, too_long

    first = attempt(jnp.ones((), X.dtype))
    _, new, image, _ = jax.lax.while_loop(lambda trial: trial[3], lambda trial: attempt(trial[0] / 2), first)
    active, t = _rectify(image, neurons.opening, width)
    # A kink is a minimum along its row only where more activation hurts; elsewhere a neuron is open or closed.
    hurts = (layer.y - matmul(active, signs))[:, None] * signs[None] < 0
    return Neurons(new, jnp.where(hurts, t, (image > 0).astype(X.dtype)), -slope)


@partial(jax.jit, static_argnames="n_steps")
def search_neurons(
    X: Float[Array, "n d"],
    residual: Float[Array, "n"],
    starts: Float[Array, "d k"],
    signs: Float[Array, "k"],
    n_steps: int,
) -> tuple[Float[Array, "d k"], Float[Array, "k"]]:
    """Unit vectors h (d, k) with large signs_k z^T (X h_k)_+, and those values (k,); z (n,) is the residual.

    Ascent with vanishing steps 1/2, 1/3, ... from ``starts``, keeping the best point met. Where z opposes a neuron the
    value has a ridge along the row's kink, on which steps of fixed length never settle; the maxima lie on such ridges.
    """
    tiny = np.finfo(X.dtype).tiny

    def advance(step: Scalar, state: tuple[Array, ...]) -> tuple[Array, ...]:
        best, largest, h = state
        a = matmul(X, h)
        values = signs * matmul(residual, jnp.maximum(a, 0.0))
        slope = signs[None] * matmul(jnp.where(a >= 0, residual[:, None], 0.0).T, X).T
        onward = h + slope / jnp.maximum(group_norms(slope), tiny)[None] / (step + 2)
        better = values > largest
        unit = onward / jnp.maximum(group_norms(onward), tiny)[None]
        return jnp.where(better[None], h, best), jnp.where(better, values, largest), unit

    none = jnp.full(starts.shape[1], -jnp.inf, X.dtype)
    best, largest, _ = jax.lax.fori_loop(0, n_steps, advance, (starts, none, starts))
    return best, largest
