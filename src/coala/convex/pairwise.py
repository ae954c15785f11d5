"""The pairwise program: a linear block, gated neurons and the logistic loss on pairs, in one convex problem.

    min_{b,u} sum_j weight_j softplus(margin_j - (g(x_w,j) - g(x_l,j))) + sparsity sum_i ||u_i|| + ridge/2 ||b||^2
    g(x) = b.x + sum_i 1(h_i.x >= 0) u_i.x

Convex for fixed gates h_i. Without neurons it is ridge-regularised linear Bradley-Terry. Gates may look at the reply's
features x or at those of its prompt; in the difference of a pair a linear block cannot see the prompt, a gate can.
Knows nothing of where gates come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Scalar

from coala.convex.linear import matmul
from coala.convex.newton import GatedNewton
from coala.convex.program import Bounds, gated_product, gated_product_adjoint, group_norms, widen
from coala.convex.pytree import pytree
from coala.convex.rows import moments, normal_product
from coala.convex.solvers import Solution, solve

# Columns of a program, the linear block included: few shapes, few compilations, each of which costs a second or two.
WIDTHS = (1, 9, 17, 33, 129, 513)


@pytree()
@dataclass(frozen=True)
class PairProgram:
    """The pairwise program for fixed gates; all fields dynamic.

    ``rows`` (2, n, d): the chosen rows and the rejected. ``patterns`` (2, n, 1 + m) bool: column 0, all open, is the
    linear block b; a closed column is padding. ``margin`` and ``weight`` (n,); a pair of weight 0 is held out.
    Weights are (d, 1 + m), column 0 = b.
    """

    rows: Float[Array, "2 n d"]
    patterns: Bool[Array, "2 n P"]
    margin: Float[Array, "n"]
    weight: Float[Array, "n"]
    sparsity: Scalar
    ridge: Scalar

    @property
    def _is_linear(self) -> Bool[Array, "P"]:
        return jnp.arange(self.patterns.shape[-1]) == 0

    @property
    def levels(self) -> Float[Array, "P"]:
        return jnp.where(self._is_linear, 0.0, self.sparsity).astype(self.margin.dtype)

    @property
    def ridges(self) -> Float[Array, "P"]:
        return jnp.where(self._is_linear, self.ridge, 0.0).astype(self.margin.dtype)

    def zeros(self) -> Float[Array, "d P"]:
        return jnp.zeros((self.rows.shape[-1], self.patterns.shape[-1]), self.margin.dtype)

    def predict(self, u: Float[Array, "d P"]) -> Float[Array, "n"]:
        """Score differences g(x_w) - g(x_l), (n,)."""
        scores = gated_product(self.rows, self.patterns, u)
        return scores[0] - scores[1]

    def predict_adjoint(self, z: Float[Array, "n"]) -> Float[Array, "d P"]:
        return gated_product_adjoint(self.rows, self.patterns, jnp.stack([z, -z]))

    def normal_product(self, curvature: Float[Array, "n"], u: Float[Array, "d P"]) -> Float[Array, "d P"]:
        """F^T diag(curvature) F u, (d, 1 + m)."""
        return normal_product(self.rows, self.patterns, (1.0, -1.0), curvature, u)

    def moments(self, curvature: Float[Array, "n"]) -> tuple[Float[Array, "d"], Float[Array, "P P"]]:
        """spectrum (d,) and overlap (1 + m, 1 + m): F^T diag(curvature) F is about their Kronecker product."""
        return moments(self.rows, self.patterns, (1.0, -1.0), curvature)

    def loss(self, z: Float[Array, "n"]) -> Scalar:
        return jnp.sum(self.weight * jax.nn.softplus(self.margin - z))

    def slope(self, z: Float[Array, "n"]) -> Float[Array, "n"]:
        return -self.weight * jax.nn.sigmoid(self.margin - z)

    def curvature(self, z: Float[Array, "n"]) -> Float[Array, "n"]:
        return self.weight * jax.nn.sigmoid(self.margin - z) * jax.nn.sigmoid(z - self.margin)

    def objective(self, u: Float[Array, "d P"]) -> Scalar:
        return self._value(u, self.predict(u))

    def _value(self, u: Float[Array, "d P"], z: Float[Array, "n"]) -> Scalar:
        return self.loss(z) + self.sparsity * group_norms(u[:, 1:]).sum() + self.ridge / 2 * jnp.sum(u[:, 0] ** 2)

    def bounds(self, u: Float[Array, "d P"], multipliers: Array | None = None) -> Bounds:
        """Objective and dual value: with a = c sigmoid(margin - z) and c = min(1, sparsity / max_i ||q_i||),

        sum_j weight_j (margin_j a_j + H(a_j)) - ||sum_j weight_j a_j (x_w,j - x_l,j)||^2 / (2 ridge),
        H the binary entropy. ``ridge`` must be positive.
        """
        z = self.predict(u)
        return self.bounds_at(u, z, self.predict_adjoint(self.slope(z)))

    def bounds_at(self, u: Float[Array, "d P"], z: Float[Array, "n"], gradient: Float[Array, "d P"]) -> Bounds:
        """:meth:`bounds` for z = F u and gradient = F^T slope(z), which a solver has at hand."""
        a = jax.nn.sigmoid(self.margin - z)
        largest = group_norms(gradient[:, 1:]).max(initial=0.0)
        c = jnp.minimum(1.0, self.sparsity / jnp.where(largest > 0, largest, 1.0))
        c = jnp.where(largest > 0, c, 1.0)
        entropy = jax.scipy.special.entr(c * a) + jax.scipy.special.entr(1 - c * a)
        linear = c * c * jnp.sum(gradient[:, 0] ** 2) / (2 * self.ridge)
        return Bounds(self._value(u, z), jnp.sum(self.weight * (self.margin * c * a + entropy)) - linear)

    def duality_gap(self, u: Float[Array, "d P"], multipliers: Array | None = None) -> Scalar:
        return self.bounds(u, multipliers).gap

    def in_double(self) -> PairProgram:
        """Everything but the rows in float64; the products widen those block by block."""
        numbers = map(widen, (self.margin, self.weight, self.sparsity, self.ridge))
        return PairProgram(self.rows, self.patterns, *numbers)


@dataclass(frozen=True)
class PairData:
    """What stays the same along a path, on the device: rows (2, n, d), margin (n,) and weight (n,).

    ``gate_rows`` (2, n, e) are the vectors the gates look at: the rows themselves unless given.
    """

    rows: Float[Array, "2 n d"]
    margin: Float[Array, "n"]
    weight: Float[Array, "n"]
    gate_rows: Float[Array, "2 n e"] | None = None

    @property
    def seen_by_gates(self) -> Float[Array, "2 n e"]:
        return self.rows if self.gate_rows is None else self.gate_rows

    def program(self, gates: Float[np.ndarray, "e m"], *, sparsity: float, ridge: float) -> PairProgram:
        """The program with gates (e, m), closed columns added up to the next compiled width."""
        dtype = self.rows.dtype
        patterns = _patterns(self.seen_by_gates, jnp.asarray(_padded(gates), dtype), jnp.asarray(gates.shape[1]))
        levels = jnp.asarray(sparsity, dtype), jnp.asarray(ridge, dtype)
        return PairProgram(self.rows, patterns, self.margin, self.weight, *levels)


def _padded(gates: Float[np.ndarray, "e m"]) -> Float[np.ndarray, "e k"]:
    """Gates with zero columns up to the next width that is compiled."""
    m = gates.shape[1]
    width = next((width for width in WIDTHS if width > m), m + 1) - 1
    return np.pad(gates, ((0, 0), (0, width - m)))


@jax.jit
def _patterns(rows: Float[Array, "2 n e"], gates: Float[Array, "e k"], n_gates: Scalar) -> Bool[Array, "2 n 1+k"]:
    is_open = (matmul(rows, gates) >= 0) & (jnp.arange(gates.shape[1]) < n_gates)[None, None]
    return jnp.concatenate([jnp.ones((*rows.shape[:-1], 1), bool), is_open], axis=-1)


@jax.jit
def _predict(program: PairProgram, u: Float[Array, "d P"]) -> Float[Array, "n"]:
    return program.predict(u)


@dataclass(frozen=True)
class PairModel:
    """Weights b (d,), gates (e, m) and u (d, m) of a solved program, in the coordinates of its rows.

    ``violation`` is max ||q(h)|| / sparsity over the gates a search found, at least 1 when there are neurons; ``found``
    (e, k) are the best directions of that search, from which the next one starts.
    """

    linear: Float[np.ndarray, "d"]
    gates: Float[np.ndarray, "e m"]
    weights: Float[np.ndarray, "d m"]
    solution: Solution
    violation: float = float("nan")
    found: Float[np.ndarray, "e k"] | None = None

    @property
    def n_neurons(self) -> int:
        return int(self.gates.shape[1])

    def scores(
        self, rows: Float[np.ndarray, "*rows d"], gate_rows: Float[np.ndarray, "*rows e"] | None = None
    ) -> Float[np.ndarray, "*rows"]:
        """g(x) for rows (..., d); ``gate_rows`` (..., e) if the gates look elsewhere."""
        scores: Float[np.ndarray, "*rows"] = rows @ self.linear
        if self.n_neurons:
            is_open = (rows if gate_rows is None else gate_rows) @ self.gates >= 0
            scores = scores + np.where(is_open, rows @ self.weights, 0).sum(axis=-1)
        return scores

    def stacked(self) -> Float[np.ndarray, "d 1+m"]:
        """(d, 1 + m): the linear block, then the neurons."""
        return np.concatenate([self.linear[:, None], self.weights], axis=1)


# Called with the step, the score differences (n,) of all pairs, held out ones too, and the step's history row.
OnStep = Callable[[int, np.ndarray, dict[str, Any]], None]


def solve_pairs(
    data: PairData,
    gates: Float[np.ndarray, "e m"],
    *,
    sparsity: float,
    ridge: float,
    start: Float[np.ndarray, "d k"] | None = None,
    tolerance: float = 1e-4,
    max_steps: int = 60,
    exact: bool = True,
    on_step: OnStep | None = None,
) -> PairModel:
    """Solve the program for fixed gates (e, m) from ``start`` (d, 1 + m); neurons that end at zero are dropped."""
    program = data.program(gates, sparsity=sparsity, ridge=ridge)
    first = np.zeros(program.zeros().shape)
    if start is not None:
        first[:, : start.shape[1]] = start
    watch: OnStep | None = None
    if on_step is not None:
        report = on_step
        watch = lambda step, u, row: report(step, np.asarray(_predict(program, jnp.asarray(u))), row)  # noqa: E731
    solution = solve(
        program,
        GatedNewton(),
        tolerance=tolerance,
        max_steps=max_steps,
        start=jnp.asarray(first, data.rows.dtype),
        exact=exact,
        on_step=watch,
    )
    neurons = solution.value[:, 1 : 1 + gates.shape[1]]
    kept = np.abs(neurons).max(axis=0, initial=0.0) > 0
    return PairModel(solution.value[:, 0], gates[:, kept], neurons[:, kept], solution)
