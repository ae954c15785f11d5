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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from coala.convex.gates import distinct
from coala.convex.linear import matmul, pcg
from coala.convex.program import Program, group_norms
from coala.convex.pytree import pytree
from coala.convex.recover import Network, recover_network
from coala.convex.solvers import Status, certify

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

    weights: np.ndarray
    patterns: np.ndarray
    network: Network
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


@pytree()
@dataclass(frozen=True)
class _Layer:
    """J with neurons of fixed signs: rows X (n, d), labels y (n,), signs (m,) of +-1; weights are (d, m)."""

    X: jax.Array
    y: jax.Array
    signs: jax.Array
    sparsity: jax.Array

    def value(self, activations: jax.Array, weights: jax.Array) -> jax.Array:
        residual = self.y - matmul(activations, self.signs)
        return jnp.vdot(residual, residual) / 2 + self.sparsity * group_norms(weights).sum()


class _Neurons(NamedTuple):
    """Weights (d, m), how far each is open at each row (n, m) in [0, 1], and the decrease the last step promised."""

    weights: jax.Array
    opening: jax.Array
    promise: jax.Array


def _rectify(a: jax.Array, opening: jax.Array, width: jax.Array) -> tuple[jax.Array, jax.Array]:
    """max_{0<=t<=1} t a - width/2 (t - opening)^2 and its derivative t: the rectifier (a)_+ = max_t t a, smoothed.

    Rows at a kink of the optimum keep a = 0 and 0 < t < 1. As the opening tends to t the smoothing vanishes there at
    any width: this is the method of multipliers, and needs no width that tends to zero.
    """
    t = jnp.clip(opening + a / width, 0.0, 1.0)
    return t * a - width / 2 * (t - opening) ** 2, t


@jax.jit
def _objective(layer: _Layer, weights: jax.Array) -> jax.Array:
    return layer.value(jnp.maximum(matmul(layer.X, weights), 0.0), weights)


@jax.jit
def _newton_step(layer: _Layer, neurons: _Neurons, softness: jax.Array) -> _Neurons:
    """Newton's direction on the smoothed J, halved until it descends, then one update of the openings.

    The Hessian leaves out what is concave; its block for each neuron, factored, preconditions the conjugate gradients.
    A neuron that would pass through zero stays there, and stays dead.
    """
    X, signs, weights = layer.X, layer.signs, neurons.weights
    norms = group_norms(weights)
    alive = norms > 0
    unit = weights / jnp.where(alive, norms, 1.0)
    bending = layer.sparsity / jnp.where(alive, norms, 1.0)
    a = matmul(X, weights)
    size = jnp.sqrt((a**2).mean(axis=0))
    width = jnp.where(size > 0, softness * size, 1.0)
    active, t = _rectify(a, neurons.opening, width)
    pull = (layer.y - matmul(active, signs))[:, None] * signs
    gradient = jnp.where(alive, layer.sparsity * unit - matmul((t * pull).T, X).T, 0.0)
    kinked = jnp.where((t > 0) & (t < 1), jnp.maximum(-pull, 0.0), 0.0) / width
    steepest = matmul((t**2 + kinked).T, X**2).max(axis=1, initial=0.0) + bending
    damping = 10 * np.finfo(X.dtype).eps * steepest

    def hessian(p: jax.Array) -> jax.Array:
        b = matmul(X, p)
        onto = t * signs * matmul(t * b, signs)[:, None] + kinked * b
        curved = matmul(onto.T, X).T + bending * (p - unit * (unit * p).sum(axis=0)) + damping * p
        return jnp.where(alive, curved, 0.0)

    identity = jnp.eye(X.shape[1], dtype=X.dtype)

    def inverse_root(neuron: tuple[jax.Array, ...]) -> jax.Array:
        curvature, bend, along, damp = neuron
        block = matmul((X * curvature[:, None]).T, X) + bend * (identity - jnp.outer(along, along))
        root = jnp.linalg.cholesky(block + 10 * damp * identity)
        return jnp.asarray(jax.scipy.linalg.solve_triangular(root, identity, lower=True))

    roots = jax.lax.map(inverse_root, ((t**2 + kinked).T, bending, unit.T, damping))

    def precondition(r: jax.Array) -> jax.Array:
        half = jnp.einsum("mde,em->md", roots, r, precision="highest")
        return jnp.einsum("mde,md->em", roots, half, precision="highest")

    accuracy = jnp.linalg.norm(gradient) / (layer.sparsity * jnp.sqrt(jnp.maximum(alive.sum(), 1)))
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

    def attempt(length: jax.Array) -> tuple[jax.Array, ...]:
        moved = weights + length * direction
        kept = (weights * moved).sum(axis=0) > 0
        new = jnp.where(kept, moved, 0.0)
        image = jnp.where(kept, a + length * b, 0.0)
        value = layer.value(_rectify(image, neurons.opening, width)[0], new)
        too_long = (value > before + 1e-4 * length * slope + rounding) & (length > 1e-6)
        return length, new, image, too_long

    first = attempt(jnp.ones((), X.dtype))
    _, new, image, _ = jax.lax.while_loop(lambda trial: trial[3], lambda trial: attempt(trial[0] / 2), first)
    active, t = _rectify(image, neurons.opening, width)
    # A kink is a minimum along its row only where more activation hurts; elsewhere a neuron is open or closed.
    hurts = (layer.y - matmul(active, signs))[:, None] * signs < 0
    return _Neurons(new, jnp.where(hurts, t, (image > 0).astype(X.dtype)), -slope)


@partial(jax.jit, static_argnames="n_steps")
def search_neurons(
    X: jax.Array, residual: jax.Array, starts: jax.Array, signs: jax.Array, n_steps: int
) -> tuple[jax.Array, jax.Array]:
    """Unit vectors h (d, k) with large signs_k z^T (X h_k)_+, and those values (k,); z (n,) is the residual.

    Ascent with vanishing steps 1/2, 1/3, ... from ``starts``, keeping the best point met. Where z opposes a neuron the
    value has a ridge along the row's kink, on which steps of fixed length never settle; the maxima lie on such ridges.
    """
    tiny = np.finfo(X.dtype).tiny

    def advance(step: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        best, largest, h = state
        a = matmul(X, h)
        values = signs * matmul(residual, jnp.maximum(a, 0.0))
        slope = signs * matmul(jnp.where(a >= 0, residual[:, None], 0.0).T, X).T
        onward = h + slope / jnp.maximum(group_norms(slope), tiny) / (step + 2)
        better = values > largest
        unit = onward / jnp.maximum(group_norms(onward), tiny)
        return jnp.where(better, h, best), jnp.where(better, values, largest), unit

    none = jnp.full(starts.shape[1], -jnp.inf, X.dtype)
    best, largest, _ = jax.lax.fori_loop(0, n_steps, advance, (starts, none, starts))
    return best, largest


@partial(jax.jit, static_argnames="n_steps")
def _multipliers(program: Program, u: jax.Array, start: jax.Array, n_steps: int) -> jax.Array:
    """L >= 0, (2, n, P), with small ||X^T(+-D_i z + E_i L_i)||, each group's non-negative least squares problem.

    Accelerated projected gradients from ``start``; z is the residual at u. Any L >= 0 makes a valid bound.
    """
    fixed = program.predict_adjoint(program.y - program.predict(u))
    steepest = jnp.linalg.norm(matmul(program.X.T, program.X), 2)
    steepness = jnp.where(steepest > 0, steepest, 1.0)

    def advance(step: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        last, ahead = state
        slope = program.cone(fixed + program.cone_adjoint(ahead))
        new = jnp.maximum(ahead - slope / steepness, 0.0)
        return new, new + step / (step + 3.0) * (new - last)

    return jnp.asarray(jax.lax.fori_loop(0, n_steps, advance, (start, start))[0])


@dataclass(frozen=True)
class _Model:
    """Neurons being trained, in float64: weights (d, m), signs (m,), openings (n, m), promise of the last step."""

    X: np.ndarray
    y: np.ndarray
    sparsity: float
    weights: np.ndarray
    signs: np.ndarray
    opening: np.ndarray
    promise: float = np.inf

    @classmethod
    def of(cls, X: np.ndarray, y: np.ndarray, sparsity: float, weights: np.ndarray, signs: np.ndarray) -> _Model:
        alive = np.linalg.norm(weights, axis=0) > 0
        return cls(X, y, sparsity, weights[:, alive], signs[alive], (X @ weights[:, alive] > 0).astype(np.float64))

    @property
    def n_neurons(self) -> int:
        return len(self.signs)

    @property
    def residual(self) -> np.ndarray:
        return np.asarray(self.y - np.maximum(self.X @ self.weights, 0.0) @ self.signs)

    @property
    def objective(self) -> float:
        residual = self.residual
        return float(residual @ residual / 2 + self.sparsity * np.linalg.norm(self.weights, axis=0).sum())

    def _padded(self, columns: np.ndarray) -> np.ndarray:
        """``columns`` with zeros up to 16, 32, 64, ... neurons: dead ones, for few shapes and few compilations."""
        width = max(16, 1 << (self.n_neurons - 1).bit_length())
        return np.pad(columns, [(0, 0)] * (columns.ndim - 1) + [(0, width - self.n_neurons)])

    def descend(self, max_steps: int, tolerance: float, softness: float, dtype: DTypeLike) -> _Model:
        """Newton steps until one promises no more than ``tolerance`` of J."""
        as_arrays = partial(jnp.asarray, dtype=dtype)
        layer = _Layer(*map(as_arrays, (self.X, self.y, self._padded(self.signs), self.sparsity)))
        neurons = _Neurons(*map(as_arrays, (self._padded(self.weights), self._padded(self.opening), np.inf)))
        objective = self.objective
        for _ in range(max_steps if self.n_neurons else 0):
            neurons = _newton_step(layer, neurons, as_arrays(softness))
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
        self, directions: np.ndarray, n_steps: int, dtype: DTypeLike
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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

    def extended(self, found: np.ndarray, signs: np.ndarray, limit: int) -> _Model:
        """With up to ``limit`` of the neurons found, distinct from those at hand, at weights that lower J.

        Each gets the weight that would be best for it alone; then all of these are scaled by the best common factor.
        """

        def signed(directions: np.ndarray, signs: np.ndarray) -> np.ndarray:
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

    def certified(self, n_steps: int) -> tuple[np.ndarray, np.ndarray, float, float]:
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


def descended(X: np.ndarray, y: np.ndarray, sparsity: float, key: jax.Array, width: int, n_steps: int) -> np.ndarray:
    """Weights (2, d, width) to which L-BFGS takes a random network with weight decay: a local optimum, or near one.

    From there pattern generation goes on; it never ends above what descent alone would reach.
    """
    from scipy.optimize import minimize

    with jax.enable_x64(True):
        draw = np.asarray(jax.random.normal(jax.random.fold_in(key, 2**31), (width, X.shape[1] + 1)))
    draw = draw.copy()
    draw[:, :-1] /= np.sqrt(X.shape[1])
    split = width * X.shape[1]

    def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
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
        X: np.ndarray,
        y: np.ndarray,
        sparsity: float,
        key: jax.Array,
        *,
        start: np.ndarray | None = None,
        on_round: OnRound | None = None,
    ) -> NetworkSolution:
        """Train on rows X (n, d) and labels y (n,) from weights ``start`` (2, d, P), or as set.

        Iterations are in ``dtype``; J, the bounds and the weights are in float64. J never rises from round to round.
        ``on_round`` gets the round's number and its row of the history.
        """
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
            estimated = objective - min(model.estimate(violation), lower)
        u = np.einsum("de,sem->sdm", basis, u)
        network = recover_network(u)
        gap = objective - lower
        return NetworkSolution(u, patterns, network, objective, gap, estimated, violation, status, history)
