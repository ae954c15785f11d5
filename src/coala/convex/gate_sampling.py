"""Where gates come from: random ones, and the search for those whose optimality condition is violated most.

Knows rows and dual variables, not programs: the squared and the pairwise loss search alike.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from coala.convex.linear import matmul
from coala.convex.program import gated_product_adjoint, group_norms


def sample_patterns(
    X: Float[np.ndarray, "n d"], n_patterns: int, key: Key[Array, ""], *, whitened: bool = False
) -> tuple[Bool[np.ndarray, "n P"], Float[np.ndarray, "d P"]]:
    """Patterns (n, P) bool of Gaussian gates, and the gates (d, P); P <= n_patterns.

    ``whitened`` draws them in coordinates in which the rows have equal second moments, so that strong directions of
    the features do not decide every gate. Duplicate patterns and those that open no row are dropped: they add
    variables and no function.
    """
    gates = np.asarray(jax.random.normal(key, (X.shape[1], n_patterns), jnp.float32)).astype(X.dtype)
    if whitened:
        values, vectors = np.linalg.eigh(X.T @ X)
        seen = values > 1e-10 * values[-1]
        gates = vectors[:, seen] @ (gates[: seen.sum()] / np.sqrt(values[seen, None]))
        gates = gates / np.linalg.norm(gates, axis=0)
    patterns = X @ gates >= 0
    _, first = np.unique(np.packbits(patterns, axis=0), axis=1, return_index=True)
    kept = np.sort(first)
    kept = kept[patterns[:, kept].any(axis=0)]
    return patterns[:, kept], gates[:, kept]


@partial(jax.jit, static_argnames="n_steps")
def ascend(
    rows: Float[Array, "*rows d"],
    dual: Float[Array, "*rows"],
    starts: Float[Array, "d k"],
    signs: Float[Array, "k"],
    n_steps: int,
) -> tuple[Float[Array, "d k"], Float[Array, "k"]]:
    """Directions h (d, k) with large ||q(h)||, q(h) = sum_r dual_r 1(h.x_r >= 0) x_r, and those norms (k,).

    ``n_steps`` of h <- h + sign q(h)/||q(h)||, normalised, from ``starts`` (d, k); rows (..., d), dual (...,), signs
    +-1 (k,). At a fixed point h is parallel to q(h), and ||q(h)|| = |sum_r dual_r (h.x_r)_+|: a stationary value of
    the dual constraint of a ReLU neuron. A local search of a non-convex problem: it may miss the maximum.
    """

    def advance(_: int, state: tuple[Array, ...]) -> tuple[Array, ...]:
        gates = state[1]
        q = gated_product_adjoint(rows, matmul(rows, gates) >= 0, dual)
        norms = group_norms(q)
        # Halfway only: the full step gates <- q / ||q|| can cycle, as the objective is not convex in the gate.
        return gates, _unit(gates + signs[None] * _unit(q, 0 * q), gates), norms

    none = jnp.zeros(starts.shape[1], rows.dtype)
    gates, _, norms = jax.lax.fori_loop(0, n_steps, advance, (starts, starts, none))
    return gates, norms


@partial(jax.jit, static_argnames="n_steps")
def separate(
    rows: Float[Array, "*rows d"],
    gate_rows: Float[Array, "*rows e"],
    dual: Float[Array, "*rows"],
    starts: Float[Array, "e k"],
    n_steps: int,
) -> tuple[Float[Array, "e k"], Float[Array, "k"]]:
    """Gates h (e, k) on other vectors z_r than the rows, with large ||q(h)||, q(h) = sum_r dual_r 1(h.z_r >= 0) x_r.

    Alternates between v = q(h)/||q(h)|| and the gate that should be open where dual_r x_r.v > 0: half way to the
    least-squares fit of dual_r x_r.v by z_r. Returns the best gate each start came by; a local search.
    """
    over_rows = tuple(range(rows.ndim - 1))
    metric = _inverse_moment(gate_rows)

    def advance(_: int, state: tuple[Array, ...]) -> tuple[Array, ...]:
        best, gates, largest = state
        q = gated_product_adjoint(rows, matmul(gate_rows, gates) >= 0, dual)
        norms = group_norms(q)
        wanted = dual[..., None] * matmul(rows, _unit(q, 0 * q))
        fit = matmul(metric, jnp.tensordot(gate_rows, wanted, (over_rows, over_rows), precision="highest"))
        better = norms > largest
        onward = _unit(gates + _unit(fit, 0 * fit), gates)
        return jnp.where(better[None], gates, best), onward, jnp.where(better, norms, largest)

    none = jnp.zeros(starts.shape[1], rows.dtype)
    best, _, largest = jax.lax.fori_loop(0, n_steps, advance, (starts, starts, none))
    return best, largest


def _unit(columns: Float[Array, "d k"], otherwise: Float[Array, "d k"]) -> Float[Array, "d k"]:
    """Columns of length 1; ``otherwise`` in place of those that are zero."""
    length = group_norms(columns)[None]
    return jnp.where(length > 0, columns / jnp.where(length > 0, length, 1.0), otherwise)


def _inverse_moment(rows: Float[Array, "... e"]) -> Float[Array, "e e"]:
    """(Z^T Z / n + 1e-3 mean eigenvalue I)^-1, (e, e), for rows z (..., e)."""
    over_rows = tuple(range(rows.ndim - 1))
    width = rows.shape[-1]
    moment = jnp.tensordot(rows, rows, (over_rows, over_rows), precision="highest") * (width / max(1, rows.size))
    floor = 1e-3 * jnp.trace(moment) / width + float(np.finfo(moment.dtype).tiny)
    identity = jnp.eye(width, dtype=moment.dtype)
    return jnp.asarray(jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(moment + floor * identity), identity))


def distinct(
    candidates: Float[np.ndarray, "d k"], existing: Float[np.ndarray, "d m"], limit: int, *, cosine: float = 0.95
) -> Float[np.ndarray, "d _"]:
    """The first ``limit`` columns of ``candidates`` at a smaller cosine to each other and to ``existing``."""
    unit = existing / np.maximum(np.linalg.norm(existing, axis=0), 1e-30)
    chosen: list[np.ndarray] = []
    for column in (candidates / np.maximum(np.linalg.norm(candidates, axis=0), 1e-30)).T:
        if len(chosen) == limit:
            break
        if (unit.T @ column < cosine).all():
            chosen.append(column)
            unit = np.concatenate([unit, column[:, None]], axis=1)
    return np.stack(chosen, axis=1) if chosen else candidates[:, :0]
