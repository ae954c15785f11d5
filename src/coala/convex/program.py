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
from jaxtyping import Array, Bool, Float, Scalar

from coala.convex.linear import matmul
from coala.convex.pytree import pytree
from coala.convex.rows import gated_product as gated_product
from coala.convex.rows import gated_product_adjoint as gated_product_adjoint
from coala.convex.rows import moments, normal_product


class Bounds(NamedTuple):
    """Two numbers that enclose a program's optimal value: an attained objective and a dual value."""

    objective: Scalar
    lower: Scalar

    @property
    def gap(self) -> Scalar:
        return self.objective - self.lower


class DualPoint(NamedTuple):
    """A residual (n,) and multipliers of the cones (2, n, P) that bound a :class:`Program` from below.

    For solvers whose best dual point does not belong to their best feasible weights.
    """

    residual: Float[Array, "n"]
    multipliers: Float[Array, "2 n P"]


class GroupProgram(Protocol):
    """min_u loss(predict(u)) + sum_i levels_i ||u_i|| + 1/2 sum_i ridges_i ||u_i||^2, u (d, P); ``loss`` separable.

    What a solver for group-sparse programs may ask of one. ``predict`` is linear; ``normal_product`` and ``moments``
    are F^T diag(curvature) F u and its summary, as in ``rows.py``; ``bounds_at`` are the bounds from products known.
    """

    @property
    def levels(self) -> Float[Array, "P"]: ...
    @property
    def ridges(self) -> Float[Array, "P"]: ...
    def zeros(self) -> Float[Array, "d P"]: ...
    def predict(self, u: Float[Array, "d P"]) -> Float[Array, "n"]: ...
    def predict_adjoint(self, z: Float[Array, "n"]) -> Float[Array, "d P"]: ...
    def normal_product(self, curvature: Float[Array, "n"], u: Float[Array, "d P"]) -> Float[Array, "d P"]: ...
    def moments(self, curvature: Float[Array, "n"]) -> tuple[Float[Array, "d"], Float[Array, "P P"]]: ...
    def loss(self, z: Float[Array, "n"]) -> Scalar: ...
    def slope(self, z: Float[Array, "n"]) -> Float[Array, "n"]: ...
    def curvature(self, z: Float[Array, "n"]) -> Float[Array, "n"]: ...
    def bounds_at(self, u: Float[Array, "d P"], z: Float[Array, "n"], gradient: Float[Array, "d P"]) -> Bounds: ...


def group_norms(u: Float[Array, "*sides d P"]) -> Float[Array, "*sides P"]:
    """||u[..., :, i]|| over the patterns i, (..., P)."""
    return jnp.asarray(jnp.linalg.norm(u, axis=-2))


def stationarity(
    gradient: Float[Array, "*sides d P"], u: Float[Array, "*sides d P"], levels: Float[Array, "P"]
) -> Float[Array, "*sides P"]:
    """Distance of 0 from ``gradient_i + levels_i d||u_i||``, per group (..., P)."""
    norms = group_norms(u)
    levels = jnp.broadcast_to(levels, norms.shape)
    direction = u / jnp.where(norms > 0, norms, 1.0)[..., None, :]
    return jnp.where(
        norms > 0,
        group_norms(gradient + levels[..., None, :] * direction),
        jnp.maximum(group_norms(gradient) - levels, 0.0),
    )


def _scaled_dual_value(
    y: Float[Array, "n"], z: Float[Array, "n"], largest: Scalar, level: Scalar, *, signed: bool
) -> Scalar:
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

    X: Float[Array, "n d"]
    y: Float[Array, "n"]
    patterns: Bool[Array, "n P"]
    sparsity: Scalar

    @property
    def levels(self) -> Float[Array, "P"]:
        return jnp.full(self.patterns.shape[1], self.sparsity, self.y.dtype)

    @property
    def ridges(self) -> Float[Array, "P"]:
        return jnp.zeros(self.patterns.shape[1], self.y.dtype)

    def zeros(self) -> Float[Array, "d P"]:
        return jnp.zeros((self.X.shape[1], self.patterns.shape[1]), self.y.dtype)

    def predict(self, u: Float[Array, "d P"]) -> Float[Array, "n"]:
        return gated_product(self.X, self.patterns, u)

    def predict_adjoint(self, z: Float[Array, "n"]) -> Float[Array, "d P"]:
        return gated_product_adjoint(self.X, self.patterns, z)

    def normal_product(self, curvature: Float[Array, "n"], u: Float[Array, "d P"]) -> Float[Array, "d P"]:
        """F^T diag(curvature) F u, (d, P)."""
        return normal_product(self.X[None], self.patterns[None], (1.0,), curvature, u)

    def moments(self, curvature: Float[Array, "n"]) -> tuple[Float[Array, "d"], Float[Array, "P P"]]:
        """spectrum (d,) and overlap (P, P): F^T diag(curvature) F is about their Kronecker product."""
        return moments(self.X[None], self.patterns[None], (1.0,), curvature)

    def loss(self, z: Float[Array, "n"]) -> Scalar:
        return jnp.sum((z - self.y) ** 2) / 2

    def slope(self, z: Float[Array, "n"]) -> Float[Array, "n"]:
        return z - self.y

    def curvature(self, z: Float[Array, "n"]) -> Float[Array, "n"]:
        return jnp.ones_like(z)

    def objective(self, u: Float[Array, "d P"]) -> Scalar:
        return self.loss(self.predict(u)) + self.sparsity * group_norms(u).sum()

    def bounds(self, u: Float[Array, "d P"], multipliers: Array | None = None) -> Bounds:
        """Objective, and the dual value of the scaled residual: y^T z - 1/2 ||z||^2 with ||X^T D_i z|| <= sparsity."""
        z = self.predict(u)
        return self.bounds_at(u, z, self.predict_adjoint(self.slope(z)))

    def bounds_at(self, u: Float[Array, "d P"], z: Float[Array, "n"], gradient: Float[Array, "d P"]) -> Bounds:
        """:meth:`bounds` for z = F u and gradient = F^T slope(z), which a solver has at hand."""
        largest = group_norms(gradient).max(initial=0.0)
        objective = self.loss(z) + self.sparsity * group_norms(u).sum()
        return Bounds(objective, _scaled_dual_value(self.y, self.y - z, largest, self.sparsity, signed=True))

    def duality_gap(self, u: Float[Array, "d P"], multipliers: Array | None = None) -> Scalar:
        return self.bounds(u, multipliers).gap

    def kkt(self, u: Float[Array, "d P"], multipliers: Array | None = None) -> Scalar:
        """Largest violation of the optimality conditions, relative to the sparsity."""
        gradient = self.predict_adjoint(self.predict(u) - self.y)
        return stationarity(gradient, u, self.levels).max(initial=0.0) / self.sparsity

    def in_double(self) -> GatedProgram:
        """Everything but the rows in float64; the products widen those block by block."""
        return replace(self, y=widen(self.y), sparsity=widen(self.sparsity))


@pytree()
@dataclass(frozen=True)
class Program:
    """The cone-constrained program (Eq. 4): weights u (2, d, P), u[0] = v and u[1] = w; multipliers (2, n, P) >= 0.

    All four fields are dynamic, so that new data, patterns or sparsity of the same shape compile nothing.
    """

    X: Float[Array, "n d"]
    y: Float[Array, "n"]
    patterns: Bool[Array, "n P"]
    sparsity: Scalar

    @property
    def relaxation(self) -> GatedProgram:
        """The same program without the cones, in u_i = v_i - w_i."""
        return GatedProgram(self.X, self.y, self.patterns, self.sparsity)

    def zeros(self) -> Float[Array, "2 d P"]:
        return jnp.zeros((2, self.X.shape[1], self.patterns.shape[1]), self.X.dtype)

    def predict(self, u: Float[Array, "2 d P"]) -> Float[Array, "n"]:
        """F u = sum_i D_i X (v_i - w_i), (n,)."""
        return gated_product(self.X, self.patterns, u[0] - u[1])

    def predict_adjoint(self, z: Float[Array, "n"]) -> Float[Array, "2 d P"]:
        """F^T z, (2, d, P)."""
        q = gated_product_adjoint(self.X, self.patterns, z)
        return jnp.stack([q, -q])

    def cone(self, u: Float[Array, "sides d P"]) -> Float[Array, "sides n P"]:
        """G u = E_i X v_i and E_i X w_i, (2, n, P); the constraints ask that it be non-negative."""
        return self._signs[None] * matmul(self.X, u)

    def cone_adjoint(self, s: Float[Array, "sides n P"]) -> Float[Array, "sides d P"]:
        """G^T s, (2, d, P)."""
        return jnp.swapaxes(matmul(jnp.swapaxes(self._signs[None] * s, -1, -2), self.X), -1, -2)

    @property
    def _signs(self) -> Float[Array, "n P"]:
        return jnp.where(self.patterns, 1.0, -1.0).astype(self.X.dtype)

    def objective(self, u: Float[Array, "2 d P"]) -> Scalar:
        """The value of the program at u, which need not be feasible."""
        residual = self.predict(u) - self.y
        return jnp.vdot(residual, residual) / 2 + self.sparsity * group_norms(u).sum()

    def violation(self, u: Float[Array, "2 d P"]) -> Scalar:
        """How far the worst cone constraint is from holding; 0 when u is feasible."""
        return jnp.maximum(-self.cone(u), 0.0).max(initial=0.0)

    def bounds(self, u: Float[Array, "2 d P"], multipliers: Float[Array, "2 n P"] | DualPoint) -> Bounds:
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

    def _dual_point(self, u: Float[Array, "2 d P"], multipliers: Float[Array, "2 n P"] | DualPoint) -> DualPoint:
        if isinstance(multipliers, DualPoint):
            return multipliers
        return DualPoint(self.y - self.predict(u), multipliers)

    def duality_gap(self, u: Float[Array, "2 d P"], multipliers: Float[Array, "2 n P"] | DualPoint) -> Scalar:
        return self.bounds(u, multipliers).gap

    def kkt(self, u: Float[Array, "2 d P"], multipliers: Float[Array, "2 n P"] | DualPoint) -> Scalar:
        """Largest of stationarity, feasibility and complementarity violation, the first relative to the sparsity."""
        z, multipliers = self._dual_point(u, multipliers)
        gradient = -self.predict_adjoint(z) - self.cone_adjoint(multipliers)
        levels = jnp.full(self.patterns.shape[1], self.sparsity, self.X.dtype)
        return jnp.stack(
            [
                stationarity(gradient, u, levels).max(initial=0.0) / self.sparsity,
                self.violation(u),
                jnp.maximum(-multipliers, 0.0).max(initial=0.0),
                jnp.abs(multipliers * self.cone(u)).max(initial=0.0),
            ]
        ).max()


def largest_sparsity(program: GatedProgram | Program) -> Scalar:
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
