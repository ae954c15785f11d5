"""Near-global training of the two-layer ReLU network under the squared loss, by generating activation patterns.

    min_{v,w}  J = 1/2 ||sum_i (X v_i)_+ - (X w_i)_+ - y||^2 + sparsity sum_i (||v_i|| + ||w_i||)

Alternates Newton's method on the neurons at hand, whose patterns follow their weights, with a search for the neuron
whose optimality condition is violated most. What is proved concerns the patterns of the final neurons; what is said of
all patterns is an estimate, because the search is local. See docs/derivations/pattern_generation.md.

Knows rows and labels; nothing of pairs, heads, validation or files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key, Scalar, Shaped

from coala.convex.gate_sampling import distinct
from coala.convex.linear import matmul
from coala.convex.papers.pattern_steps import Layer, Neurons, newton_step, search_neurons
from coala.convex.papers.recover import ReluNetwork, recover_network
from coala.convex.program import Program
from coala.convex.solvers import Status, certify
from coala.values import CoalaError

Rows = Float[np.ndarray, "n d"]
PerRow = Float[np.ndarray, "n"]
Multipliers = Float[Array, "2 n P"]
OnRound = Callable[[int, dict[str, Any]], None]


@dataclass(frozen=True)
class NetworkSolution:
    """A network with what was proved of it and what was only estimated.

    ``weights`` (2, d, P) are v and w, one pattern per neuron and the block of the other sign zero; ``network`` is the
    same as two layers. ``objective`` is J. Proved: the optimal value of the cone-constrained program
    (:class:`~coala.convex.program.Program`) with the ``patterns`` (n, P) of these neurons lies in
    [objective - gap, objective]. Estimated, not proved: that of all networks lies in
    [objective - estimated_gap, objective]; this supposes that ``violation``, the largest dual norm found over the
    sparsity, is the largest there is.
    """

    weights: Float[np.ndarray, "2 d P"]
    patterns: Bool[np.ndarray, "n P"]
    network: ReluNetwork
    objective: float
    gap: float
    estimated_gap: float
    violation: float
    status: Status
    history: list[dict[str, Any]]

    @property
    def n_neurons(self) -> int:
        return len(self.network.second_layer)

    @property
    def relative_gap(self) -> float:
        """Proved gap over objective, for the patterns of the neurons; 0 for an objective of 0."""
        return self.gap / self.objective if self.objective > 0 else 0.0

    @property
    def relative_estimated_gap(self) -> float:
        """Estimated gap over objective, for all patterns; 0 for an objective of 0."""
        return self.estimated_gap / self.objective if self.objective > 0 else 0.0


@partial(jax.jit, static_argnames="n_steps")
def _multipliers(program: Program, u: Float[Array, "2 d P"], start: Multipliers, n_steps: int) -> Multipliers:
    """L >= 0, (2, n, P), with small ||X^T(+-D_i z + E_i L_i)||, each group's non-negative least squares problem.

    Accelerated projected gradients from ``start``; z is the residual at u. Any L >= 0 makes a valid bound.
    """
    fixed = program.predict_adjoint(program.y - program.predict(u))
    steepest = jnp.linalg.norm(matmul(program.X.T, program.X), 2)
    steepness = jnp.where(steepest > 0, steepest, 1.0)

    def advance(step: Scalar, state: tuple[Multipliers, Multipliers]) -> tuple[Multipliers, Multipliers]:
        last, ahead = state
        slope = program.cone(fixed + program.cone_adjoint(ahead))
        new = jnp.maximum(ahead - slope / steepness, 0.0)
        return new, new + step / (step + 3.0) * (new - last)

    return jnp.asarray(jax.lax.fori_loop(0, n_steps, advance, (start, start))[0])


@dataclass(frozen=True)
class _Model:
    """Neurons being trained, in float64: weights (d, m), signs (m,), openings (n, m), promise of the last step."""

    X: Rows
    y: PerRow
    sparsity: float
    weights: Float[np.ndarray, "d m"]
    signs: Float[np.ndarray, "m"]
    opening: Float[np.ndarray, "n m"]
    promise: float = np.inf

    @classmethod
    def of(
        cls, X: Rows, y: PerRow, sparsity: float, weights: Float[np.ndarray, "d m"], signs: Float[np.ndarray, "m"]
    ) -> _Model:
        alive = np.linalg.norm(weights, axis=0) > 0
        return cls(X, y, sparsity, weights[:, alive], signs[alive], (X @ weights[:, alive] > 0).astype(np.float64))

    @property
    def n_neurons(self) -> int:
        return len(self.signs)

    @property
    def residual(self) -> PerRow:
        return np.asarray(self.y - np.maximum(self.X @ self.weights, 0.0) @ self.signs)

    @property
    def objective(self) -> float:
        residual = self.residual
        return float(residual @ residual / 2 + self.sparsity * np.linalg.norm(self.weights, axis=0).sum())

    def _padded(self, columns: Shaped[np.ndarray, "... m"]) -> Shaped[np.ndarray, "... k"]:
        """``columns`` with zeros up to 16, 32, 64, ... neurons: dead ones, for few shapes and few compilations."""
        width = max(16, 1 << (self.n_neurons - 1).bit_length())
        return np.pad(columns, [(0, 0)] * (columns.ndim - 1) + [(0, width - self.n_neurons)])

    def descend(self, max_steps: int, tolerance: float, softness: float, dtype: DTypeLike) -> _Model:
        """Newton steps until one promises no more than ``tolerance`` of J."""
        as_arrays = partial(jnp.asarray, dtype=dtype)
        layer = Layer(*map(as_arrays, (self.X, self.y, self._padded(self.signs), self.sparsity)))
        neurons = Neurons(*map(as_arrays, (self._padded(self.weights), self._padded(self.opening), np.inf)))
        objective = self.objective
        for _ in range(max_steps if self.n_neurons else 0):
            neurons = newton_step(layer, neurons, as_arrays(softness))
            if float(neurons.promise) <= tolerance * objective:
                break
        weights = np.asarray(neurons.weights, np.float64)[:, : self.n_neurons]
        alive = np.linalg.norm(weights, axis=0) > 0
        opening = np.asarray(neurons.opening, np.float64)[:, : self.n_neurons][:, alive]
        return replace(
            self,
            weights=weights[:, alive],
            signs=self.signs[alive],
            opening=opening,
            promise=float(neurons.promise) if self.n_neurons else 0.0,
        )

    def merged(self, cosine: float = 0.999) -> _Model:
        """Parallel neurons of one sign as one, unless that raises J."""
        if not self.n_neurons:
            return self
        unit = self.weights / np.linalg.norm(self.weights, axis=0)
        alike = (unit.T @ unit > cosine) & (self.signs[:, None] == self.signs)
        first = alike.argmax(axis=0)
        weights = np.zeros_like(self.weights)
        np.add.at(weights.T, first, self.weights.T)
        kept = np.unique(first)
        fewer = replace(self, weights=weights[:, kept], signs=self.signs[kept], opening=self.opening[:, kept])
        return fewer if fewer.objective <= self.objective else self

    def search(
        self, directions: Float[np.ndarray, "d k"], n_steps: int, dtype: DTypeLike
    ) -> tuple[Float[np.ndarray, "d k"], Float[np.ndarray, "k"], Float[np.ndarray, "k"]]:
        """Unit vectors (d, k), their signs (k,) and signs z^T (X h)_+ (k,), the largest first.

        Starts from the neurons at hand and, as far as there is room, from ``directions`` (d, k) with either sign.
        """
        signs = np.where(np.arange(directions.shape[1]) % 2 == 0, 1.0, -1.0)
        own = min(self.n_neurons, len(signs) // 2)
        starts = np.concatenate([self.weights[:, :own], directions[:, own:]], axis=1)
        signs[:own] = self.signs[:own]
        starts = starts / np.maximum(np.linalg.norm(starts, axis=0), np.finfo(np.float64).tiny)
        given = (jnp.asarray(a, dtype) for a in (self.X, self.residual, starts, signs))
        found, values = search_neurons(*given, n_steps)
        order = np.argsort(-np.asarray(values), kind="stable")
        return np.asarray(found, np.float64)[:, order], signs[order], np.asarray(values, np.float64)[order]

    def extended(self, found: Float[np.ndarray, "d k"], signs: Float[np.ndarray, "k"], limit: int) -> _Model:
        """With up to ``limit`` of the neurons found, distinct from those at hand, at weights that lower J.

        Each gets the weight that would be best for it alone; then all of these are scaled by the best common factor.
        """

        def signed(directions: Float[np.ndarray, "d k"], signs: Float[np.ndarray, "k"]) -> Float[np.ndarray, "d+1 k"]:
            # One more coordinate sets neurons of opposite signs apart; a cosine c of equal signs becomes (1 + c) / 2.
            return np.concatenate([directions / np.linalg.norm(directions, axis=0), signs[None]])

        chosen = distinct(signed(found, signs), signed(self.weights, self.signs), limit, cosine=0.99)
        new, new_signs = np.sqrt(2) * chosen[:-1], np.sign(chosen[-1])
        residual, active = self.residual, np.maximum(self.X @ new, 0.0)
        alone = (new_signs * (residual @ active) - self.sparsity) / np.maximum((active**2).sum(axis=0), 1e-300)
        together = active @ (new_signs * alone)
        factor = (residual @ together - self.sparsity * alone.sum()) / max(together @ together, 1e-300)
        return replace(
            self,
            weights=np.concatenate([self.weights, factor * alone * new], axis=1),
            signs=np.concatenate([self.signs, new_signs]),
            opening=np.concatenate([self.opening, (active > 0).astype(np.float64)], axis=1),
            promise=np.inf,
        )

    def estimate(self, violation: float) -> float:
        """The dual value of the scaled residual, a lower bound if no neuron violates its condition by more."""
        z = self.residual
        size = z @ z
        a = min(max(self.y @ z / size, 0.0), 1 / violation) if size > 0 else 0.0
        return float(a * (self.y @ z) - a * a / 2 * size)

    def certified(self, n_steps: int) -> tuple[Float[np.ndarray, "2 d m"], Bool[np.ndarray, "n m"], float, float]:
        """v and w (2, d, m), patterns (n, m), and the bounds of the program that holds just these patterns."""
        a = self.X @ self.weights
        # An activation that is zero but for rounding counts as open, lest equal rows fall on different sides.
        patterns = a >= -32 * np.finfo(np.float64).eps * np.abs(a).max(axis=0, initial=0.0)
        pull = self.residual[:, None] * self.signs
        # At a kink, the multiplier makes up for the part of the pull that the neuron, half open, does not feel.
        own = np.maximum(-pull, 0.0) * np.where(patterns, 1 - self.opening, self.opening)
        positive = self.signs > 0
        u = np.stack([self.weights * positive, self.weights * ~positive])
        start = np.stack([own * positive, own * ~positive])
        # Closed patterns without weights make up the width: they change nothing but the shape.
        program = Program(*map(jnp.asarray, (self.X, self.y, self._padded(patterns), self.sparsity)))
        multipliers = _multipliers(program, jnp.asarray(self._padded(u)), jnp.asarray(self._padded(start)), n_steps)
        objective, lower = certify(program, self._padded(u), multipliers)
        return u, patterns, objective, lower


def descended(
    X: Rows, y: PerRow, sparsity: float, key: Key[Array, ""], width: int, n_steps: int
) -> Float[np.ndarray, "2 d P"]:
    """Weights (2, d, width) to which L-BFGS takes a random network with weight decay: a local optimum, or near one.

    From there pattern generation goes on; it never ends above what descent alone would reach.
    """
    from scipy.optimize import minimize

    with jax.enable_x64(True):
        draw = np.asarray(jax.random.normal(jax.random.fold_in(key, 2**31), (width, X.shape[1] + 1)))
    draw = draw.copy()
    draw[:, :-1] /= np.sqrt(X.shape[1])
    split = width * X.shape[1]

    def value_and_gradient(flat: Float[np.ndarray, "k"]) -> tuple[float, Float[np.ndarray, "k"]]:
        first, second = flat[:split].reshape(width, -1), flat[split:]
        active = np.maximum(X @ first.T, 0)
        residual = active @ second - y
        onto_first = ((active > 0) * residual[:, None] * second).T @ X
        gradient = np.concatenate([onto_first.ravel(), active.T @ residual]) + sparsity * flat
        return float(residual @ residual / 2 + sparsity / 2 * flat @ flat), gradient

    options = {"maxiter": n_steps, "maxfun": 2 * n_steps, "maxcor": 20}
    flat = np.concatenate([draw[:, :-1].ravel(), draw[:, -1]])
    end = minimize(value_and_gradient, flat, jac=True, method="L-BFGS-B", options=options).x
    first, second = end[:split].reshape(width, -1), end[split:]
    blocks = (first * np.abs(second)[:, None]).T
    # Weight decay shrinks dead neurons only slowly; what no row feels is no neuron.
    norms = np.linalg.norm(blocks, axis=0)
    blocks = np.where(norms > 1e-6 * norms.max(initial=0.0), blocks, 0.0)
    return np.stack([np.where(second > 0, blocks, 0.0), np.where(second < 0, blocks, 0.0)])


@dataclass(frozen=True)
class PatternGeneration:
    """How to train, in rounds: from weights given, from where L-BFGS takes ``first_neurons`` at random, or from none.

    A round makes Newton steps, searches for violating neurons and adds some of them. Training ends when no neuron found
    violates its optimality condition by more than ``slack`` and Newton's method promises less than ``tolerance`` of J.
    ``softness`` is the width of the smoothing at a kink, relative to a neuron's activations: it decides the path, not
    the optimum.
    """

    first_neurons: int = 0
    first_steps: int = 400
    new_neurons: int = 24
    max_neurons: int = 256
    max_rounds: int = 20
    newton_steps: int = 25
    n_starts: int = 256
    search_steps: int = 60
    certificate_steps: int = 300
    slack: float = 0.01
    tolerance: float = 1e-5
    softness: float = 0.05
    dtype: DTypeLike = np.float32

    def run(
        self,
        X: Rows,
        y: PerRow,
        sparsity: float,
        key: Key[Array, ""],
        *,
        start: Float[np.ndarray, "2 d P"] | None = None,
        on_round: OnRound | None = None,
    ) -> NetworkSolution:
        """Train on rows X (n, d) and labels y (n,) from weights ``start`` (2, d, P), or as set.

        Iterations are in ``dtype``; J, the bounds and the weights are in float64. J never rises from round to round.
        ``on_round`` gets the round's number and its row of the history. Raises :class:`CoalaError` for a sparsity of 0,
        at which no search could end.
        """
        if not sparsity > 0:
            raise CoalaError(f"The sparsity is {sparsity:g}; expected a number above 0.")
        X, y = np.asarray(X, np.float64), np.asarray(y, np.float64)
        n, d = X.shape
        # With fewer rows than features, neurons live in the span of the rows.
        basis = np.linalg.qr(X.T)[0] if n < d else np.eye(d)
        first = np.zeros((2, d, 0)) if start is None else np.asarray(start, np.float64)
        if start is None and self.first_neurons:
            first = descended(X, y, float(sparsity), key, self.first_neurons, self.first_steps)
        weights, signs = np.concatenate([first[0], first[1]], axis=1), np.repeat([1.0, -1.0], first.shape[2])
        with jax.enable_x64(True):
            model = _Model.of(X @ basis, y, float(sparsity), basis.T @ weights, signs)
            history: list[dict[str, Any]] = []
            status = Status.MAX_STEPS
            for turn in range(self.max_rounds + 1):
                trained = model.descend(self.newton_steps, self.tolerance, self.softness, self.dtype).merged()
                settled = trained.promise <= self.tolerance * trained.objective
                model = trained if trained.objective <= model.objective else model
                random = np.asarray(jax.random.normal(jax.random.fold_in(key, turn), (d, self.n_starts)))
                found, sides, values = model.search(basis.T @ random, self.search_steps, self.dtype)
                # A search can miss the value 1 that the neurons of the model attain.
                violation = max(float(values[0]) / sparsity, 1.0)
                row = {"round": turn, "objective": model.objective, "violation": violation}
                history.append({**row, "n_neurons": model.n_neurons})
                if on_round is not None:
                    on_round(turn, history[-1])
                if violation <= 1 + self.slack and settled:
                    status = Status.CONVERGED
                    break
                room = min(self.new_neurons, self.max_neurons - model.n_neurons)
                violates = values > (1 + self.slack) * sparsity
                if room > 0 and turn < self.max_rounds and violates.any():
                    model = model.extended(found[:, violates], sides[violates], room)
            u, patterns, objective, lower = model.certified(self.certificate_steps)
            # At an optimum the bound may pass the objective by rounding.
            gap = max(objective - lower, 0.0)
            estimated = max(objective - model.estimate(violation), gap)
        u = np.einsum("de,sem->sdm", basis, u)
        network = recover_network(u)
        return NetworkSolution(u, patterns, network, objective, gap, estimated, violation, status, history)
