"""Solvers for the convex programs and the one loop that drives them.

A solver only initialises and steps; ``solve`` owns the loop, the stopping rule and the history. The measure of
optimality belongs to the program, so every solver is judged by the same certified gap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from coala.convex.linear import pcg
from coala.convex.program import Bounds, GroupProgram, group_norms, in_double
from coala.convex.prox import group_soft_threshold

P = TypeVar("P")
P_contra = TypeVar("P_contra", contravariant=True)
S = TypeVar("S")


class Status(Enum):
    """How a solve ended; a stalled one has reached the precision of its arithmetic above the tolerance."""

    CONVERGED = "converged"
    STALLED = "stalled"
    MAX_STEPS = "max_steps"


class Solver(Protocol[P_contra, S]):
    """What ``solve`` drives. States are pytrees; ``solution`` gives primal weights and dual multipliers (or None)."""

    def init(self, program: P_contra, start: jax.Array | None = None) -> S: ...
    def step(self, program: P_contra, state: S) -> S: ...
    def solution(self, program: P_contra, state: S) -> tuple[jax.Array, jax.Array | None]: ...


@dataclass(frozen=True)
class Solution:
    """Weights with what was proved of them: the optimal value lies in [objective - gap, objective]."""

    value: np.ndarray
    status: Status
    steps: int
    objective: float
    gap: float
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def relative_gap(self) -> float:
        """Gap over objective; 0 for an objective of 0."""
        return self.gap / self.objective if self.objective > 0 else 0.0


@jax.jit
def _bounds(program: Any, value: jax.Array, multipliers: jax.Array | None) -> Bounds:
    bounds: Bounds = program.bounds(value, multipliers)
    return bounds


def certify(program: Any, value: Any, multipliers: Any = None) -> tuple[float, float]:
    """(objective, lower bound) of a program at ``value``, computed in float64 whatever the program's own type."""
    with jax.enable_x64(True):
        objective, lower = _bounds(*in_double((program, value, multipliers)))
        return float(objective), float(lower)


def solve(
    program: P,
    solver: Solver[P, S],
    *,
    tolerance: float = 1e-4,
    max_steps: int = 100,
    start: jax.Array | None = None,
    exact: bool = True,
    on_step: Callable[[int, np.ndarray, dict[str, Any]], None] | None = None,
) -> Solution:
    """Step until the certified gap is at most ``tolerance`` times the objective.

    With ``exact`` the last word is a certificate in float64; without it, the program's own precision is trusted.
    ``on_step`` gets the step, the weights and that step's history row. Never raises for want of convergence: see
    ``Solution.status``.
    """
    state = solver.init(program, start)
    history: list[dict[str, Any]] = []
    status, lower, stale, best = Status.MAX_STEPS, -np.inf, 0, np.inf
    for step in range(max_steps + 1):
        value, multipliers = solver.solution(program, state)
        objective, dual = map(float, _bounds(program, value, multipliers))
        lower = max(lower, dual)
        row: dict[str, Any] = {"step": step, "objective": objective, "gap": objective - lower}
        history.append(row)
        if on_step is not None:
            on_step(step, np.asarray(value), row)
        if objective - lower <= tolerance * abs(objective):
            if not exact:
                status = Status.CONVERGED
                break
            objective, lower = certify(program, value, multipliers)
            if objective - lower <= tolerance * abs(objective):
                status = Status.CONVERGED
                break
        stale = stale + 1 if objective - lower >= best * 0.999 else 0
        best = min(best, objective - lower)
        if stale >= 10:
            status = Status.STALLED
            break
        if step < max_steps:
            state = solver.step(program, state)
    if exact and status is not Status.CONVERGED:
        objective, lower = certify(program, value, multipliers)
    return Solution(np.asarray(value), status, step, objective, objective - lower, history)


class NewtonState(NamedTuple):
    """Weights (d, P), and the inverse length of the last proximal step."""

    weights: jax.Array
    steepness: jax.Array


@dataclass(frozen=True)
class GatedNewton:
    """Newton's method on the groups that are not zero, for any :class:`~coala.convex.program.GroupProgram`.

    Each step first makes a proximal gradient step, which lets groups enter and leave and never raises the objective;
    then solves Newton's equations on the remaining groups, where the objective is smooth, by conjugate gradients:

        (F^T diag(curvature) F + blockdiag(levels_i (I - uu^T/||u||^2)/||u|| + ridges_i I)) p = -gradient.

    The line search along p is exact and costs no product with the data. A full step on which groups that would pass
    through zero stay there is tried as well, and the better of the two is kept.
    """

    max_cg_steps: int = 150
    forcing: float = 0.1

    @partial(jax.jit, static_argnums=0)
    def init(self, program: GroupProgram, start: jax.Array | None = None) -> NewtonState:
        weights = program.zeros() if start is None else start
        bend = program.diagonal(program.curvature(program.predict(weights)))
        return NewtonState(weights, 2 * bend.max(initial=0.0) + program.ridges.max(initial=0.0))

    def solution(self, program: GroupProgram, state: NewtonState) -> tuple[jax.Array, None]:
        return state.weights, None

    @partial(jax.jit, static_argnums=0)
    def step(self, program: GroupProgram, state: NewtonState) -> NewtonState:
        weights, steepness = _proximal_step(program, state)
        z = program.predict(weights)
        norms = group_norms(weights)
        alive = (norms > 0) | (program.levels == 0)
        inverse = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1.0), 0.0)
        unit = weights * inverse
        gradient = program.predict_adjoint(program.slope(z)) + program.levels * unit + program.ridges * weights
        gradient = jnp.where(alive, gradient, 0.0)
        bend = program.curvature(z)
        diagonal = program.diagonal(bend) + program.levels * inverse + program.ridges
        # A trace of damping keeps directions that no row sees from wandering in finite precision.
        damping = 10 * jnp.finfo(weights.dtype).eps * diagonal.max(initial=0.0)
        diagonal = diagonal + damping
        diagonal = jnp.where(diagonal > 0, diagonal, 1.0)

        def hessian(p: jax.Array) -> jax.Array:
            curved = program.predict_adjoint(bend * program.predict(p))
            around = p - unit * (unit * p).sum(axis=0)
            return jnp.where(alive, curved + program.levels * inverse * around + (program.ridges + damping) * p, 0.0)

        size = jnp.linalg.norm(gradient) / (jnp.linalg.norm(program.levels) + steepness * jnp.linalg.norm(weights))
        target = jnp.minimum(self.forcing, jnp.sqrt(jnp.where(jnp.isfinite(size), size, 1.0)))
        direction = pcg(
            hessian, -gradient, lambda r: r / diagonal, tolerance=target, max_steps=self.max_cg_steps
        ).value
        dz = program.predict(direction)
        straight = weights + _exact_step(program, weights, direction, z, dz) * direction
        full = weights + direction
        passes = ((full * weights).sum(axis=0) <= 0) & (program.levels > 0)
        stopped = jnp.where(passes, 0.0, full)
        trials = jnp.stack([weights, straight, stopped])
        values = jnp.stack([program.objective(weights), program.objective(straight), program.objective(stopped)])
        return NewtonState(trials[jnp.argmin(jnp.where(jnp.isnan(values), jnp.inf, values))], steepness)


def _proximal_step(program: GroupProgram, state: NewtonState) -> tuple[jax.Array, jax.Array]:
    """One proximal gradient step from ``state``, its length found by doubling ``steepness`` until it majorises."""
    weights = state.weights
    z = program.predict(weights)
    loss = program.loss(z) + jnp.sum(program.ridges * weights**2) / 2
    gradient = program.predict_adjoint(program.slope(z)) + program.ridges * weights
    rounding = 10 * jnp.finfo(weights.dtype).eps * jnp.abs(loss)

    def trial(steepness: jax.Array) -> jax.Array:
        return group_soft_threshold(weights - gradient / steepness, program.levels / steepness)

    def too_long(steepness: jax.Array) -> jax.Array:
        new = trial(steepness)
        change = new - weights
        model = loss + jnp.vdot(gradient, change) + steepness / 2 * jnp.vdot(change, change)
        value = program.loss(program.predict(new)) + jnp.sum(program.ridges * new**2) / 2
        return (value > model + rounding) & (steepness < 1e30)

    first = jnp.maximum(state.steepness / 2, jnp.finfo(weights.dtype).tiny ** 0.5)
    steepness = jax.lax.while_loop(too_long, lambda s: 2 * s, first)
    return trial(steepness), steepness


def _exact_step(
    program: GroupProgram, weights: jax.Array, direction: jax.Array, z: jax.Array, dz: jax.Array
) -> jax.Array:
    """The t >= 0 that minimises the objective along ``weights + t direction``: bisection on its derivative."""
    a, b, c = ((x * y).sum(axis=0) for x, y in ((weights, weights), (weights, direction), (direction, direction)))

    def derivative(t: jax.Array) -> jax.Array:
        norms = jnp.sqrt(jnp.maximum(a + 2 * t * b + t * t * c, 0.0))
        turning = jnp.where(norms > 0, (b + t * c) / jnp.where(norms > 0, norms, 1.0), jnp.sqrt(c))
        smooth = jnp.vdot(program.slope(z + t * dz), dz)
        return smooth + jnp.sum(program.levels * turning) + jnp.sum(program.ridges * (b + t * c))

    one = jnp.ones((), weights.dtype)
    high = jax.lax.while_loop(lambda t: (derivative(t) < 0) & (t < 64), lambda t: 2 * t, one)

    def halve(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = (low + high) / 2
        falling = derivative(middle) < 0
        return jnp.where(falling, middle, low), jnp.where(falling, high, middle)

    low, high = jax.lax.fori_loop(0, 30, halve, (0 * one, high))
    return (low + high) / 2
