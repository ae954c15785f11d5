"""The one-program pairwise head: a linear block, gated neurons, the logistic loss on pairs, and the gates learnt.

    min_{b,u} sum_j weight_j softplus(margin_j - (g(x_w,j) - g(x_l,j))) + sparsity sum_i ||u_i|| + ridge/2 ||b||^2
    g(x) = b.x + sum_i 1(h_i.x >= 0) u_i.x

Convex for fixed gates h_i. Without neurons it is ridge-regularised linear Bradley-Terry. Gates are found by pattern
generation: solve, search for gates whose optimality condition is most violated, add them, solve again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coala.convex.gates import ascend, distinct
from coala.convex.linear import matmul
from coala.convex.newton import GatedNewton
from coala.convex.program import Bounds, gated_product, gated_product_adjoint, group_norms, stationarity
from coala.convex.solvers import Solution, solve

# Columns of a program, the linear block included: few shapes, few compilations, each of which costs a second or two.
WIDTHS = (16, 40, 136, 520)
NEW_GATES = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairProgram:
    """The pairwise program for fixed gates; all fields dynamic.

    ``rows`` (2, n, d): the chosen rows and the rejected. ``patterns`` (2, n, 1 + m) bool: column 0, all open, is the
    linear block b; a closed column is padding. ``margin`` and ``weight`` (n,); a pair of weight 0 is held out.
    Weights are (d, 1 + m), column 0 = b.
    """

    rows: jax.Array
    patterns: jax.Array
    margin: jax.Array
    weight: jax.Array
    sparsity: jax.Array
    ridge: jax.Array

    @property
    def _is_linear(self) -> jax.Array:
        return jnp.arange(self.patterns.shape[-1]) == 0

    @property
    def levels(self) -> jax.Array:
        return jnp.where(self._is_linear, 0.0, self.sparsity).astype(self.rows.dtype)

    @property
    def ridges(self) -> jax.Array:
        return jnp.where(self._is_linear, self.ridge, 0.0).astype(self.rows.dtype)

    def zeros(self) -> jax.Array:
        return jnp.zeros((self.rows.shape[-1], self.patterns.shape[-1]), self.rows.dtype)

    def predict(self, u: jax.Array) -> jax.Array:
        """Score differences g(x_w) - g(x_l), (n,)."""
        scores = gated_product(self.rows, self.patterns, u)
        return scores[0] - scores[1]

    def predict_adjoint(self, z: jax.Array) -> jax.Array:
        return gated_product_adjoint(self.rows, self.patterns, jnp.stack([z, -z]))

    def diagonal(self, curvature: jax.Array) -> jax.Array:
        """Diagonal of F^T diag(curvature) F, (d, 1 + m)."""
        squares = gated_product_adjoint(self.rows**2, self.patterns, jnp.stack([curvature, curvature]))
        crossed = gated_product_adjoint(self.rows[0] * self.rows[1], self.patterns[0] & self.patterns[1], curvature)
        return jnp.maximum(squares - 2 * crossed, 0.0)

    def loss(self, z: jax.Array) -> jax.Array:
        return jnp.sum(self.weight * jax.nn.softplus(self.margin - z))

    def slope(self, z: jax.Array) -> jax.Array:
        return -self.weight * jax.nn.sigmoid(self.margin - z)

    def curvature(self, z: jax.Array) -> jax.Array:
        return self.weight * jax.nn.sigmoid(self.margin - z) * jax.nn.sigmoid(z - self.margin)

    def objective(self, u: jax.Array) -> jax.Array:
        return self._value(u, self.predict(u))

    def _value(self, u: jax.Array, z: jax.Array) -> jax.Array:
        return self.loss(z) + self.sparsity * group_norms(u[:, 1:]).sum() + self.ridge / 2 * jnp.sum(u[:, 0] ** 2)

    def bounds(self, u: jax.Array, multipliers: jax.Array | None = None) -> Bounds:
        """Objective and dual value: with a = c sigmoid(margin - z) and c = min(1, sparsity / max_i ||q_i||),

        sum_j weight_j (margin_j a_j + H(a_j)) - ||sum_j weight_j a_j (x_w,j - x_l,j)||^2 / (2 ridge),
        H the binary entropy. ``ridge`` must be positive.
        """
        z = self.predict(u)
        a = jax.nn.sigmoid(self.margin - z)
        q = self.predict_adjoint(self.weight * a)
        largest = group_norms(q[:, 1:]).max(initial=0.0)
        c = jnp.minimum(1.0, self.sparsity / jnp.where(largest > 0, largest, 1.0))
        c = jnp.where(largest > 0, c, 1.0)
        entropy = jax.scipy.special.entr(c * a) + jax.scipy.special.entr(1 - c * a)
        linear = c * c * jnp.sum(q[:, 0] ** 2) / (2 * self.ridge)
        return Bounds(self._value(u, z), jnp.sum(self.weight * (self.margin * c * a + entropy)) - linear)

    def duality_gap(self, u: jax.Array, multipliers: jax.Array | None = None) -> jax.Array:
        return self.bounds(u, multipliers).gap

    def kkt(self, u: jax.Array, multipliers: jax.Array | None = None) -> jax.Array:
        """Largest violation of the optimality conditions over the groups."""
        gradient = self.predict_adjoint(self.slope(self.predict(u))) + self.ridges * u
        return stationarity(gradient, u, self.levels).max(initial=0.0)


@dataclass(frozen=True)
class PairData:
    """What stays the same along a path: rows (2, n, d), margin (n,) and weight (n,), on the device."""

    rows: jax.Array
    margin: jax.Array
    weight: jax.Array

    def program(self, gates: np.ndarray, *, sparsity: float, ridge: float) -> PairProgram:
        """The program with gates (d, m), closed columns added up to the next compiled width."""
        dtype = self.rows.dtype
        patterns = _patterns(self.rows, jnp.asarray(_padded(gates), dtype), jnp.asarray(gates.shape[1]))
        levels = jnp.asarray(sparsity, dtype), jnp.asarray(ridge, dtype)
        return PairProgram(self.rows, patterns, self.margin, self.weight, *levels)


def _padded(gates: np.ndarray) -> np.ndarray:
    """Gates with zero columns up to the next width that is compiled."""
    m = gates.shape[1]
    width = next((width for width in WIDTHS if width > m), m + 1) - 1
    return np.pad(gates, ((0, 0), (0, width - m)))


@jax.jit
def _patterns(rows: jax.Array, gates: jax.Array, n_gates: jax.Array) -> jax.Array:
    is_open = (matmul(rows, gates) >= 0) & (jnp.arange(gates.shape[1]) < n_gates)
    return jnp.concatenate([jnp.ones((*rows.shape[:-1], 1), bool), is_open], axis=-1)


@jax.jit
def _predict(program: PairProgram, u: jax.Array) -> jax.Array:
    return program.predict(u)


@dataclass(frozen=True)
class PairModel:
    """Weights b (d,), gates and u (d, m) of a solved program, in the coordinates of its rows.

    ``violation`` is max ||q(h)|| / sparsity over the gates a search found, at least 1 when there are neurons; ``found``
    (d, k) are the best directions of that search, from which the next one starts.
    """

    linear: np.ndarray
    gates: np.ndarray
    weights: np.ndarray
    solution: Solution
    violation: float = float("nan")
    found: np.ndarray | None = None

    @property
    def n_neurons(self) -> int:
        return int(self.gates.shape[1])

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """g(x) for rows (..., d)."""
        scores: np.ndarray = rows @ self.linear
        if self.n_neurons:
            scores = scores + np.where(rows @ self.gates >= 0, rows @ self.weights, 0).sum(axis=-1)
        return scores

    def stacked(self) -> np.ndarray:
        """(d, 1 + m): the linear block, then the neurons."""
        return np.concatenate([self.linear[:, None], self.weights], axis=1)


# Called with the step, the score differences (n,) of all pairs, held out ones too, and the step's history row.
OnStep = Callable[[int, np.ndarray, dict[str, Any]], None]


def solve_pairs(
    data: PairData,
    gates: np.ndarray,
    *,
    sparsity: float,
    ridge: float,
    start: np.ndarray | None = None,
    tolerance: float = 1e-4,
    max_steps: int = 60,
    exact: bool = True,
    on_step: OnStep | None = None,
) -> PairModel:
    """Solve the program for fixed gates (d, m) from ``start`` (d, 1 + m); neurons that end at zero are dropped."""
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


# --- gates ---------------------------------------------------------------------------------------------------------


def search_gates(
    data: PairData,
    model: PairModel,
    *,
    n_starts: int,
    n_steps: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Gates h (d, k) with large ||q(h)||, q(h) = sum_j dual_j (1(h.x_w >= 0) x_w - 1(h.x_l >= 0) x_l), best first.

    Iterates h <- +-q(h) / ||q(h)|| from random starts, from what the model's last search found, and from its own gates
    and weights; keeps the best of each run. A local search of a non-convex problem: it may miss the maximum.
    """
    rows = np.asarray(data.rows)
    margins = _margins(data, model)
    dual = np.asarray(data.weight) / (1 + np.exp(np.clip(margins - np.asarray(data.margin), -60, 60)))
    d = rows.shape[-1]
    known = [model.weights, model.gates, -model.weights]
    if model.found is not None:
        known.append(model.found[:, : n_starts // 4])
    warm = np.concatenate(known, axis=1)[:, : n_starts // 2]
    starts = np.concatenate([warm, rng.standard_normal((d, n_starts - warm.shape[1]))], axis=1)
    starts /= np.maximum(np.linalg.norm(starts, axis=0), 1e-30)
    signs = np.where(np.arange(n_starts) % 2 == 0, 1.0, -1.0)
    dtype = data.rows.dtype
    best, norms = ascend(
        data.rows,
        jnp.asarray(np.stack([dual, -dual]), dtype),
        jnp.asarray(starts, dtype),
        jnp.asarray(signs, dtype),
        n_steps,
    )
    order = np.argsort(-np.asarray(norms), kind="stable")
    return np.asarray(best)[:, order], np.asarray(norms)[order]


def _margins(data: PairData, model: PairModel) -> np.ndarray:
    chosen, rejected = model.scores(np.asarray(data.rows))
    return np.asarray(chosen - rejected)


@dataclass(frozen=True)
class Search:
    """How hard to look for gates: random starts, iterations of each, rounds of adding, neurons at most."""

    n_starts: int = 256
    n_steps: int = 40
    max_rounds: int = 8
    max_neurons: int = 32
    slack: float = 0.02


def learn_gates(
    data: PairData,
    model: PairModel,
    *,
    sparsity: float,
    ridge: float,
    search: Search,
    rng: np.random.Generator,
    tolerance: float = 1e-4,
    exact: bool = True,
    on_step: OnStep | None = None,
) -> PairModel:
    """Pattern generation from ``model``: re-solve and add up to 4 violating gates until none is found.

    Ends when the largest violation found is at most (1 + slack) sparsity, after ``max_rounds`` or at ``max_neurons``.
    """
    gates, start = model.gates, model.stacked()
    for turn in range(search.max_rounds + 1):
        found = model.found
        model = solve_pairs(
            data, gates, sparsity=sparsity, ridge=ridge, start=start, tolerance=tolerance, exact=exact, on_step=on_step
        )
        model = replace(model, found=found)
        candidates, norms = search_gates(data, model, n_starts=search.n_starts, n_steps=search.n_steps, rng=rng)
        # A search can miss the value 1 that the neurons of the model attain.
        violation = max(float(norms[0]) / sparsity, 1.0 if model.n_neurons else 0.0)
        model = replace(model, violation=violation, found=candidates[:, :64])
        room = min(NEW_GATES, search.max_neurons - model.n_neurons)
        if violation <= 1 + search.slack or room <= 0 or turn == search.max_rounds:
            break
        new = distinct(candidates[:, norms > sparsity], model.gates, room)
        if not new.shape[1]:
            break
        gates = np.concatenate([model.gates, new], axis=1)
        start = model.stacked()
    return model
