"""A primal-dual interior-point method for the cone-constrained program: few, dear steps to a certified optimum.

Every iterate is strictly feasible, so none needs repair. Knows nothing of gates: a point inside the cones is found
from the patterns alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Scalar

from coala.convex.linear import cholesky, cholesky_solve, matmul, pcg, weighted_grams
from coala.convex.papers.cones import columns, constrained, interior_directions
from coala.convex.program import Program, group_norms, in_double


class BarrierState(NamedTuple):
    """Weights (2, d, P) inside the cones, upper bounds (2, P) on their norms, and the multipliers of both.

    ``multipliers`` (2, n, P) belong to the cones, ``pull`` (2, d, P) with ||pull_i|| < sparsity to the norms.
    ``patterns`` are those with an interior, the others closed; ``overlap`` is F_d^T F_d of :class:`Barrier`.
    """

    weights: Float[Array, "2 d P"]
    multipliers: Float[Array, "2 n P"]
    pull: Float[Array, "2 d P"]
    mu: Scalar
    patterns: Bool[Array, "n P"]
    overlap: Float[Array, "..."]


@dataclass(frozen=True)
class Barrier:
    """Predictor-corrector steps (Mehrotra) along the central path of the cone-constrained program.

    With r = F u - y, the optimality conditions relaxed by mu are

        F^T r = pull + G^T L,   L_j (G u)_j = mu,   t_i pull_i = -sparsity u_i,   sparsity (t_i^2 - ||u_i||^2) = mu t_i

    with multipliers L > 0, G u > 0 and ||pull_i|| < sparsity: t_i smooths ||u_i||. Newton's equations have the matrix
    F^T F + blockdiag(B_v, B_w). v_i + w_i is eliminated pattern by pattern, which leaves one system of P d unknowns in
    v_i - w_i with F_d^T F_d, F_d = [D_1 X ... D_P X]. It is factored whole up to ``direct_width`` unknowns and by
    patterns above; conjugate gradients, preconditioned with that factor, remove what this or rounding leaves. A step
    costs about 4 n d^2 P + (P d)^3 / 3 flop; some 15 reach a relative gap of 1e-6. All in float64, whatever the
    program's type; but ``solve`` looks at gaps in that type, so pose a program in float64 for a gap below 1e-5.
    """

    direct_width: int = 4096
    max_cg_steps: int = 100

    def init(self, program: Program, start: Float[Array, "2 d P"] | None = None) -> BarrierState:
        """Enters the central path inside the cones; a ``start`` would have to be central too and is not used."""
        with jax.enable_x64(True):
            state: BarrierState = self._init(program)
            return state

    def step(self, program: Program, state: BarrierState) -> BarrierState:
        with jax.enable_x64(True):
            new: BarrierState = self._step(program, state)
            return new

    def solution(
        self, program: Program, state: BarrierState
    ) -> tuple[Float[np.ndarray, "2 d P"], Float[np.ndarray, "2 n P"]]:
        """The strictly feasible weights, or zero where that is better, and the multipliers of the cones."""
        with jax.enable_x64(True):
            value = _better_of_zero_and(program, state.weights)
        # NumPy arrays keep their 64 bits outside the context.
        return np.asarray(value), np.asarray(state.multipliers)

    @partial(jax.jit, static_argnums=0)
    def _init(self, program: Program) -> BarrierState:
        program = in_double(program)
        inside = interior_directions(program)
        program = replace(program, patterns=program.patterns & (group_norms(inside) > 0)[None])
        bound = constrained(program)[None]
        # The penalty starts at a quarter of the objective at zero; mu well above what would match it, for a start too
        # near the boundary makes short steps only.
        quarter = jnp.maximum(jnp.vdot(program.y, program.y) / 8, float(np.finfo(program.X.dtype).eps))
        price = 2 * program.sparsity * group_norms(inside).sum()
        weights = jnp.stack([inside, inside]) * (quarter / jnp.where(price > 0, price, 1.0))
        mu = 300 * quarter / (2 * (bound.sum(dtype=quarter.dtype) + bound.shape[-1]))
        multipliers = jnp.where(bound, mu / jnp.where(bound, program.cone(weights), 1.0), 0.0)
        pull = -program.sparsity * weights / _smooth(weights, mu, program.sparsity)[:, None, :]
        if self._direct(program):
            n = len(program.X)
            F = jnp.where(program.patterns[:, :, None], program.X[:, None, :], 0.0).reshape(n, -1)
            overlap = matmul(F.T, F)
        else:
            overlap = weighted_grams(program.X, program.patterns.astype(program.X.dtype))
        return BarrierState(weights, multipliers, pull, mu, program.patterns, overlap)

    def _direct(self, program: Program) -> bool:
        return program.X.shape[1] * program.patterns.shape[1] <= self.direct_width

    @partial(jax.jit, static_argnums=0)
    def _step(self, program: Program, state: BarrierState) -> BarrierState:
        program = replace(in_double(program), patterns=state.patterns)
        weights, multipliers, pull, mu = state.weights, state.multipliers, state.pull, state.mu
        bound = constrained(program)[None]
        slack = jnp.where(bound, program.cone(weights), 1.0)
        stiffness = multipliers / slack
        norms = _SmoothNorms(weights, _smooth(weights, mu, program.sparsity), pull, program.sparsity, mu)
        residual = program.predict_adjoint(program.predict(weights) - program.y)
        residual = residual - pull - program.cone_adjoint(multipliers)
        solve = self._newton_solver(program, state.overlap, norms, stiffness)

        def towards(goal: Scalar, second_order: Float[Array, "2 n P"]) -> _Direction:
            """Newton's direction towards mu = ``goal``, with the second-order term of the cones' products."""
            aim = jnp.where(bound, (goal - second_order) / slack - multipliers, 0.0)
            force = norms.force(goal)
            du = solve(force - residual + program.cone_adjoint(aim))
            slope = jnp.where(bound, program.cone(du), 0.0)
            return _Direction(du, slope, aim - stiffness * slope, force - norms.curve(du))

        def longest(direction: _Direction) -> Scalar:
            """The step at which a constraint or a multiplier reaches its limit."""
            linear = jnp.maximum(-direction.slack / slack, -direction.multipliers / jnp.where(bound, multipliers, 1.0))
            return 1 / linear.max(initial=float(np.finfo(mu.dtype).tiny))

        aim = towards(jnp.zeros_like(mu), jnp.zeros_like(slack))
        reach = jnp.minimum(longest(aim), 1.0)
        # Never to 0 at once, where a norm of 0 has no smoothing left.
        goal = mu * jnp.maximum((1 - reach) ** 3, 1e-4)
        # The second-order terms are those of a full step; a shorter one calls for less (Colombo & Gondzio, 2008).
        step = towards(goal, reach * aim.slack * aim.multipliers)
        length = jnp.minimum(0.995 * longest(step), 1.0)
        weights = weights + length * step.weights
        multipliers = multipliers + length * step.multipliers
        smooth = _smooth(weights, mu + length * (goal - mu), program.sparsity)
        # A pull that would come too near its limit, or pass it, is shortened to a tenth of the room its weights would
        # give it: shortening the step of all for the sake of a few norms takes several times the steps, and the pull
        # of the weights themselves has forgotten what the dual variables agreed on.
        room = program.sparsity * (1 - group_norms(weights) / smooth)
        moved = pull + length * step.pull
        pull = moved * jnp.minimum(1.0, (program.sparsity - 0.1 * room) / group_norms(moved))[:, None, :]
        # What the step has made of mu, the norms counted as they are smoothed where it aimed.
        pairing = program.sparsity * smooth + (pull * weights).sum(axis=1)
        total = jnp.where(bound, program.cone(weights) * multipliers, 0.0).sum() + pairing.sum()
        new = BarrierState(
            weights, multipliers, pull, total / (2 * bound.sum(dtype=total.dtype) + pairing.size), *state[4:]
        )
        # At the limit of the precision the factorisation fails: the state before it is the answer.
        sound = jnp.isfinite(weights).all() & jnp.isfinite(multipliers).all() & (new.mu > 0)
        sound &= (jnp.where(bound, program.cone(weights), 1.0) > 0).all()
        return BarrierState(*(jnp.where(sound, a, b) for a, b in zip(new, state, strict=True)))

    def _newton_solver(
        self, program: Program, overlap: Float[Array, "..."], norms: _SmoothNorms, stiffness: Float[Array, "2 n P"]
    ) -> Callable[[Array], Array]:
        """Solves (F^T F + norm cones + G^T diag(stiffness) G) u = right-hand side, both (2, d, P)."""
        _, n, P = stiffness.shape
        d = program.X.shape[1]
        grams = weighted_grams(program.X, jnp.moveaxis(stiffness, 1, 0).reshape(n, 2 * P))
        first, second = norms.matrices() + grams.reshape(2, P, d, d)
        both = cholesky(first + second)
        share = cholesky_solve(both, first)
        parallel = first - matmul(jnp.swapaxes(first, -1, -2), share)
        parallel = (parallel + jnp.swapaxes(parallel, -1, -2)) / 2
        if self._direct(program):
            blocks = jnp.zeros((P, d, P, d), parallel.dtype).at[jnp.arange(P), :, jnp.arange(P)].set(parallel)
            factor = cholesky(overlap + blocks.reshape(P * d, P * d))
        else:
            factor = cholesky(overlap + parallel)

        def precondition(r: Float[Array, "2 d P"]) -> Float[Array, "2 d P"]:
            r_first, r_sum = columns(r[0]), columns(r[0] + r[1])
            target = r_first - matmul(jnp.swapaxes(share, -1, -2), r_sum)
            difference = cholesky_solve(factor, target.reshape(*factor.shape[:-2], -1, 1)).reshape(P, d, 1)
            w = cholesky_solve(both, r_sum - matmul(first, difference))
            return jnp.stack([w + difference, w])[..., 0].swapaxes(-1, -2)

        def operator(u: Float[Array, "2 d P"]) -> Float[Array, "2 d P"]:
            image = program.predict_adjoint(program.predict(u)) + norms.curve(u)
            return image + program.cone_adjoint(stiffness * program.cone(u))

        return lambda r: pcg(operator, r, precondition, tolerance=1e-10, max_steps=self.max_cg_steps).value


@jax.jit
def _better_of_zero_and(program: Program, u: Float[Array, "2 d P"]) -> Float[Array, "2 d P"]:
    program = in_double(program)
    return jnp.where(program.objective(u) < jnp.vdot(program.y, program.y) / 2, u, 0.0)


class _Direction(NamedTuple):
    """Changes of the weights, of G u, of the multipliers and of the pulls."""

    weights: Float[Array, "2 d P"]
    slack: Float[Array, "2 n P"]
    multipliers: Float[Array, "2 n P"]
    pull: Float[Array, "2 d P"]


class _SmoothNorms(NamedTuple):
    """Newton's view of t(u) pull + sparsity u = 0, t(u) the smoothed norms (2, P), symmetrised (Andersen et al., 2000).

    The derivative of t is 2 sparsity u / (2 sparsity t - mu) in u and t / (2 sparsity t - mu) in mu.
    """

    u: Float[Array, "2 d P"]
    t: Float[Array, "2 P"]
    pull: Float[Array, "2 d P"]
    sparsity: Scalar
    mu: Scalar

    @property
    def _spread(self) -> Float[Array, "2 P"]:
        return 2 * self.sparsity * self.t - self.mu

    def force(self, goal: Scalar) -> Float[Array, "2 d P"]:
        """The change of pull when u stays and mu becomes ``goal``."""
        share = 1 + (goal - self.mu) / self._spread
        return -(self.sparsity / self.t)[:, None, :] * self.u - share[:, None, :] * self.pull

    def curve(self, du: Float[Array, "2 d P"]) -> Float[Array, "2 d P"]:
        """The fall of pull with du: positive semi-definite as long as ||pull|| <= sparsity."""
        share = self.sparsity / (self.t * self._spread)
        along, pulled = ((a * du).sum(axis=1) for a in (self.u, self.pull))
        straight = (self.sparsity / self.t)[:, None, :] * du
        return straight + (share * along)[:, None, :] * self.pull + (share * pulled)[:, None, :] * self.u

    def matrices(self) -> Float[Array, "2 P d d"]:
        """The matrices of :meth:`curve`, (2, P, d, d)."""
        u, pull = jnp.swapaxes(self.u, 1, 2), jnp.swapaxes(self.pull, 1, 2)
        outer = u[..., :, None] * pull[..., None, :]
        straight = (self.sparsity / self.t)[..., None, None]
        share = (self.sparsity / (self.t * self._spread))[..., None, None]
        identity = jnp.eye(u.shape[-1], dtype=u.dtype)[None, None]
        return straight * identity + share * (outer + jnp.swapaxes(outer, -1, -2))


def _smooth(u: Float[Array, "2 d P"], mu: Scalar, sparsity: Scalar) -> Float[Array, "2 P"]:
    """The t > ||u|| with sparsity (t^2 - ||u||^2) = mu t, (2, P): minimises sparsity t - mu log(t^2 - ||u||^2) / 2."""
    return (mu + jnp.sqrt(mu**2 + 4 * (sparsity * group_norms(u)) ** 2)) / (2 * sparsity)
