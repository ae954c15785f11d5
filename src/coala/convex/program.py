"""The convex programs of the squared loss: operators, objective, certificates. Knows no solver.

Data X (n, d), labels y (n,), gates h_i with activation patterns D_i = diag(1(X h_i >= 0)), E_i = 2 D_i - I:

    Program       min_{v,w} 1/2 ||sum_i D_i X (v_i - w_i) - y||^2 + sparsity sum_i (||v_i|| + ||w_i||)
                  subject to E_i X v_i >= 0, E_i X w_i >= 0                             (Eq. 4, with the factor 1/2)
    GatedProgram  the same without the cones; then only u_i = v_i - w_i matters, one block per pattern

Every operator is two matrix products and a mask (``rows.py``). Nothing here is vectorised with ``vmap``: see
``selftest.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from coala.convex.linear import matmul
from coala.convex.pytree import pytree
from coala.convex.rows import gated_product as gated_product
from coala.convex.rows import gated_product_adjoint as gated_product_adjoint
from coala.convex.rows import moments, normal_product


class Bounds(NamedTuple):
    """Two numbers that enclose a program's optimal value: an attained objective and a dual value."""

    objective: jax.Array
    lower: jax.Array

    @property
    def gap(self) -> jax.Array:
        return self.objective - self.lower


class DualPoint(NamedTuple):
    """A residual (n,) and multipliers of the cones (2, n, P) that bound a :class:`Program` from below.

    For solvers whose best dual point does not belong to their best feasible weights.
    """

    residual: jax.Array
    multipliers: jax.Array


class GroupProgram(Protocol):
    """min_u loss(predict(u)) + sum_i levels_i ||u_i|| + 1/2 sum_i ridges_i ||u_i||^2, u (d, P); ``loss`` separable.

    What a solver for group-sparse programs may ask of one. ``predict`` is linear; ``normal_product`` and ``moments``
    are F^T diag(curvature) F u and its summary, as in ``rows.py``; ``bounds_at`` are the bounds from products known.
    """

    @property
    def levels(self) -> jax.Array: ...
    @property
    def ridges(self) -> jax.Array: ...
    def zeros(self) -> jax.Array: ...
    def predict(self, u: jax.Array) -> jax.Array: ...
    def predict_adjoint(self, z: jax.Array) -> jax.Array: ...
    def normal_product(self, curvature: jax.Array, u: jax.Array) -> jax.Array: ...
    def moments(self, curvature: jax.Array) -> tuple[jax.Array, jax.Array]: ...
    def loss(self, z: jax.Array) -> jax.Array: ...
    def slope(self, z: jax.Array) -> jax.Array: ...
    def curvature(self, z: jax.Array) -> jax.Array: ...
    def bounds_at(self, u: jax.Array, z: jax.Array, gradient: jax.Array) -> Bounds: ...


def group_norms(u: jax.Array) -> jax.Array:
    """||u[..., :, i]|| over the patterns i, (..., P)."""
    return jnp.asarray(jnp.linalg.norm(u, axis=-2))


def _scaled_dual_value(y: jax.Array, z: jax.Array, largest: jax.Array, level: jax.Array, *, signed: bool) -> jax.Array:
    """Best a y^T z - a^2/2 ||z||^2 over the multiples a of z that keep the dual norms at most ``level``."""
    limit = jnp.where(largest > 0, level / jnp.where(largest > 0, largest, 1.0), jnp.inf)
    size = jnp.vdot(z, z)
    best = jnp.where(size > 0, jnp.vdot(y, z) / jnp.where(size > 0, size, 1.0), 0.0)
    a = jnp.clip(best, -limit if signed else 0.0, limit)
    # Of norms that overflowed nothing is known, and -inf is the bound that is always true.
    return jnp.where(jnp.isfinite(largest), a * jnp.vdot(y, z) - a * a / 2 * size, -jnp.inf)


@pytree()
@dataclass(frozen=True)
class GatedProgram:
    """The gated relaxation: X (n, d), y (n,), patterns (n, P) bool, sparsity a number. Weights are u (d, P).

    Its optimal value is at most that of :class:`Program` on the same data. A row that no pattern opens, with y = 0,
    leaves the program unchanged: this is how a fold is held out without a new shape.
    """

    X: jax.Array
    y: jax.Array
    patterns: jax.Array
    sparsity: jax.Array

    @property
    def levels(self) -> jax.Array:
        return jnp.full(self.patterns.shape[1], self.sparsity, self.y.dtype)

    @property
    def ridges(self) -> jax.Array:
        return jnp.zeros(self.patterns.shape[1], self.y.dtype)

    def zeros(self) -> jax.Array:
        return jnp.zeros((self.X.shape[1], self.patterns.shape[1]), self.y.dtype)

    def predict(self, u: jax.Array) -> jax.Array:
        return gated_product(self.X, self.patterns, u)

    def predict_adjoint(self, z: jax.Array) -> jax.Array:
        return gated_product_adjoint(self.X, self.patterns, z)

    def normal_product(self, curvature: jax.Array, u: jax.Array) -> jax.Array:
        """F^T diag(curvature) F u, (d, P)."""
        return normal_product(self.X[None], self.patterns[None], (1.0,), curvature, u)

    def moments(self, curvature: jax.Array) -> tuple[jax.Array, jax.Array]:
        """spectrum (d,) and overlap (P, P): F^T diag(curvature) F is about their Kronecker product."""
        return moments(self.X[None], self.patterns[None], (1.0,), curvature)

    def loss(self, z: jax.Array) -> jax.Array:
        return jnp.sum((z - self.y) ** 2) / 2

    def slope(self, z: jax.Array) -> jax.Array:
        return z - self.y

    def curvature(self, z: jax.Array) -> jax.Array:
        return jnp.ones_like(z)

    def objective(self, u: jax.Array) -> jax.Array:
        return self.loss(self.predict(u)) + self.sparsity * group_norms(u).sum()

    def bounds(self, u: jax.Array, multipliers: jax.Array | None = None) -> Bounds:
        """Objective, and the dual value of the scaled residual: y^T z - 1/2 ||z||^2 with ||X^T D_i z|| <= sparsity."""
        z = self.predict(u)
        return self.bounds_at(u, z, self.predict_adjoint(self.slope(z)))

    def bounds_at(self, u: jax.Array, z: jax.Array, gradient: jax.Array) -> Bounds:
        """:meth:`bounds` for z = F u and gradient = F^T slope(z), which a solver has at hand."""
        largest = group_norms(gradient).max(initial=0.0)
        objective = self.loss(z) + self.sparsity * group_norms(u).sum()
        return Bounds(objective, _scaled_dual_value(self.y, self.y - z, largest, self.sparsity, signed=True))

    def duality_gap(self, u: jax.Array, multipliers: jax.Array | None = None) -> jax.Array:
        return self.bounds(u, multipliers).gap

    def in_double(self) -> GatedProgram:
        """Everything but the rows in float64; the products widen those block by block."""
        return replace(self, y=widen(self.y), sparsity=widen(self.sparsity))


@pytree()
@dataclass(frozen=True)
class Program:
    """The cone-constrained program (Eq. 4): weights u (2, d, P), u[0] = v and u[1] = w; multipliers (2, n, P) >= 0.

    All four fields are dynamic, so that new data, patterns or sparsity of the same shape compile nothing.
    """

    X: jax.Array
    y: jax.Array
    patterns: jax.Array
    sparsity: jax.Array

    @property
    def relaxation(self) -> GatedProgram:
        """The same program without the cones, in u_i = v_i - w_i."""
        return GatedProgram(self.X, self.y, self.patterns, self.sparsity)

    def zeros(self) -> jax.Array:
        return jnp.zeros((2, self.X.shape[1], self.patterns.shape[1]), self.X.dtype)

    def predict(self, u: jax.Array) -> jax.Array:
        """F u = sum_i D_i X (v_i - w_i), (n,)."""
        return gated_product(self.X, self.patterns, u[0] - u[1])

    def predict_adjoint(self, z: jax.Array) -> jax.Array:
        """F^T z, (2, d, P)."""
        q = gated_product_adjoint(self.X, self.patterns, z)
        return jnp.stack([q, -q])

    def cone(self, u: jax.Array) -> jax.Array:
        """G u = E_i X v_i and E_i X w_i, (2, n, P); the constraints ask that it be non-negative."""
        return self._signs * matmul(self.X, u)

    def cone_adjoint(self, s: jax.Array) -> jax.Array:
        """G^T s, (2, d, P)."""
        return jnp.swapaxes(matmul(jnp.swapaxes(self._signs * s, -1, -2), self.X), -1, -2)

    @property
    def _signs(self) -> jax.Array:
        return jnp.where(self.patterns, 1.0, -1.0).astype(self.X.dtype)

    def objective(self, u: jax.Array) -> jax.Array:
        """The value of the program at u, which need not be feasible."""
        residual = self.predict(u) - self.y
        return jnp.vdot(residual, residual) / 2 + self.sparsity * group_norms(u).sum()

    def violation(self, u: jax.Array) -> jax.Array:
        """How far the worst cone constraint is from holding; 0 when u is feasible."""
        return jnp.maximum(-self.cone(u), 0.0).max(initial=0.0)

    def bounds(self, u: jax.Array, multipliers: jax.Array | DualPoint) -> Bounds:
        """Objective (infinite at an infeasible u) and the dual value of the scaled residual and multipliers.

        Dual feasible are z, L >= 0 with ||X^T(+-D_i z + E_i L_i)|| <= sparsity for every pattern and sign. Of
        ``multipliers`` alone the residual is that of u.
        """
        z, multipliers = self._dual_point(u, multipliers)
        multipliers = jnp.maximum(multipliers, 0.0)
        largest = group_norms(self.predict_adjoint(z) + self.cone_adjoint(multipliers)).max(initial=0.0)
        # A repaired point touches a constraint, where rounding may leave it a few units in the last place outside.
        rounding = 64 * np.finfo(self.X.dtype).eps * jnp.abs(self.cone(u)).max(initial=0.0)
        objective = jnp.where(self.violation(u) <= rounding, self.objective(u), jnp.inf)
        return Bounds(objective, _scaled_dual_value(self.y, z, largest, self.sparsity, signed=False))

    def _dual_point(self, u: jax.Array, multipliers: jax.Array | DualPoint) -> DualPoint:
        if isinstance(multipliers, DualPoint):
            return multipliers
        return DualPoint(self.y - self.predict(u), multipliers)

    def duality_gap(self, u: jax.Array, multipliers: jax.Array | DualPoint) -> jax.Array:
        return self.bounds(u, multipliers).gap


def largest_sparsity(program: GatedProgram | Program) -> jax.Array:
    """max_i ||X^T D_i y||: at and above this sparsity the weights of the gated program are zero."""
    return group_norms(gated_product_adjoint(program.X, program.patterns, program.y)).max(initial=0.0)


T = TypeVar("T")


def widen(a: Any) -> Any:
    """The array in float64 if it holds numbers of another precision."""
    return a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a


def in_double(tree: T) -> T:
    """The same program or weights computing in float64; call under ``jax.enable_x64(True)``.

    Rows may stay as they are stored: a program with an ``in_double`` of its own knows which arrays to widen.
    """

    def widened(part: Any) -> Any:
        return part.in_double() if hasattr(part, "in_double") else widen(part)

    wide: T = jax.tree.map(widened, tree, is_leaf=lambda part: hasattr(part, "in_double"))
    return wide
