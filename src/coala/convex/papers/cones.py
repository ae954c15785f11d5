"""The cones of a program: points inside them, and the feasible weights nearest to weights that are not.

Knows nothing of gates: all follows from the rows and the patterns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Scalar

from coala.convex.linear import cholesky, cholesky_solve, weighted_grams
from coala.convex.program import Program, group_norms, in_double


def constrained(program: Program) -> Bool[Array, "n P"]:
    """Which constraints can bind, (n, P): those of patterns with an open row, on rows that are not zero."""
    return program.patterns.any(axis=0)[None] & (program.X != 0).any(axis=1)[:, None]


_Margins = tuple[Float[Array, "d P"], Float[Array, "n P"], Float[Array, "n P"], Scalar]


@jax.jit
def interior_directions(program: Program) -> Float[Array, "d P"]:
    """Directions h_i (d, P) of nearly largest margin: E_i x.h_i >= ||x||/2 on every row, ||h_i|| close to the least.

    An interior-point method for min ||h_i||^2/2 subject to E_i x.h_i >= ||x||, until every row has half its margin.
    Zero for closed patterns and for patterns that no gate makes. In float64; call under ``jax.enable_x64(True)``.
    """
    program = in_double(program)
    lengths = jnp.linalg.norm(program.X, axis=1, keepdims=True)
    program = replace(program, X=program.X / jnp.where(lengths > 0, lengths, 1.0))
    bound = constrained(program)
    n = len(bound)
    identity = jnp.eye(program.X.shape[1], dtype=program.X.dtype)

    def cone(h: Float[Array, "d P"]) -> Float[Array, "n P"]:
        return jnp.where(bound, program.cone(h[None])[0], 1.0)

    def adjoint(s: Float[Array, "n P"]) -> Float[Array, "d P"]:
        return program.cone_adjoint(jnp.where(bound, s, 0.0)[None])[0]

    def advance(state: _Margins) -> _Margins:
        h, slack, multipliers, steps = state
        mu = 0.1 * (slack * multipliers).sum(axis=0, keepdims=True) / n
        stiffness = jnp.where(bound, multipliers / slack, 0.0)
        missing = jnp.where(bound, cone(h) - slack - 1, 0.0)
        aim = mu / slack - multipliers - stiffness * missing
        right = adjoint(multipliers + aim) - h
        dh = _rows(cholesky_solve(cholesky(weighted_grams(program.X, stiffness) + identity[None]), columns(right)))
        ds = jnp.where(bound, cone(dh) + missing, 0.0)
        dL = mu / slack - multipliers - stiffness * ds
        ratios = jnp.maximum(-ds / slack, -dL / multipliers).max(axis=0, initial=0.0, keepdims=True)
        length = jnp.minimum(1.0, 0.99 / jnp.where(ratios > 0, ratios, 0.5))
        return h + length * dh, slack + length * ds, multipliers + length * dL, steps + 1

    def unfinished(state: _Margins) -> Scalar:
        return jnp.asarray((cone(state[0]).min(initial=1.0) < 0.5) & (state[3] < 60))

    one = jnp.ones_like(bound, program.X.dtype)
    # Multipliers and slacks must grow to the inverse square of the margin: an ample start saves most of the steps.
    h = jax.lax.while_loop(unfinished, advance, (program.zeros()[0], 10 * one, 100 * one, jnp.asarray(0)))[0]
    found = program.patterns.any(axis=0) & (cone(h).min(axis=0, initial=1.0) >= 0.5)
    return jnp.where(found[None], h, 0.0)


def _distances(program: Program, u: Float[Array, "2 d P"], inside: Float[Array, "d P"]) -> Float[Array, "2 P"]:
    """The smallest t (2, P) >= 0 for which u + t h is feasible; 0 for a pattern without an interior."""
    room = jnp.where(constrained(program)[None], program.cone(inside[None]), 0.0)
    ratios = jnp.maximum(-program.cone(u), 0.0) / jnp.where(room > 0, room, jnp.inf)
    # A hair more, or rounding of the sum leaves the tightest row outside again.
    return jnp.asarray(ratios.max(axis=1, initial=0.0) * (1 + 1e-9))


class _Approach(NamedTuple):
    """Offsets (2, d, P), their slacks and the multipliers of both, (2, n, P)."""

    offset: Float[Array, "2 d P"]
    slack: Float[Array, "2 n P"]
    multipliers: Float[Array, "2 n P"]
    steps: Scalar


def nearest(program: Program, u: Float[Array, "2 d P"], inside: Float[Array, "d P"]) -> Float[Array, "2 d P"]:
    """Feasible weights about as near to u as any: to 2 % of the distance, group by group. Wants float64.

    An interior-point method for min ||u_i' - u_i||^2 over the cones, from u_i + t h_i for ``inside`` h_i (d, P), which
    is much further away where a cone is thin. It works in float32 in units of that distance, in which nothing is large
    or small; the last move along h_i, in the precision of u, makes up for the rounding. A pattern without an interior
    (h_i = 0) gets zero weights.
    """
    apart = _distances(program, u, inside)
    norms = group_norms(inside)[None]
    along = inside / jnp.where(norms > 0, norms, 1.0)
    unit = apart * norms
    lengths = jnp.linalg.norm(program.X, axis=1, keepdims=True)
    scaled = replace(program, X=program.X / jnp.where(lengths > 0, lengths, 1.0))
    needed = -scaled.cone(u) / jnp.where(unit > 0, unit, 1.0)[:, None, :]
    moving = constrained(program)[None] & (unit > 0)[:, None, :]
    narrow = jnp.float32
    # Rows far from binding would overflow; none of them comes into play.
    needed = jnp.where(moving, jnp.maximum(needed, -1e6), -1.0).astype(narrow)
    first = jnp.where((unit > 0)[:, None, :], 1.1 * along[None], 0.0).astype(narrow)
    offset = _least_offset(replace(scaled, X=scaled.X.astype(narrow)), needed, moving, first)
    near = u + unit[:, None, :] * offset.astype(u.dtype)
    near = near + _distances(program, near, inside)[:, None, :] * inside[None]
    further = u + apart[:, None, :] * inside[None]
    better = group_norms(near - u) < group_norms(further - u)
    return jnp.where((norms > 0)[None], jnp.where(better[:, None, :], near, further), 0.0)


def _least_offset(
    program: Program, needed: Float[Array, "2 n P"], moving: Bool[Array, "2 n P"], first: Float[Array, "2 d P"]
) -> Float[Array, "2 d P"]:
    """About argmin ||c||^2/2 subject to G c >= ``needed`` (2, n, P) where ``moving``, from a strictly feasible c.

    Every step of a group, a predictor and a corrector with the same factor, stays strictly feasible and has a length
    of its own.
    """
    count = jnp.maximum(moving.sum(axis=1, dtype=first.dtype), 1)
    identity = jnp.eye(program.X.shape[1], dtype=first.dtype)
    n, P = program.patterns.shape

    def slack_of(c: Float[Array, "2 d P"]) -> Float[Array, "2 n P"]:
        return jnp.where(moving, program.cone(c) - needed, 1.0)

    def adjoint(s: Float[Array, "2 n P"]) -> Float[Array, "2 d P"]:
        return program.cone_adjoint(jnp.where(moving, s, 0.0))

    def left(state: _Approach) -> Float[Array, "2 P"]:
        """The duality gap, relative to ||c||^2/2, (2, P)."""
        c, slack, multipliers, _ = state
        apart = ((c - adjoint(multipliers)) ** 2).sum(axis=1) / 2
        gap = apart + jnp.where(moving, slack * multipliers, 0.0).sum(axis=1)
        return gap / jnp.maximum((c**2).sum(axis=1) / 2, 1e-30)

    def advance(state: _Approach) -> _Approach:
        c, slack, multipliers, steps = state
        stiffness = jnp.where(moving, multipliers / slack, 0.0)
        grams = weighted_grams(program.X, jnp.moveaxis(stiffness, 1, 0).reshape(n, 2 * P))
        factor = cholesky(grams + identity[None])

        def towards(
            goal: Float[Array, "2 P"], second_order: Float[Array, "2 n P"]
        ) -> tuple[Float[Array, "2 d P"], Float[Array, "2 n P"], Float[Array, "2 n P"]]:
            aim = jnp.where(moving, (goal[:, None, :] - second_order) / slack, 0.0)
            right = jnp.moveaxis(adjoint(aim) - c, 2, 1).reshape(2 * P, -1, 1)
            dc = jnp.moveaxis(cholesky_solve(factor, right)[..., 0].reshape(2, P, -1), 1, 2)
            ds = jnp.where(moving, program.cone(dc), 0.0)
            return dc, ds, jnp.where(moving, aim - multipliers - stiffness * ds, 0.0)

        def longest(ds: Float[Array, "2 n P"], dL: Float[Array, "2 n P"]) -> Float[Array, "2 P"]:
            ratios = jnp.maximum(-ds / slack, -dL / jnp.where(moving, multipliers, 1.0)).max(axis=1, initial=0.0)
            return 1 / jnp.maximum(ratios, 1e-6)

        mu = jnp.where(moving, slack * multipliers, 0.0).sum(axis=1) / count
        _, ds, dL = towards(jnp.zeros_like(mu), jnp.zeros_like(slack))
        reach = jnp.minimum(longest(ds, dL), 1.0)
        dc, ds, dL = towards(mu * (1 - reach) ** 3, reach[:, None, :] * ds * dL)
        length = jnp.minimum(0.98 * longest(ds, dL), 1.0)[:, None, :]
        moved = c + length * dc
        new = _Approach(moved, slack_of(moved), multipliers + length * dL, steps + 1)
        sound = (jnp.isfinite(new.offset).all(axis=1) & (new.slack > 0).all(axis=1))[:, None, :]
        c, slack, multipliers = (jnp.where(sound, a, b) for a, b in zip(new[:3], state[:3], strict=True))
        return _Approach(c, slack, multipliers, new.steps)

    def unfinished(state: _Approach) -> Scalar:
        return (left(state) > 0.04).any() & (state.steps < 20)

    slack = slack_of(first)
    mu = (first**2).sum(axis=1) / count
    start = _Approach(first, slack, jnp.where(moving, mu[:, None, :] / slack, 0.0), jnp.asarray(0))
    return jax.lax.while_loop(unfinished, advance, start).offset


def columns(u: Float[Array, "d P"]) -> Float[Array, "P d 1"]:
    """(d, P) as P columns (P, d, 1)."""
    return u.T[..., None]


def _rows(columns: Float[Array, "P d 1"]) -> Float[Array, "d P"]:
    """The inverse of :func:`columns`."""
    return columns[..., 0].T
