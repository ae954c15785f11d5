"""Proximal maps and projections: closed-form answers to the non-smooth parts of the programs."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def group_soft_threshold(
    z: Float[Array, "*sides d P"], level: float | Float[Array, ""] | Float[Array, "P"]
) -> Float[Array, "*sides d P"]:
    """Prox of ``sum_i level_i ||z[..., :, i]||_2``: shrink each pattern's weights towards 0 (Alg. 2, v-update).

    ``z`` is (..., d, P); ``level`` a number or (P,), not negative. A group with norm at most its level becomes 0.
    """
    norms = jnp.linalg.norm(z, axis=-2, keepdims=True)
    level = jnp.broadcast_to(jnp.asarray(level, z.dtype), norms.shape)
    # The inner `where` keeps a zero column at 0 instead of nan; the solvers never differentiate this function.
    return jnp.where(norms > level, 1 - level / jnp.where(norms > 0, norms, 1.0), 0.0) * z


def project_orthant(s: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Projection on the non-negative orthant (Alg. 2, s-update)."""
    return jnp.maximum(s, 0.0)
